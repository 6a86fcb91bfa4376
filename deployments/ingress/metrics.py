"""GET /metrics: what the meters have counted, in Prometheus' text format. Any ingress shows the whole cluster.

Requests and tokens count when their row is committed, so that these counters agree with the ledger; they begin at zero
with each meter's process, as Prometheus expects of counters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from deployments.contracts import DurationSum, MeterCounters

__all__ = ["METRICS_TYPE", "metrics_text"]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CALLER = ("model", "key", "team")


def metrics_text(meters: Sequence[MeterCounters], unsettled: int) -> bytes:
    """`meters`: of each meter. `unsettled`: settlements in the outbox of this ingress."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Counters(meters, unsettled))
    return generate_latest(registry)


class _Counters(Collector):
    def __init__(self, meters: Sequence[MeterCounters], unsettled: int) -> None:
        self._meters = meters
        self._unsettled = unsettled

    def collect(self) -> Iterable[Metric]:
        meters = self._meters
        requests: dict[tuple[str, ...], float] = defaultdict(float)
        tokens: dict[tuple[str, ...], float] = defaultdict(float)
        costs: dict[tuple[str, ...], float] = defaultdict(float)
        refusals: dict[tuple[str, ...], float] = defaultdict(float)
        for meter in meters:
            for group in meter.requests:
                caller = (group.model, group.key_id, group.team or "")
                requests[*caller, group.status] += group.requests
                tokens[*caller, "prompt"] += group.prompt_tokens
                tokens[*caller, "cached"] += group.cached_tokens
                tokens[*caller, "completion"] += group.completion_tokens
                costs[caller] += group.cost
            for code, count in meter.refusals.items():
                refusals[(code,)] += count
        yield _counter("requests", "Requests that have a row in the ledger", (*_CALLER, "status"), requests)
        yield _counter(
            "tokens", "Tokens in the rows of the ledger; cached ones are prompt tokens, too", (*_CALLER, "kind"), tokens
        )
        yield _counter("cost", "What they cost, in the currency of the prices", _CALLER, costs)
        yield _counter("refusals", "Requests that were not admitted", ("code",), refusals)
        yield CounterMetricFamily(
            "millstream_wrong_keys", "Unknown, revoked or expired keys", value=sum(each.wrong_keys for each in meters)
        )
        yield CounterMetricFamily(
            "millstream_lost_reservations",
            "Admitted requests of which nobody could tell what became",
            value=sum(each.lost_reservations for each in meters),
        )
        yield GaugeMetricFamily(
            "millstream_open_reservations",
            "Requests admitted and not settled",
            value=sum(each.open_reservations for each in meters),
        )
        yield GaugeMetricFamily(
            "millstream_spooled_settlements",
            "Settlements on the meters' disks that the database does not have yet",
            value=sum(each.spooled for each in meters),
        )
        yield GaugeMetricFamily(
            "millstream_unsettled_requests",
            "Settlements of this ingress that no meter has acknowledged yet",
            value=self._unsettled,
        )
        yield _summary("admission", "Admitting a request, in the meter", [each.admissions for each in meters])
        yield _summary("settlement", "Committing settlements, in the meter", [each.commits for each in meters])


def _counter(
    name: str, documentation: str, labels: Sequence[str], values: dict[tuple[str, ...], float]
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"millstream_{name}", documentation, labels=labels)
    for labelled, value in sorted(values.items()):
        family.add_metric(labelled, value)
    return family


def _summary(name: str, documentation: str, sums: Sequence[DurationSum]) -> SummaryMetricFamily:
    return SummaryMetricFamily(
        f"millstream_{name}_seconds",
        documentation,
        count_value=sum(each.count for each in sums),
        sum_value=sum(each.seconds for each in sums),
    )
