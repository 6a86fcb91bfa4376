"""Calls that are made while one is under way travel together in the next.

An idle system makes each call at once, a loaded one makes fewer, larger ones, and no timer decides. A call between two
processes costs more than what it carries (docs/performance.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Generic, TypeVar

__all__ = ["Coalescer"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Coalescer(Generic[Item, Answer]):
    """Bounded by its callers, who all wait for their answers."""

    def __init__(self, send: Callable[[list[Item]], Awaitable[list[Answer]]]) -> None:
        """`send` makes one call for many items and answers each, in order. It must be bounded in time, since all later
        calls wait for it. What it raises, all that travel in it raise."""
        self._send = send
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def call(self, item: Item) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._sender is None or self._sender.done():
            # In a context of its own: it carries calls of many requests, so no one request's end may cancel it.
            self._sender = asyncio.create_task(self._send_all(), context=Context())
        return await answer

    async def _send_all(self) -> None:
        while self._waiting:
            batch = [(item, answer) for item, answer in self._waiting if not answer.done()]  # the caller may be gone
            self._waiting = []
            if not batch:
                return
            try:
                answers = await self._send([item for item, _ in batch])
                if len(answers) != len(batch):
                    raise RuntimeError(f"{len(answers)} answers to {len(batch)} items")
            except Exception as error:
                for _, waiting in batch:
                    if not waiting.done():
                        waiting.set_exception(error)
            else:
                for (_, waiting), answer in zip(batch, answers, strict=True):
                    if not waiting.done():
                        waiting.set_result(answer)
