"""The connection over which a meter is called by an ingress or an engine replica: both ends.

A call through Serve hands out the ticket for it (ticketed_connection.py); all others go over it, several at a time. A
connection that breaks, or over which nothing comes for CALL_LIMIT_S while an answer is due, fails the calls that wait
as a meter that died does: it may or may not have acted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec
import structlog

from deployments.contracts import pack, unpack
from deployments.meter.errors import MeterError
from deployments.ticketed_connection import FramedConnection, Ticket, TicketServer

__all__ = ["CALL_LIMIT_S", "MeterConnection", "MeterMethod", "MeterServer", "MeterUnreachable"]

log = structlog.get_logger()

MeterMethod = Literal["authenticate", "admit", "settle", "renew", "administer", "usage", "counters", "ping"]

CALL_LIMIT_S: Final = 10.0
_MAX_UNDER_WAY: Final = 256
"""Calls of one connection that the meter works on; it reads no more until one of them has ended."""
_CLOSE_LIMIT_S: Final = 5.0


class MeterUnreachable(Exception):
    """The meter gave no answer; it may or may not have acted."""


class _Call(msgspec.Struct, frozen=True, array_like=True):
    number: int
    """Names the call on its connection."""
    method: MeterMethod
    argument: bytes


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    number: int
    result: bytes
    error: str | None = None
    """The name of what the method raised."""


class MeterConnection(FramedConnection):
    """The caller's end."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = False
        self._calls = 0
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        """By number; those whose callers have given up, too, until they are answered."""
        self._heard_at = 0.0
        """Event-loop time of the last answer, or of the first call after it."""
        self._watch: asyncio.TimerHandle | None = None

    async def call(self, method: MeterMethod, argument: bytes) -> bytes:
        """Raises MeterUnreachable."""
        if self.lost:
            raise MeterUnreachable("connection lost")
        loop = asyncio.get_running_loop()
        if not self._waiting:
            self._heard_at = loop.time()
            if self._watch is None:
                self._watch = loop.call_later(CALL_LIMIT_S, self._look)
        self._calls = number = self._calls + 1
        answer: asyncio.Future[bytes] = loop.create_future()
        self._waiting[number] = answer
        self.send(pack(_Call(number, method, argument)))
        return await answer

    def frame_received(self, frame: bytes) -> None:
        answer = unpack(frame, _Answer)
        self._heard_at = asyncio.get_running_loop().time()
        waiting = self._waiting.pop(answer.number)
        if waiting.done():
            return  # the caller has given up
        if answer.error is None:
            waiting.set_result(answer.result)
        else:
            waiting.set_exception(MeterUnreachable(answer.error))

    def connection_lost(self, _error: Exception | None) -> None:
        self._lose("connection lost")

    def _lose(self, reason: str) -> None:
        self.lost = True
        if self._watch is not None:
            self._watch.cancel()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(MeterUnreachable(reason))
        self._waiting.clear()

    def _look(self) -> None:
        """Whether the meter hangs. Looks again as long as answers are due, and is not set and cleared for each call."""
        self._watch = None
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        if loop.time() - self._heard_at >= CALL_LIMIT_S:
            self._lose(f"no answer for {CALL_LIMIT_S:g} s")
            self.close()
        else:
            self._watch = loop.call_at(self._heard_at + CALL_LIMIT_S, self._look)


class MeterServer:
    """Where the others connect to a meter. For use on one event loop."""

    def __init__(self, answer: Callable[[MeterMethod, bytes], Awaitable[bytes]]) -> None:
        """`answer(method, argument)` is the result; the caller learns only the name of what it raises."""
        self._answer = answer
        self._tickets = TicketServer()
        self._callers: set[_Caller] = set()

    async def start(self, host: str) -> None:
        """Listen on a free port of `host`, an address that the others can reach."""
        await self._tickets.start(host)

    def ticket(self) -> Ticket:
        """For one connection."""
        return self._tickets.ticket(_Caller(self._answer, self._callers))

    async def close(self) -> None:
        """Take no more calls, and give those under way a bounded time to be answered. Safe twice, and before
        `start`."""
        self._tickets.close()
        callers = list(self._callers)
        for caller in callers:
            caller.leaving = True
        if under_way := [task for caller in callers for task in caller.under_way]:
            await asyncio.wait(under_way, timeout=_CLOSE_LIMIT_S)
        for caller in callers:
            caller.close()


class _Caller(FramedConnection):
    """The meter's end of one connection."""

    def __init__(self, answer: Callable[[MeterMethod, bytes], Awaitable[bytes]], callers: set[_Caller]) -> None:
        super().__init__()
        self._answer = answer
        self._callers = callers
        self.under_way: set[asyncio.Task[None]] = set()
        """A call goes on when its caller is gone: what it records must not depend on that."""
        self.leaving = False
        """Calls are not taken any more; their callers find out when the connection ends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._callers.add(self)

    def frame_received(self, frame: bytes) -> None:
        if self.leaving:
            return
        call = unpack(frame, _Call)
        task = asyncio.create_task(self._work(call), name=f"meter-{call.method}")
        self.under_way.add(task)
        task.add_done_callback(self._worked)
        if len(self.under_way) == _MAX_UNDER_WAY and self._transport is not None:
            self._transport.pause_reading()

    def connection_lost(self, _error: Exception | None) -> None:
        self._callers.discard(self)

    async def _work(self, call: _Call) -> None:
        try:
            answer = _Answer(call.number, await self._answer(call.method, call.argument))
        except MeterError as error:
            answer = _Answer(call.number, b"", type(error).__name__)
        except Exception as error:
            log.exception("call failed", method=call.method)
            answer = _Answer(call.number, b"", type(error).__name__)
        self.send(pack(answer))

    def _worked(self, task: asyncio.Task[None]) -> None:
        self.under_way.discard(task)
        if len(self.under_way) == _MAX_UNDER_WAY - 1 and self._transport is not None:
            self._transport.resume_reading()
