"""A limit of a minute: what was admitted within the last 60 seconds. Pure: time is an argument, in seconds.

It slides: what is admitted at t counts in [t, t + 60), later corrections included. So no 60 seconds hold more than the
limit, nothing is held back longer than it must be, and the time at which there will be room is known exactly.
"""

from __future__ import annotations

import math
from collections import deque

__all__ = ["MinuteWindow", "WindowEntry"]


class WindowEntry:
    """One admission in a window."""

    __slots__ = ("admitted_at", "amount", "expired")

    def __init__(self, admitted_at: float, amount: int) -> None:
        self.admitted_at = admitted_at
        self.amount = amount
        self.expired = False


class MinuteWindow:
    """What was admitted within the last `span_s`, one entry each. `limit` may change at any time; None sets none."""

    __slots__ = ("_entries", "_span_s", "_sum", "limit")

    def __init__(self, limit: int | None = None, span_s: float = 60.0) -> None:
        self.limit = limit
        self._span_s = span_s
        self._entries: deque[WindowEntry] = deque()
        self._sum = 0

    def used(self, now: float) -> int:
        """Within the `span_s` that end now. Amortised O(1), as all but `wait_s`."""
        entries = self._entries
        # Not `admitted_at <= now - span_s`, which is rounded differently from the time that `wait_s` promises.
        while entries and entries[0].admitted_at + self._span_s <= now:
            entry = entries.popleft()
            entry.expired = True
            self._sum -= entry.amount
        return self._sum

    def room(self, now: float) -> int | None:
        """What may still be admitted, negative if the limit was lowered; None without a limit."""
        return None if self.limit is None else self.limit - self.used(now)

    def wait_s(self, now: float, amount: int) -> float | None:
        """Seconds until `amount` fits, if nothing else is admitted or corrected meanwhile: 0 if it does now, None if it
        never does. Looks at as many entries as have to leave."""
        if self.limit is None:
            return 0.0
        if amount > self.limit:
            return None
        missing = amount - (self.limit - self.used(now))
        if missing <= 0:
            return 0.0
        for entry in self._entries:
            missing -= entry.amount
            if missing <= 0:
                return _until(entry.admitted_at + self._span_s, now)
        raise AssertionError("the entries are more than their sum")

    def empty_s(self, now: float) -> float:
        """Seconds until nothing counts any more."""
        if not self.used(now):
            return 0.0
        last = next(entry for entry in reversed(self._entries) if entry.amount)
        return _until(last.admitted_at + self._span_s, now)

    def add(self, now: float, amount: int) -> WindowEntry:
        """Counts `amount` from now on; the entry is for `correct`."""
        entry = WindowEntry(now, amount)
        self._entries.append(entry)
        self._sum += amount
        return entry

    def correct(self, entry: WindowEntry, amount: int) -> None:
        """What was admitted as `entry` has used `amount` only, and has from its beginning."""
        if not entry.expired:
            self._sum += amount - entry.amount
            entry.amount = amount

    def __len__(self) -> int:
        return len(self._entries)


def _until(at: float, now: float) -> float:
    """The wait with `now + wait >= at`, whatever is rounded."""
    wait_s = at - now
    return wait_s if now + wait_s >= at else wait_s + math.ulp(at)
