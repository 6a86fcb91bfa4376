"""Keys, limits and settlements together, on a real database; time passes only when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from deployments.contracts import (
    AdministrationCommand,
    AdmissionRefused,
    AdmissionRequest,
    Admitted,
    CreateKey,
    KeyChanges,
    KeyDraft,
    KeyRecord,
    Limits,
    RevokeKey,
    SetTeam,
    UpdateKey,
    UsageQuery,
    UsageRow,
)
from deployments.meter.admission.model_catalog import MeteredModel
from deployments.meter.errors import LedgerUnavailable
from deployments.meter.keys.keys import key_digest
from deployments.meter.ledger.ledger import Ledger
from deployments.meter.meter import Meter, steady_clock
from tests.deployments.meter.running_meter import Clock, answer_of, running_meter, settlement
from tests.deployments.meter.tiny_tokenizer import save_tiny_tokenizer

NOON = datetime(2024, 2, 28, 12, tzinfo=UTC).timestamp()
DAY_S = 86_400.0
PROMPT = [1, 2, 3, 4, 5, 6]
MAX_TOKENS = 4
RESERVED = len(PROMPT) + MAX_TOKENS

_numbers = count()


@pytest.fixture
def clock() -> Clock:
    return Clock(NOON)


@asynccontextmanager
async def opened(folder: Path, clock: Clock, **settings: Any) -> AsyncIterator[Meter]:
    """With two models: tokens of `tiny` cost 1 each and those that it generates 2, and `broken` has no tokenizer."""
    async with running_meter(folder, clock=clock, **settings) as meter:
        tiny = save_tiny_tokenizer(folder / "tiny")
        meter.set_models(
            [MeteredModel("tiny", tiny, 64, 1e6, 2e6), MeteredModel("broken", folder / "missing", 64, 1e6, 2e6)]
        )
        yield meter


@pytest.fixture
async def meter(tmp_path: Path, clock: Clock) -> AsyncIterator[Meter]:
    async with opened(tmp_path, clock) as meter:
        yield meter


async def administer(meter: Meter, command: AdministrationCommand) -> KeyRecord:
    answer = await meter.administer(command)
    assert answer.error is None
    return answer.keys[0]


async def make_key(meter: Meter, *, team: str | None = None, **limits: Any) -> KeyRecord:
    return await administer(meter, CreateKey(KeyDraft("key", team=team, limits=Limits(**limits))))


def ask(key: KeyRecord, clock: Clock, **changes: Any) -> AdmissionRequest:
    values: dict[str, Any] = {
        "model": "tiny",
        "prompts": [PROMPT],
        "max_tokens": MAX_TOKENS,
        "choices": 1,
        "ingress_id": "ingress-1",
    }
    return AdmissionRequest(f"cmpl-{next(_numbers)}", key.id, team=key.team, started_at=clock.now, **(values | changes))


async def admitted(meter: Meter, request: AdmissionRequest) -> Admitted:
    answer = await answer_of(meter, request)
    assert isinstance(answer, Admitted), answer
    return answer


async def refused(meter: Meter, request: AdmissionRequest) -> AdmissionRefused:
    answer = await answer_of(meter, request)
    assert isinstance(answer, AdmissionRefused), answer
    return answer


async def by_status(meter: Meter) -> dict[str | None, UsageRow]:
    return {row.status: row for row in await meter.usage(UsageQuery(since=0.0, by=("status",)))}


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_a_revoked_and_an_expired_key_admit_nothing(meter: Meter, clock: Clock) -> None:
    revoked = await make_key(meter)
    expiring = await administer(meter, CreateKey(KeyDraft("key", expires_at=NOON + 10.0)))
    for key in (revoked, expiring):
        await admitted(meter, ask(key, clock))
    await administer(meter, RevokeKey(revoked.id))
    clock.now += 10.0
    for key in (revoked, expiring):
        assert (await refused(meter, ask(key, clock))).code == "invalid_api_key"


async def test_a_key_for_an_alias_may_use_the_model(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as meter:
        meter.set_models([MeteredModel("tiny", save_tiny_tokenizer(tmp_path / "tiny"), 64, aliases=("A/b", "c"))])
        key = await administer(meter, CreateKey(KeyDraft("key", models=("c",))))
        await admitted(meter, ask(key, clock))
        key = await administer(meter, CreateKey(KeyDraft("key", models=("d",))))
        assert (await refused(meter, ask(key, clock))).code == "model_not_allowed"


async def test_a_key_may_use_its_models_only(meter: Meter, clock: Clock) -> None:
    key = await administer(meter, CreateKey(KeyDraft("key", models=("other",))))
    refusal = await refused(meter, ask(key, clock))
    assert (refusal.code, refusal.param) == ("model_not_allowed", "model")


async def test_the_admin_and_anonymous_callers_have_no_limits(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock, require_keys=False) as meter:
        for key_id in ("admin", "anonymous"):
            answer = await admitted(meter, AdmissionRequest("cmpl", key_id, "tiny", [PROMPT], MAX_TOKENS, 1))
            assert answer.rate_limits is None
        assert await meter.authenticate(key_digest("anything")) is not None


# --- limits ----------------------------------------------------------------------------------------------------------


async def test_what_is_admitted_tells_what_it_reserves_and_what_is_left(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter, requests_per_minute=5, tokens_per_minute=100)
    answer = await admitted(meter, ask(key, clock, prompts=[PROMPT, PROMPT], choices=3))
    assert answer.admitted_at == NOON
    assert answer.reserved_tokens == 2 * len(PROMPT) + 2 * 3 * MAX_TOKENS
    assert (answer.prompt_price, answer.completion_price) == (1e6, 2e6)
    assert answer.rate_limits is not None
    assert (answer.rate_limits.remaining_requests, answer.rate_limits.remaining_tokens) == (4, 64)


@pytest.mark.parametrize("limits", [{"requests_per_minute": 2}, {"tokens_per_minute": 2 * RESERVED}])
async def test_a_minute_slides_and_the_wait_is_exact(meter: Meter, clock: Clock, limits: dict[str, Any]) -> None:
    key = await make_key(meter, **limits)
    await admitted(meter, ask(key, clock))
    clock.now += 10.0
    await admitted(meter, ask(key, clock))
    clock.now += 5.0
    refusal = await refused(meter, ask(key, clock))
    assert (refusal.code, refusal.retry_after_s) == ("rate_limit_exceeded", 45.0)
    assert refusal.rate_limits is not None
    clock.now += 44.999
    await refused(meter, ask(key, clock))
    clock.now += 0.001
    await admitted(meter, ask(key, clock))


async def test_a_settlement_gives_back_what_was_not_used(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter, tokens_per_minute=2 * RESERVED - 3, concurrency=1)
    request = ask(key, clock)
    answer = await admitted(meter, request)
    refusal = await refused(meter, ask(key, clock))
    assert refusal.retry_after_s == 60.0
    await meter.settle([settlement(request, answer, completion_tokens=1)])
    await admitted(meter, ask(key, clock))


async def test_an_engines_settlement_ends_the_reservation_of_a_silent_ingress(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter, concurrency=1)
    request = ask(key, clock)
    answer = await admitted(meter, request)
    assert "requests at a time" in (await refused(meter, ask(key, clock))).message
    await meter.settle([settlement(request, answer, status="disconnected", witness="engine", parts={0: 4})])
    await meter.sweep()
    assert "requests at a time" in (await refused(meter, ask(key, clock))).message
    clock.now += 15.0
    await meter.sweep()
    await admitted(meter, ask(key, clock))


async def test_a_team_limits_all_its_keys_together_and_a_refusal_takes_nothing(meter: Meter, clock: Clock) -> None:
    await meter.administer(SetTeam("mill", Limits(requests_per_minute=1)))
    first, second = [await make_key(meter, team="mill", requests_per_minute=1) for _ in range(2)]
    await admitted(meter, ask(first, clock))
    assert "the team mill" in (await refused(meter, ask(second, clock))).message
    await meter.administer(SetTeam("mill", Limits(requests_per_minute=2)))
    await admitted(meter, ask(second, clock))


async def test_many_at_once_are_admitted_up_to_the_limit_exactly(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter, tokens_per_minute=7 * RESERVED, tokens_per_day=1000)
    answers = await asyncio.gather(*(answer_of(meter, ask(key, clock)) for _ in range(20)))
    assert sum(isinstance(answer, Admitted) for answer in answers) == 7


@pytest.mark.parametrize("limit", ["requests_per_minute", "concurrency"])
async def test_a_refusal_that_needs_no_prompt_does_not_tokenize(meter: Meter, clock: Clock, limit: str) -> None:
    limits: dict[str, Any] = {limit: 1}
    key = await make_key(meter, **limits)
    await admitted(meter, ask(key, clock))
    refusal = await refused(meter, ask(key, clock, model="broken", prompts=["the mill"]))  # has no tokenizer
    assert refusal.code == "rate_limit_exceeded"


async def test_the_wait_is_exact_even_if_tokens_last_longer_than_requests(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter, requests_per_minute=2, tokens_per_minute=100)
    await admitted(meter, ask(key, clock, prompts=[[7]], max_tokens=1))
    clock.now += 30.0
    await admitted(meter, ask(key, clock, prompts=[[7] * 50]))
    refusal = await refused(meter, ask(key, clock, prompts=["z" * 50]))
    assert refusal.retry_after_s == 60.0


async def test_changed_limits_hold_at_once_and_know_the_last_minute(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter)
    await admitted(meter, ask(key, clock))
    await administer(meter, UpdateKey(key.id, KeyChanges(limits={"requests_per_minute": 1})))
    clock.now += 59.0
    assert (await refused(meter, ask(key, clock))).retry_after_s == 1.0
    await administer(meter, UpdateKey(key.id, KeyChanges(limits={"requests_per_minute": None})))
    await admitted(meter, ask(key, clock))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 10), st.floats(0.0, 25.0), st.integers(0, 10), st.booleans()),
        max_size=25,
    )
)
async def test_whatever_happens_no_minute_holds_more_than_the_limits(
    meter: Meter, clock: Clock, requests: list[tuple[int, int, float, int, bool]]
) -> None:
    key = await make_key(meter, requests_per_minute=6, tokens_per_minute=60)
    counted: dict[str, tuple[float, int]] = {}
    running: list[tuple[AdmissionRequest, Admitted]] = []
    for prompt_tokens, max_tokens, pause_s, used, ends in requests:
        clock.now += pause_s
        request = ask(key, clock, prompts=[[7] * prompt_tokens], max_tokens=max_tokens)
        answer = await answer_of(meter, request)
        if isinstance(answer, AdmissionRefused):
            assert answer.retry_after_s is not None
            clock.now += answer.retry_after_s
            answer = await admitted(meter, request)
        counted[request.request_id] = (clock.now, prompt_tokens + max_tokens)
        running.append((request, answer))
        if ends:
            ended, of_ended = running.pop(0)
            tokens = min(used, ended.max_tokens)
            await meter.settle([settlement(ended, of_ended, completion_tokens=tokens)])
            counted[ended.request_id] = (counted[ended.request_id][0], len(of_ended.token_ids[0]) + tokens)
    for begin, _ in counted.values():
        within = [tokens for at, tokens in counted.values() if begin <= at < begin + 60.0]
        assert len(within) <= 6
        assert sum(within) <= 60
    clock.now += 60.0


# --- quotas ----------------------------------------------------------------------------------------------------------


async def test_a_quota_is_renewed_at_midnight(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter, tokens_per_day=RESERVED + 2)
    request = ask(key, clock)
    await meter.settle([settlement(request, await admitted(meter, request))])
    refusal = await refused(meter, ask(key, clock))
    assert (refusal.code, refusal.retry_after_s) == ("insufficient_quota", DAY_S / 2)
    clock.now += DAY_S / 2
    await admitted(meter, ask(key, clock))


async def test_money_counts_at_the_models_prices(meter: Meter, clock: Clock) -> None:
    worst = len(PROMPT) * 1.0 + MAX_TOKENS * 2.0
    key = await make_key(meter, money_per_month=2 * worst - 6.0)
    request = ask(key, clock)
    answer = await admitted(meter, request)
    assert "money per month" in (await refused(meter, ask(key, clock))).message
    await meter.settle([settlement(request, answer, completion_tokens=1)])
    await admitted(meter, ask(key, clock))


async def test_a_successor_knows_what_was_used_and_what_is_open(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as meter:
        key = await make_key(meter, tokens_per_day=3 * RESERVED, requests_per_minute=3, concurrency=2)
        done, running = ask(key, clock), ask(key, clock)
        await meter.settle([settlement(done, await admitted(meter, done))])
        answer = await admitted(meter, running)
    clock.now += 30.0
    async with opened(tmp_path, clock) as meter:
        assert meter.counters().open_reservations == 1
        await admitted(meter, ask(key, clock))
        refusals = (await refused(meter, ask(key, clock))).message
        assert "tokens per day" in refusals
        await administer(meter, UpdateKey(key.id, KeyChanges(limits={"tokens_per_day": None})))
        refusal = await refused(meter, ask(key, clock))
        assert ("requests per minute" in refusal.message, refusal.retry_after_s) == (True, 30.0)
        clock.now += 30.0
        assert "requests at a time" in (await refused(meter, ask(key, clock))).message
        await meter.settle([settlement(running, answer)])
        await admitted(meter, ask(key, clock))


async def test_a_successor_closes_what_was_recorded_and_not_journaled(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as meter:
        key = await make_key(meter, concurrency=1, tokens_per_day=2 * RESERVED)
        request = ask(key, clock)
        answer = await admitted(meter, request)
        journal = (tmp_path / "meter" / "reservations-0.journal").read_bytes()
        await meter.settle([settlement(request, answer)])
    (tmp_path / "meter" / "reservations-0.journal").write_bytes(journal)
    async with opened(tmp_path, clock) as meter:
        assert meter.counters().open_reservations == 0
        await admitted(meter, ask(key, clock))


async def test_a_settlement_that_was_not_expected_counts_in_the_quota(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter, tokens_per_day=2 * RESERVED)
    first, unseen = ask(key, clock), ask(key, clock)
    await meter.settle([settlement(first, await admitted(meter, first), completion_tokens=0)])
    await meter.settle([settlement(unseen, completion_tokens=4)])
    assert "used 16" in (await refused(meter, ask(key, clock))).message


async def test_a_corrected_settlement_counts_as_corrected(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter, tokens_per_day=2 * RESERVED)
    request = ask(key, clock)
    answer = await admitted(meter, request)
    await meter.settle([settlement(request, answer, witness="engine", status="disconnected", parts={0: 0})])
    await meter.settle([settlement(request, answer, completion_tokens=4)])
    await admitted(meter, ask(key, clock))
    assert "used 20" in (await refused(meter, ask(key, clock))).message


async def test_usage_is_never_loaded_while_it_is_recorded(meter: Meter, clock: Clock) -> None:
    """Else a row could count twice: once as loaded, and once as settled."""
    keys = [await make_key(meter, tokens_per_day=1000) for _ in range(20)]
    await meter.administer(SetTeam("mill", Limits(tokens_per_day=1000)))

    async def use(key: KeyRecord) -> None:
        for _ in range(5):
            request = ask(key, clock)
            await meter.settle([settlement(request, await admitted(meter, request), completion_tokens=4)])
            await meter.settle([settlement(ask(key, clock), completion_tokens=4)])  # makes it load again

    await asyncio.gather(*map(use, keys))
    for key in keys:
        request = ask(key, clock, prompts=[[7] * 50], max_tokens=14, choices=100)
        assert f"used {10 * RESERVED}," in (await refused(meter, request)).message


# --- what is lost, refused, or away ----------------------------------------------------------------------------------


async def test_a_request_whose_ingress_is_gone_is_lost_in_the_end(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter, concurrency=1, tokens_per_day=1000)
    request = ask(key, clock)
    await admitted(meter, request)
    for _ in range(3):
        clock.now += 20.0
        meter.renew("ingress-1")
        await meter.sweep()
    await refused(meter, ask(key, clock))
    with capture_logs() as logs:
        for _ in range(3):
            clock.now += 20.0
            await meter.sweep()
    assert [(each["event"], each["request"], each["reserved_tokens"]) for each in logs] == [
        ("reservation lost", request.request_id, RESERVED)
    ]
    await admitted(meter, ask(key, clock))
    assert meter.counters().lost_reservations == 1
    assert await by_status(meter) == {"lost": UsageRow(1, 0, 0, 0, 0.0, status="lost")}


async def test_an_ingress_that_comes_back_has_the_last_word(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter)
    request = ask(key, clock)
    answer = await admitted(meter, request)
    for _ in range(4):
        clock.now += 20.0
        await meter.sweep()
    await meter.settle([settlement(request, answer)])
    assert await by_status(meter) == {"finished": UsageRow(1, 6, 0, 4, 14.0, status="finished")}
    counted = {counter.status: (counter.requests, counter.cost) for counter in meter.counters().requests}
    assert counted == {"lost": (1, 0.0), "finished": (1, 14.0)}, "a counter never goes down"


@pytest.mark.parametrize("recorded", [True, False])
async def test_refused_requests_have_rows_only_where_asked(tmp_path: Path, clock: Clock, recorded: bool) -> None:
    async with opened(tmp_path, clock, record_refusals=recorded) as meter:
        key = await make_key(meter, requests_per_minute=1)
        for _ in range(3):
            await answer_of(meter, ask(key, clock))
    async with opened(tmp_path, clock) as meter:
        expected = {"refused": UsageRow(2, 0, 0, 0, 0.0, status="refused")} if recorded else {}
        assert await by_status(meter) == expected


async def test_while_the_database_is_away_requests_without_quotas_go_on(tmp_path: Path, clock: Clock) -> None:
    away = tmp_path / "not-mounted"
    async with opened(tmp_path, clock, database=away / "ledger.db") as meter:
        admin = AdmissionRequest("cmpl-admin", "admin", "tiny", [PROMPT], MAX_TOKENS, 1, started_at=NOON)
        await meter.settle([settlement(admin, await admitted(meter, admin))])
        assert (meter.counters().spooled, meter.counters().open_reservations) == (1, 0)
        unknown = await answer_of(meter, AdmissionRequest("cmpl-1", "key-1", "tiny", [PROMPT], MAX_TOKENS, 1))
        assert isinstance(unknown, AdmissionRefused)
        assert unknown.code == "unavailable"
        with pytest.raises(LedgerUnavailable):
            await meter.check_reachable()
        away.mkdir()
        async with asyncio.timeout(10):
            while meter.counters().spooled:  # noqa: ASYNC110  # the ledger looks for its database by itself
                await asyncio.sleep(0.01)
        key = await make_key(meter, tokens_per_day=RESERVED)
        await admitted(meter, ask(key, clock))


async def test_usage_that_cannot_be_told_admits_nothing(
    meter: Meter, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await make_key(meter, tokens_per_day=RESERVED)

    async def fails(*_: object, **__: object) -> None:
        raise LedgerUnavailable("no route to host")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "used_since", fails)
        refused = await answer_of(meter, ask(key, clock))
        assert isinstance(refused, AdmissionRefused)
        assert (refused.code, refused.message) == (
            "unavailable",
            "ledger unavailable: usage not known: no route to host",
        )
    await admitted(meter, ask(key, clock))


async def test_a_full_spool_admits_nothing(meter: Meter, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await make_key(meter)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "full", True)
        with pytest.raises(LedgerUnavailable, match="spool is full"):
            await answer_of(meter, ask(key, clock))
    await admitted(meter, ask(key, clock))


# --- counters --------------------------------------------------------------------------------------------------------


async def test_the_counters_follow_the_ledger(meter: Meter, clock: Clock) -> None:
    key = await make_key(meter, team="mill", requests_per_minute=2)
    for _ in range(2):
        request = ask(key, clock)
        row = settlement(request, await admitted(meter, request))
        await meter.settle([row])
        await meter.settle([row])
    await refused(meter, ask(key, clock))
    assert await meter.authenticate(key_digest("sk-wrong")) is None
    told = meter.counters()
    [counter] = told.requests
    assert (counter.model, counter.key_id, counter.team, counter.status) == ("tiny", key.id, "mill", "finished")
    assert (counter.requests, counter.prompt_tokens, counter.completion_tokens, counter.cost) == (2, 12, 8, 28.0)
    assert (told.admissions.count, told.commits.count, told.wrong_keys) == (2, 4, 1)
    assert told.refusals == {"rate_limit_exceeded": 1}
    assert told.admissions.seconds > 0
    assert told.commits.seconds > 0


def test_the_clock_is_that_of_the_world_and_never_goes_back() -> None:
    clock = steady_clock()
    times = [clock() for _ in range(1000)]
    assert times == sorted(times)
    assert abs(times[-1] - datetime.now(UTC).timestamp()) < 1.0
