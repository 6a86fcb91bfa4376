"""Engine replicas in memory: real ones whose connection can fail, and scripted ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
from structlog.testing import capture_logs

from deployments.contracts import (
    EngineLoad,
    EngineStep,
    FinishReason,
    Sampling,
    Submission,
    SubmissionStatus,
    TokenDelta,
    pack,
    unpack,
)
from deployments.engine.orphans import Orphanage
from deployments.engine.replica import EngineReplica
from deployments.engine.simulated_engine import SimulatedEngine
from deployments.engine.simulator import Simulator, SimulatorSettings
from deployments.ingress.engine_pool import EnginePool, PoolLimits
from deployments.ingress.replica_stream import ReplicaLost, ReplicaTransport
from tests.deployments.accounts import RecordedOutbox
from tests.deployments.ingress.virtual_time import write_rounds

__all__ = [
    "LIMITS",
    "SETTINGS",
    "MemoryReplica",
    "ScriptedReplica",
    "opened_pool",
    "replicas_of",
    "undisturbed",
]

SETTINGS = SimulatorSettings(vocabulary_tokens=28, first_token=1, step_s=0.01, max_num_seqs=8, kv_blocks=2048)
LIMITS = PoolLimits(hold_timeout_s=30.0, resume_timeout_s=180.0, drain_timeout_s=60.0, max_held=512)


def undisturbed(
    prompt: Sequence[int], sampling: Sampling, settings: SimulatorSettings = SETTINGS
) -> tuple[list[int], FinishReason]:
    """What an engine that nothing happens to generates."""
    simulator = Simulator(settings)
    simulator.submit("only", list(prompt), sampling)
    tokens: list[int] = []
    while True:
        for output in simulator.step().outputs:
            tokens.append(output.token_id)
            if output.finish_reason is not None:
                return tokens, output.finish_reason


class MemoryReplica:
    """A replica with its simulated engine. Its faults are switched on and off by the test."""

    def __init__(self, settings: SimulatorSettings = SETTINGS, *, max_waiting: int = 1000) -> None:
        self.reachable = True
        """Calls and new streams fail at once when not."""
        self.answering = True
        """The replica does what it is told when not, but its answers are lost."""
        self.killed_by: int | None = None
        """Breaks down over every prompt that begins with this token."""
        self.submissions: list[Submission] = []
        self.aborts: list[int] = []
        """Numbers of the generations that were to be aborted."""
        self.released: list[str] = []
        """Requests that it was told to forget."""
        self._engine = SimulatedEngine(settings, max_model_len=2048, max_waiting=max_waiting)
        self.outbox = RecordedOutbox()
        """What the replica settled itself."""
        self._replica = EngineReplica(self._engine, Orphanage(self.outbox))
        self._speaking = asyncio.Event()
        self._speaking.set()
        self._connections: set[asyncio.Queue[bytes | None]] = set()

    @property
    def load(self) -> EngineLoad:
        return self._engine.load()

    @property
    def sequences(self) -> int:
        return self.load.running + self.load.waiting

    @property
    def streams(self) -> int:
        return len(self._connections)

    def break_streams(self) -> None:
        """As a lost connection does: what is on its way never arrives."""
        for connection in self._connections:
            while not connection.empty():
                connection.get_nowait()
            connection.put_nowait(None)

    def fall_silent(self) -> None:
        """As a hung process does: nothing fails, nothing arrives."""
        self._speaking.clear()

    def speak_again(self) -> None:
        self._speaking.set()

    async def start(self) -> None:
        await self._engine.start()

    async def shutdown(self) -> None:
        await self._replica.shutdown()

    # --- ReplicaTransport ---------------------------------------------------------------------------------------------

    async def steps(self, stream_id: str) -> AsyncGenerator[bytes, None]:
        await self._reach()
        connection: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._connections.add(connection)
        sender = asyncio.create_task(self._send(stream_id, connection), name=f"sender-{stream_id}")
        try:
            while True:
                message = await connection.get()
                await self._speaking.wait()
                if message is None:
                    raise ReplicaLost("stream broken")
                yield message
        finally:
            self._connections.discard(connection)
            sender.cancel()
            await asyncio.wait([sender])

    async def submit(self, stream_id: str, submissions: bytes, released: list[str]) -> list[SubmissionStatus]:
        await self._reach()
        self.released += released
        batch = unpack(submissions, list[Submission])
        if any(submission.token_ids[0] == self.killed_by for submission in batch):
            self.break_streams()
            raise ReplicaLost("broken down")
        self.submissions += batch
        statuses = self._replica.submit(stream_id, batch, released)
        await self._answer()
        return statuses

    async def abort(self, stream_id: str, generations: list[int], released: list[str]) -> None:
        await self._reach()
        self.aborts += generations
        self.released += released
        self._replica.abort(stream_id, generations, released)
        await self._answer()

    async def _reach(self) -> None:
        await self._speaking.wait()
        if not self.reachable:
            raise ReplicaLost("not reachable")

    async def _answer(self) -> None:
        await asyncio.sleep(0.0005)  # a call takes time, and may be overtaken
        if not self.answering:
            await asyncio.Event().wait()

    async def _send(self, stream_id: str, connection: asyncio.Queue[bytes | None]) -> None:
        async for message in self._replica.steps(stream_id):
            connection.put_nowait(message)
        connection.put_nowait(None)


class ScriptedReplica:
    """A replica whose every message and answer the test writes. A stream that is opened gets one message at once."""

    def __init__(self) -> None:
        self.status: SubmissionStatus = "accepted"
        self.error: Exception | None = None
        """Raised by `submit`."""
        self.abort_error: Exception | None = None
        """Raised by `abort`."""
        self.load = EngineLoad()
        """Told with the first message of each stream."""
        self.submissions: list[Submission] = []
        self.aborts: list[int] = []
        self.opened: list[str] = []
        self.calls: list[str] = []
        """`submit` and `abort` in the order in which they arrived."""
        self.taking = asyncio.Event()
        """`submit` arrives when it is set."""
        self.taking.set()
        self.greeting = True
        """A new stream says something at once."""
        self.skipped = 0
        """Messages that get lost from now on."""
        self._streams: list[asyncio.Queue[EngineStep | None]] = []

    def tell(self, *deltas: TokenDelta, load: EngineLoad | None = None, stream: int = -1) -> None:
        self._streams[stream].put_nowait(EngineStep(0, load or self.load, list(deltas)))

    def end_stream(self, stream: int = -1) -> None:
        self._streams[stream].put_nowait(None)

    async def steps(self, stream_id: str) -> AsyncGenerator[bytes, None]:
        queue: asyncio.Queue[EngineStep | None] = asyncio.Queue()
        self._streams.append(queue)
        self.opened.append(stream_id)
        if self.greeting:
            self.tell()
        sequence = 0
        while (step := await queue.get()) is not None:
            yield pack(msgspec.structs.replace(step, sequence=sequence + self.skipped))
            sequence += 1

    async def submit(self, stream_id: str, submissions: bytes, released: list[str]) -> list[SubmissionStatus]:
        await self.taking.wait()
        self.calls.append("submit")
        batch = unpack(submissions, list[Submission])
        self.submissions += batch
        if self.error is not None:
            raise self.error
        return [self.status] * len(batch)

    async def abort(self, stream_id: str, generations: list[int], released: list[str]) -> None:
        if generations or not released:
            self.calls.append("abort")
        self.aborts += generations
        if self.abort_error is not None:
            raise self.abort_error


@asynccontextmanager
async def replicas_of(
    count: int, settings: SimulatorSettings = SETTINGS, *, max_waiting: int = 1000
) -> AsyncIterator[dict[str, MemoryReplica]]:
    """Running replicas `r0`, `r1`, …"""
    replicas = {f"r{number}": MemoryReplica(settings, max_waiting=max_waiting) for number in range(count)}
    for replica in replicas.values():
        await replica.start()
    try:
        yield replicas
    finally:
        for replica in replicas.values():
            replica.speak_again()
            await replica.shutdown()


@asynccontextmanager
async def opened_pool(
    replicas: dict[str, MemoryReplica] | dict[str, ScriptedReplica],
    limits: PoolLimits = LIMITS,
    notes: RecordedOutbox | None = None,
) -> AsyncIterator[EnginePool]:
    """A pool that has just heard of `replicas`. Fails when one of its tasks has failed."""
    notes = RecordedOutbox() if notes is None else notes

    def connect(replica_id: str) -> ReplicaTransport:
        return replicas[replica_id]

    pool = EnginePool("m", connect, ingress_id="i", limits=limits, rounds=write_rounds(), note=notes.note)
    pool.replicas_changed(frozenset(replicas))
    with capture_logs() as logs:
        try:
            yield pool
        finally:
            await pool.close()
    assert [log for log in logs if log["event"] == "task failed"] == []
