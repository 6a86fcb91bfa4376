"""The sending end of one step stream: merges what the engine produced while the receiver was not pulling.

An idle system sends each engine step at once; a loaded one sends fewer, larger messages. There is no timer and no
fixed batching interval, since either would make tokens arrive in bunches. Free of Ray, so that it is tested alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from deployments.contracts import EngineLoad, EngineStep, FinishReason, TokenDelta

__all__ = ["HEARTBEAT_S", "StepOutbox"]

HEARTBEAT_S = 1.0
"""Longest silence on a healthy stream; coupled with SILENCE_LIMIT_S in deployments/ingress/replica_stream.py."""


class StepOutbox:
    """News for one ingress replica, at most one message's worth.

    Bounded by construction: it holds at most the tokens that the stream's live generations may still produce.
    """

    def __init__(self, load: Callable[[], EngineLoad], *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._load = load
        self._heartbeat_s = heartbeat_s
        self._deltas: dict[int, TokenDelta] = {}
        self._news = asyncio.Event()
        self._closed = False
        self._sequence = 0

    def push(
        self,
        generation: int,
        token_ids: list[int],
        finish_reason: FinishReason | None,
        *,
        cached_tokens: int = 0,
        message: str = "",
    ) -> None:
        """Add what `generation` gained, behind what has not been pulled yet. Ignored once closed: else an engine that
        goes on could keep the stream from ending."""
        if self._closed:
            return
        waiting = self._deltas.get(generation)
        if waiting is not None:
            token_ids = waiting.token_ids + token_ids
            cached_tokens = cached_tokens or waiting.cached_tokens
        self._deltas[generation] = TokenDelta(generation, token_ids, finish_reason, cached_tokens, message)
        self._news.set()

    def forget(self, generation: int) -> None:
        """Drop what an aborted generation left behind."""
        self._deltas.pop(generation, None)

    def touch(self) -> None:
        """Send a message soon even without news of a generation: the load has changed."""
        self._news.set()

    def close(self) -> None:
        """End the stream after what has been pushed is pulled."""
        self._closed = True
        self._news.set()

    async def steps(self) -> AsyncGenerator[EngineStep, None]:
        """The messages, each made when the receiver asks for it; the first comes at once and only tells the load."""
        yield self._take()
        while not self._closed or self._deltas:
            if not self._news.is_set():
                try:
                    async with asyncio.timeout(self._heartbeat_s):
                        await self._news.wait()
                except TimeoutError:
                    pass  # nothing new for a while: the message below is the heartbeat
            yield self._take()

    def _take(self) -> EngineStep:
        deltas = list(self._deltas.values())
        self._deltas.clear()
        if not self._closed:
            self._news.clear()
        step = EngineStep(self._sequence, self._load(), deltas)
        self._sequence += 1
        return step
