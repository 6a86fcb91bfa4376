"""How long turns of the event loops of a running cluster take, seen from inside of its processes (loop_probe)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from tests.conftest import eventually

__all__ = ["LoopPause", "LoopWatch", "watched_loops"]


class LoopPause(NamedTuple):
    """A loop that did not turn."""

    pid: int
    at: float
    """When it should have, by time.monotonic."""
    late_s: float
    held_s: float
    """What of it was its process's own doing (loop_probe/loop_beat.py)."""
    stacks: list[list[str]]
    """Where it was meanwhile, innermost last."""


class LoopWatch(NamedTuple):
    loops: dict[int, int]
    """How many are watched, by process."""
    pauses: list[LoopPause]
    """Those above 20 ms, complete once the watch has ended."""


@asynccontextmanager
async def watched_loops(home: Path, pids: Collection[int]) -> AsyncIterator[LoopWatch]:
    """Of these processes, all of which were started with loop_probe.probe_environment."""
    folder = home / "loop-probe"
    for file in folder.glob("*.jsonl"):  # of an earlier watch
        file.unlink()
    watch = LoopWatch(dict.fromkeys(pids, 0), [])

    async def all_watched() -> bool:
        for pid in pids:
            watch.loops[pid] = len(list(folder.glob(f"{pid}-*.jsonl")))
        return all(watch.loops.values())

    on = folder / "on"
    on.touch()
    try:
        await eventually(all_watched, 20.0)
        yield watch
    finally:
        on.unlink()
        for file in folder.glob("*.jsonl"):
            pid = int(file.name.partition("-")[0])
            if pid in watch.loops:
                for line in file.read_text().splitlines()[1:]:
                    watch.pauses.append(LoopPause(pid, **json.loads(line)))
