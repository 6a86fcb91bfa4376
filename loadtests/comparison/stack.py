"""What the processes of one system cost: CPU time and memory, without the load generator."""

from __future__ import annotations

from contextlib import suppress

import psutil

from serve_app.ray_node import processes_of

__all__ = ["Stack"]


class Stack:
    """All processes of a system: those with its mark in their environment (serve_app/ray_node.py)."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._begun = self._cpu_s()

    def cpu_s(self) -> float:
        """User and system seconds since this object was made. Of processes that have ended meanwhile nothing counts."""
        return sum(now - self._begun.get(process, 0.0) for process, now in self._cpu_s().items())

    def memory_bytes(self) -> int:
        """Proportional set sizes: what is shared counts once."""
        total = 0
        for process in processes_of(self._mark):
            with suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total

    def _cpu_s(self) -> dict[tuple[int, float], float]:
        """By process, with its time of creation, since ids are used again."""
        times: dict[tuple[int, float], float] = {}
        for process in processes_of(self._mark):
            with suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                times[process.pid, process.create_time()] = used.user + used.system
        return times
