"""Engine replicas in memory: real ones whose connection can fail, and scripted ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
from structlog.testing import capture_logs

from deployments.contracts import (
    EngineCommands,
    EngineLoad,
    EngineStep,
    FinishReason,
    Sampling,
    Submission,
    TokenDelta,
    pack,
    unpack,
)
from deployments.engine.orphans import OrphanedRequests
from deployments.engine.replica import EngineReplica
from deployments.engine.simulated_engine import SimulatedEngine
from deployments.engine.simulator import Simulator, SimulatorSettings
from deployments.ingress.routing.engine_pool import EnginePool, PoolLimits
from deployments.ingress.routing.replica_stream import ReplicaLine, ReplicaLost, ReplicaTransport
from tests.deployments.accounts import RecordedOutbox
from tests.deployments.ingress.virtual_time import write_scheduler

__all__ = [
    "LIMITS",
    "SETTINGS",
    "MemoryLine",
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
        """New streams fail at once when not."""
        self.killed_by: int | None = None
        """Breaks down over every prompt that begins with this token."""
        self.submissions: list[Submission] = []
        self.aborts: list[int] = []
        """Numbers of the generations that were to be aborted."""
        self.released: list[str] = []
        """Requests that it was told to forget."""
        self._engine = SimulatedEngine(settings, max_waiting=max_waiting)
        self.outbox = RecordedOutbox()
        """What the replica settled itself."""
        self._replica = EngineReplica(self._engine, OrphanedRequests(self.outbox))
        self._speaking = asyncio.Event()
        self._speaking.set()
        self._lines: set[MemoryLine] = set()

    @property
    def load(self) -> EngineLoad:
        return self._engine.load()

    @property
    def sequences(self) -> int:
        return self.load.running + self.load.waiting

    @property
    def streams(self) -> int:
        return len(self._lines)

    def break_streams(self) -> None:
        """As a lost connection does: what is on its way never arrives."""
        for line in self._lines:
            line.break_off()

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

    @asynccontextmanager
    async def open(self, stream_id: str) -> AsyncIterator[ReplicaLine]:
        await self._speaking.wait()
        if not self.reachable:
            raise ReplicaLost("not reachable")
        line = MemoryLine(self._speaking)
        self._lines.add(line)
        tasks = [
            asyncio.create_task(self._send(stream_id, line), name=f"sender-{stream_id}"),
            asyncio.create_task(self._obey(stream_id, line), name=f"listener-{stream_id}"),
        ]
        try:
            yield line
        finally:
            self._lines.discard(line)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _send(self, stream_id: str, line: MemoryLine) -> None:
        async for message in self._replica.steps(stream_id):
            line.messages.put_nowait(message)
        line.messages.put_nowait(None)

    async def _obey(self, stream_id: str, line: MemoryLine) -> None:
        while True:
            packed = await line.orders.get()
            await self._speaking.wait()
            orders = unpack(packed, EngineCommands)
            self.released += orders.released
            submissions = [unpack(each, Submission) for each in orders.submissions]
            if any(submission.token_ids[0] == self.killed_by for submission in submissions):
                self.break_streams()
                return
            self.submissions += submissions
            self.aborts += orders.aborted
            self._replica.take_commands(stream_id, packed)


class MemoryLine:
    """A step stream of a MemoryReplica."""

    def __init__(self, speaking: asyncio.Event) -> None:
        self.messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.orders: asyncio.Queue[bytes] = asyncio.Queue()
        self._speaking = speaking

    async def receive(self) -> bytes | None:
        message = await self.messages.get()
        await self._speaking.wait()
        return message

    def send(self, orders: bytes) -> None:
        self.orders.put_nowait(orders)

    def break_off(self) -> None:
        for queue in (self.messages, self.orders):
            while not queue.empty():
                queue.get_nowait()
        self.messages.put_nowait(None)


class ScriptedReplica:
    """A replica whose every message the test writes. A stream that is opened gets one message at once."""

    def __init__(self) -> None:
        self.full = False
        """Refuses what is submitted, and tells so at once; else the next message tells what was accepted."""
        self.load = EngineLoad()
        """Told with the first message of each stream."""
        self.submissions: list[Submission] = []
        self.aborts: list[int] = []
        self.released: list[str] = []
        self.opened: list[str] = []
        self.orders: list[EngineCommands] = []
        """As they arrived."""
        self.greeting = True
        """A new stream says something at once."""
        self.skipped = 0
        """Messages that get lost from now on."""
        self._lines: list[_ScriptedLine] = []

    def tell(
        self,
        *deltas: TokenDelta,
        load: EngineLoad | None = None,
        acknowledged: int | None = None,
        refused: Sequence[int] = (),
        stream: int = -1,
    ) -> None:
        """By default all submissions so far are `acknowledged`."""
        if acknowledged is None:
            acknowledged = self.submissions[-1].generation if self.submissions else 0
        step = EngineStep(0, load or self.load, list(deltas), acknowledged, list(refused))
        self._lines[stream].messages.put_nowait(step)

    def end_stream(self, stream: int = -1) -> None:
        self._lines[stream].messages.put_nowait(None)

    @asynccontextmanager
    async def open(self, stream_id: str) -> AsyncIterator[ReplicaLine]:
        self._lines.append(line := _ScriptedLine(self))
        self.opened.append(stream_id)
        if self.greeting:
            self.tell(acknowledged=0)
        yield line

    def take(self, orders: EngineCommands) -> None:
        self.orders.append(orders)
        self.released += orders.released
        self.aborts += orders.aborted
        submissions = [unpack(each, Submission) for each in orders.submissions]
        self.submissions += submissions
        if self.full and submissions:
            self.tell(refused=[submission.generation for submission in submissions])


class _ScriptedLine:
    def __init__(self, replica: ScriptedReplica) -> None:
        self.messages: asyncio.Queue[EngineStep | None] = asyncio.Queue()
        self._replica = replica
        self._sequence = 0

    async def receive(self) -> bytes | None:
        step = await self.messages.get()
        if step is None:
            return None
        numbered = msgspec.structs.replace(step, sequence=self._sequence + self._replica.skipped)
        self._sequence += 1
        return pack(numbered)

    def send(self, orders: bytes) -> None:
        self._replica.take(unpack(orders, EngineCommands))


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
    outbox: RecordedOutbox | None = None,
) -> AsyncIterator[EnginePool]:
    """A pool that has just heard of `replicas`. Fails when one of its tasks has failed."""
    outbox = RecordedOutbox() if outbox is None else outbox

    def connect(replica_id: str) -> ReplicaTransport:
        return replicas[replica_id]

    pool = EnginePool(
        "m", connect, ingress_id="i", limits=limits, writes=write_scheduler(), checkpoint=outbox.checkpoint
    )
    pool.replicas_changed(frozenset(replicas))
    with capture_logs() as logs:
        try:
            yield pool
        finally:
            await pool.close()
    assert [log for log in logs if log["event"] == "task failed"] == []
