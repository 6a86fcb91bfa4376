"""One engine and the step streams it feeds: submissions in, step messages out. Free of Ray.

One step stream per ingress replica carries the tokens of all its generations here (see step_outbox.py). A stream owns
its generations: when it ends, for whatever reason, they are aborted, so that an ingress that dies leaves no work
behind; what they used is settled from here then (orphans.py). The receiving side is
deployments/ingress/replica_stream.py.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
import structlog

from deployments.contracts import (
    EngineLoad,
    FinishReason,
    PositionLogprobs,
    Submission,
    SubmissionStatus,
    TokenDelta,
    pack,
)
from deployments.engine.engine import Engine, EngineQueueFull, EngineUnhealthy
from deployments.engine.orphans import Orphanage, Tabs
from deployments.engine.step_outbox import StepOutbox

__all__ = ["DrainRate", "EngineReplica"]

log = structlog.get_logger()


class DrainRate:
    """Generations that end per second, averaged exponentially over about ten seconds."""

    _HORIZON_S = 10.0

    def __init__(self, now: float) -> None:
        self._per_s = 0.0
        self._since = now
        self._ended = 0

    def count(self) -> None:
        self._ended += 1

    def read(self, now: float) -> float:
        elapsed_s = now - self._since
        if elapsed_s >= 1.0:
            weight = min(1.0, elapsed_s / self._HORIZON_S)
            self._per_s += weight * (self._ended / elapsed_s - self._per_s)
            self._since, self._ended = now, 0
        return self._per_s


@dataclass
class _Stream:
    outbox: StepOutbox
    keys: dict[int, str] = field(default_factory=dict)
    """Generation number on this stream -> key in the engine."""
    tabs: Tabs = field(default_factory=Tabs)


class EngineReplica:
    """Feeds one step stream per ingress replica from one engine."""

    def __init__(self, engine: Engine, orphanage: Orphanage) -> None:
        self._engine = engine
        self._orphanage = orphanage
        engine.on_death = self._end_streams
        self._streams: dict[str, _Stream] = {}
        self._drain_rate = DrainRate(time.monotonic())
        self._submitted = 0

    def load(self) -> EngineLoad:
        return msgspec.structs.replace(self._engine.load(), finished_per_s=self._drain_rate.read(time.monotonic()))

    async def steps(self, stream_id: str) -> AsyncGenerator[bytes, None]:
        """Open the step stream `stream_id` and yield packed `EngineStep` messages until the caller goes away."""
        ingress = stream_id.rpartition("#")[0]  # as ReplicaStream names its connections
        self._orphanage.returned(ingress)
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
            for key in stream.keys.values():
                self._engine.abort(key)
            self._orphanage.take(ingress, stream.tabs)
            log.info("step stream closed", stream=stream_id, aborted=len(stream.keys))

    def submit(self, stream_id: str, submissions: list[Submission], released: list[str]) -> list[SubmissionStatus]:
        """Queue generations; their tokens travel on the stream `stream_id`. One status per submission, in order.

        `released` are requests that are settled and forgotten here.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return ["stream_unknown"] * len(submissions)
        stream.tabs.release(released)
        return [self._submit(stream, submission) for submission in submissions]

    def _submit(self, stream: _Stream, submission: Submission) -> SubmissionStatus:
        generation, choice = submission.generation, submission.choice
        self._submitted += 1
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
            if finish_reason is not None:
                stream.keys.pop(generation, None)
                self._drain_rate.count()
            if token_ids:
                tab.count(choice, len(token_ids), 0 if submission.resumed else cached_tokens)
            stream.outbox.push(
                TokenDelta(
                    generation, token_ids, finish_reason, cached_tokens, message, param, logprobs, prompt_logprobs
                )
            )

        stream.keys[generation] = key
        tab = stream.tabs.open(submission)
        try:
            self._engine.submit(key, submission.token_ids, submission.sampling, deliver, resumed=submission.resumed)
        except EngineQueueFull:
            del stream.keys[generation]
            stream.tabs.refuse(submission)
            return "queue_full"
        return "accepted"

    def abort(self, stream_id: str, generations: list[int], released: list[str]) -> None:
        """Stop generations; unknown ones have ended already. `released` as for `submit`."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.tabs.release(released)
        for generation in generations:
            key = stream.keys.pop(generation, None)
            if key is not None:
                self._engine.abort(key)
            stream.outbox.forget(generation)
        stream.outbox.touch()

    async def check_health(self) -> None:
        """Raise EngineUnhealthy when the engine is dead or hung; its generations then resume on other replicas."""
        try:
            await self._engine.check_health()
        except EngineUnhealthy:
            self._end_streams()
            raise

    async def shutdown(self) -> None:
        self._end_streams()
        self._orphanage.close()
        await self._engine.shutdown()

    def _end_streams(self) -> None:
        """Every ingress takes a stream that ends for the loss of this replica and resumes elsewhere at once."""
        for stream in self._streams.values():
            stream.outbox.close()
