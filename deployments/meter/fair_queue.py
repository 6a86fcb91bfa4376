"""Who is next when the callers of several owners wait for the same few threads. A core: no threads, no event loop.

The owner that has had least is next, by the size of what it was given (start-time fair queueing: an owner that comes
back after a pause starts level with the others, and has nothing saved up). What one owner may have waiting is bounded,
and so is the whole; when that is full, whoever has most of it gives way to whoever has less.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

__all__ = ["FairQueue", "QueueFull"]

Item = TypeVar("Item")


class QueueFull(Exception):
    """There is no room for one more of this owner."""

    def __init__(self, *, of_owner: bool, limit: int) -> None:
        """`of_owner`: it has as much waiting as it may, whatever the others have."""
        super().__init__(of_owner, limit)
        self.of_owner = of_owner
        self.limit = limit


class FairQueue(Generic[Item]):
    def __init__(self, *, capacity: int, per_owner: int) -> None:
        self._capacity = capacity
        self._per_owner = per_owner
        self._waiting: dict[str, deque[tuple[int, Item]]] = {}
        """By owner, none empty."""
        self._had: dict[str, float] = {}
        """What each owner was given, counted from where it was level with the others."""
        self._level = 0.0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, owner: str, size: int, item: Item) -> Item | None:
        """Let `item` wait; an item of another owner that had to give way for it is returned. Raises QueueFull."""
        queue = self._waiting.get(owner)
        held = 0 if queue is None else len(queue)
        if held >= self._per_owner:
            raise QueueFull(of_owner=True, limit=self._per_owner)
        gone = None
        if self._count >= self._capacity:
            most = max(self._waiting, key=lambda other: len(self._waiting[other]), default=owner)
            if most == owner or len(self._waiting[most]) <= held + 1:
                raise QueueFull(of_owner=False, limit=self._capacity)
            _, gone = self._waiting[most].pop()
            self._left(most)
        if queue is None:
            queue = self._waiting[owner] = deque()
            self._had[owner] = max(self._had.get(owner, 0.0), self._level)
        queue.append((size, item))
        self._count += 1
        return gone

    def pop(self) -> Item:
        """The next of the owner that has had least; there must be one."""
        owner = min(self._waiting, key=self._had.__getitem__)
        size, item = self._waiting[owner].popleft()
        self._level = self._had[owner]
        self._had[owner] += size
        self._left(owner)
        if not self._waiting:
            self._had.clear()
            self._level = 0.0
        elif len(self._had) > 2 * len(self._waiting) + self._capacity:
            self._had = {each: had for each, had in self._had.items() if each in self._waiting or had > self._level}
        return item

    def remove(self, owner: str, item: Item) -> None:
        """It waits no more; nothing happens if it does not."""
        queue = self._waiting.get(owner, deque())
        for number, (_, each) in enumerate(queue):
            if each == item:
                del queue[number]
                self._left(owner)
                return

    def drain(self) -> list[Item]:
        """All that wait, in no order; none is left."""
        items = [item for queue in self._waiting.values() for _, item in queue]
        self._waiting.clear()
        self._had.clear()
        self._level, self._count = 0.0, 0
        return items

    def _left(self, owner: str) -> None:
        """One item of `owner` is out."""
        self._count -= 1
        if not self._waiting[owner]:
            del self._waiting[owner]
