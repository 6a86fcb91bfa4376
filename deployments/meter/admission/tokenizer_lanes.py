"""The threads on which texts become tokens: a lane for each order of duration, so that nobody's long text stands before
anybody's short one, and within a lane turns that are fair between the keys and teams.

A token's worth of text takes about 1.2 µs to encode: a text of LONG_SIZE characters 10 to 20 ms, one of 8 MiB 4 s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from deployments.meter.worker_threads import WorkerThreads

__all__ = ["LONG_SIZE", "TokenizerLanes"]

T = TypeVar("T")

LONG_SIZE: Final = 32_768
"""Characters and token ids of a request from which on it counts as long."""


class TokenizerLanes:
    """For use on one event loop."""

    def __init__(self, *, threads: int, max_waiting: int) -> None:
        """Both of each lane. Of what waits there, half at most is one owner's."""
        of_owner = max(1, max_waiting // 2)
        self._short, self._long = (
            WorkerThreads(name, threads=threads, max_waiting=max_waiting, max_waiting_of_owner=of_owner)
            for name in ("tokenizer", "tokenizer of long prompts")
        )
        self._loading = WorkerThreads("tokenizer files", threads=1, max_waiting=max_waiting)

    async def encode(self, call: Callable[[], T], *, owner: str, size: int) -> T:
        """Runs `call`, which encodes so many characters and token ids. Raises as WorkerThreads.run."""
        lane = self._long if size >= LONG_SIZE else self._short
        return await lane.run(call, owner=owner, size=size)

    async def load(self, call: Callable[[], T]) -> T:
        """Runs `call`, which reads a tokenizer. Raises as WorkerThreads.run."""
        return await self._loading.run(call)

    def close(self) -> None:
        """As WorkerThreads.close."""
        for lane in (self._short, self._long, self._loading):
            lane.close()
