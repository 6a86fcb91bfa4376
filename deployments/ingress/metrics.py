"""GET /metrics in Prometheus' text format: any ingress replica shows the whole cluster.

The meters tell what is in the ledger: requests and tokens count when their row is committed. The ingress replicas tell
what only they see, each for itself; the one that is asked asks the others. Of the engine replicas it tells what their
step streams say. Counters begin at zero with the process that counts, and carry its name as a label, so that Prometheus
notices each new beginning; docs/monitoring.md says what each means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from deployments.contracts import DurationHistogram, DurationSum, IngressCounters, MeterCounters
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.routing.catalog import Catalog

__all__ = ["METRICS_TYPE", "PoolState", "ResponseCounts", "ingress_counters", "metrics_text"]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CALLER = ("model", "key", "team")
_Values = Iterable[tuple[Sequence[str], float]]
"""Of one metric, each with the values of its labels."""


class PoolState(NamedTuple):
    """One model's engine replicas, as the ingress that is asked sees them."""

    model: str
    min_replicas: int
    max_replicas: int
    replicas: list[dict[str, Any]]
    """As EnginePool.cards."""


ResponseCounts = Counter[tuple[str, int]]
"""Responses that were begun, by the path of the route and the status."""


def ingress_counters(catalog: Catalog, meter: MeterClient, responses: ResponseCounts) -> IngressCounters:
    """Of this ingress replica."""
    return IngressCounters(
        meter.ingress_id,
        [model.pool.counters() for model in catalog.models()],
        unsettled=meter.unsettled,
        oldest_unsettled_s=meter.oldest_unsettled_s,
        loop_lag_s=catalog.loop_lag_s,
        responses=[(path, status, count) for (path, status), count in responses.items()],
    )


