"""Watches every event loop of a process, of whatever kind, that has this folder in PYTHONPATH.

A beat every 5 ms notes by how much it was late, and what CPU time its process used meanwhile: the smaller of the two is
what the process itself has held the loop for, since a busy machine uses none of it. A thread notes where the loop is
while its beat is overdue. One file for each loop, in the folder of MILLSTREAM_LOOP_PROBE: JSON lines, the first of
which tells that the loop is watched, the others its pauses. tests/faults/harm.py reads them.
"""

from __future__ import annotations

import os

_FOLDER = os.environ.get("MILLSTREAM_LOOP_PROBE")

if _FOLDER:
    import asyncio
    import json
    import sys
    import threading
    import time
    import traceback
    from typing import Any

    _BEAT_S = 0.005
    _TOLD_S = 0.02
    """Shorter pauses are not told."""
    _SEEN_AFTER_S = (0.04, 0.2, 1.0)
    """When the stack of a loop whose beat is overdue is noted."""

    class _Beat:
        def __init__(self, loop: Any) -> None:
            self._loop = loop
            self._due = 0.0
            self._used = 0.0
            self._thread = 0
            self._stacks: list[list[str]] = []
            self._file = os.path.join(_FOLDER or "", f"{os.getpid()}-{id(self):x}.jsonl")
            loop.call_soon_threadsafe(self._start)

        def _start(self) -> None:
            self._thread = threading.get_ident()
            self._write(
                {"pid": os.getpid(), "thread": threading.current_thread().name, "kind": type(self._loop).__name__}
            )
            self._expect()
            threading.Thread(target=self._look_for_ever, name="loop probe", daemon=True).start()

        def _expect(self) -> None:
            self._used = time.process_time()
            self._due = time.monotonic() + _BEAT_S
            self._loop.call_later(_BEAT_S, self._beat)

        def _beat(self) -> None:
            late_s = time.monotonic() - self._due
            used_s = time.process_time() - self._used
            if min(late_s, used_s) > _TOLD_S:
                self._write({"at": self._due, "late_s": late_s, "used_s": used_s, "stacks": self._stacks})
            self._stacks = []
            self._expect()

        def _look_for_ever(self) -> None:
            while True:
                time.sleep(0.01)
                late_s = time.monotonic() - self._due
                stacks = self._stacks
                if len(stacks) < len(_SEEN_AFTER_S) and late_s > _SEEN_AFTER_S[len(stacks)]:
                    frame = sys._current_frames().get(self._thread)
                    if frame is not None and self._stacks is stacks:
                        lines = traceback.extract_stack(frame)[-12:]
                        stacks.append([f"{line.filename}:{line.lineno} {line.name}" for line in lines])
                    del frame

        def _write(self, told: dict[str, Any]) -> None:
            with open(self._file, "a") as file:
                file.write(json.dumps(told) + "\n")

    _watched: dict[int, tuple[Any, _Beat]] = {}
    _set_event_loop = asyncio.set_event_loop

    def _watching(loop: Any) -> None:
        _set_event_loop(loop)
        if loop is not None and id(loop) not in _watched:
            _watched[id(loop)] = (loop, _Beat(loop))

    asyncio.set_event_loop = _watching  # Ray's loops and Serve's are all set
