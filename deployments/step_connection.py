"""The connection that carries a step stream from an engine replica to an ingress: both ends, and what is between them.

A message over a Serve handle passes through gRPC, its threads and Serve's generators on both sides, which costs far
more CPU time than what is in it (docs/performance.md); here it costs a write and a read. The stream is still opened,
and ended, by a call through Serve, which so knows that the replica is in use: its first item is the ticket for the
connection.

The ingress sends the ticket's secret, and then one byte for each message that it has dealt with; only then the next is
made. So a receiver that is busy gets fewer, larger messages, and nothing queues up between the two. A process that dies
takes its connections with it: the other side knows at once.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final, cast

import msgspec
import structlog

__all__ = ["StepServer", "StepTicket", "received_steps"]

log = structlog.get_logger()

_SECRET_BYTES: Final = 16
_CONNECT_LIMIT_S: Final = 5.0
_UNREACHABLE_MS: Final = 10_000
"""A host that takes nothing for so long is gone."""
_DONE: Final = b"\0"
_LENGTH_BYTES: Final = 4


class StepTicket(msgspec.Struct, frozen=True, array_like=True):
    """Leads one ingress to its step stream, once."""

    host: str
    port: int
    secret: bytes


class StepServer:
    """Where ingresses connect to an engine replica. For use on one event loop."""

    def __init__(self, steps: Callable[[str], AsyncGenerator[bytes, None]]) -> None:
        """`steps(stream_id)` opens the stream and yields its messages until it is closed."""
        self._steps = steps
        self._server: asyncio.Server | None = None
        self._address = ("", 0)
        self._expected: dict[bytes, _Line] = {}

    async def start(self, host: str) -> None:
        """Listen on a free port of `host`, an address that ingresses can reach."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Sender(self._expected, self._steps), host, 0)
        self._address = (host, self._server.sockets[0].getsockname()[1])

    async def line(self, stream_id: str) -> AsyncGenerator[StepTicket, None]:
        """Yields the ticket for `stream_id`, and ends with its connection; that ends when this is closed."""
        secret = secrets.token_bytes(_SECRET_BYTES)
        line = self._expected[secret] = _Line(stream_id)
        try:
            yield StepTicket(*self._address, secret)
            try:
                async with asyncio.timeout(_CONNECT_LIMIT_S):
                    await line.connected.wait()
            except TimeoutError:
                log.warning("step stream never connected", stream=stream_id)
                return
            await line.ended.wait()
        finally:
            self._expected.pop(secret, None)
            line.close()

    def close(self) -> None:
        """Take no more connections; those there are end with their streams."""
        if self._server is not None:
            self._server.close()


class _Line:
    """One step stream: the call that opened it, and the connection that carries it."""

    def __init__(self, stream_id: str) -> None:
        self.stream_id = stream_id
        self.connected = asyncio.Event()
        self.ended = asyncio.Event()
        self.pump: asyncio.Task[None] | None = None

    def close(self) -> None:
        if self.pump is not None:
            self.pump.cancel()


class _Sender(asyncio.Protocol):
    """The replica's end of a connection."""

    def __init__(self, expected: dict[bytes, _Line], steps: Callable[[str], AsyncGenerator[bytes, None]]) -> None:
        self._expected = expected
        self._steps = steps
        self._secret = b""
        self._line: _Line | None = None
        self._done = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREACHABLE_MS)
        self._stranger = asyncio.get_running_loop().call_later(_CONNECT_LIMIT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        if self._line is not None:
            self._done.set()
            return
        self._secret += data
        if len(self._secret) < _SECRET_BYTES:
            return
        self._stranger.cancel()
        line = self._expected.pop(self._secret, None)
        if line is None:
            log.warning("step connection without a ticket refused")
            self._transport.close()
            return
        self._line = line
        line.pump = asyncio.create_task(self._send_all(line), name=f"steps-{line.stream_id}")
        line.pump.add_done_callback(lambda _: line.ended.set())  # also when it is cancelled before it began
        line.connected.set()

    def connection_lost(self, _error: Exception | None) -> None:
        self._stranger.cancel()
        if self._line is not None:
            self._line.close()

    async def _send_all(self, line: _Line) -> None:
        try:
            async with aclosing(self._steps(line.stream_id)) as steps:
                async for message in steps:
                    self._done.clear()
                    self._transport.write(len(message).to_bytes(_LENGTH_BYTES) + message)
                    await self._done.wait()
        except Exception as error:
            log.warning("step stream failed", stream=line.stream_id, reason=repr(error))
        finally:
            self._transport.close()


async def received_steps(ticket: StepTicket) -> AsyncGenerator[bytes, None]:
    """The messages of a step stream until its replica ends it; closing this ends it, too. Raises OSError."""
    async with asyncio.timeout(_CONNECT_LIMIT_S):
        transport, receiver = await asyncio.get_running_loop().create_connection(_Receiver, ticket.host, ticket.port)
    try:
        transport.write(ticket.secret)
        while (message := await receiver.message()) is not None:
            yield message
            transport.write(_DONE)
    finally:
        transport.abort()


class _Receiver(asyncio.Protocol):
    """The ingress's end: of one message at a time, since the next comes after it is dealt with."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue(2)

    async def message(self) -> bytes | None:
        """None at the end."""
        return await self._messages.get()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) < _LENGTH_BYTES:
            return
        end = _LENGTH_BYTES + int.from_bytes(self._buffer[:_LENGTH_BYTES])
        if len(self._buffer) >= end:
            self._messages.put_nowait(bytes(self._buffer[_LENGTH_BYTES:end]))
            del self._buffer[:end]

    def connection_lost(self, _error: Exception | None) -> None:
        self._messages.put_nowait(None)
