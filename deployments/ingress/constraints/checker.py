"""Checks of constraints, and of the outputs made by them, in processes of their own (worker.py).

Started when first needed; one that ended, or that is too slow, is replaced. Each owner (a key or a team) has one check
under way at most, and owners take turns, so that nobody's checks hold up another's. What was decided once is
remembered: applications repeat one schema.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from deployments.contracts import CheckedConstraint, CheckedOutputs, ConstraintCheck, OutputCheck, pack, unpack
from deployments.ingress.constraints.limits import LoadModel
from deployments.ingress.errors import Overloaded, ServiceUnavailable

__all__ = ["ConstraintChecker"]

log = structlog.get_logger()

_WORKERS = 2
_START_LIMIT_S = 60.0
"""For a worker to start, or to read a tokenizer."""
_CHECK_LIMIT_S = 10.0
"""For one check by the clock: it is long only on a machine that is far too busy."""
_OUTPUTS_LIMIT_S = 30.0
_WAIT_LIMIT_S = 30.0
"""For a turn and the check, together."""
_MAX_WAITING, _MAX_WAITING_OF_OWNER = 256, 64
"""Checks of constraints. Outputs are as many as there are running candidates at most."""
_REMEMBERED, _REMEMBERED_BYTES = 1024, 16 * 2**20
_MAX_ANSWER_BYTES = 2**24

T = TypeVar("T")


class _WorkerEnded(Exception):
    """Before it answered; `args[0]` is its exit status as subprocess tells it."""


@dataclass(eq=False)
class _Job:
    owner: str
    message: ConstraintCheck | OutputCheck
    key: bytes | None
    """By which the answer is remembered."""
    answer: asyncio.Future[CheckedConstraint | CheckedOutputs] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class ConstraintChecker:
    """`check` and `conforming` may be called by any number of requests at once."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()
        """By owner; the first one's turn is next."""
        self._checks_waiting = 0
        self._under_way: dict[str, _Job] = {}
        """By owner."""
        self._idle = [_Worker() for _ in range(_WORKERS)]
        self._remembered: OrderedDict[bytes, CheckedConstraint] = OrderedDict()
        self._remembered_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def check(self, owner: str, check: ConstraintCheck) -> CheckedConstraint:
        """The grammar of a constraint, or why there is none. Raises ServiceUnavailable."""
        key = blake2b(pack(check), digest_size=16).digest()
        if (known := self._recall(key)) is not None:
            return known
        if self._checks_waiting >= _MAX_WAITING or len(self._waiting.get(owner, ())) >= _MAX_WAITING_OF_OWNER:
            raise Overloaded("Too many requests with new constraints wait to be checked.", retry_after_s=1.0)
        answer = await self._ask(_Job(owner, check, key))
        assert isinstance(answer, CheckedConstraint)
        return answer

    async def conforming(self, owner: str, check: OutputCheck) -> list[bool]:
        """Whether each output conforms. Raises ServiceUnavailable."""
        answer = await self._ask(_Job(owner, check, None))
        assert isinstance(answer, CheckedOutputs)
        return answer.conforming

    async def close(self) -> None:
        """End the workers; what waits is given up. Safe twice."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        # Of those under way what is left are tasks that were cancelled before they began.
        for job in (*self._under_way.values(), *(job for jobs in self._waiting.values() for job in jobs)):
            if not job.answer.done():
                job.answer.set_exception(_busy())
        self._under_way.clear()
        self._waiting.clear()
        self._checks_waiting = 0
        for worker in self._idle:
            await worker.end()

    async def _ask(self, job: _Job) -> CheckedConstraint | CheckedOutputs:
        jobs = self._waiting.setdefault(job.owner, deque())
        if isinstance(job.message, OutputCheck):
            jobs.appendleft(job)  # of an answer whose client waits for its end
        else:
            jobs.append(job)
            self._checks_waiting += 1
        self._dispatch()
        try:
            async with asyncio.timeout(_WAIT_LIMIT_S + (_OUTPUTS_LIMIT_S if job.key is None else 0.0)):
                return await job.answer
        except TimeoutError:
            raise _busy() from None

    def _dispatch(self) -> None:
        """Give idle workers the next jobs of owners that have none under way."""
        while self._idle and not self._closed and (job := self._next()) is not None:
            worker = self._idle.pop()
            self._under_way[job.owner] = job
            task = asyncio.create_task(self._run(worker, job), name="constraint-check")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next(self) -> _Job | None:
        for owner, jobs in list(self._waiting.items()):
            while jobs and owner not in self._under_way:
                job = jobs.popleft()
                self._checks_waiting -= job.key is not None
                if job.key is not None and (known := self._recall(job.key)) is not None and not job.answer.done():
                    job.answer.set_result(known)  # by another that waited with it
                if not job.answer.done():
                    self._waiting.move_to_end(owner)
                    return job
            if not jobs:
                del self._waiting[owner]
        return None

    async def _run(self, worker: _Worker, job: _Job) -> None:
        try:
            answer = await _answered(worker, job.message)
        except ServiceUnavailable as error:
            if not job.answer.done():
                job.answer.set_exception(error)
        else:
            if job.key is not None and isinstance(answer, CheckedConstraint):
                self._remember(job.key, answer)
            if not job.answer.done():
                job.answer.set_result(answer)
        finally:
            if not job.answer.done():  # this was closed, or failed in a way that nobody foresaw
                job.answer.set_exception(_busy())
            self._idle.append(worker)
            self._under_way.pop(job.owner, None)
            self._dispatch()

    def _recall(self, key: bytes) -> CheckedConstraint | None:
        known = self._remembered.get(key)
        if known is not None:
            self._remembered.move_to_end(key)
        return known

    def _remember(self, key: bytes, answer: CheckedConstraint) -> None:
        self._remembered[key] = answer
        self._remembered_bytes += len(answer.grammar)
        while len(self._remembered) > _REMEMBERED or self._remembered_bytes > _REMEMBERED_BYTES:
            _, forgotten = self._remembered.popitem(last=False)
            self._remembered_bytes -= len(forgotten.grammar)


async def _answered(worker: _Worker, message: ConstraintCheck | OutputCheck) -> CheckedConstraint | CheckedOutputs:
    """What the worker says. Raises ServiceUnavailable where nobody can tell."""
    try:
        await worker.load(message.folder)
        if isinstance(message, ConstraintCheck):
            return await worker.ask(message, CheckedConstraint, _CHECK_LIMIT_S)
        return await worker.ask(message, CheckedOutputs, _OUTPUTS_LIMIT_S)
    except TimeoutError:
        await worker.end()
        log.warning("constraint worker too slow")
        raise _busy() from None
    except _WorkerEnded as ended:
        log.error("constraint worker lost", status=ended.args[0])
        raise _busy() from None
    except asyncio.CancelledError:
        await worker.end()
        raise


def _busy() -> ServiceUnavailable:
    return ServiceUnavailable("The constraint could not be checked in time.", retry_after_s=1.0)


class _Worker:
    """One process and the socket to it; started by the first `load`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def load(self, folder: str) -> None:
        """Raises TimeoutError and _WorkerEnded."""
        if self._process is None:
            ours, theirs = socket.socketpair()
            with theirs:
                spawning = asyncio.create_task(asyncio.to_thread(_spawn, theirs))
                try:
                    self._process = await asyncio.shield(spawning)
                except asyncio.CancelledError:
                    self._process = await spawning  # for `end`
                    ours.close()
                    raise
            self._reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=_MAX_ANSWER_BYTES)
        await self.ask(LoadModel(folder), LoadModel, _START_LIMIT_S)

    async def ask(self, message: msgspec.Struct, kind: type[T], limit_s: float) -> T:
        """Raises TimeoutError and _WorkerEnded."""
        assert self._reader is not None
        assert self._writer is not None
        data = pack(message)
        try:
            async with asyncio.timeout(limit_s):
                self._writer.write(len(data).to_bytes(4) + data)
                await self._writer.drain()
                size = int.from_bytes(await self._reader.readexactly(4))
                return unpack(await self._reader.readexactly(size), kind)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _WorkerEnded(await self.end()) from None

    async def end(self) -> int | None:
        """Kill it, unless it has ended; its exit status. Safe twice."""
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        process, self._process, self._reader, self._writer = self._process, None, None, None
        return None if process is None else await asyncio.to_thread(_reap, process)


def _spawn(connection: socket.socket) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "deployments.ingress.constraints.worker"],
        stdin=connection.fileno(),
        env={**os.environ, "PYTHONPATH": path, "RAYON_NUM_THREADS": "1"},
    )


def _reap(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=0.5)  # it ended by itself, most likely: its connection is gone
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(timeout=10.0)
