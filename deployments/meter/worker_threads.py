"""Blocking work beside the event loop, with the two things that ThreadPoolExecutor lacks: a bound on what
waits, and cancelling that takes a waiting call out of the queue at once instead of leaving it there with all
it refers to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.meter.errors import MeterBusy, MeterClosed

__all__ = ["WorkerThreads"]

T = TypeVar("T")


class WorkerThreads:
    """`threads` calls at a time, at most `max_waiting` more behind them. For use on one event loop."""

    def __init__(self, name: str, *, threads: int, max_waiting: int) -> None:
        self._name = name
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = asyncio.Semaphore(threads)
        self._waiting = 0
        self._closed = False
        self._max_waiting = max_waiting

    async def run(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises. A call that has begun runs to its end even if the caller is
        cancelled.

        Raises MeterBusy when `max_waiting` calls wait already, MeterClosed after `close`.
        """
        if self._free.locked() and self._waiting >= self._max_waiting:
            raise MeterBusy(self._name, self._max_waiting)
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        if self._closed:
            self._free.release()
            raise MeterClosed(self._name)
        result = asyncio.get_running_loop().run_in_executor(self._executor, call)
        # The thread is free when the call ends, not when its caller gives up.
        result.add_done_callback(lambda _: self._free.release())
        return await asyncio.shield(result)

    def close(self) -> None:
        """Takes no more calls and does not wait for those that run. Safe twice."""
        self._closed = True
        self._executor.shutdown(wait=False)
