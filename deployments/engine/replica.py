"""One engine and the step streams it feeds: commands in, step messages out. Free of Ray.

One step stream per ingress replica carries the tokens of all its generations here (see step_outbox.py). A stream owns
its generations: when it ends, for whatever reason, they are aborted, so that an ingress that dies leaves no work
behind; what they used is settled from here then (orphans.py). The receiving side is
deployments/ingress/routing/replica_stream.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec
import structlog

from deployments.contracts import (
    EngineCommands,
    EngineLoad,
    FinishReason,
    PositionLogprobs,
    Sampling,
    Sibling,
    Submission,
    TokenDelta,
    pack,
    unpack,
)
from deployments.engine.demand import ReplicaDemand
from deployments.engine.engine import Engine, EngineQueueFull, EngineUnhealthy
from deployments.engine.orphans import OrphanedRequests, RequestUsages
from deployments.engine.step_outbox import StepOutbox
from deployments.scaling.decision import ReplicaSignals

__all__ = ["EngineReplica"]

log = structlog.get_logger()


_TURN_GENERATIONS: Final = 8
_TURN_PROMPT_TOKENS: Final = 65_536
_TURN_ABORTS: Final = 64
"""What the engine is handed in one turn of the event loop: vLLM checks each generation there, some 0.3 ms and more with
the prompt. A request of a thousand must not hold up the tokens of others."""


class _Numbered(msgspec.Struct):
    """What is still told of a submission that cannot be read."""

    generation: int
    siblings: tuple[Sibling, ...] = ()


@dataclass(eq=False)
class _Stream:
    outbox: StepOutbox
    keys: dict[int, str] = field(default_factory=dict)
    """Generation number on this stream -> key in the engine."""
    usages: RequestUsages = field(default_factory=RequestUsages)
    arriving: set[int] = field(default_factory=set)
    """Generations that the engine does not have yet, and that nobody has aborted."""


class _Arrival(NamedTuple):
    """A generation that the engine does not have yet."""

    stream: _Stream
    generation: int
    choice: int
    submission: Submission | Exception
    """Or why it cannot be read."""
    sampling: Sampling | None


class EngineReplica:
    """Feeds one step stream per ingress replica from one engine."""

    def __init__(self, engine: Engine, orphans: OrphanedRequests, *, start_up_s: float = 0.0) -> None:
        """`start_up_s`: how long it took until the engine could be used."""
        self._engine = engine
        self._orphans = orphans
        engine.on_death = self._end_streams
        self._streams: dict[str, _Stream] = {}
        self._arrivals: deque[_Arrival] = deque()
        self._aborts: deque[str] = deque()
        """Keys in the engine. Both are bounded by what the ingresses have under way."""
        self._handing_over = False
        self._start_up_s = start_up_s
        self._demand = ReplicaDemand(time.monotonic())
        self._submitted = self._submitted_before = 0
        self._busy_at = time.monotonic()

    def load(self) -> EngineLoad:
        return msgspec.structs.replace(
            self._engine.load(),
            finished_per_s=self._demand.ends_per_s(time.monotonic()),
            start_up_s=self._start_up_s,
            max_num_seqs=self._engine.max_num_seqs,
            unsettled=self._orphans.unsettled,
        )

    def signals(self) -> ReplicaSignals:
        """What the decision on the number of replicas rests on."""
        now = time.monotonic()
        load, times, demand = self._engine.load(), self._engine.step_times, self._demand
        step_s, step_s_per_sequence = times.decode_s
        if load.running or load.waiting or self._submitted != self._submitted_before:
            self._busy_at, self._submitted_before = now, self._submitted
        return ReplicaSignals(
            running=load.running,
            waiting=load.waiting,
            waiting_prefill_tokens=load.waiting_prefill_tokens * demand.uncached_share,
            kv_blocks_used=load.kv_blocks_total - load.kv_blocks_free,
            kv_blocks_total=load.kv_blocks_total,
            max_num_seqs=self._engine.max_num_seqs,
            arrivals_per_s=demand.arrivals_per_s(now),
            arriving_prefill_tokens_per_s=demand.prefill_tokens_per_s(now),
            generated_tokens=demand.generated_tokens,
            prefill_tokens_per_s=times.prefill_tokens_per_s,
            step_s=step_s,
            step_s_per_sequence=step_s_per_sequence,
            start_up_s=self._start_up_s,
            idle_s=now - self._busy_at,
        )

    async def steps(self, stream_id: str) -> AsyncGenerator[bytes, None]:
        """Open the step stream `stream_id` and yield packed `EngineStep` messages until the caller goes away."""
        ingress = stream_id.rpartition("#")[0]  # as ReplicaStream names its connections
        self._orphans.returned(ingress)
        await self._engine.check_health()
        stream = _Stream(StepOutbox(self.load))
        self._streams[stream_id] = stream
        log.info("step stream opened", stream=stream_id)
        try:
            async with aclosing(stream.outbox.steps()) as steps:
                async for step in steps:
                    yield pack(step)
        finally:
            if self._streams.get(stream_id) is stream:
                del self._streams[stream_id]
            stream.arriving.clear()
            self._aborts.extend(stream.keys.values())
            self._hand_over_on()
            self._orphans.take(ingress, stream.usages)
            log.info("step stream closed", stream=stream_id, aborted=len(stream.keys))

    def take_commands(self, stream_id: str, commands: bytes) -> None:
        """Carry out packed `EngineCommands` that came with the stream `stream_id`; ignored when that has ended. Raises
        msgspec.DecodeError."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        asked = unpack(commands, EngineCommands)
        stream.usages.release(asked.released)
        for packed in asked.submissions:
            self._queue(stream, packed)
        for generation in asked.aborted:
            self._abort(stream, generation)
        self._hand_over_on()

    def _queue(self, stream: _Stream, packed: msgspec.Raw) -> None:
        try:
            submission = unpack(packed, Submission)
        except Exception as error:  # whatever it is: the generations of others go on
            unread = unpack(packed, _Numbered)
            arrivals = [
                _Arrival(stream, number, 0, error, None)
                for number in (unread.generation, *(each.generation for each in unread.siblings))
            ]
        else:
            sampling = submission.sampling
            arrivals = [_Arrival(stream, submission.generation, submission.choice, submission, sampling)]
            for sibling in submission.siblings:
                seeded = sampling if sibling.seed is None else msgspec.structs.replace(sampling, seed=sibling.seed)
                arrivals.append(_Arrival(stream, sibling.generation, sibling.choice, submission, seeded))
        stream.arriving.update(arrival.generation for arrival in arrivals)
        self._arrivals.extend(arrivals)

    def _abort(self, stream: _Stream, generation: int) -> None:
        if (key := stream.keys.pop(generation, None)) is not None:
            self._aborts.append(key)
        stream.arriving.discard(generation)
        stream.outbox.forget(generation)
        stream.outbox.touch()

    def _hand_over_on(self) -> None:
        """Now, unless more waits already."""
        if not self._handing_over:
            self._hand_over()

    def _hand_over(self) -> None:
        """To the engine, a bounded part of what waits in each turn of the event loop."""
        for _ in range(min(len(self._aborts), _TURN_ABORTS)):
            self._engine.abort(self._aborts.popleft())
        generations = prompt_tokens = 0
        while self._arrivals and generations < _TURN_GENERATIONS and prompt_tokens < _TURN_PROMPT_TOKENS:
            arrival = self._arrivals.popleft()
            if arrival.generation in arrival.stream.arriving:
                arrival.stream.arriving.remove(arrival.generation)
                generations += 1
                if isinstance(arrival.submission, Submission):
                    prompt_tokens += len(arrival.submission.token_ids)
                self._try_to_submit(arrival)
            else:
                arrival.stream.outbox.acknowledge(arrival.generation)
        self._handing_over = bool(self._aborts or self._arrivals)
        if self._handing_over:
            asyncio.get_running_loop().call_soon(self._hand_over)

    def _try_to_submit(self, arrival: _Arrival) -> None:
        stream, generation = arrival.stream, arrival.generation
        try:
            accepted = self._submit(arrival)
        except Exception as error:  # whatever it is: the generations of others go on
            log.exception("submission failed", generation=generation)
            if (key := stream.keys.pop(generation, None)) is not None:
                self._engine.abort(key)
            stream.outbox.push(TokenDelta(generation, [], "failed", message=repr(error)))
            accepted = True
        stream.outbox.acknowledge(generation, refused=not accepted)

    def _submit(self, arrival: _Arrival) -> bool:
        """False when the engine's queue is full."""
        stream, generation, choice, submission, sampling = arrival
        if isinstance(submission, Exception):
            raise submission
        assert sampling is not None
        self._submitted += 1
        prompt_tokens = len(submission.token_ids)
        generated = 0
        key = f"{submission.account.request_id}-{self._submitted}"

        def deliver(
            token_ids: list[int],
            finish_reason: FinishReason | None,
            *,
            cached_tokens: int = 0,
            message: str = "",
            param: str | None = None,
            logprobs: list[PositionLogprobs] | None = None,
            prompt_logprobs: list[PositionLogprobs | None] | None = None,
        ) -> None:
            nonlocal generated
            if token_ids and not generated:
                self._demand.prefilled(prompt_tokens, cached_tokens)
            generated += len(token_ids)
            if finish_reason is not None:
                stream.keys.pop(generation, None)
                self._demand.ended(generated)
            if token_ids:
                usage.count(choice, len(token_ids), 0 if submission.resumed else cached_tokens)
            stream.outbox.push(
                TokenDelta(
                    generation, token_ids, finish_reason, cached_tokens, message, param, logprobs, prompt_logprobs
                )
            )

        stream.keys[generation] = key
        usage = stream.usages.open(submission, choice)
        try:
            self._engine.submit(key, submission.token_ids, sampling, deliver, resumed=submission.resumed)
        except EngineQueueFull:
            del stream.keys[generation]
            stream.usages.refuse(submission, choice)
            return False
        self._demand.arrived(prompt_tokens)
        return True

    async def check_health(self) -> None:
        """Raise EngineUnhealthy when the engine is dead or hung; its generations then resume on other replicas."""
        try:
            await self._engine.check_health()
        except EngineUnhealthy:
            self._end_streams()
            raise

    async def shutdown(self) -> None:
        self._end_streams()
        self._orphans.close()
        await self._engine.shutdown()

    def _end_streams(self) -> None:
        """Every ingress takes a stream that ends for the loss of this replica and resumes elsewhere at once."""
        for stream in self._streams.values():
            stream.outbox.close()
