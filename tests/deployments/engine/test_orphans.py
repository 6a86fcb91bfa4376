"""Requests whose ingress is gone, or only seemed to be."""

from __future__ import annotations

import asyncio

from deployments.contracts import Sampling, Submission
from deployments.engine.orphans import GRACE_S, OrphanedRequests, RequestUsages
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


def with_tokens(*requests: str) -> RequestUsages:
    usages = RequestUsages()
    for request in requests:
        usages.open(submission(request), 0).count(0, 3, 0)
    return usages


@in_virtual_time
async def test_an_ingress_that_does_not_come_back_is_settled_for() -> None:
    outbox = RecordedOutbox()
    orphans = OrphanedRequests(outbox)
    orphans.take("i", with_tokens("a", "b"))
    await asyncio.sleep(GRACE_S - 0.1)
    assert outbox.settled == []
    assert outbox.checkpoints.keys() == {"a", "b"}  # should this replica die meanwhile
    assert outbox.checkpoints["a"].parts == {0: 3}
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
    orphans = OrphanedRequests(outbox)
    orphans.take("i", with_tokens("a"))
    orphans.take("j", with_tokens("b"))
    await asyncio.sleep(GRACE_S / 2)
    orphans.returned("i")
    assert outbox.checkpoints.keys() == {"b"}
    await asyncio.sleep(60)
    assert requests(outbox) == ["b"]


@in_virtual_time
async def test_closing_waits_for_nobody() -> None:
    outbox = RecordedOutbox()
    orphans = OrphanedRequests(outbox)
    orphans.take("i", with_tokens("a"))
    orphans.close()
    assert requests(outbox) == ["a"]
    await asyncio.sleep(60)
    assert requests(outbox) == ["a"]


def test_settled_requests_are_forgotten() -> None:
    usages = with_tokens("a", "b")
    usages.release(["a", "never heard of"])
    assert [each.account.request_id for _, each in usages.settlements()] == ["b"]


def test_choices_are_counted_apart_and_from_where_earlier_replicas_left_them() -> None:
    usages = RequestUsages()
    first = usages.open(submission("a"), 0)
    second = usages.open(submission("a", resumed_tokens=10), 3)
    assert first is second
    first.count(0, 2, 4)
    second.count(3, 1, 0)
    first.count(0, 2, 0)
    [(_, settlement)] = usages.settlements()
    assert settlement.parts == {0: 4, 3: 11}
    assert (settlement.completion_tokens, settlement.cached_tokens, settlement.resumes) == (15, 4, 1)


def test_what_the_engine_refused_is_not_settled() -> None:
    usages = with_tokens("a")
    usages.open(submission("b"), 0)
    usages.refuse(submission("b"), 0)
    usages.open(submission("a"), 1)
    usages.refuse(submission("a"), 1)
    [(_, settlement)] = usages.settlements()
    assert settlement.parts == {0: 3}