def metrics_text(
    meters: Mapping[str, MeterCounters | None], ingresses: Sequence[IngressCounters], pools: Sequence[PoolState]
) -> bytes:
    """`meters` by name, None where one gave no answer."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Metrics(meters, ingresses, pools))
    return generate_latest(registry)


class _Metrics(Collector):
    def __init__(
        self,
        meters: Mapping[str, MeterCounters | None],
        ingresses: Sequence[IngressCounters],
        pools: Sequence[PoolState],
    ) -> None:
        self._asked = meters
        self._meters = {name: counters for name, counters in sorted(meters.items()) if counters is not None}
        self._ingresses = ingresses
        self._pools = pools

    def collect(self) -> Iterable[Metric]:
        yield from self._of_the_ledger()
        yield from self._of_the_meters()
        yield from self._of_the_ingresses()
        yield from self._of_the_engines()

    def _of_the_ledger(self) -> Iterator[Metric]:
        groups = [
            ((group.model, group.key_id, group.team or "", meter), group)
            for meter, counters in self._meters.items()
            for group in counters.requests
        ]
        yield _counter(
            "requests",
            "Requests that have a row in the ledger",
            (*_CALLER, "status", "meter"),
            (((*caller, group.status, meter), group.requests) for (*caller, meter), group in groups),
        )
        for name, documentation, field in (
            ("prompt_tokens", "Prompt tokens in the rows of the ledger", "prompt_tokens"),
            ("cached_prompt_tokens", "Those of them that were in a prefix cache", "cached_tokens"),
            ("completion_tokens", "Completion tokens in the rows of the ledger", "completion_tokens"),
            ("cost", "What they cost, in the currency of the prices", "cost"),
        ):
            sums: dict[tuple[str, ...], float] = {}
            for labels, group in groups:
                sums[labels] = sums.get(labels, 0) + getattr(group, field)
            yield _counter(name, documentation, (*_CALLER, "meter"), sums.items())

    def _of_the_meters(self) -> Iterator[Metric]:
        meters = self._meters
        yield _gauge(
            "meter_up",
            "Whether the meter answered",
            ("meter",),
            (((name,), counters is not None) for name, counters in self._asked.items()),
        )
        yield _counter(
            "refusals",
            "Requests that were not admitted",
            ("code", "meter"),
            (((code, name), count) for name, each in meters.items() for code, count in each.refusals.items()),
        )
        for counter, documentation in (
            ("wrong_keys", "Requests with an unknown, revoked or expired key"),
            ("lost_reservations", "Admitted requests of which nobody could tell what became"),
        ):
            yield _counter(
                counter, documentation, ("meter",), (((name,), getattr(each, counter)) for name, each in meters.items())
            )
        for gauge, documentation, field in (
            ("open_reservations", "Requests admitted and not settled", "open_reservations"),
            ("spooled_settlements", "Settlements on the meter's disk that the database does not have yet", "spooled"),
        ):
            yield _gauge(
                gauge, documentation, ("meter",), (((name,), getattr(each, field)) for name, each in meters.items())
            )
        for summary, documentation, field in (
            ("admission", "Time to admit a request, in the meter", "admissions"),
            ("settlement", "Time to make settlements durable, in the meter", "commits"),
        ):
            yield _summary(summary, documentation, {name: getattr(each, field) for name, each in meters.items()})

    def _of_the_ingresses(self) -> Iterator[Metric]:
        yield _counter(
            "http_responses",
            "Responses that were begun, by the path of the endpoint; empty where there is none",
            ("path", "status", "ingress"),
            (
                ((path, str(status), each.ingress_id), count)
                for each in self._ingresses
                for path, status, count in each.responses
            ),
        )
        told = [(pool, (pool.model, each.ingress_id)) for each in self._ingresses for pool in each.pools]
        labels = ("model", "ingress")
        yield _histogram(
            "first_token",
            "From the arrival of a request to its first token, by the ingress replica that served it",
            labels,
            ((each, pool.first_tokens) for pool, each in told),
        )
        yield _histogram(
            "inter_token",
            "Between successive deliveries of a request's tokens, by the ingress replica that served it",
            labels,
            ((each, pool.inter_tokens) for pool, each in told),
        )
        for name, documentation in (
            ("resumes", "Generations that lost their engine replica and went on elsewhere"),
            ("not_resumable", "Generations in a required form that ended with their engine replica"),
            ("given_up", "Generations that ended because two engine replicas were lost while they began"),
        ):
            yield _counter(name, documentation, labels, ((each, getattr(pool, name)) for pool, each in told))
        for name, documentation, field in (
            ("held_requests", "Requests that wait because no engine replica is up", "held"),
            ("suspects", "Generations tried alone, or waiting for it: a replica was lost while they began", "suspects"),
        ):
            yield _gauge(name, documentation, labels, ((each, getattr(pool, field)) for pool, each in told))
        for name, documentation, field in (
            ("unsettled_requests", "Settlements that no meter has acknowledged yet", "unsettled"),
            ("oldest_unsettled_seconds", "How long the oldest of them has waited", "oldest_unsettled_s"),
            ("event_loop_lag_seconds", "How late the event loop wakes, averaged over some seconds", "loop_lag_s"),
        ):
            yield _gauge(
                name,
                documentation,
                ("ingress",),
                (((each.ingress_id,), getattr(each, field)) for each in self._ingresses),
            )

    def _of_the_engines(self) -> Iterator[Metric]:
        pools = self._pools
        yield _gauge(
            "replicas_in_rotation",
            "Engine replicas that take requests",
            ("model",),
            (((pool.model,), sum(bool(each["in_rotation"]) for each in pool.replicas)) for pool in pools),
        )
        for name, documentation in (
            ("min_replicas", "Engine replicas that the configuration asks for at least"),
            ("max_replicas", "Engine replicas that the configuration allows at most"),
        ):
            yield _gauge(name, documentation, ("model",), (((pool.model,), getattr(pool, name)) for pool in pools))
        cards = [card for pool in pools for card in pool.replicas if card["in_rotation"] or card["draining"]]
        for name, documentation, field in (
            ("running_sequences", "Sequences in the batch of the engine", "running"),
            ("waiting_sequences", "Sequences in its queue, accepted and not prefilled yet", "waiting"),
            ("waiting_prompt_tokens", "Prompt tokens in its queue", "waiting_prefill_tokens"),
            ("kv_blocks", "Blocks of its KV cache", "kv_blocks_total"),
            ("free_kv_blocks", "Those of them that no sequence uses", "kv_blocks_free"),
            ("orphaned_settlements", "Settlements of requests without an ingress that wait for a meter", "unsettled"),
            ("start_up_seconds", "How long the replica took to start", "start_up_s"),
        ):
            yield _gauge(
                f"engine_{name}",
                documentation,
                ("model", "replica"),
                (((card["model"], card["id"]), card[field]) for card in cards),
            )


def _counter(name: str, documentation: str, labels: Sequence[str], values: _Values) -> Metric:
    family = CounterMetricFamily(f"millstream_{name}", documentation, labels=labels)
    for labelled, value in sorted(values):
        family.add_metric(labelled, value)
    return family


def _gauge(name: str, documentation: str, labels: Sequence[str], values: _Values) -> Metric:
    family = GaugeMetricFamily(f"millstream_{name}", documentation, labels=labels)
    for labelled, value in sorted(values):
        family.add_metric(labelled, value)
    return family


def _summary(name: str, documentation: str, meters: Mapping[str, DurationSum]) -> Metric:
    family = SummaryMetricFamily(f"millstream_{name}_seconds", documentation, labels=("meter",))
    for meter, total in meters.items():
        family.add_metric((meter,), count_value=total.count, sum_value=total.seconds)
    return family


def _histogram(
    name: str, documentation: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], DurationHistogram]]
) -> Metric:
    family = HistogramMetricFamily(f"millstream_{name}_seconds", documentation, labels=labels)
    for labelled, histogram in values:
        bounds = [*map(str, histogram.bounds_s), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric(labelled, buckets, sum_value=histogram.seconds)
    return family
