"""What a meter has done since its process began, for Prometheus."""

from __future__ import annotations

from collections import Counter

from deployments.contracts import DurationSum, MeterCounters, RequestCounter
from deployments.meter.ledger import Change

__all__ = ["Counters"]


class Counters:
    """Follows the ledger (`committed`), so that what Prometheus sums up is what the ledger has."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, str, str], RequestCounter] = {}
        self._admissions = DurationSum()
        self._commits = DurationSum()
        self.refusals: Counter[str] = Counter()
        """By code."""
        self.lost_reservations = 0

    def committed(self, changes: list[Change]) -> None:
        """The ledger's `on_committed`."""
        for change in changes:
            group = (change.model, change.key_id, change.team, change.status)
            if (counter := self._requests.get(group)) is None:
                counter = RequestCounter(change.model, change.key_id, change.team or None, change.status)
                self._requests[group] = counter
            counter.requests += change.requests
            counter.prompt_tokens += change.prompt_tokens
            counter.cached_tokens += change.cached_tokens
            counter.completion_tokens += change.completion_tokens
            counter.cost += change.cost

    def admitted(self, seconds: float) -> None:
        self._admissions.count += 1
        self._admissions.seconds += seconds

    def settled(self, seconds: float) -> None:
        self._commits.count += 1
        self._commits.seconds += seconds

    def told(self, *, wrong_keys: int, open_reservations: int, spooled: int) -> MeterCounters:
        """All of it, with what others count."""
        return MeterCounters(
            list(self._requests.values()),
            dict(self.refusals),
            self._admissions,
            self._commits,
            wrong_keys=wrong_keys,
            lost_reservations=self.lost_reservations,
            open_reservations=open_reservations,
            spooled=spooled,
        )
