"""A simulation's report: one HTML page with plots that needs nothing beside it.

Needs matplotlib, which the extra `load` installs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from itertools import groupby
from typing import Final

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from serve_app.planning.outcome import Moment, Outcome
from serve_app.report_page import STYLE, logarithmic, svg

__all__ = ["html"]

_MAX_CHANGES: Final = 500
"""Rows of the table of decisions."""


def html(outcome: Outcome, *, title: str, description: str, target_first_token_s: float) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>\n'
        for name, value in outcome.readable(target_first_token_s)
    )
    plots = "".join(
        f"<section><h2>{title}</h2>{svg(draw, outcome.duration_s)}</section>\n"
        for title, draw in _drawings(outcome, target_first_token_s)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}
  .decisions td:last-child, .decisions th:last-child {{ text-align: left; white-space: normal; }}
</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="quiet">{escape(description)}</p>
<div class="tiles">
{tiles}</div>
<div class="plots">
{plots}</div>
{_decisions(outcome)}
</main>
</body>
</html>
"""


def _decisions(outcome: Outcome) -> str:
    shown = outcome.changes[:_MAX_CHANGES]
    rows = "".join(
        f"<tr><td>{change.at_s:,.1f} s</td><td>{change.before}</td><td>{change.after}</td>"
        f"<td>{escape(change.reason)}</td></tr>\n"
        for change in shown
    )
    more = len(outcome.changes) - len(shown)
    note = f'<p class="quiet">{more:,} more are not shown.</p>' if more else ""
    return f"""<section class="decisions">
<h2>Decisions that changed the number of replicas</h2>
<table>
<tr><th>at</th><th>from</th><th>to</th><th>because</th></tr>
{rows}</table>
{note}
</section>"""


def _drawings(outcome: Outcome, target_first_token_s: float) -> list[tuple[str, Callable[[Axes], None]]]:
    intervals = outcome.intervals()
    times = [interval.at_s for interval in intervals]
    moments = _turns(outcome.moments)

    def arrivals(axis: Axes) -> None:
        axis.plot(times, [interval.arrivals_per_s for interval in intervals], label="requests/s")
        axis.set_ylabel("requests/s")
        axis.yaxis.set_major_formatter("{x:,.0f}")

    def replicas(axis: Axes) -> None:
        at = [moment.at_s for moment in moments]
        for name, counts, color in (
            ("with those that start or drain", [moment.counted for moment in moments], "tab:gray"),
            ("up", [moment.up for moment in moments], "tab:blue"),
            ("wanted", [moment.wanted for moment in moments], "tab:orange"),
        ):
            axis.step(at, counts, where="post", label=name, color=color, linewidth=1.2)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel("replicas")

    def first_token(axis: Axes) -> None:
        axis.plot(times, [interval.first_token_p99_s for interval in intervals], ":", color="tab:blue", label="p99")
        axis.plot(times, [interval.first_token_p50_s for interval in intervals], color="tab:blue", label="p50")
        axis.axhline(target_first_token_s, color="tab:red", linewidth=1.0, label="target")
        logarithmic(axis, "seconds")

    return [("Arrivals", arrivals), ("Replicas", replicas), ("First token", first_token)]


def _turns(moments: Iterable[Moment]) -> list[Moment]:
    """The first and last of each run of moments that differ in time alone: a step plot needs no more."""
    turns: list[Moment] = []
    for _, run in groupby(moments, key=lambda moment: moment[1:]):
        first, *others = run
        turns += [first, *others[-1:]]
    return turns
