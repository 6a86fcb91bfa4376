"""MeterClient over a meter in memory: keys, admissions while the meter is away, and settlements that are never lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest

from deployments.contracts import AdmissionRefused, AdmissionRequest, Admitted, KeyInfo, RateLimits, Settlement
from deployments.ingress import meter_client
from deployments.ingress.errors import (
    ApiError,
    InsufficientQuota,
    InvalidApiKey,
    InvalidRequest,
    ModelNotAllowed,
    ModelNotFound,
    RateLimitExceeded,
    ServiceUnavailable,
)
from deployments.ingress.meter_client import MeterClient
from deployments.meter.remote.meter_transport import MeterUnreachable
from tests.deployments import accounts
from tests.deployments.ingress.memory_gateway import meter_client_of
from tests.deployments.ingress.memory_meter import USER_KEY, MemoryMeter
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet


@asynccontextmanager
async def started(meter: MemoryMeter) -> AsyncIterator[MeterClient]:
    with TemporaryDirectory() as folder:
        client = meter_client_of(meter, Path(folder))
        await client.start()
        try:
            yield client
        finally:
            meter.error = None
            meter.answering.set()
            await client.close()


def request(number: int = 0) -> AdmissionRequest:
    return AdmissionRequest(f"cmpl-{number}", "key", "m", ["hello"], max_tokens=4, choices=1)


def settlement(number: int) -> Settlement:
    return accounts.settlement(f"cmpl-{number}", number)


def now() -> float:
    return asyncio.get_running_loop().time()


# --- keys ----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_key_is_looked_up_once_in_two_seconds() -> None:
    meter = MemoryMeter()
    async with started(meter) as client:
        for _ in range(3):
            assert await client.authenticate(USER_KEY) == KeyInfo("key-user", "user", admin=False)
        await asyncio.sleep(1.9)
        await client.authenticate(USER_KEY)
        assert meter.calls == ["authenticate"]
        await asyncio.sleep(0.2)
        await client.authenticate(USER_KEY)
        assert meter.calls == ["authenticate"] * 2


@in_virtual_time
async def test_a_key_that_the_meter_revoked_is_refused_within_two_seconds() -> None:
    meter = MemoryMeter()
    async with started(meter) as client:
        await client.authenticate(USER_KEY)
        meter.revoke(USER_KEY)
        await asyncio.sleep(2.0)
        with pytest.raises(InvalidApiKey):
            await client.authenticate(USER_KEY)


@in_virtual_time
async def test_an_unknown_key_is_refused_and_works_as_soon_as_it_is_granted() -> None:
    meter = MemoryMeter()
    async with started(meter) as client:
        with pytest.raises(InvalidApiKey) as refused:
            await client.authenticate("sk-new")
        assert refused.value.status == 401
        assert "sk-new" not in refused.value.message
        meter.grant("sk-new", KeyInfo("key-new", "new", admin=False))
        assert (await client.authenticate("sk-new")).key_id == "key-new"


@in_virtual_time
async def test_the_cache_of_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter_client, "_KEY_CACHE_SIZE", 2)
    meter = MemoryMeter()
    for name in "abc":
        meter.grant(name, KeyInfo(name, name, admin=False))
    async with started(meter) as client:
        for name in "abc":
            await client.authenticate(name)
        meter.calls.clear()
        for name in "cb":
            await client.authenticate(name)
        assert meter.calls == []
        await client.authenticate("a")
        assert meter.calls == ["authenticate"]


# --- admissions ----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_admission_gives_the_token_ids() -> None:
    meter = MemoryMeter()
    meter.answer = lambda _request: Admitted([[1, 2, 3]])
    async with started(meter) as client:
        assert await client.admit(request()) == Admitted([[1, 2, 3]])
        assert meter.admissions == [msgspec.structs.replace(request(), ingress_id="i")]


@in_virtual_time
async def test_an_admission_waits_for_the_meter_to_return() -> None:
    meter = MemoryMeter()
    meter.answer = lambda _request: Admitted([[1]])
    meter.error = MeterUnreachable("gone")
    async with started(meter) as client:
        admitting = asyncio.create_task(client.admit(request()))
        await asyncio.sleep(8.0)
        assert not admitting.done()
        meter.error = None
        assert await admitting == Admitted([[1]])
        assert now() < 9.1
        assert len(meter.calls) < 20
        assert {admission.request_id for admission in meter.admissions} == {"cmpl-0"}


@in_virtual_time
async def test_an_admission_that_cannot_be_decided_is_asked_for_again_and_holds_up_no_other() -> None:
    meter = MemoryMeter()
    undecided = 5

    def decide(asked: AdmissionRequest) -> Admitted | AdmissionRefused:
        nonlocal undecided
        if asked.request_id == "cmpl-1" and undecided:
            undecided -= 1
            return AdmissionRefused("unavailable", "secret")
        return Admitted([[1]])

    meter.answer = decide
    async with started(meter) as client:
        waiting = asyncio.create_task(client.admit(request(1)))
        assert await client.admit(request(2)) == Admitted([[1]])
        assert not waiting.done()
        assert await waiting == Admitted([[1]])
        undecided = 1000
        with pytest.raises(ServiceUnavailable) as refused:
            await client.admit(request(1))
        assert "secret" not in refused.value.message


@in_virtual_time
async def test_an_admission_that_takes_long_holds_up_no_other() -> None:
    meter = MemoryMeter()
    meter.answer = lambda asked: Admitted([[int(asked.request_id.removeprefix("cmpl-"))]])
    meter.slow["cmpl-0"] = decided = asyncio.Event()
    async with started(meter) as client:
        slow, beside = (asyncio.create_task(client.admit(request(number))) for number in range(2))
        assert await beside == Admitted([[1]])
        assert await client.admit(request(2)) == Admitted([[2]])
        assert now() < 0.1
        assert not slow.done()
        decided.set()
        assert await slow == Admitted([[0]])


@in_virtual_time
async def test_an_admission_that_is_never_decided_ends_by_its_own_limit() -> None:
    meter = MemoryMeter()
    meter.answer = lambda _request: Admitted([[1]])
    meter.slow["cmpl-0"] = asyncio.Event()
    async with started(meter) as client:
        slow = asyncio.create_task(client.admit(request(0)))
        for number in range(1, 12):
            await client.admit(request(number))
            await asyncio.sleep(1.0)
        with pytest.raises(ServiceUnavailable):
            await slow
        assert now() == pytest.approx(11.0, abs=0.1)


@pytest.mark.parametrize("hangs", [False, True])
def test_an_admission_is_refused_when_the_meter_stays_away(hangs: bool) -> None:
    @in_virtual_time
    async def scenario() -> None:
        meter = MemoryMeter()
        async with started(meter) as client:
            if hangs:
                meter.answering.clear()
            else:
                meter.error = MeterUnreachable("gone")
            with pytest.raises(ServiceUnavailable) as refused:
                await client.admit(request())
            assert 9.0 <= now() <= 10.0
            assert refused.value.headers() == {"retry-after": "5"}
            with pytest.raises(ServiceUnavailable):
                await client.authenticate(USER_KEY)
            assert now() <= 20.0

    scenario()


@pytest.mark.parametrize(
    ("refusal", "kind", "status", "param", "code"),
    [
        (AdmissionRefused("model_not_found", "no", "model"), ModelNotFound, 404, "model", "model_not_found"),
        (
            AdmissionRefused("context_length_exceeded", "no", "prompt"),
            InvalidRequest,
            400,
            "prompt",
            "context_length_exceeded",
        ),
        (AdmissionRefused("empty_prompt", "no", "prompt"), InvalidRequest, 400, "prompt", "empty_prompt"),
        (AdmissionRefused("invalid_api_key", "no"), InvalidApiKey, 401, None, "invalid_api_key"),
        (AdmissionRefused("model_not_allowed", "no"), ModelNotAllowed, 403, "model", "model_not_allowed"),
        (AdmissionRefused("rate_limit_exceeded", "no"), RateLimitExceeded, 429, None, "rate_limit_exceeded"),
        (AdmissionRefused("insufficient_quota", "no"), InsufficientQuota, 429, None, "insufficient_quota"),
        (
            AdmissionRefused("token_out_of_vocabulary", "no", "prompt"),
            InvalidRequest,
            400,
            "prompt",
            "token_out_of_vocabulary",
        ),
    ],
    ids=lambda value: value.code if isinstance(value, AdmissionRefused) else "",
)
def test_a_refusal_is_raised_as_what_the_client_sees(
    refusal: AdmissionRefused, kind: type[ApiError], status: int, param: str | None, code: str
) -> None:
    @in_virtual_time
    async def scenario() -> None:
        meter = MemoryMeter()
        meter.answer = lambda _request: refusal
        async with started(meter) as client:
            with pytest.raises(kind) as refused:
                await client.admit(request())
        error = refused.value
        assert (error.status, error.message, error.param, error.code) == (status, "no", param, code)

    scenario()


@in_virtual_time
async def test_a_limited_caller_is_told_when_to_come_back_and_what_is_left() -> None:
    meter = MemoryMeter()
    limits = RateLimits(limit_tokens=100, remaining_tokens=7, reset_tokens_s=61.5)
    meter.answer = lambda _request: AdmissionRefused("rate_limit_exceeded", "no", None, 12.3, limits)
    async with started(meter) as client:
        with pytest.raises(RateLimitExceeded) as refused:
            await client.admit(request())
    assert refused.value.headers() == {
        "retry-after": "13",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "7",
        "x-ratelimit-reset-tokens": "1m1.5s",
    }


@in_virtual_time
async def test_a_caller_whose_request_never_fits_is_told_not_to_retry() -> None:
    meter = MemoryMeter()
    meter.answer = lambda _request: AdmissionRefused("rate_limit_exceeded", "no")
    async with started(meter) as client:
        with pytest.raises(RateLimitExceeded) as refused:
            await client.admit(request())
    assert refused.value.headers() == {"x-should-retry": "false"}


# --- settlements ---------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_settlement_is_sent_at_once_and_once() -> None:
    meter = MemoryMeter()
    async with started(meter) as client:
        client.settle(settlement(1))
        await quiet()
        client.settle(settlement(2))
        await asyncio.sleep(100)
        assert meter.batches == [[settlement(1)], [settlement(2)]]


@in_virtual_time
async def test_what_comes_while_a_batch_is_under_way_makes_the_next_in_order() -> None:
    meter = MemoryMeter()
    meter.answering.clear()
    async with started(meter) as client:
        client.settle(settlement(0))
        await quiet()
        for number in range(1, 4):
            client.settle(settlement(number))
        meter.answering.set()
        await quiet()
        assert meter.batches == [[settlement(0)], [settlement(number) for number in range(1, 4)]]


@in_virtual_time
async def test_batches_are_bounded() -> None:
    meter = MemoryMeter()
    async with started(meter) as client:
        for number in range(2500):
            client.settle(settlement(number))
        await quiet()
        assert [len(batch) for batch in meter.batches] == [1000, 1000, 500]
        assert meter.settlements == [settlement(number) for number in range(2500)]


@pytest.mark.parametrize("error", [MeterUnreachable("gone"), TimeoutError(), ValueError("a bug"), KeyError("x")])
def test_a_settlement_is_sent_until_it_is_acknowledged_whatever_the_failure(error: Exception) -> None:
    @in_virtual_time
    async def scenario() -> None:
        meter = MemoryMeter()
        meter.error = error
        async with started(meter) as client:
            client.settle(settlement(1))
            await asyncio.sleep(60)
            client.settle(settlement(2))
            await asyncio.sleep(60)
            tries = len(meter.batches)
            assert 100 < tries < 130  # once a second
            meter.error = None
            await asyncio.sleep(1.1)
            assert meter.batches[tries:] == [[settlement(1), settlement(2)]]
            client.settle(settlement(3))
            await quiet()
            assert meter.batches[tries + 1 :] == [[settlement(3)]]

    scenario()


@in_virtual_time
async def test_a_settlement_without_an_answer_is_sent_again() -> None:
    meter = MemoryMeter()
    meter.answering.clear()
    async with started(meter) as client:
        client.settle(settlement(1))
        await asyncio.sleep(10.2)
        assert meter.batches == [[settlement(1)]] * 2


@in_virtual_time
async def test_a_full_outbox_is_told_until_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter_client, "OUTBOX_SIZE", 2)
    meter = MemoryMeter()
    async with started(meter) as client:
        meter.error = MeterUnreachable("gone")
        client.settle(settlement(1))
        assert not client.full
        client.settle(settlement(2))
        assert client.full
        client.settle(settlement(3))  # what was admitted before is recorded nevertheless
        meter.error = None
        await asyncio.sleep(2)
        assert not client.full
        assert meter.batches[-1] == [settlement(1), settlement(2), settlement(3)]


@in_virtual_time
async def test_an_ingress_tells_its_meter_every_few_seconds_that_it_lives() -> None:
    meter = MemoryMeter()
    async with started(meter):
        await asyncio.sleep(60)
        assert 11 <= len(meter.renewed) <= 14
        assert set(meter.renewed) == {"i"}


@in_virtual_time
async def test_each_owner_has_a_meter_of_its_own(tmp_path: Path) -> None:
    meters = [MemoryMeter() for _ in range(3)]
    for meter in meters:
        meter.answer = lambda _request: Admitted([[1]])
    client = MeterClient(meters, ingress_id="i", outbox_folder=tmp_path, admission_timeout_s=10.0)
    await client.start()
    for number in range(60):
        key_id, team = f"key-{number}", f"team-{number % 5}" if number % 2 else None
        asked = AdmissionRequest(f"cmpl-{number}", key_id, "m", ["hello"], max_tokens=4, choices=1, team=team)
        await client.admit(asked)
        client.settle(accounts.settlement("", account=accounts.account(f"cmpl-{number}", key_id=key_id, team=team)))
    await quiet()
    for meter in meters:
        admitted = {admission.request_id for admission in meter.admissions}
        assert admitted == {settled.account.request_id for settled in meter.settlements}
        assert 10 < len(admitted) < 35
        others = {each.team for other in meters if other is not meter for each in other.admissions}
        assert others.isdisjoint({admission.team for admission in meter.admissions} - {None})
    await client.close()


@in_virtual_time
async def test_close_waits_for_the_outbox_to_empty() -> None:
    meter = MemoryMeter()
    meter.answering.clear()
    async with started(meter) as client:
        for number in range(1500):
            client.settle(settlement(number))
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(5)
        assert not closing.done()
        meter.answering.set()
        await closing
        assert len(meter.settlements) == 1500
        assert now() < 5.1


@in_virtual_time
async def test_close_gives_up_after_a_bounded_time(tmp_path: Path) -> None:
    meter = MemoryMeter()
    meter.error = MeterUnreachable("gone")
    client = meter_client_of(meter, tmp_path)
    await client.start()
    client.settle(settlement(1))
    await client.close()
    assert now() == pytest.approx(10.0, abs=0.01)


@in_virtual_time
async def test_close_is_safe_twice_and_before_start(tmp_path: Path) -> None:
    await meter_client_of(MemoryMeter(), tmp_path).close()
    client = meter_client_of(MemoryMeter(), tmp_path)
    await client.start()
    await client.close()
    await client.close()
    assert now() == 0.0


@in_virtual_time
async def test_ping_does_not_wait_for_long() -> None:
    meter = MemoryMeter()
    meter.answering.clear()
    async with started(meter) as client:
        with pytest.raises(TimeoutError):
            await client.ping()
        assert now() == pytest.approx(2.0)
