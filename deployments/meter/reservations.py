"""What admitted requests may still use: the table against which limits are to be checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from deployments.meter.errors import MeterBusy

__all__ = ["Reservation", "Reservations"]


@dataclass(frozen=True)
class Reservation:
    """The most that one admitted request can use."""

    key_id: str
    model: str
    prompt_tokens: int
    """Over all prompts, each counted once."""
    completion_tokens: int
    """Over all prompts and choices."""


class Reservations:
    """Open reservations by request id, at most `capacity`.

    One whose request was never settled, because its ingress died before any engine knew of it, ends after
    `lifetime_s`; else the table would fill up with them.
    """

    def __init__(
        self,
        *,
        capacity: int = 100_000,
        lifetime_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._lifetime_s = lifetime_s
        self._clock = clock
        # Oldest first: a dict keeps the order of insertion, and replacing inserts anew.
        self._open: dict[str, tuple[float, Reservation]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def reserve(self, request_id: str, reservation: Reservation) -> None:
        """Opens a reservation, in place of an earlier one of the same request. Raises MeterBusy when full."""
        now = self._clock()
        self._open.pop(request_id, None)
        self._drop_expired(now)
        if len(self._open) >= self._capacity:
            raise MeterBusy("open reservations", self._capacity)
        self._open[request_id] = (now, reservation)

    def release(self, request_id: str) -> None:
        """Ends a reservation. Unknown ids are fine: settlements arrive twice, and after a restart of the
        meter."""
        self._open.pop(request_id, None)

    def _drop_expired(self, now: float) -> None:
        while self._open:
            oldest_id = next(iter(self._open))
            if now - self._open[oldest_id][0] < self._lifetime_s:
                return
            del self._open[oldest_id]
