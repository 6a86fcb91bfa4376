"""When the streams of this process are written: all that have news in one round, and no more rounds than it can afford.

A write to a connection costs far more than the tokens in it (docs/performance.md). So when a round takes long, because
there are many streams, the process rests as long before the next: what arrives meanwhile travels together. There is no
interval: few streams are written at once, token by token, and the more there are, the more tokens share a write.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

__all__ = ["WriteScheduler"]

_WORTH_A_REST_S: Final = 0.004
"""A round that takes less is followed by the next at once: nobody sees tokens that come so close together apart."""
_LONGEST_REST_S: Final = 0.01


class WriteScheduler:
    """One for all streams on an event loop. Bounded by the streams there are: each joins a round once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` in seconds; the event loop's own may count milliseconds only."""
        self._clock = clock
        self._joined: list[Callable[[], None]] = []
        self._scheduled = False
        self._not_before = 0.0

    def join(self, wake: Callable[[], None]) -> None:
        """Call `wake` in the next round; it resumes a task that writes without waiting for anything else."""
        self._joined.append(wake)
        if not self._scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._scheduled = True
        loop = asyncio.get_running_loop()
        rest_s = self._not_before - self._clock()
        if rest_s > 0:
            loop.call_later(rest_s, self._write)
        else:
            loop.call_soon(self._write)

    def _write(self) -> None:
        begun = self._clock()
        joined, self._joined = self._joined, []
        for wake in joined:
            wake()
        # The tasks that were woken run before this does: the loop keeps the order.
        asyncio.get_running_loop().call_soon(self._end, begun)

    def _end(self, begun: float) -> None:
        now = self._clock()
        took_s = now - begun
        self._not_before = now + min(took_s, _LONGEST_REST_S) if took_s >= _WORTH_A_REST_S else now
        self._scheduled = False
        if self._joined:
            self._schedule()
