"""A load test's report: figures as JSON, and one HTML page with plots that needs nothing beside it."""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
import msgspec

from loadtests.token_metrics import Distribution, TokenMetrics

__all__ = ["Report", "Sample", "html", "write_report"]

_TEMPLATE: Final = Path(__file__).with_name("load_report.html.j2")
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
    model: str
    metrics: TokenMetrics
    samples: list[Sample] = []


def write_report(report: Report, file: Path) -> None:
    """`file` is the page; the figures go beside it, as .json."""
    file.parent.mkdir(parents=True, exist_ok=True)
    summary = {"summary": report.metrics.summary(), **msgspec.to_builtins(report)}
    file.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(summary)))
    file.write_text(html(report))


def html(report: Report) -> str:
    metrics = report.metrics
    began = min(metrics.seconds, default=0)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE.read_text()).render(
        report=report,
        began=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began)),
        seconds=len(metrics.seconds),
        percents=_PERCENTS,
        latencies=_latencies(metrics),
        summary=metrics.summary(),
        errors=sorted(metrics.errors.items(), key=lambda each: -each[1]),
        plots=_plots(report, began),
    )


def _latencies(metrics: TokenMetrics) -> list[tuple[str, Distribution]]:
    return [
        ("First token", metrics.first_token_s),
        ("Between tokens", metrics.between_tokens_s),
        ("End to end", metrics.end_to_end_s),
    ]


def _plots(report: Report, began: int) -> list[tuple[str, str]]:
    """Titles and SVG."""
    metrics = report.metrics
    times = range(max(metrics.seconds, default=began) - began + 1)

    def each_second(field: str) -> list[int]:
        return [getattr(metrics.seconds.get(began + at), field, 0) for at in times]

    begun, ended, failed = each_second("begun"), each_second("ended"), each_second("failed")
    under_way: list[int] = []
    for come, gone in zip(begun, ended, strict=True):
        under_way.append((under_way[-1] if under_way else 0) + come - gone)
    sampled = [sample.at - began for sample in report.samples]

    def latency(axis: Any) -> None:
        for name, distribution in _latencies(metrics):
            if distribution.count:
                shares = [100 * step / 200 for step in range(1, 200)] + [99.9]
                # Equal distances for 90, 99 and 99.9%: the tail is what matters.
                axis.plot(
                    [-math.log10(1 - share / 100) for share in shares],
                    [1000 * distribution.percentile(share) for share in shares],
                    label=name,
                )
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_xticks([-math.log10(1 - share / 100) for share in (50, 90, 99, 99.9)], ["50", "90", "99", "99.9"])
        axis.set_xlabel("percentile")
        axis.set_ylabel("ms")

    def throughput(axis: Any) -> None:
        axis.plot(times, each_second("tokens"), label="completion tokens/s", color="tab:blue")
        axis.set_ylabel("completion tokens/s")
        other = axis.twinx()
        other.plot(times, ended, label="requests/s", color="tab:orange", linewidth=1.0)
        other.set_ylabel("requests/s that end")
        other.set_ylim(bottom=0)

    def concurrency(axis: Any) -> None:
        axis.plot(times, under_way, label="requests under way")
        if sampled:
            axis.plot(sampled, [each.running for each in report.samples], label="running on engines", linewidth=1.0)
            axis.plot(sampled, [each.waiting for each in report.samples], label="waiting at engines", linewidth=1.0)

    def errors(axis: Any) -> None:
        axis.bar(times, failed, width=1.0, color="tab:red", label="failed requests/s")
        axis.set_ylim(top=max(1, *failed) * 1.1)

    def replicas(axis: Any) -> None:
        counts = [sample.replicas.get(report.model, 0) for sample in report.samples]
        axis.step(sampled, counts, where="post", label=report.model)
        axis.set_ylim(top=max(counts) + 1)
        axis.yaxis.get_major_locator().set_params(integer=True)

    drawings: list[tuple[str, Callable[[Any], None]]] = [
        ("Latency by percentile", latency),
        ("Throughput", throughput),
        ("Concurrency", concurrency),
        ("Errors", errors),
    ]
    if sampled:
        drawings.append(("Replicas in rotation", replicas))
    return [(title, _svg(draw, over_time=draw is not latency)) for title, draw in drawings]


def _svg(draw: Callable[[Any], None], *, over_time: bool) -> str:
    import matplotlib as mpl  # takes a second: not before there is something to draw

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    draw(axis)
    axis.grid(visible=True, alpha=0.25)
    if over_time:
        axis.set_xlabel("seconds since the start")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    lines = [found for each in figure.axes for found in zip(*each.get_legend_handles_labels(), strict=True)]
    if lines:
        figure.legend(
            [line for line, _ in lines],
            [label for _, label in lines],
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
