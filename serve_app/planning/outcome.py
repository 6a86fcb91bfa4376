"""What a simulation has shown: its raw course, and the figures that are read from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "Moment", "Outcome", "ScaleChange"]

Floats = npt.NDArray[np.float64]


class ScaleChange(NamedTuple):
    """A decision that changed the number of replicas."""

    at_s: float
    before: int
    after: int
    reason: str


class Moment(NamedTuple):
    """The pool at one decision, after it."""

    at_s: float
    wanted: int
    up: int
    """Taking requests."""
    counted: int
    """Starting, up or draining: what costs."""


class Interval(NamedTuple):
    """Of the time axis; NaN where nothing was served."""

    at_s: float
    arrivals_per_s: float
    first_token_p50_s: float
    first_token_p99_s: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    duration_s: float
    """Until everything had ended, or the workload was over."""
    arrived_at: Floats
    """Of each request, in order."""
    first_token_at: Floats
    """Of the same; NaN for those refused."""
    refused: Mapping[str, int]
    """By reason."""
    replica_seconds: float
    """From the decision to start a replica until it was gone."""
    peak_replicas: int
    moments: tuple[Moment, ...]
    """Every half second."""
    changes: tuple[ScaleChange, ...]

    @property
    def requests(self) -> int:
        return len(self.arrived_at)

    @property
    def first_token_s(self) -> Floats:
        """From arrival to first token, of those served."""
        waits = self.first_token_at - self.arrived_at
        served: Floats = waits[~np.isnan(waits)]
        return served

    def share_within(self, target_s: float) -> float:
        """Of all requests, those whose first token came in time; NaN without requests."""
        return float(np.count_nonzero(self.first_token_s <= target_s)) / self.requests if self.requests else math.nan

    @property
    def direction_changes(self) -> int:
        """How often the number of replicas turned from rising to falling or back."""
        rises = [change.after > change.before for change in self.changes]
        return sum(one != next_one for one, next_one in pairwise(rises))

    @property
    def mean_replicas(self) -> float:
        return self.replica_seconds / self.duration_s if self.duration_s else float(self.peak_replicas)

    def figures(self, target_first_token_s: float) -> dict[str, Any]:
        """For programs; None where there is nothing to tell."""
        waits = self.first_token_s
        percentiles = np.percentile(waits, (50, 90, 99)).tolist() if len(waits) else (None, None, None)
        return {
            "duration_s": self.duration_s,
            "requests": self.requests,
            "refused": sum(self.refused.values()),
            "refused_by_reason": dict(self.refused),
            "replica_hours": self.replica_seconds / 3600,
            "mean_replicas": self.mean_replicas,
            "peak_replicas": self.peak_replicas,
            "first_token_s": dict(zip(("p50", "p90", "p99"), percentiles, strict=True)),
            "target_first_token_s": target_first_token_s,
            "share_within_target": self.share_within(target_first_token_s) if self.requests else None,
            "direction_changes": self.direction_changes,
            "changes": [change._asdict() for change in self.changes],
        }

    def readable(self, target_first_token_s: float) -> list[tuple[str, str]]:
        """The same for people, without the changes: names and values."""
        figures = self.figures(target_first_token_s)
        share = figures["share_within_target"]
        return [
            ("requests", f"{self.requests:,}"),
            ("refused", f"{figures['refused']:,}"),
            *((f"refused: {reason}", f"{count:,}") for reason, count in self.refused.items()),
            ("replica-hours", f"{figures['replica_hours']:,.2f}"),
            ("replicas on average", f"{self.mean_replicas:,.1f}"),
            ("replicas at most", f"{self.peak_replicas:,}"),
            *(
                (f"first token, {name}", "–" if value is None else f"{value:,.3f} s")
                for name, value in figures["first_token_s"].items()
            ),
            (f"within {target_first_token_s:g} s", "–" if share is None else f"{share:.2%}"),
            ("changes of direction", f"{self.direction_changes:,}"),
        ]

    def intervals(self, points: int = 600) -> list[Interval]:
        """The whole time in equal parts of whole seconds, at most `points` of them; by arrival."""
        every_s = max(1, math.ceil(self.duration_s / points))
        times = np.arange(0, max(self.duration_s, 1.0), every_s)
        waits = self.first_token_at - self.arrived_at
        bounds = np.searchsorted(self.arrived_at, [*times, math.inf])
        intervals: list[Interval] = []
        for at, (begin, end) in zip(times.tolist(), pairwise(bounds.tolist()), strict=True):
            of_interval = waits[begin:end]
            served = of_interval[~np.isnan(of_interval)]
            p50, p99 = np.percentile(served, (50, 99)).tolist() if len(served) else (math.nan, math.nan)
            intervals.append(Interval(at, (end - begin) / every_s, p50, p99))
        return intervals
