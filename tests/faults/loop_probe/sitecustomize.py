"""Watches, on demand, the event loops of every process that has this folder in PYTHONPATH.

While there is a file `on` in the folder of MILLSTREAM_LOOP_PROBE, each loop has a file there of its own: JSON lines,
the first of which tells that the loop is watched, the others its pauses (loop_beat.py). tests/faults/loop_watch.py
reads them.
"""

from __future__ import annotations

import os

_FOLDER = os.environ.get("MILLSTREAM_LOOP_PROBE")

if _FOLDER:
    import asyncio
    import json
    import threading
    import time
    from collections.abc import Callable
    from typing import Any

    import uvloop
    from loop_beat import LoopBeat  # type: ignore[import-not-found]  # beside this file, in PYTHONPATH

    _TOLD_S = 0.02
    _LOOKS_EVERY_S = 0.5
    _loops: list[Any] = []
    _looking = threading.Lock()

    def _beat_of(loop: Any) -> LoopBeat:
        path = os.path.join(str(_FOLDER), f"{os.getpid()}-{id(loop):x}.jsonl")

        def write(told: dict[str, Any]) -> None:
            with open(path, "a") as file:
                file.write(json.dumps(told) + "\n")

        def started() -> None:
            write({"thread": threading.current_thread().name, "kind": type(loop).__name__})

        return LoopBeat(loop, write, started, _TOLD_S)

    def _look_loop() -> None:
        beats: dict[int, LoopBeat] = {}
        on = os.path.join(str(_FOLDER), "on")
        while True:
            time.sleep(_LOOKS_EVERY_S)
            _loops[:] = [loop for loop in _loops if not loop.is_closed()]
            if os.path.exists(on):
                for loop in _loops:
                    if loop.is_running() and id(loop) not in beats:
                        beats[id(loop)] = _beat_of(loop)
            else:
                for beat in beats.values():
                    beat.stop()
                beats.clear()

    def _watched(make: Callable[[], Any]) -> Callable[[], Any]:
        def new_event_loop() -> Any:
            _loops.append(loop := make())
            if _looking.acquire(blocking=False):  # the first one, and never released
                threading.Thread(target=_look_loop, name="loop probe", daemon=True).start()
            return loop

        return new_event_loop

    # By these Ray makes the loops of its actors, and Serve those of replicas.
    asyncio.new_event_loop = _watched(asyncio.new_event_loop)
    uvloop.new_event_loop = _watched(uvloop.new_event_loop)
