"""Blocking work beside the event loop, with what ThreadPoolExecutor lacks: bounds on what waits, turns that are fair
between the owners of what waits (fair_queue.py), and cancelling that takes a waiting call out of the queue at once
instead of leaving it there with all it refers to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from deployments.meter.errors import MeterBusy, MeterClosed, OwnerBusy
from deployments.meter.fair_queue import FairQueue, QueueFull

__all__ = ["WorkerThreads"]

T = TypeVar("T")

_NEWEST: Final = 0.1
"""Weight of the last call in the mean of what calls take."""


class WorkerThreads:
    """`threads` calls at a time, at most `max_waiting` more behind them. For use on one event loop."""

    def __init__(self, name: str, *, threads: int, max_waiting: int, max_waiting_of_owner: int | None = None) -> None:
        """`max_waiting_of_owner`: of any one owner; None for as many as may wait at all."""
        self._name = name
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = threads
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue(
            capacity=max_waiting, per_owner=max_waiting if max_waiting_of_owner is None else max_waiting_of_owner
        )
        self._mean_s = 0.0
        self._closed = False

    async def run(self, call: Callable[[], T], *, owner: str = "", size: int = 1) -> T:
        """What `call` returns or raises. A call that has begun runs to its end even if the caller is
        cancelled. Turns are fair between owners, by the sizes of their calls; those of one owner keep their order.

        Raises OwnerBusy when calls of this owner fill what it may have waiting, MeterBusy when those of all do, and
        MeterClosed after `close`.
        """
        if self._closed:
            raise MeterClosed(self._name)
        if self._free:
            self._free -= 1
        else:
            await self._turn(owner, size)
        if self._closed:
            raise MeterClosed(self._name)
        result = asyncio.get_running_loop().run_in_executor(self._executor, self._timed, call)
        # The thread is free when the call ends, not when its caller gives up.
        result.add_done_callback(self._ended)
        returned, _ = await asyncio.shield(result)
        return returned

    def close(self) -> None:
        """Takes no more calls, and those that wait raise MeterClosed; does not wait for those that run. Safe twice."""
        self._closed = True
        for turn in self._queue.drain():
            if not turn.done():
                turn.set_exception(MeterClosed(self._name))
        self._executor.shutdown(wait=False)

    # --- internals ---------------------------------------------------------------------------------------------------

    async def _turn(self, owner: str, size: int) -> None:
        """Returns with a thread of its own."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            gives_way = self._queue.push(owner, size, turn)
        except QueueFull as full:
            if full.of_owner:
                raise OwnerBusy(self._name, full.limit, self._wait_s()) from None
            raise MeterBusy(self._name, full.limit) from None
        if gives_way is not None and not gives_way.done():
            gives_way.set_exception(OwnerBusy(self._name, len(self._queue), self._wait_s()))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._queue.remove(owner, turn)
            elif turn.exception() is None:
                self._pass_on()  # it had just come to its turn
            raise

    def _timed(self, call: Callable[[], T]) -> tuple[T, float]:
        """In a thread."""
        began_s = time.perf_counter()
        result = call()
        return result, time.perf_counter() - began_s

    def _ended(self, result: asyncio.Future[tuple[T, float]]) -> None:
        if not result.cancelled() and result.exception() is None:
            self._mean_s += _NEWEST * (result.result()[1] - self._mean_s)
        self._pass_on()

    def _pass_on(self) -> None:
        """A thread is free."""
        while len(self._queue):
            turn = self._queue.pop()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _wait_s(self) -> float:
        """Until what waits now is done, if calls go on to take as long as they did; at least a second."""
        return max(1.0, (len(self._queue) + self._threads) * self._mean_s / self._threads)
