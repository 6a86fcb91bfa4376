"""The connection over which a meter is called by an ingress or an engine replica: both ends.

A call through Serve hands out the ticket for it (ticketed_connection.py); all others go over it, and each is answered
when it is decided, whatever others wait for. What one turn of an event loop calls or answers travels in one frame: an
idle system sends each message at once, a loaded one fewer, larger frames, and no timer decides. (A call of its own for
each costs more than what it carries: docs/performance.md.)

While calls are under way, the meter tells every ALIVE_S that it lives. So a connection over which nothing comes for
CALL_LIMIT_S while an answer is due means that the meter hangs, not that one call takes long, for which its caller has a
limit. That, and a connection that breaks, fails the calls that wait as a meter that died does: it may or may not have
acted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Generic, Literal, TypeVar

import msgspec
import structlog

from deployments.connections.ticketed_connection import FramedConnection, Ticket, TicketServer
from deployments.contracts import pack
from deployments.meter.errors import MeterError

__all__ = ["ALIVE_S", "CALL_LIMIT_S", "MeterConnection", "MeterMethod", "MeterServer", "MeterUnreachable"]

log = structlog.get_logger()

MeterMethod = Literal["authenticate", "admit", "settle", "renew", "administer", "usage", "counters", "ping"]

CALL_LIMIT_S: Final = 10.0
ALIVE_S: Final = 2.0
"""Well below CALL_LIMIT_S: a meter that is late now and then does not hang."""
_MAX_UNDER_WAY: Final = 8192
"""Calls of one connection that the meter works on, and the bytes of what they brought; it reads no more until some of
them have ended. That protects the meter's memory from an ingress that asks without end, and from nothing else: of one
key or team far fewer admissions can be undecided at a time (deployments/meter/admission/admission.py), so that its slow
ones do not stop the reading of everybody's."""
_MAX_BYTES_UNDER_WAY: Final = 256 * 2**20
_FRAME_BYTES: Final = 256 * 2**10
"""A frame ends with the message that reaches this."""
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


Message = TypeVar("Message", _Call, _Answer)

_NOTHING: Final = pack([])
"""A frame without messages."""


class _TurnFrames(FramedConnection, Generic[Message]):
    """Sends what one turn of the event loop has to say in one frame: a list of messages."""

    def __init__(self) -> None:
        super().__init__()
        self._turn: list[Message] = []
        self._turn_bytes = 0

    def put(self, message: Message, size: int) -> None:
        """`size` in bytes, roughly."""
        if not self._turn:
            asyncio.get_running_loop().call_soon(self.send_turn)
        self._turn.append(message)
        self._turn_bytes += size
        if self._turn_bytes >= _FRAME_BYTES:
            self.send_turn()

    def send_turn(self) -> None:
        """What was put, now."""
        if self._turn:
            messages, self._turn, self._turn_bytes = self._turn, [], 0
            self.send(pack(messages))


class MeterConnection(_TurnFrames[_Call]):
    """The caller's end."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = False
        self._calls = 0
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        """By number; those whose callers have given up, too, until they are answered."""
        self._decoder = msgspec.msgpack.Decoder(list[_Answer])
        self._heard_at = 0.0
        """Event-loop time of the last sign of life, or of the first call after it."""
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
        self.put(_Call(number, method, argument), len(argument))
        return await answer

    def frame_received(self, frame: bytes) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        for answer in self._decoder.decode(frame):
            waiting = self._waiting.pop(answer.number)
            if waiting.done():
                continue  # the caller has given up
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
            self._lose(f"no sign of life for {CALL_LIMIT_S:g} s")
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
            caller.send_turn()
            caller.close()


class _Caller(_TurnFrames[_Answer]):
    """The meter's end of one connection."""

    def __init__(self, answer: Callable[[MeterMethod, bytes], Awaitable[bytes]], callers: set[_Caller]) -> None:
        super().__init__()
        self._answer = answer
        self._callers = callers
        self._decoder = msgspec.msgpack.Decoder(list[_Call])
        self.under_way: dict[asyncio.Task[None], int] = {}
        """With the bytes of their arguments. A call goes on when its caller is gone: what it records must not depend on
        that."""
        self._bytes_under_way = 0
        self._reading = True
        self._alive: asyncio.TimerHandle | None = None
        self.leaving = False
        """Calls are not taken any more; their callers find out when the connection ends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._callers.add(self)

    def frame_received(self, frame: bytes) -> None:
        if self.leaving:
            return
        for call in self._decoder.decode(frame):
            task = asyncio.create_task(self._work(call), name=call.method)
            self.under_way[task] = len(call.argument)
            self._bytes_under_way += len(call.argument)
            task.add_done_callback(self._worked)
        if self._alive is None:
            self._alive = asyncio.get_running_loop().call_later(ALIVE_S, self._tell)
        self._read_within_bounds()

    def connection_lost(self, _error: Exception | None) -> None:
        self._callers.discard(self)
        if self._alive is not None:
            self._alive.cancel()

    async def _work(self, call: _Call) -> None:
        try:
            answer = _Answer(call.number, await self._answer(call.method, call.argument))
        except MeterError as error:
            answer = _Answer(call.number, b"", type(error).__name__)
        except Exception as error:
            log.exception("call failed", method=call.method)
            answer = _Answer(call.number, b"", type(error).__name__)
        self.put(answer, len(answer.result))

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._bytes_under_way -= self.under_way.pop(task)
        self._read_within_bounds()

    def _read_within_bounds(self) -> None:
        within = len(self.under_way) < _MAX_UNDER_WAY and self._bytes_under_way < _MAX_BYTES_UNDER_WAY
        if within == self._reading or self._transport is None:
            return
        self._reading = within
        if within:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _tell(self) -> None:
        """That the meter lives, as long as calls are under way; not a timer for each of them."""
        self._alive = None
        if self.under_way:
            self.send(_NOTHING)
            self._alive = asyncio.get_running_loop().call_later(ALIVE_S, self._tell)
