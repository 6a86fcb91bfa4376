"""MeterClient over a meter in memory: keys, admissions while the meter is away, and settlements that are never lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deployments.contracts import AdmissionRefused, AdmissionRequest, Admitted, KeyInfo, Settlement
from deployments.ingress import meter_client
from deployments.ingress.errors import ApiError, InvalidApiKey, InvalidRequest, ModelNotFound, ServiceUnavailable
from deployments.ingress.meter_client import MeterClient, MeterUnreachable
from tests.deployments.ingress.memory_meter import USER_KEY, MemoryMeter
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet


@asynccontextmanager
async def started(meter: MemoryMeter) -> AsyncIterator[MeterClient]:
    client = MeterClient(meter, admission_timeout_s=10.0)
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
    return Settlement(
        request_id=f"cmpl-{number}",
        key_id="key",
        model="m",
        status="finished",
        prompt_tokens=1,
        cached_tokens=0,
        completion_tokens=number,
        choices=1,
        resumes=0,
        started_at=0.0,
        first_token_s=None,
        total_s=1.0,
    )


def now() -> float:
    return asyncio.get_running_loop().time()


# --- keys ----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_key_is_looked_up_once_in_five_seconds() -> None:
    meter = MemoryMeter()
    async with started(meter) as client:
        for _ in range(3):
            assert await client.authenticate(USER_KEY) == KeyInfo("key-user", "user", admin=False)
        await asyncio.sleep(4.9)
        await client.authenticate(USER_KEY)
        assert meter.calls == ["authenticate"]
        await asyncio.sleep(0.2)
        await client.authenticate(USER_KEY)
        assert meter.calls == ["authenticate"] * 2


@in_virtual_time
async def test_a_revoked_key_is_refused_within_five_seconds() -> None:
    meter = MemoryMeter()
    async with started(meter) as client:
        await client.authenticate(USER_KEY)
        meter.revoke(USER_KEY)
        await asyncio.sleep(5.0)
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
        assert meter.admissions == [request()]


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
    refusal: AdmissionRefused, kind: type[ApiError], status: int, param: str, code: str
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
async def test_a_full_outbox_refuses_admissions_until_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter_client, "_OUTBOX_SIZE", 2)
    meter = MemoryMeter()
    meter.answer = lambda _request: Admitted([[1]])
    async with started(meter) as client:
        meter.error = MeterUnreachable("gone")
        client.settle(settlement(1))
        client.settle(settlement(2))
        with pytest.raises(ServiceUnavailable) as refused:
            await client.admit(request())
        assert refused.value.retry_after_s == 5.0
        assert meter.admissions == []
        client.settle(settlement(3))  # what was admitted before is recorded nevertheless
        meter.error = None
        await asyncio.sleep(2)
        assert await client.admit(request()) == Admitted([[1]])
        assert meter.batches[-1] == [settlement(1), settlement(2), settlement(3)]


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
async def test_close_gives_up_after_a_bounded_time() -> None:
    meter = MemoryMeter()
    meter.error = MeterUnreachable("gone")
    client = MeterClient(meter, admission_timeout_s=10.0)
    await client.start()
    client.settle(settlement(1))
    await client.close()
    assert now() == pytest.approx(10.0, abs=0.01)


@in_virtual_time
async def test_close_is_safe_twice_and_before_start() -> None:
    client = MeterClient(MemoryMeter(), admission_timeout_s=10.0)
    await client.close()
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
