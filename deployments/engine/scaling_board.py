"""What the scaling policies of one Serve controller share: ingress reports that pools need, and decisions to be shown.

Serve runs the policies of all deployments in its controller. That of the ingress writes here what ingress replicas
report, those of the models read it: a pool without replicas has no other voice. Apart from the policies because Serve
pickles those by value: their globals would be copies, those of an imported module are one for the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from deployments.ingress.demand import ModelDemand

__all__ = ["DecisionBoard", "ShownDecision", "demand_of", "report_demands"]

_STALE_S = 10.0
_demands: dict[str, tuple[float, ModelDemand]] = {}


def report_demands(now: float, demands: Mapping[str, ModelDemand]) -> None:
    """`now` in Unix seconds, as Serve tells its policies."""
    _demands.update({model: (now, demand) for model, demand in demands.items()})


def demand_of(model: str, now: float) -> ModelDemand:
    """The latest report; nothing is asked for when it is old."""
    reported_at, demand = _demands.get(model, (0.0, ModelDemand()))
    return demand if now - reported_at < _STALE_S else ModelDemand()


class ShownDecision(msgspec.Struct, frozen=True):
    """The latest word on the number of one deployment's replicas."""

    replicas: int
    reason: str
    changed_at: float | None = None
    """Unix time in seconds at which the number last changed; None if it has not since the controller began."""
    changed_from: int | None = None
    changed_for: str | None = None
    """The reason of then."""


class DecisionBoard:
    """Decisions as files of the head node, one per application, for `millstream status`."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "run" / "autoscaling"

    def show(self, application: str, decision: ShownDecision) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{application}.json"
        new = file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(decision))
        os.replace(new, file)

    def read(self, application: str) -> ShownDecision | None:
        """None while nothing is decided, as for a fixed number of replicas, or by nobody."""
        file = self._folder / f"{application}.json"
        try:
            if time.time() - file.stat().st_mtime > _STALE_S:
                return None
            return msgspec.json.decode(file.read_bytes(), type=ShownDecision)
        except FileNotFoundError:
            return None
