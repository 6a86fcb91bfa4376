"""What the scaling policies of one Serve controller share: ingress reports that pools need, and decisions to be shown.

Serve runs the policies of all deployments in its controller. That of the ingress writes here what ingress replicas
report, those of the models read it: a pool without replicas has no other voice. Apart from the policies because Serve
pickles those by value: their globals would be copies, those of an imported module are one for the process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Final

import msgspec

from deployments.scaling.ingress_demand import ModelDemand

__all__ = ["DECISION_FILES", "DecisionBoard", "ShownDecision", "demand_of", "log_folder", "report_demands"]

DECISION_FILES: Final = "scaling-*.json"

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

    application: str
    replicas: int
    reason: str
    shown_at: float
    """Unix time in seconds."""
    changed_at: float | None = None
    """Unix time in seconds at which the number last changed; None if it has not since the controller began."""
    changed_from: int | None = None
    changed_for: str | None = None
    """The reason of then."""

    def is_old(self, now: float) -> bool:
        """Whether nobody decides any more: the number is fixed, or the controller is gone."""
        return now - self.shown_at > _STALE_S


class DecisionBoard:
    """Decisions as files beside the logs of Serve's controller, one per application, for `millstream status`: Ray's
    dashboard hands out what is there, wherever the head node is (serve_app/serve_api.py)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def show(self, decision: ShownDecision) -> None:
        file = self._folder / DECISION_FILES.replace("*", decision.application)
        new = file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(decision))
        os.replace(new, file)


def log_folder() -> Path | None:
    """Where Serve logs in this process; None where it does not, as outside of Ray."""
    for handler in logging.getLogger("ray.serve").handlers:
        target = handler.target if isinstance(handler, MemoryHandler) else handler
        if isinstance(target, logging.FileHandler):
            return Path(target.baseFilename).parent
    return None
