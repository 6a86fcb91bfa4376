"""What Prometheus reads: names, labels and values, and that every number is where its process counts it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.contracts import (
    DurationHistogram,
    DurationSum,
    IngressCounters,
    MeterCounters,
    PoolCounters,
    RequestCounter,
    pack,
    unpack,
)
from deployments.ingress.app import IngressSettings, build_app
from deployments.ingress.metrics import PoolState, metrics_text
from deployments.meter.remote.meter_transport import MeterUnreachable
from tests.deployments.ingress.memory_gateway import (
    AUTHORIZED,
    BODY_LIMIT_BYTES,
    Gateway,
    gateway,
    meter_client_of,
)
from tests.deployments.ingress.memory_meter import ADMIN_KEY
from tests.deployments.ingress.memory_replicas import SETTINGS
from tests.deployments.ingress.virtual_time import in_virtual_time

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """By name and labels; fails on text that is not Prometheus' and on a series that is told twice."""
    told: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = sample.name, frozenset(sample.labels.items())
            assert series not in told
            told[series] = sample.value
    return told


class Scrape:
    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = samples(text)

    def __call__(self, name: str, **labels: str) -> float:
        """The sum over all series of that name which have these labels."""
        wanted = labels.items()
        found = [value for (each, has), value in self.samples.items() if each == name and wanted <= has]
        assert found, f"no {name} with {labels}"
        return sum(found)


async def scrape(gate: Gateway) -> Scrape:
    response = await gate.client.get("/metrics", headers=ADMIN)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Scrape(response.text)


def meter_counters(*, requests: list[RequestCounter] | None = None, lost: int = 0) -> MeterCounters:
    return MeterCounters(
        requests or [], {"rate_limit_exceeded": 3}, DurationSum(4, 0.5), DurationSum(2, 0.25), lost_reservations=lost
    )


# --- the text ---------------------------------------------------------------------------------------------------------


def test_each_meter_has_series_of_its_own_so_that_one_that_begins_anew_does_not_set_back_the_others() -> None:
    group = RequestCounter("m", "key-1", "red", "finished", 2, 10, 4, 6, 1.5)
    told = Scrape(metrics_text({"Meter": meter_counters(requests=[group]), "Meter-1": None}, [], []).decode())
    assert told("millstream_requests_total", model="m", key="key-1", team="red", status="finished", meter="Meter") == 2
    assert told("millstream_prompt_tokens_total", meter="Meter") == 10
    assert told("millstream_cached_prompt_tokens_total") == 4
    assert told("millstream_completion_tokens_total") == 6
    assert told("millstream_cost_total") == 1.5
    assert told("millstream_refusals_total", code="rate_limit_exceeded") == 3
    assert told("millstream_admission_seconds_count") == 4
    assert told("millstream_settlement_seconds_sum") == 0.25
    assert (told("millstream_meter_up", meter="Meter"), told("millstream_meter_up", meter="Meter-1")) == (1, 0)
    assert not any(("meter", "Meter-1") in labels for name, labels in told.samples if name != "millstream_meter_up")


def test_tokens_are_summed_over_the_statuses_of_their_requests() -> None:
    groups = [RequestCounter("m", "k", None, status, 1, 10, 0, 5) for status in ("finished", "cancelled")]
    told = Scrape(metrics_text({"Meter": meter_counters(requests=groups)}, [], []).decode())
    assert told("millstream_completion_tokens_total", model="m", key="k", team="") == 10
    assert told("millstream_requests_total", status="cancelled") == 1


def test_histograms_are_cumulative_and_their_bounds_inclusive() -> None:
    first, between = DurationHistogram.empty((0.5, 1.0)), DurationHistogram.empty((0.1,))
    for seconds in (0.5, 0.75, 1.0, 7.0):
        first.observe(seconds)
    ingress = IngressCounters(
        "i-1", [PoolCounters("m", first, between, 2, 1, 4, 3, 6)], 5, 0.75, 0.25, [("/p", 200, 8)]
    )
    told = Scrape(metrics_text({}, [unpack(pack(ingress), IngressCounters)], []).decode())
    buckets = [told("millstream_first_token_seconds_bucket", ingress="i-1", le=le) for le in ("0.5", "1.0", "+Inf")]
    assert buckets == [1, 3, 4]
    assert told("millstream_first_token_seconds_sum", model="m") == 9.25
    assert told("millstream_first_token_seconds_count") == 4
    assert told("millstream_inter_token_seconds_count") == 0
    assert (told("millstream_resumes_total"), told("millstream_held_requests")) == (2, 1)
    assert told("millstream_suspects", model="m", ingress="i-1") == 4
    assert (told("millstream_given_up_total"), told("millstream_not_resumable_total")) == (3, 6)
    assert told("millstream_unsettled_requests", ingress="i-1") == 5
    assert told("millstream_oldest_unsettled_seconds") == 0.75
    assert told("millstream_event_loop_lag_seconds") == 0.25
    assert told("millstream_http_responses_total", path="/p", status="200", ingress="i-1") == 8


