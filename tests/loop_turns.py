"""How long turns of an event loop took in the test's own process."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.faults.loop_probe.loop_beat import LoopBeat, Pause

__all__ = ["LONGEST_TURN_S", "LoopTurns", "assert_short", "loop_turns"]

LONGEST_TURN_S = 0.05
"""What one request may take of a loop that others need."""
_ATTEMPTS = 5
"""The best of so many counts: a collection of garbage, say, is not the request's."""


@dataclass
class LoopTurns:
    pauses: list[Pause] = field(default_factory=list)

    @property
    def longest_s(self) -> float:
        """Of this process's own doing; 0 for one too short to be told."""
        return max((pause["held_s"] for pause in self.pauses), default=0.0)

    def __str__(self) -> str:
        if not self.pauses:
            return "no pause"
        longest = max(self.pauses, key=lambda pause: float(pause["held_s"]))
        where = [line for stack in longest["stacks"] for line in [*stack[-8:], "-"]]
        return "\n".join([f"{longest['held_s']:.3f} s of {longest['late_s']:.3f} s in", *where])


@contextmanager
def loop_turns() -> Iterator[LoopTurns]:
    """Of the running loop."""
    turns = LoopTurns()
    beat = LoopBeat(asyncio.get_running_loop(), turns.pauses.append, lambda: None, told_s=0.005)
    try:
        yield turns
    finally:
        beat.stop()


async def assert_short(turns_of: Callable[[], Awaitable[LoopTurns]]) -> None:
    """No turn of what `turns_of` does takes longer than LONGEST_TURN_S."""
    gc.collect()
    gc.freeze()  # what other tests have left is none of a server's
    least = await turns_of()
    for _ in range(_ATTEMPTS - 1):
        if least.longest_s < LONGEST_TURN_S:
            break
        least = min(least, await turns_of(), key=lambda turns: turns.longest_s)
    assert least.longest_s < LONGEST_TURN_S, str(least)
