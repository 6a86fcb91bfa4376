"""The receiving end of one engine replica: its step stream, the generations on it, and whether it is alive.

A replica is in rotation while its step stream is live. A stream that breaks, ends or is silent means that the replica
is lost; its generations go back to the pool, and the stream is opened again as long as the replica is in the pool.
The sending end is deployments/engine/replica.py. Free of Ray: `ReplicaTransport` is the seam.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from itertools import count
from typing import Protocol

import msgspec
import structlog

from deployments.contracts import EngineCommands, EngineLoad, EngineStep, Sibling, pack, unpack
from deployments.ingress.errors import InternalError
from deployments.ingress.inference.generation import Generation, Placement

__all__ = ["SILENCE_LIMIT_S", "ReplicaLine", "ReplicaLost", "ReplicaStream", "ReplicaTransport"]

log = structlog.get_logger()

SILENCE_LIMIT_S = 3.0
"""A replica that sends nothing for so long is lost; heartbeats come every HEARTBEAT_S of
deployments/engine/step_outbox.py."""
COMMAND_BYTES = 2**20
"""Submissions that travel in one frame, at most: a replica reads a frame in one turn of its event loop."""
_RETRY_FIRST_S, _RETRY_MAX_S = 0.1, 4.0
_CONNECTIONS = count(1)
"""Numbers of all step streams that this process has opened: none is used again, be the replica in the pool again."""


class ReplicaLost(Exception):
    """The replica cannot be used now."""


class ReplicaLine(Protocol):
    """An open step stream, as of deployments/connections/step_connection.py."""

    async def receive(self) -> bytes | None:
        """The next packed `EngineStep`, None when the replica has ended the stream; the one before is dealt with.
        Raises ReplicaLost."""

    def send(self, commands: bytes) -> None:
        """Packed `EngineCommands`. Never waits; lost if the stream breaks."""


class ReplicaTransport(Protocol):
    """How to reach one replica."""

    def open(self, stream_id: str) -> AbstractAsyncContextManager[ReplicaLine]:
        """Leaving it ends the stream. Raises ReplicaLost when the replica cannot be reached."""


class ReplicaStream:
    """One replica as this ingress sees it."""

    def __init__(
        self,
        replica_id: str,
        transport: ReplicaTransport,
        *,
        name: str,
        on_live: Callable[[], None],
        on_lost: Callable[[list[Generation], frozenset[Generation]], None],
        on_refused: Callable[[list[Generation]], None],
        on_message: Callable[[], None],
    ) -> None:
        """`on_lost` gets what the replica was generating, and those of them that may be why it is lost; `on_refused`
        that for which its queue had no room. `on_message` is called when one has been dealt with."""
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
        self._numbers = 0
        self._unacknowledged: deque[tuple[int, Generation]] = deque()
        """Submitted, and the replica has not told yet whether it takes them."""
        self._line: ReplicaLine | None = None
        self._submissions: list[msgspec.Raw] = []
        self._aborted: list[int] = []
        self._released: list[str] = []
        """These three make the next commands. Settled requests alone are no reason to send any."""
        self._sending = False
        """Commands are about to be sent."""
        self._retry_s = _RETRY_FIRST_S
        self._on_live = on_live
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._on_message = on_message
        self._reader: asyncio.Task[None] | None = None
        self._emptied = asyncio.Event()

    @property
    def accepting(self) -> bool:
        return self.live and not self.draining

    @property
    def sequences(self) -> int:
        """Generations on the replica, of all ingress replicas: as reported, plus those submitted since."""
        return max(self.load.running + self.load.waiting + len(self._unacknowledged), len(self.generations))

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

    def submit(self, generations: list[Generation]) -> None:
        """Send generations to the replica, which accepts them, with `accepting` true; their tokens come through
        `Generation.deliver`. They count as its own from now on, so that of requests that come at the same moment not
        all choose the same replica."""
        for choices in _by_prompt(generations):
            numbers = range(self._numbers + 1, self._numbers + 1 + len(choices))
            self._numbers += len(choices)
            siblings = tuple(
                Sibling(number, each.candidate, each.sampling.seed)
                for number, each in zip(numbers[1:], choices[1:], strict=True)
            )
            for number, generation in zip(numbers, choices, strict=True):
                generation.placed(Placement(self, number))
            try:
                packed = pack(choices[0].submission(numbers[0], siblings))
            except Exception:  # a parameter of the client's that has no form on the wire
                log.exception("submission not packed", request_id=choices[0].request_id)
                for generation in choices:
                    generation.fail(InternalError())
                continue
            for number, generation in zip(numbers, choices, strict=True):
                self.generations[number] = generation
                self._unacknowledged.append((number, generation))
            self._submissions.append(msgspec.Raw(packed))
        self._send_soon()

    def abort(self, numbers: list[int]) -> None:
        """Stop generations: nothing of them arrives any more, and the replica frees what they hold."""
        taken = [number for number in numbers if self._take(number)]
        if taken:
            self._aborted += taken
            self._send_soon()

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
        self._break("drained", drained=True)

    # --- internals ---------------------------------------------------------------------------------------------------

    def _send_soon(self) -> None:
        """What is ordered at the same moment travels together."""
        if not self._sending:
            self._sending = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        self._sending = False
        if self._line is None or not (self._submissions or self._aborted or self._released):
            return  # the stream was lost meanwhile
        *first, last = _in_frames(self._submissions)
        for submissions in first:
            self._line.send(pack(EngineCommands([], submissions, [])))
        self._line.send(pack(EngineCommands(self._released, last, self._aborted)))
        self._released, self._submissions, self._aborted = [], [], []

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        # deployments/engine/replica.py knows by what is before the number that this ingress has come back.
        stream_id = f"{self._name}#{next(_CONNECTIONS)}"
        async with AsyncExitStack() as stack:
            # The first message has a limit of its own, since only live streams are watched for silence.
            async with asyncio.timeout(SILENCE_LIMIT_S):
                line = await stack.enter_async_context(self._transport.open(stream_id))
                message = await line.receive()
            for expected in count():
                if message is None:
                    return
                self.last_heard = loop.time()
                step = unpack(message, EngineStep)
                if step.sequence != expected:
                    raise ReplicaLost(f"message {step.sequence} came in place of {expected}: tokens are missing")
                self._apply(step)
                if not expected:
                    self._line = line
                    self.live = True
                    self._retry_s = _RETRY_FIRST_S
                    log.info("replica in rotation", replica=self._name)
                    self._on_live()
                if self._released and not step.deltas:  # there is time, and no commands may come to carry them
                    self._send_soon()
                message = await line.receive()

    def _apply(self, step: EngineStep) -> None:
        self.load = step.load
        if self._unacknowledged and self._unacknowledged[0][0] <= step.acknowledged:
            self._acknowledge(step.acknowledged, frozenset(step.refused))
        for delta in step.deltas:
            generation = self.generations.get(delta.generation)
            if generation is None:
                continue  # aborted or moved to another replica
            if delta.finish_reason is not None:
                self._take(delta.generation)
                if delta.finish_reason == "failed":
                    log.error("engine failed a generation", replica=self._name, reason=delta.message)
            generation.deliver(delta)
        self._on_message()

    def _acknowledge(self, acknowledged: int, refused: frozenset[int]) -> None:
        """Generations up to the number `acknowledged` are accepted, but for those that are `refused`."""
        unplaced: list[Generation] = []
        while self._unacknowledged and self._unacknowledged[0][0] <= acknowledged:
            number, generation = self._unacknowledged.popleft()
            if number not in refused:
                generation.accepted()
            elif self._take(number):
                unplaced.append(generation)
        if unplaced:
            self._on_refused(unplaced)

    def _take(self, number: int) -> bool:
        """Take a generation off the stream; False when it has ended or moved already."""
        taken = self.generations.pop(number, None) is not None
        if not self.generations:
            self._emptied.set()
        return taken

    def _break(self, reason: str, *, drained: bool = False) -> None:
        """Give the stream up; `run` opens it again if the replica is to stay."""
        self._lose(reason, drained=drained)
        if self._reader is not None:
            self._reader.cancel()

    def _suspects(self) -> frozenset[Generation]:
        """Those that may be why the replica is lost: it has not told of them yet, or their first step was under way.
        vLLM takes sequences into its batch in the order of their arrival, so what waited behind a full batch was
        never looked at."""
        unacknowledged = {generation for _, generation in self._unacknowledged if not generation.ended}
        unproven = [each for each in self.generations.values() if not each.proven and each not in unacknowledged]
        proven = len(self.generations) - len(unproven) - len(unacknowledged)
        room = max(1, self.load.max_num_seqs - proven) if self.load.max_num_seqs else len(unproven)
        return frozenset(unproven[:room]) | unacknowledged

    def _lose(self, reason: str, *, drained: bool = False) -> None:
        was_live = self.live
        suspects: frozenset[Generation] = frozenset() if drained else self._suspects()
        if was_live:
            self.live = False
            log.info("replica out of rotation", replica=self._name, reason=reason, moving=len(self.generations))
        self.load = EngineLoad()
        self._line = None
        for commands in (self._unacknowledged, self._released, self._submissions, self._aborted):
            commands.clear()
        self._emptied.set()
        lost = list(self.generations.values())
        self.generations.clear()
        if lost or was_live:
            self._on_lost(lost, suspects)


def _by_prompt(generations: list[Generation]) -> list[list[Generation]]:
    """Runs of those that can travel together: choices of one prompt of one request that have no tokens yet."""
    runs: list[list[Generation]] = []
    for generation in generations:
        before = runs[-1][-1] if runs else None
        if (
            before is not None
            and generation.prompt is before.prompt
            and generation.account is before.account
            and not (generation.tokens or generation.resumes or before.tokens or before.resumes)
        ):
            runs[-1].append(generation)
        else:
            runs.append([generation])
    return runs


def _in_frames(submissions: list[msgspec.Raw]) -> list[list[msgspec.Raw]]:
    """In order, each within COMMAND_BYTES unless it is a single one; at least one, be it empty."""
    frames: list[list[msgspec.Raw]] = [[]]
    size = 0
    for submission in submissions:
        bytes_ = len(memoryview(submission))
        if frames[-1] and size + bytes_ > COMMAND_BYTES:
            frames.append([])
            size = 0
        frames[-1].append(submission)
        size += bytes_
    return frames
