"""The scaling decision of a model's pool as a policy of Ray Serve, whose controller calls it ten times a second."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import ray
from ray.serve.config import AutoscalingContext
from ray.util.metrics import Counter

from deployments.scaling.decision import (
    Decision,
    PoolScaler,
    PoolSignals,
    ReplicaSignals,
    ScalingTargets,
)
from deployments.scaling.placement import unschedulable_reason
from deployments.scaling.scaling_board import DecisionBoard, ShownDecision, demand_of, log_folder

__all__ = ["DecisionLog", "PacedPolicy", "PoolPolicy", "latest_values"]

_log = logging.getLogger("ray.serve")
"""Serve's own, which its controller writes to a file: these lines belong among its others."""
_PERIOD_S = 0.5
_SHOW_AGAIN_S = 2.0
_COMING_S, _PLACE_PERIOD_S = 2.0, 5.0
"""Replicas that are missing for so long may have no place; that is looked into so often."""
_REPORT_LIMIT_S = 10.0
"""What a replica said longer ago says nothing of now."""


def latest_values(ctx: AutoscalingContext) -> list[dict[str, float]]:
    """What each replica reported last through `record_autoscaling_stats`, without those that said nothing lately."""
    told: dict[Any, dict[str, float]] = {}
    for name, series_of_replicas in (ctx.raw_metrics or {}).items():
        for replica, series in series_of_replicas.items():
            if series and ctx.current_time - series[-1].timestamp < _REPORT_LIMIT_S:
                told.setdefault(replica, {})[name] = series[-1].value
    return list(told.values())


class DecisionLog:
    """Tells of decisions: in the log and a counter when the number changes, and on the board."""

    def __init__(self, application: str) -> None:
        self._application = application
        folder = log_folder()
        self._board = None if folder is None else DecisionBoard(folder)
        self._shown = ShownDecision(application, 0, "", 0.0)
        self._shown_at = -math.inf
        self._changes = Counter(
            "millstream_scaling_decisions",
            description="Changes of the number of replicas that were decided on",
            tag_keys=("application", "direction"),
        )

    def tell(self, now: float, target: int, decision: Decision) -> None:
        """`target`: what was wanted before. `now` in Unix seconds."""
        if decision.replicas != target:
            direction = "up" if decision.replicas > target else "down"
            self._changes.inc(tags={"application": self._application, "direction": direction})
            _log.info("Scaling %s from %d to %d: %s", self._application, target, decision.replicas, decision.reason)
            shown = ShownDecision(
                self._application, decision.replicas, decision.reason, now, now, target, decision.reason
            )
        elif now - self._shown_at >= _SHOW_AGAIN_S:
            shown = msgspec.structs.replace(
                self._shown, replicas=decision.replicas, reason=decision.reason, shown_at=now
            )
        else:
            return
        self._shown, self._shown_at = shown, now
        if self._board is not None:
            self._board.show(shown)


class PacedPolicy(ABC):
    """A policy that decides twice a second, and tells of it, however often Serve asks."""

    def __init__(self) -> None:
        self._log: DecisionLog | None = None
        self._decided_at = -math.inf

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        now = time.monotonic()
        target: int = ctx.target_num_replicas
        if now - self._decided_at < _PERIOD_S:
            return target, {}
        self._decided_at = now
        decision = self._decision(now, ctx)
        if decision is None:
            return target, {}
        if self._log is None:
            self._log = DecisionLog(ctx.app_name)
        self._log.tell(ctx.current_time, target, decision)
        return decision.replicas, {}

    @abstractmethod
    def _decision(self, now: float, ctx: AutoscalingContext) -> Decision | None:
        """None while too little is known to change anything. `now` in seconds of a steady clock."""


class PoolPolicy(PacedPolicy):
    """For `autoscaling_config.policy` of a deployment Engine."""

    def __init__(self, model: str, targets: Mapping[str, Any], needs: Mapping[str, float]) -> None:
        """`needs`: what a replica reserves, by Ray's name of the resource."""
        super().__init__()
        self._model = model
        self._needs = needs
        self._complete_at = self._placed_at = -math.inf
        self._no_place: str | None = None
        self._decide: Callable[[float, PoolSignals], Decision] = PoolScaler(ScalingTargets(**targets)).decide

    def _decision(self, now: float, ctx: AutoscalingContext) -> Decision | None:
        target = ctx.target_num_replicas
        replicas = [
            ReplicaSignals(*(values[field] for field in ReplicaSignals._fields))
            for values in latest_values(ctx)
            if values.keys() >= set(ReplicaSignals._fields)
        ]
        if ctx.running_replicas and not replicas:
            return None  # they have not reported yet, or not to this controller
        demand = demand_of(self._model, ctx.current_time)
        signals = PoolSignals(target=target, replicas=tuple(replicas), **demand._asdict())
        decision = self._decide(now, signals)
        if no_place := self._missing(now, len(ctx.running_replicas), target):
            decision = Decision(decision.replicas, f"{decision.reason}; {no_place}")
        return decision

    def _missing(self, now: float, running: int, target: int) -> str | None:
        """Why replicas do not come, if the nodes cannot hold so many; looked at while some have been missing for long.

        What others use does not count: what is free would not tell replicas that start from those without a place.
        """
        if running >= target:
            self._complete_at, self._no_place = now, None
        elif now - self._complete_at >= _COMING_S and now - self._placed_at >= _PLACE_PERIOD_S:
            self._placed_at = now
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            free = {
                name: sum(node.get(name, 0.0) for node in nodes) - (target - 1) * amount
                for name, amount in self._needs.items()
            }
            reason = unschedulable_reason(self._needs, nodes, free)
            told = reason and f"{target - running} of {target} replicas are not up: {reason}"
            if told and told != self._no_place:
                _log.warning("No place for replicas of %s: %s", self._model, told)
            self._no_place = told
        return self._no_place
