"""What a request used is known to the meter, to this process's disk, or to the engines, at every moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

from deployments.contracts import (
    AdmissionRefused,
    AdmissionRequest,
    Admitted,
    KeyInfo,
    RateLimits,
    Settlement,
)
from deployments.engine.orphans import GRACE_S
from deployments.engine.step_outbox import HEARTBEAT_S
from deployments.meter.remote.meter_transport import MeterUnreachable
from deployments.settlement.outbox import SettlementOutbox
from tests.deployments.ingress.memory_gateway import Gateway, gateway
from tests.deployments.ingress.memory_meter import USER_KEY
from tests.deployments.ingress.memory_replicas import SETTINGS
from tests.deployments.ingress.virtual_time import in_virtual_time

STEP_S = SETTINGS.step_s


async def left_on_disk(gate: Gateway) -> list[Settlement]:
    """What another process finds once this one is dead."""
    found: list[Settlement] = []

    async def keep(_meter: str, settlements: list[Settlement]) -> None:
        found.extend(settlements)

    [outbox] = (gate.folder / "outbox").glob("*.outbox")
    copy = gate.folder / "of-the-dead"
    copy.mkdir()
    (copy / outbox.name).write_bytes(outbox.read_bytes())
    heir = SettlementOutbox(copy, "heir", keep)
    await heir.recover()
    await heir.close()
    return found


# --- the ingress as the witness --------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_stream_is_settled_on_disk_when_its_client_sees_the_end(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        exchange = gate.request(stream=True, max_tokens=20)
        await exchange.until(lambda: exchange.body != b"")
        gate.meter.error = MeterUnreachable("gone")
        await exchange.until(lambda: b"[DONE]" in exchange.body)
        [settled] = await left_on_disk(gate)
        assert (settled.status, settled.completion_tokens, settled.witness) == ("finished", 20, "ingress")
        gate.meter.error = None
        await exchange.task


@in_virtual_time
async def test_a_whole_answer_is_settled_on_disk_when_its_client_sees_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        exchange = gate.request(max_tokens=20)
        await asyncio.sleep(10 * STEP_S)
        gate.meter.error = MeterUnreachable("gone")
        await exchange.until(lambda: exchange.complete)
        [settled] = await left_on_disk(gate)
        assert (settled.status, settled.completion_tokens) == ("finished", 20)
        gate.meter.error = None
        await exchange.task


@in_virtual_time
async def test_what_is_recorded_of_a_request(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        gate.meter.grant(USER_KEY, KeyInfo("key-1", "user", admin=False, team="red"))
        tokenized = gate.meter.answer

        def priced(request: AdmissionRequest) -> Admitted | AdmissionRefused:
            admitted = tokenized(request)
            assert isinstance(admitted, Admitted)
            return Admitted(admitted.token_ids, 123.0, 77, 0.5, 1.5)

        gate.meter.answer = priced
        await gate.client.post(
            "/openai/v1/completions",
            json={"model": "m", "prompt": "hello", "max_tokens": 8},
            headers={"x-request-id": "mine-1"},
        )
        account = (settled := await gate.settlement()).account
        assert (account.key_id, account.team, account.model, account.dialect) == ("key-1", "red", "m", "D1")
        assert (account.caller_request_id, account.admitted_at, account.reserved_tokens) == ("mine-1", 123.0, 77)
        assert (account.prompt_price, account.completion_price, account.prompt_tokens) == (0.5, 1.5, 5)
        assert settled.queue_s is not None
        assert settled.first_token_s is not None
        assert 0 <= settled.queue_s <= settled.first_token_s <= settled.total_s


# --- the engines as witnesses ----------------------------------------------------------------------------------------


@in_virtual_time
async def test_engines_forget_a_request_once_it_is_recorded(tmp_path: Path) -> None:
    async with gateway(tmp_path, replicas=2) as gate:
        gate.meter.error = None
        answer = await gate.complete(n=2)
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert [replica.released for replica in gate.replicas.values()] == [[answer.json()["id"]]] * 2


@in_virtual_time
async def test_engines_remember_a_request_while_no_meter_has_recorded_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        exchange = gate.request(stream=True, max_tokens=20)
        await exchange.until(lambda: exchange.body != b"")
        gate.meter.error = MeterUnreachable("gone")
        await exchange.task
        await asyncio.sleep(5 * HEARTBEAT_S)
        assert gate.replicas["r0"].released == []
        gate.meter.error = None
        await asyncio.sleep(5 * HEARTBEAT_S)
        assert len(gate.replicas["r0"].released) == 1


@in_virtual_time
async def test_engines_settle_what_a_dead_ingress_had_with_them(tmp_path: Path) -> None:
    """Each replica knows its own choices, the finished ones included."""
    async with gateway(tmp_path, replicas=2) as gate:
        gate.meter.error = None
        exchange = gate.request(stream=True, n=4, max_tokens=500, stop=["never"])
        await exchange.until(lambda: len(exchange.body) > 10_000)
        received = len(exchange.events)
        await gate.catalog.close()  # its streams end, as they do with its process
        await asyncio.sleep(GRACE_S + 0.1)
        orphans = [orphan for replica in gate.replicas.values() for orphan in replica.outbox.settled]
        assert [meter for meter, _ in orphans] == ["Meter", "Meter"]
        parts = {choice: tokens for _, settled in orphans for choice, tokens in (settled.parts or {}).items()}
        assert parts.keys() == {0, 1, 2, 3}
        assert received <= sum(parts.values()) < 2000
        assert {settled.account.request_id for _, settled in orphans} == {gate.meter.admissions[0].request_id}
        assert {settled.prompt_tokens for _, settled in orphans} == {5}
        exchange.hang_up()
        await exchange.task


@in_virtual_time
async def test_a_replica_that_took_over_counts_what_the_lost_one_had_made(tmp_path: Path) -> None:
    async with gateway(tmp_path, replicas=2) as gate:
        exchange = gate.request(stream=True, max_tokens=500)
        await exchange.until(lambda: len(exchange.events) > 20)
        lost, other = sorted(gate.replicas.values(), key=lambda replica: -replica.sequences)
        lost.reachable = False
        lost.break_streams()
        await asyncio.sleep(10 * STEP_S)
        received = len(exchange.events)
        await gate.catalog.close()
        await asyncio.sleep(GRACE_S + 0.1)
        [(_, settled)] = other.outbox.settled
        assert received > 20
        assert received <= settled.completion_tokens < 500
        assert settled.resumes == 1
        exchange.hang_up()
        await exchange.task


@in_virtual_time
async def test_what_was_made_on_a_lost_replica_is_on_disk_until_the_request_is_settled(tmp_path: Path) -> None:
    async with gateway(tmp_path, replicas=2) as gate:
        gate.meter.error = None
        exchange = gate.request(stream=True, n=2, max_tokens=500)
        await exchange.until(lambda: len(exchange.events) > 20)
        gate.replicas["r0"].break_streams()
        await asyncio.sleep(10 * STEP_S)
        [noted] = await left_on_disk(gate)
        assert (noted.status, noted.witness, sorted(noted.parts or ())) == ("disconnected", "engine", [0, 1])
        assert 20 <= noted.completion_tokens < 1000
        await exchange.task
        assert (await gate.settlement()).completion_tokens == 1000
        assert [file.stat().st_size for file in (tmp_path / "outbox").iterdir()] == [0]


@in_virtual_time
async def test_a_broken_connection_of_a_living_ingress_makes_no_orphans(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        exchange = gate.request(stream=True, max_tokens=60)
        await exchange.until(lambda: exchange.body != b"")
        gate.replicas["r0"].break_streams()
        await exchange.task
        await asyncio.sleep(3 * GRACE_S)
        assert gate.replicas["r0"].outbox.settled == []
        assert (await gate.settlement()).completion_tokens == 60


# --- limits ----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_caller_over_its_limit_is_told_so(tmp_path: Path) -> None:
    limits = RateLimits(limit_requests=3, remaining_requests=0, reset_requests_s=41.0)
    async with gateway(tmp_path) as gate:
        gate.meter.answer = lambda _: AdmissionRefused("rate_limit_exceeded", "3 of 3 requests", None, 40.2, limits)
        for path in ("/v1/completions", "/openai/v1/completions", "/api/v1/compatibility/openai/v1/completions"):
            response = await gate.client.post(path, json={"model": "m", "prompt": "hello"})
            assert response.status_code == 429
            assert response.json()["error"]["code"] == "rate_limit_exceeded"
            assert response.headers["retry-after"] == "41"
            assert response.headers["x-ratelimit-remaining-requests"] == "0"
            assert response.headers["x-ratelimit-reset-requests"] == "41s"
        assert gate.meter.settlements == []


@in_virtual_time
async def test_an_admitted_caller_is_told_what_is_left(tmp_path: Path) -> None:
    limits = RateLimits(limit_tokens=100, remaining_tokens=40, reset_tokens_s=0.02)
    async with gateway(tmp_path) as gate:
        tokenized = gate.meter.answer

        def limited(request: AdmissionRequest) -> Admitted | AdmissionRefused:
            admitted = tokenized(request)
            assert isinstance(admitted, Admitted)
            return Admitted(admitted.token_ids, rate_limits=limits)

        gate.meter.answer = limited
        for stream in (False, True):
            headers = (await gate.complete(stream=stream)).headers
            assert headers["x-ratelimit-limit-tokens"] == "100"
            assert headers["x-ratelimit-remaining-tokens"] == "40"
            assert headers["x-ratelimit-reset-tokens"] == "20ms"
            assert "x-ratelimit-limit-requests" not in headers


@in_virtual_time
async def test_a_key_sees_the_models_that_it_may_use(tmp_path: Path) -> None:
    async with gateway(tmp_path, models=("m", "other")) as gate:
        gate.meter.grant(USER_KEY, KeyInfo("key-1", "user", admin=False, models=("other",)))
        listed = (await gate.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["other"]


# --- metrics ---------------------------------------------------------------------------------------------------------
