"""The sending end of one step stream: merges what the engine produced while the receiver was not pulling.

An idle system sends each engine step at once; a loaded one sends fewer, larger messages. There is no timer and no
fixed batching interval, since either would make tokens arrive in bunches. Free of Ray, so that it is tested alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import msgspec

from deployments.contracts import EngineLoad, EngineStep, TokenDelta

__all__ = ["HEARTBEAT_S", "StepOutbox"]

MESSAGE_LOGPROBS = 16_384
"""Log probabilities in one message, at most, unless the tokens of one delta have more: the receiver reads a message in
one turn of its event loop, some 0.5 µs for each."""
HEARTBEAT_S = 1.0
"""Longest silence on a healthy stream; coupled with SILENCE_LIMIT_S in
deployments/ingress/routing/replica_stream.py."""


class StepOutbox:
    """GenerationEvent for one ingress replica, at most one message's worth.

    Bounded by construction: it holds at most the tokens that the stream's live generations may still produce.
    """

    def __init__(self, load: Callable[[], EngineLoad], *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._load = load
        self._heartbeat_s = heartbeat_s
        self._deltas: dict[int, TokenDelta] = {}
        self._logprobs = False
        """Some of them have log probabilities."""
        self._news = asyncio.Event()
        self._closed = False
        self._sequence = 0
        self._acknowledged = 0
        self._refused: list[int] = []

    def push(self, delta: TokenDelta) -> None:
        """Add what a generation gained, behind what has not been pulled yet. Ignored once closed: else an engine that
        goes on could keep the stream from ending."""
        if self._closed:
            return
        waiting = self._deltas.get(delta.generation)
        self._deltas[delta.generation] = delta if waiting is None else _merged(waiting, delta)
        self._logprobs = self._logprobs or delta.logprobs is not None or delta.prompt_logprobs is not None
        self._news.set()

    def acknowledge(self, generation: int, *, refused: bool = False) -> None:
        """It was submitted, and is the last one so far."""
        self._acknowledged = generation
        if refused:
            self._refused.append(generation)
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
        if self._logprobs and deltas:
            part, rest = _parted(deltas[0])
            if rest is not None:
                self._deltas[rest.generation] = rest
                return self._step([part])
            deltas = deltas[: _fitting(deltas)]
        if len(deltas) == len(self._deltas):
            self._deltas.clear()
            self._logprobs = False
        else:
            for delta in deltas:
                del self._deltas[delta.generation]
        if not (self._closed or self._deltas):
            self._news.clear()
        return self._step(deltas)

    def _step(self, deltas: list[TokenDelta]) -> EngineStep:
        step = EngineStep(self._sequence, self._load(), deltas, self._acknowledged, self._refused)
        self._refused = []
        self._sequence += 1
        return step


def _parted(delta: TokenDelta) -> tuple[TokenDelta, TokenDelta | None]:
    """What of it fits into one message, and what comes behind: of a long prompt the log probabilities are told in
    parts without tokens."""
    told, size = delta.prompt_logprobs or [], 0
    for number, position in enumerate(told):
        size += 0 if position is None else len(position.token_ids)
        if size > MESSAGE_LOGPROBS and number:
            rest = msgspec.structs.replace(delta, prompt_logprobs=told[number:])
            return TokenDelta(delta.generation, [], prompt_logprobs=told[:number]), rest
    return delta, None


def _fitting(deltas: list[TokenDelta]) -> int:
    """How many of them make one message."""
    size = 0
    for number, delta in enumerate(deltas):
        for positions in (delta.logprobs, delta.prompt_logprobs):
            size += sum(len(position.token_ids) for position in positions or () if position is not None)
        if size > MESSAGE_LOGPROBS and number:
            return number
    return len(deltas)


def _merged(first: TokenDelta, second: TokenDelta) -> TokenDelta:
    return TokenDelta(
        first.generation,
        first.token_ids + second.token_ids,
        second.finish_reason,
        first.cached_tokens or second.cached_tokens,
        second.message,
        second.param,
        None if first.logprobs is None else first.logprobs + (second.logprobs or []),
        first.prompt_logprobs,
    )