def test_a_model_without_replicas_has_a_number_of_them_all_the_same() -> None:
    told = Scrape(metrics_text({}, [], [PoolState("m", 0, 4, [])]).decode())
    assert told("millstream_replicas_in_rotation", model="m") == 0
    assert (told("millstream_min_replicas"), told("millstream_max_replicas")) == (0, 4)


# --- what the ingress counts ------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_stream_counts_one_first_token_and_each_delivery_after_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        chunks = [event for event in await gate.stream(max_tokens=8, ignore_eos=True) if isinstance(event, dict)]
        told = await scrape(gate)
        assert told("millstream_first_token_seconds_count", model="m") == 1
        assert 1 <= told("millstream_inter_token_seconds_count", model="m") < 8
        assert len(chunks) > 1


@in_virtual_time
async def test_tokens_that_come_together_are_one_delivery(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        await gate.stream(max_tokens=8, n=4, ignore_eos=True)
        told = await scrape(gate)
        assert told("millstream_first_token_seconds_count") == 1
        assert told("millstream_inter_token_seconds_count") < 8


@in_virtual_time
async def test_the_engines_are_told_as_their_step_streams_tell_them(tmp_path: Path) -> None:
    async with gateway(tmp_path, replicas=2) as gate:
        exchanges = [gate.request(max_tokens=500, ignore_eos=True) for _ in range(3)]
        await asyncio.sleep(10 * SETTINGS.step_s)
        told = await scrape(gate)
        assert told("millstream_replicas_in_rotation", model="m") == 2
        assert told("millstream_engine_running_sequences") == 3
        assert told("millstream_engine_kv_blocks") == 2 * SETTINGS.kv_blocks
        assert told("millstream_engine_free_kv_blocks") < 2 * SETTINGS.kv_blocks
        for exchange in exchanges:
            exchange.hang_up()
            await exchange.task


@in_virtual_time
async def test_a_lost_replica_counts_its_generations_as_resumed(tmp_path: Path) -> None:
    async with gateway(tmp_path, replicas=2) as gate:
        exchanges = [gate.request(max_tokens=50, ignore_eos=True) for _ in range(4)]
        await asyncio.sleep(10 * SETTINGS.step_s)
        lost = gate.replicas["r1"]
        moved = lost.sequences
        assert moved
        lost.reachable = False
        lost.break_streams()
        for exchange in exchanges:
            await exchange.task
        told = await scrape(gate)
        assert told("millstream_resumes_total", model="m") == moved
        assert told("millstream_inter_token_seconds_count") > 0


@in_virtual_time
async def test_requests_without_a_replica_are_held(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        gate.pool.replicas_changed(frozenset())
        await asyncio.sleep(1)
        exchange = gate.request(max_tokens=4)
        await asyncio.sleep(1)
        told = await scrape(gate)
        assert (told("millstream_held_requests", model="m"), told("millstream_replicas_in_rotation")) == (1, 0)
        exchange.hang_up()
        await exchange.task


@in_virtual_time
async def test_settlements_that_no_meter_takes_are_told(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        assert (await scrape(gate))("millstream_unsettled_requests") == 0
        exchange = gate.request(stream=True, max_tokens=4, ignore_eos=True)
        await exchange.until(lambda: exchange.body != b"")
        gate.meter.error = MeterUnreachable("gone")
        await exchange.task
        told = await scrape(gate)
        assert told("millstream_unsettled_requests", ingress="i") == 1
        gate.meter.error = None
        await asyncio.sleep(1)
        assert (await scrape(gate))("millstream_unsettled_requests") == 0


@in_virtual_time
async def test_the_replica_that_is_asked_tells_of_all_others(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        await gate.complete(max_tokens=4)
        first = DurationHistogram.empty((1.0,))
        first.observe(0.5)
        other = IngressCounters("j", [PoolCounters("m", first, DurationHistogram.empty((1.0,)))], 7)

        async def others() -> list[IngressCounters]:
            return [other]

        meter = meter_client_of(gate.meter, gate.folder, "asked")
        app = build_app(gate.catalog, meter, IngressSettings(BODY_LIMIT_BYTES, 15.0), others)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            told = Scrape((await client.get("/metrics", headers=ADMIN)).text)
        await meter.close()
        assert told("millstream_first_token_seconds_count", model="m") == 2
        assert told("millstream_unsettled_requests", ingress="j") == 7


@in_virtual_time
async def test_a_meter_that_is_away_is_told_as_such(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        assert (await scrape(gate))("millstream_meter_up", meter="Meter") == 1
        gate.meter.error = MeterUnreachable("gone")
        told = await scrape(gate)
        assert told("millstream_meter_up", meter="Meter") == 0
        assert told("millstream_unsettled_requests") == 0
        gate.meter.error = None


@in_virtual_time
async def test_only_administrators_may_look(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        assert (await gate.client.get("/metrics", headers=AUTHORIZED)).status_code == 403


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (1.0, 0), (1.0001, 1), (2.5, 2), (99.0, 2)])
def test_a_duration_counts_at_the_first_bound_that_is_not_below_it(seconds: float, bucket: int) -> None:
    histogram = DurationHistogram.empty((1.0, 2.0))
    histogram.observe(seconds)
    assert histogram.counts.index(1) == bucket
    assert histogram.seconds == seconds
