"""Requests whose ingress is gone, or only seemed to be."""

from __future__ import annotations

import asyncio

from deployments.contracts import Sampling, Submission
from deployments.engine.orphans import GRACE_S, OrphanedRequests, Tabs
from tests.deployments.accounts import RecordedOutbox, account
from tests.deployments.ingress.virtual_time import in_virtual_time


def submission(request_id: str, resumed_tokens: int = 0) -> Submission:
    return Submission(
        1,
        [1, 2],
        Sampling(max_tokens=9),
        account(request_id, prompt_tokens=5),
        "Meter-1",
        resumed=resumed_tokens > 0,
        resumed_tokens=resumed_tokens,
    )


def requests(outbox: RecordedOutbox) -> list[str]:
    """That are settled."""
    return [each.account.request_id for _, each in outbox.settled]


def with_tokens(*requests: str) -> Tabs:
    tabs = Tabs()
    for request in requests:
        tabs.open(submission(request), 0).count(0, 3, 0)
    return tabs


@in_virtual_time
async def test_an_ingress_that_does_not_come_back_is_settled_for() -> None:
    outbox = RecordedOutbox()
    orphanage = OrphanedRequests(outbox)
    orphanage.take("i", with_tokens("a", "b"))
    await asyncio.sleep(GRACE_S - 0.1)
    assert outbox.settled == []
    assert outbox.notes.keys() == {"a", "b"}  # should this replica die meanwhile
    assert outbox.notes["a"].parts == {0: 3}
    await asyncio.sleep(0.2)
    assert [(meter, each.account.request_id) for meter, each in outbox.settled] == [("Meter-1", "a"), ("Meter-1", "b")]
    one = outbox.settled[0][1]
    assert (one.status, one.witness, one.prompt_tokens, one.completion_tokens, one.parts) == (
        *("disconnected", "engine", 5, 3),
        {0: 3},
    )


@in_virtual_time
async def test_an_ingress_that_comes_back_settles_itself() -> None:
    outbox = RecordedOutbox()
    orphanage = OrphanedRequests(outbox)
    orphanage.take("i", with_tokens("a"))
    orphanage.take("j", with_tokens("b"))
    await asyncio.sleep(GRACE_S / 2)
    orphanage.returned("i")
    assert outbox.notes.keys() == {"b"}
    await asyncio.sleep(60)
    assert requests(outbox) == ["b"]


@in_virtual_time
async def test_closing_waits_for_nobody() -> None:
    outbox = RecordedOutbox()
    orphanage = OrphanedRequests(outbox)
    orphanage.take("i", with_tokens("a"))
    orphanage.close()
    assert requests(outbox) == ["a"]
    await asyncio.sleep(60)
    assert requests(outbox) == ["a"]


def test_settled_requests_are_forgotten() -> None:
    tabs = with_tokens("a", "b")
    tabs.release(["a", "never heard of"])
    assert [each.account.request_id for _, each in tabs.settlements()] == ["b"]


def test_choices_are_counted_apart_and_from_where_earlier_replicas_left_them() -> None:
    tabs = Tabs()
    first = tabs.open(submission("a"), 0)
    second = tabs.open(submission("a", resumed_tokens=10), 3)
    assert first is second
    first.count(0, 2, 4)
    second.count(3, 1, 0)
    first.count(0, 2, 0)
    [(_, settlement)] = tabs.settlements()
    assert settlement.parts == {0: 4, 3: 11}
    assert (settlement.completion_tokens, settlement.cached_tokens, settlement.resumes) == (15, 4, 1)


def test_what_the_engine_refused_is_not_settled() -> None:
    tabs = with_tokens("a")
    tabs.open(submission("b"), 0)
    tabs.refuse(submission("b"), 0)
    tabs.open(submission("a"), 1)
    tabs.refuse(submission("a"), 1)
    [(_, settlement)] = tabs.settlements()
    assert settlement.parts == {0: 3}
