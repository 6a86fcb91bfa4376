"""The receiving end of one engine replica: its step stream, the generations on it, and whether it is alive.

A replica is in rotation while its step stream is live. A stream that breaks, ends or is silent means that the replica
is lost; its generations go back to the pool, and the stream is opened again as long as the replica is in the pool.
The sending end is deployments/engine/replica.py. Free of Ray: `ReplicaTransport` is the seam.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from itertools import chain, count, islice
from typing import Any, Protocol

import msgspec
import structlog

from deployments.contracts import EngineLoad, EngineStep, SubmissionStatus, pack, unpack
from deployments.ingress.coalescer import Coalescer
from deployments.ingress.errors import InternalError
from deployments.ingress.generation import Generation, Placement

__all__ = ["SILENCE_LIMIT_S", "ReplicaLost", "ReplicaStream", "ReplicaTransport"]

log = structlog.get_logger()

SILENCE_LIMIT_S = 3.0
"""A replica that sends nothing for so long is lost; heartbeats come every HEARTBEAT_S of
deployments/engine/step_outbox.py."""
_SUBMIT_LIMIT_S = 5.0
_RETRY_FIRST_S, _RETRY_MAX_S = 0.1, 4.0
_CONNECTIONS = count(1)
"""Numbers of all step streams that this process has opened: none is used again, be the replica in the pool again."""


class ReplicaLost(Exception):
    """The replica cannot be used now."""


class ReplicaTransport(Protocol):
    """How to reach one replica. Every method raises ReplicaLost when it cannot be reached."""

    def steps(self, stream_id: str) -> AsyncGenerator[bytes, None]:
        """Packed `EngineStep` messages, until the replica ends the stream."""

    async def submit(self, stream_id: str, submissions: bytes, released: list[str]) -> list[SubmissionStatus]:
        """Packed list of `Submission`. `released`: requests that are settled, which the replica may forget."""

    async def abort(self, stream_id: str, generations: list[int], released: list[str]) -> None: ...


class ReplicaStream:
    """One replica as this ingress sees it."""

    def __init__(
        self,
        replica_id: str,
        transport: ReplicaTransport,
        *,
        name: str,
        on_live: Callable[[], None],
        on_lost: Callable[[list[Generation]], None],
    ) -> None:
        self.replica_id = replica_id
        self.live = False
        """The stream is open and not silent."""
        self.draining = False
        """The replica is leaving: it finishes what it has and gets nothing new."""
        self.load = EngineLoad()
        self.generations: dict[int, Generation] = {}
        self.last_heard = 0.0
        """Event-loop time of the last message, in seconds."""
        self._transport = transport
        self._name = name
        self._connection = 0
        self._submissions = self._submitter()
        self._numbers = 0
        self._unreported = 0
        self._submitting: set[int] = set()
        """Generations on their way to the replica: an abort that overtook them would find nothing there."""
        self._aborted_early: set[int] = set()
        """Those of them that nobody wants any more; `submit` aborts them once the replica has them."""
        self._released: list[str] = []
        """Settled requests that the replica has not been told of; they travel with the next call."""
        self._retry_s = _RETRY_FIRST_S
        self._on_live = on_live
        self._on_lost = on_lost
        self._reader: asyncio.Task[None] | None = None
        self._emptied = asyncio.Event()

    @property
    def accepting(self) -> bool:
        return self.live and not self.draining

    @property
    def sequences(self) -> int:
        """Generations on the replica, of all ingress replicas: as reported, plus those submitted since."""
        return max(self.load.running + self.load.waiting + self._unreported, len(self.generations))

    # --- in the order in which they happen --------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the stream open until the replica has left the pool and is drained."""
        try:
            while not self.draining:
                self._retry_s = min(2 * self._retry_s, _RETRY_MAX_S)
                self._reader = asyncio.create_task(self._read(), name=f"steps-{self._name}")
                await asyncio.wait([self._reader])
                self._lose("broken" if self._reader.cancelled() else repr(self._reader.exception()))
                if not self.draining:
                    await asyncio.sleep(self._retry_s)
        finally:
            if self._reader is not None:
                self._reader.cancel()
                await asyncio.wait([self._reader])

    def submit(self, generations: list[Generation]) -> Coroutine[Any, Any, list[Generation]]:
        """Send generations to the replica; their tokens come through `Generation.deliver`. They count as its own from
        now on, so that of requests that come at the same moment not all choose the same replica.

        The result are those that the replica refused because its queue is full. Those that are lost with the stream
        while the call is under way go to `on_lost` as all others on it do. A call that fails for any other reason
        fails its own generations and leaves the others alone.
        """
        numbered: dict[int, Generation] = {}
        for generation in generations:
            if generation.ended:
                continue  # aborted since it was assigned to this replica: it had no placement to be aborted at
            self._numbers += 1
            generation.placement = Placement(self, self._numbers)
            numbered[self._numbers] = generation
        self.generations |= numbered
        self._unreported += len(numbered)
        self._submitting |= numbered.keys()
        return self._submit(numbered, self._connection)

    async def _submit(self, numbered: dict[int, Generation], connection: int) -> list[Generation]:
        if not numbered:
            return []
        statuses: list[SubmissionStatus] | None = None
        try:
            submissions = [msgspec.Raw(pack(generation.submission(number))) for number, generation in numbered.items()]
            async with asyncio.timeout(_SUBMIT_LIMIT_S):
                statuses = await self._submissions.call(submissions)
        except (ReplicaLost, TimeoutError) as error:
            self._break(f"submission failed: {error!r}", connection)
            return []
        except Exception:
            log.exception("submission failed", replica=self._name)
        finally:
            self._submitting -= numbered.keys()
            aborted = self._aborted_early & numbered.keys()
            self._aborted_early -= aborted
        if statuses is None:
            for number, generation in numbered.items():
                if self._take(number):
                    generation.fail(InternalError())
            await self._send_abort(list(numbered))
            return []
        if "stream_unknown" in statuses:
            self._break("the replica does not know this stream", connection)
            return []
        if aborted:
            await self._send_abort(list(aborted))
        refused: list[Generation] = []
        for (number, generation), status in zip(numbered.items(), statuses, strict=True):
            if status == "accepted":
                generation.accepted()
            elif self._take(number):
                refused.append(generation)
        return refused

    async def abort(self, numbers: list[int]) -> None:
        """Stop generations: nothing of them arrives any more, and the replica frees what they hold."""
        taken = {number for number in numbers if self._take(number)}
        self._aborted_early |= taken & self._submitting
        if taken - self._submitting:
            await self._send_abort(list(taken - self._submitting))

    def release(self, request_id: str) -> None:
        """The request is settled for good: the replica need not be able to."""
        if self.live:
            self._released.append(request_id)

    def check_silence(self, now: float) -> None:
        """Give the replica up when nothing was heard of it for SILENCE_LIMIT_S; `now` in event-loop time."""
        if self.live and now - self.last_heard > SILENCE_LIMIT_S:
            self._break(f"silent for {now - self.last_heard:.1f} s")

    async def drain(self, limit_s: float) -> None:
        """Let what runs here finish, at most `limit_s`; give the rest back; then close the stream."""
        self.draining = True
        self._emptied.clear()
        if self.generations and self.live:
            try:
                async with asyncio.timeout(limit_s):
                    await self._emptied.wait()
            except TimeoutError:
                log.info("moving generations off a leaving replica", replica=self._name)
        self._break("drained")

    # --- internals ---------------------------------------------------------------------------------------------------

    @property
    def _stream_id(self) -> str:
        # deployments/engine/replica.py knows by what is before the number that this ingress has come back.
        return f"{self._name}#{self._connection}"

    def _submitter(self) -> Coalescer[list[msgspec.Raw], list[SubmissionStatus]]:
        """Sends submissions over the present connection."""
        stream_id = self._stream_id

        async def send(batch: list[list[msgspec.Raw]]) -> list[list[SubmissionStatus]]:
            async with asyncio.timeout(_SUBMIT_LIMIT_S):
                submissions = msgspec.msgpack.encode([*chain(*batch)])
                statuses = await self._transport.submit(stream_id, submissions, self._take_released())
            if len(statuses) != sum(map(len, batch)):
                raise RuntimeError(f"{len(statuses)} statuses for {sum(map(len, batch))} submissions")
            each = iter(statuses)
            return [list(islice(each, len(submissions))) for submissions in batch]

        return Coalescer(send)

    async def _send_abort(self, numbers: list[int]) -> None:
        connection = self._connection
        try:
            async with asyncio.timeout(_SUBMIT_LIMIT_S):
                await self._transport.abort(self._stream_id, numbers, self._take_released())
        except (ReplicaLost, TimeoutError) as error:
            # The generations end with the stream, which is broken now if it was not before.
            self._break(f"abort failed: {error!r}", connection)
        except Exception:
            log.exception("abort failed", replica=self._name)

    def _take_released(self) -> list[str]:
        released, self._released = self._released, []
        return released

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        self._connection = next(_CONNECTIONS)
        self._submissions = self._submitter()
        self.last_heard = loop.time()
        async with aclosing(self._transport.steps(self._stream_id)) as steps:
            for expected in count():
                try:
                    # The first message has a limit of its own, since only live streams are watched for silence.
                    async with asyncio.timeout(None if expected else SILENCE_LIMIT_S):
                        message = await anext(steps)
                except StopAsyncIteration:
                    return
                self.last_heard = loop.time()
                step = unpack(message, EngineStep)
                if step.sequence != expected:
                    raise ReplicaLost(f"message {step.sequence} came in place of {expected}: tokens are missing")
                self._apply(step)
                if not expected:
                    self.live = True
                    self._retry_s = _RETRY_FIRST_S
                    log.info("replica in rotation", replica=self._name)
                    self._on_live()
                if self._released and not step.deltas:  # there is time, and no call may come to carry them
                    await self._send_abort([])

    def _apply(self, step: EngineStep) -> None:
        self.load = step.load
        self._unreported = 0
        for delta in step.deltas:
            generation = self.generations.get(delta.generation)
            if generation is None:
                continue  # aborted or moved to another replica
            if delta.finish_reason is not None:
                self._take(delta.generation)
                if delta.finish_reason == "failed":
                    log.error("engine failed a generation", replica=self._name, reason=delta.message)
            generation.deliver(delta)

    def _take(self, number: int) -> bool:
        """Take a generation off the stream; False when it has ended or moved already."""
        taken = self.generations.pop(number, None) is not None
        if not self.generations:
            self._emptied.set()
        return taken

    def _break(self, reason: str, connection: int | None = None) -> None:
        """Give the stream up; `run` opens it again if the replica is to stay.

        A call that was made over an earlier `connection` says nothing about the present one.
        """
        if connection is not None and connection != self._connection:
            return
        self._lose(reason)
        if self._reader is not None:
            self._reader.cancel()

    def _lose(self, reason: str) -> None:
        was_live = self.live
        if was_live:
            self.live = False
            log.info("replica out of rotation", replica=self._name, reason=reason, moving=len(self.generations))
        self.load = EngineLoad()
        self._unreported = 0
        self._released.clear()
        self._emptied.set()
        lost = list(self.generations.values())
        self.generations.clear()
        if lost or was_live:
            self._on_lost(lost)
