"""How Millstream's reports look: the style of a page that needs nothing beside it, and plots to stand in it.

Needs matplotlib, which the extra `load` installs.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MultipleLocator, NullFormatter

__all__ = ["STYLE", "logarithmic", "svg"]

STYLE: Final = """\
  body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #f5f6f8; margin: 0; }
  main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
  h1 { font-size: 24px; margin: 0; }
  h2 { font-size: 17px; margin: 0 0 8px; }
  p { margin: 4px 0; }
  .quiet { color: #5b6470; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 12px; margin: 20px 0; }
  .tile, section { background: #fff; border: 1px solid #dde1e6; border-radius: 8px; padding: 14px 16px; }
  .tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
  .bad b { color: #b42318; }
  .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 16px; }
  section { margin: 16px 0; overflow-x: auto; }
  .plots section { margin: 0; }
  .plots svg { width: 100%; height: auto; display: block; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #e6e9ed; white-space: nowrap; }
  th:first-child, td:first-child { text-align: left; white-space: normal; }
  tr:last-child td { border-bottom: 0; }
  .warning { border-color: #e5b567; background: #fff8ea; }
  @media print { body { background: #fff; } section, .tile { break-inside: avoid; } }"""
"""For a <style> element."""


def logarithmic(axis: Axes, unit: str) -> None:
    """Its vertical axis, with plain numbers."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel(unit)


def svg(draw: Callable[[Axes], None], over_s: float | None) -> str:
    """An <svg> element. `over_s`: how long the time on its horizontal axis is; None if that is something else."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axis = figure.subplots()
    draw(axis)
    axis.grid(visible=True, alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if over_s is not None:
        unit_s, unit = (1, "seconds") if over_s <= 300 else (60, "minutes") if over_s <= 4 * 3600 else (3600, "hours")
        axis.set_xlabel(f"{unit} since the start")
        axis.xaxis.set_major_locator(MultipleLocator(unit_s * _step(over_s / unit_s)))
        axis.xaxis.set_major_formatter(lambda at, _: f"{at / unit_s:g}")
        axis.set_xlim(0, over_s)
        if axis.get_yscale() == "linear":
            axis.set_ylim(bottom=0, top=max(1.0, axis.get_ylim()[1]))
    if lines := len(axis.get_legend_handles_labels()[0]):
        figure.legend(loc="outside lower center", ncols=2 if lines == 4 else 3, frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _step(length: float) -> float:
    """Between ticks, a round one of which six to twelve fit."""
    return next((step for step in (1, 2, 5, 10, 20, 30, 60, 120) if length / step <= 12), length / 10)
