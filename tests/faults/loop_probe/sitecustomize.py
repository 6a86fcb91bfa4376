"""Watches the event loops of every process that has this folder in PYTHONPATH.

One file for each loop, in the folder of MILLSTREAM_LOOP_PROBE: JSON lines, the first of which tells that the loop is
watched, the others its pauses (loop_beat.py). tests/faults/harm.py reads them.
"""

from __future__ import annotations

import os

_FOLDER = os.environ.get("MILLSTREAM_LOOP_PROBE")

if _FOLDER:
    import asyncio
    import json
    import threading
    from collections.abc import Callable
    from typing import Any

    import uvloop
    from loop_beat import LoopBeat  # type: ignore[import-not-found]  # beside this file, in PYTHONPATH

    _TOLD_S = 0.02

    def _watched(make: Callable[[], Any]) -> Callable[[], Any]:
        def new_event_loop() -> Any:
            loop = make()
            path = os.path.join(str(_FOLDER), f"{os.getpid()}-{id(loop):x}.jsonl")

            def write(told: dict[str, Any]) -> None:
                with open(path, "a") as file:
                    file.write(json.dumps(told) + "\n")

            def started() -> None:
                write({"thread": threading.current_thread().name, "kind": type(loop).__name__})

            LoopBeat(loop, write, started, _TOLD_S)
            return loop

        return new_event_loop

    # By these Ray makes the loops of its actors, and Serve those of replicas.
    asyncio.new_event_loop = _watched(asyncio.new_event_loop)
    uvloop.new_event_loop = _watched(uvloop.new_event_loop)
