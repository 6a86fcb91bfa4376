"""How much an owner has used in the day or month that runs, in UTC. Pure: time is an argument, Unix time in seconds.

A request belongs to the day in which it arrived, as in the ledger (deployments/meter/ledger/schema.py, USAGE_HOURS),
which is asked once for each day and month; from then on what is committed is added up here.
"""

from __future__ import annotations

from deployments.meter.ledger.periods import Period, PeriodName

__all__ = ["Quota"]


class Quota:
    """Used by one owner in the running day or month; unknown until it is loaded."""

    def __init__(self, name: PeriodName) -> None:
        self.name: PeriodName = name
        self._period = Period(0.0, 0.0)
        self._tokens = 0
        self._cost = 0.0

    def is_loaded(self, now: float) -> bool:
        """Whether it knows the period that runs."""
        return self._period.begins_at <= now < self._period.ends_at

    def load(self, period: Period, tokens: int, cost: float) -> None:
        """What the ledger has of `period`."""
        self._period, self._tokens, self._cost = period, tokens, cost

    def add(self, started_at: float, tokens: int, cost: float) -> None:
        """The ledger has gained this, of a request that arrived at `started_at`; negative when a row was replaced."""
        if self.is_loaded(started_at):
            self._tokens += tokens
            self._cost += cost

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def cost(self) -> float:
        return self._cost

    def wait_s(self, now: float) -> float:
        """Seconds until the next period begins."""
        return self._period.ends_at - now
