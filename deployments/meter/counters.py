"""What a meter has done since its process began, for Prometheus."""

from __future__ import annotations

from collections import Counter

from deployments.contracts import USAGE_SUMS, DurationSum, MeterCounters, RequestCounter
from deployments.meter.ledger.rows import RowChange

__all__ = ["Counters"]

_Group = tuple[str, str, str, str]


class Counters:
    """Follows the ledger (`committed`), so that what Prometheus sums up is what the ledger has.

    A row that a better witness replaces leaves its group. What is told of the group then stands still until it has
    gained as much again: Prometheus takes a counter that goes down for one that began anew, and would count all of it
    a second time.
    """

    def __init__(self) -> None:
        self._exact: dict[_Group, RequestCounter] = {}
        self._told: dict[_Group, RequestCounter] = {}
        self._admissions = DurationSum()
        self._commits = DurationSum()
        self.refusals: Counter[str] = Counter()
        """By code."""
        self.lost_reservations = 0

    def committed(self, changes: list[RowChange]) -> None:
        """The ledger's `on_committed`."""
        for change in changes:
            group = (change.model, change.key_id, change.team, change.status)
            if (exact := self._exact.get(group)) is None:
                head = (change.model, change.key_id, change.team or None, change.status)
                exact = self._exact[group] = RequestCounter(*head)
                self._told[group] = RequestCounter(*head)
            told = self._told[group]
            for name in USAGE_SUMS:
                value = getattr(exact, name) + getattr(change, name)
                setattr(exact, name, value)
                setattr(told, name, max(value, getattr(told, name)))

    def admitted(self, seconds: float) -> None:
        self._admissions.count += 1
        self._admissions.seconds += seconds

    def settled(self, seconds: float) -> None:
        self._commits.count += 1
        self._commits.seconds += seconds

    def told(self, *, wrong_keys: int, open_reservations: int, spooled: int) -> MeterCounters:
        """All of it, with what others count."""
        return MeterCounters(
            list(self._told.values()),
            dict(self.refusals),
            self._admissions,
            self._commits,
            wrong_keys=wrong_keys,
            lost_reservations=self.lost_reservations,
            open_reservations=open_reservations,
            spooled=spooled,
        )
