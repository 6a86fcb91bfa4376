"""A load test's report: figures as JSON, and one HTML page with plots that needs nothing beside it."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
import msgspec
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from loadtests.load.endpoint import Served
from loadtests.load.token_metrics import Distribution, Interval, TokenMetrics
from serve_app.report_page import STYLE, logarithmic, svg

__all__ = ["Report", "Sample", "html", "write_report"]

_TEMPLATE: Final = Path(__file__).with_name("report.html.j2")
_LATE_S: Final = 0.05
"""When 1% of the requests are sent later than that after their time, the report warns."""
_PERCENTS: Final = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


class Sample(msgspec.Struct):
    """What Millstream said of its replicas at one moment, by model."""

    at: float
    """Unix time."""
    replicas: dict[str, int]
    """In rotation."""
    running: int
    waiting: int

    @classmethod
    def of(cls, at: float, cards: Sequence[dict[str, Any]]) -> Sample:
        """From the data of GET /admin/v1/replicas."""
        in_rotation = Counter(card["model"] for card in cards if card["in_rotation"])
        return cls(
            at,
            {card["model"]: in_rotation[card["model"]] for card in cards},
            sum(card["running"] for card in cards),
            sum(card["waiting"] for card in cards),
        )


class Report(msgspec.Struct, kw_only=True):
    scenario: str
    description: str
    host: str
    served: Served
    metrics: TokenMetrics
    samples: list[Sample] = []
    generator_busy: bool = False
    """Locust was short of CPU time at some moment."""


def write_report(report: Report, file: Path) -> None:
    """`file` is the page; the figures go beside it, as .json."""
    file.parent.mkdir(parents=True, exist_ok=True)
    summary = {"summary": report.metrics.summary(), **msgspec.to_builtins(report)}
    file.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(summary)))
    file.write_text(html(report))


def html(report: Report) -> str:
    metrics = report.metrics
    began = min(metrics.timeline, default=0)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = lambda value: f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    environment.filters["percentile"] = _percentile
    return environment.from_string(_TEMPLATE.read_text()).render(
        style=STYLE,
        report=report,
        metrics=metrics,
        began=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began)),
        duration=f"{metrics.duration_s:,} s",
        percents=_PERCENTS,
        latencies=_latencies(metrics),
        too_late=metrics.late_s.percentile(99) > _LATE_S,
        summary=metrics.summary(),
        errors=sorted(metrics.errors.items(), key=lambda each: -each[1]),
        plots=_plots(report, began),
    )


def _percentile(distribution: Distribution, percent: float, scale: float = 1000.0) -> str:
    """In milliseconds, if the distribution is in seconds."""
    return f"{scale * distribution.percentile(percent):,.1f}" if distribution.count else "–"


def _latencies(metrics: TokenMetrics) -> list[tuple[str, Distribution]]:
    return [
        ("First token", metrics.first_token_s),
        ("Between tokens", metrics.between_tokens_s),
        ("End to end", metrics.end_to_end_s),
    ]


def _plots(report: Report, began: int) -> list[tuple[str, str]]:
    """Titles and SVG."""
    metrics = report.metrics
    every_s = metrics.interval_s
    times = range(0, metrics.duration_s, every_s)
    intervals = [metrics.timeline.get(began + at) or Interval() for at in times]
    under_way = list(itertools.accumulate(each.begun - each.ended for each in intervals))
    sampled = [sample.at - began for sample in report.samples]

    def latency(axis: Axes) -> None:
        shares = [step / 200 for step in range(1, 200)] + [0.999]
        for name, distribution in _latencies(metrics):
            if distribution.count:
                # Equal distances for 90, 99 and 99.9%: the tail is what matters.
                axis.plot(
                    [-math.log10(1 - share) for share in shares],
                    [1000 * distribution.percentile(100 * share) for share in shares],
                    label=name.lower(),
                )
        axis.set_xticks([-math.log10(1 - share) for share in (0.5, 0.9, 0.99, 0.999)], ["50", "90", "99", "99.9"])
        axis.set_xlabel("percentile")
        logarithmic(axis, "ms")

    def latency_over_time(axis: Axes) -> None:
        for name, color in (("first_token_s", "tab:blue"), ("between_tokens_s", "tab:orange")):
            told = [(at, getattr(each, name)) for at, each in zip(times, intervals, strict=True)]
            told = [(at, distribution) for at, distribution in told if distribution.count]
            for percent, style in ((99, ":"), (50, "-")):
                axis.plot(
                    [at for at, _ in told],
                    [1000 * distribution.percentile(percent) for _, distribution in told],
                    style,
                    color=color,
                    label=f"{name.removesuffix('_s').replace('_', ' ')}, p{percent}",
                )
        logarithmic(axis, "ms")

    def throughput(axis: Axes) -> None:
        axis.plot(times, [each.tokens / every_s for each in intervals], label="completion tokens/s")
        axis.set_ylabel("completion tokens/s")
        axis.yaxis.set_major_formatter("{x:,.0f}")

    def requests(axis: Axes) -> None:
        axis.plot(times, [each.begun / every_s for each in intervals], label="begun", color="tab:gray")
        axis.plot(times, [(each.ended - each.failed) / every_s for each in intervals], label="ended well")
        axis.plot(times, [each.failed / every_s for each in intervals], label="failed", color="tab:red")
        axis.set_ylabel("requests/s")

    def concurrency(axis: Axes) -> None:
        axis.plot([at + every_s for at in times], under_way, label="requests under way")
        if sampled:
            axis.plot(sampled, [each.running for each in report.samples], label="running on engines", linewidth=1.0)
            axis.plot(sampled, [each.waiting for each in report.samples], label="waiting at engines", linewidth=1.0)
        axis.set_ylabel("requests")

    def replicas(axis: Axes) -> None:
        known = report.samples[-1].replicas
        for model in [report.served.model] if report.served.model in known else sorted(known):
            axis.step(sampled, [each.replicas.get(model, 0) for each in report.samples], where="post", label=model)
        axis.set_ylim(top=max(1, *(count for each in report.samples for count in each.replicas.values())) * 1.3)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel("replicas")

    drawings: list[tuple[str, Callable[[Axes], None]]] = [
        ("Latency by percentile", latency),
        ("Latency over time", latency_over_time),
        ("Throughput", throughput),
        ("Requests and errors", requests),
        ("Concurrency", concurrency),
    ]
    if sampled:
        drawings.append(("Replicas in rotation", replicas))
    return [(title, svg(draw, metrics.duration_s if draw is not latency else None)) for title, draw in drawings]
