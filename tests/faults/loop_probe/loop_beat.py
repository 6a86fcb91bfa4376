"""Whether an event loop turns: a beat on it every few milliseconds, and by how much each was late through the process's
own doing.

A beat may also be late because other processes have the CPUs, or other machines of the same host, which says nothing of
the code. So of its delay the time is taken off that the loop's thread waited for a CPU, and what the host took from the
machine for certain. No more counts than the process has computed meanwhile: in the loop's thread, or in another that
held the interpreter. Imports nothing of the project, since sitecustomize.py runs it in every process of a cluster.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["BEAT_S", "LoopBeat", "Pause"]

BEAT_S = 0.005
_SEEN_AFTER_S = (0.04, 0.2, 1.0)
"""When the stack of a loop whose beat is overdue is noted."""

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")

Pause = dict[str, Any]
"""`at`, when the beat was due, by time.monotonic; `late_s`, the whole delay; `held_s`, what of it counts; `stacks`,
where the loop was, innermost last."""


def _stolen_ticks() -> int:
    """Of all CPUs, by the host, so far, in whole ticks."""
    with open("/proc/stat", "rb") as file:
        return int(file.readline().split()[8])


class LoopBeat:
    """`tell` is called on the loop for each beat that was late by more than `told_s`, until `stop`."""

    def __init__(self, loop: Any, tell: Callable[[Pause], None], started: Callable[[], None], told_s: float) -> None:
        self._loop = loop
        self._tell = tell
        self._started = started
        self._told_s = told_s
        self._due = self._used = self._waited = 0.0
        self._stolen = 0
        self._thread = 0
        self._stacks: list[list[str]] = []
        self._stopped = False
        loop.call_soon_threadsafe(self._start)

    def stop(self) -> None:
        self._stopped = True

    def _start(self) -> None:
        self._thread = threading.get_ident()
        self._schedule = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        self._started()
        self._expect()
        threading.Thread(target=self._look, name="loop beat", daemon=True).start()

    def _waited_s(self) -> float:
        """For a CPU, so far."""
        with open(self._schedule, "rb") as file:
            return int(file.read().split()[1]) / 1e9

    def _expect(self) -> None:
        self._used, self._waited, self._stolen = time.process_time(), self._waited_s(), _stolen_ticks()
        self._due = time.monotonic() + BEAT_S
        self._loop.call_later(BEAT_S, self._beat)

    def _beat(self) -> None:
        if self._stopped:
            return
        late_s = time.monotonic() - self._due
        if late_s > self._told_s:
            # Two ticks apart may be little more than one.
            stolen_s = max(_stolen_ticks() - self._stolen - 1, 0) * _TICK_S
            waited_s = self._waited_s() - self._waited
            held_s = min(late_s - waited_s - stolen_s, time.process_time() - self._used)
            if held_s > self._told_s:
                self._tell({"at": self._due, "late_s": late_s, "held_s": held_s, "stacks": self._stacks})
        self._stacks = []
        self._expect()

    def _look(self) -> None:
        while not self._stopped:
            time.sleep(0.01)
            late_s = time.monotonic() - self._due
            stacks = self._stacks
            if len(stacks) < len(_SEEN_AFTER_S) and late_s > _SEEN_AFTER_S[len(stacks)]:
                frame = sys._current_frames().get(self._thread)
                if frame is not None and self._stacks is stacks:
                    lines = traceback.extract_stack(frame)[-12:]
                    stacks.append([f"{line.filename}:{line.lineno} {line.name}" for line in lines])
                del frame
