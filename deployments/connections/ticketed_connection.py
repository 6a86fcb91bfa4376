"""Connections of the cluster's processes to each other, past Serve: tickets, which calls through Serve hand out, and
frames of bytes in both directions.

A message over a Serve handle passes through gRPC, its threads and Serve's wrappers on both sides, which costs far more
CPU time than what is in it (docs/performance.md); here it costs a write and a read. Serve still leads to the process
and says who may connect. What the frames mean is the business of step_connection.py (engine replicas) and
meter/remote/meter_connection.py (meters).

Whoever connects sends the secret of his ticket first, inside TLS where the cluster has it (tls.py). A process that dies
takes its connections with it: the other side knows at once.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from abc import ABC, abstractmethod
from typing import Final, TypeVar, cast

import msgspec
import structlog

from deployments.connections.tls import tls_files

__all__ = ["CONNECT_LIMIT_S", "MAX_FRAME_BYTES", "FramedConnection", "Ticket", "TicketServer", "connected"]

log = structlog.get_logger()

CONNECT_LIMIT_S: Final = 5.0
"""How long a ticket is good, and a stranger may say nothing."""
_SECRET_BYTES: Final = 16
_LENGTH_BYTES: Final = 4
MAX_FRAME_BYTES: Final = 128 * 2**20
"""Twice what the largest request body may be (serve_app/config.py). A longer frame is a mistake, or not ours: the
connection ends."""
_UNREACHABLE_MS: Final = 10_000
"""A host that takes nothing for so long is gone."""
_PROBE_S: Final = 3


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """Leads to one connection, once."""

    host: str
    port: int
    secret: bytes


class FramedConnection(asyncio.Protocol, ABC):
    """One end: frames in order, whole, each sent at once."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREACHABLE_MS)
            # An end that only waits learns of a lost host by asking, until the other has been silent for as long.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)

    def send(self, frame: bytes) -> None:
        """Never waits. What is sent when the other end is gone is lost: `connection_lost` tells. Raises ValueError for
        a frame beyond MAX_FRAME_BYTES."""
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(frame)} bytes")
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(len(frame).to_bytes(_LENGTH_BYTES) + frame)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _LENGTH_BYTES:
            length = int.from_bytes(buffer[:_LENGTH_BYTES])
            if length > MAX_FRAME_BYTES:
                log.error("frame too long", bytes=length)
                self.close()
                return
            end = _LENGTH_BYTES + length
            if len(buffer) < end:
                return
            frame = bytes(buffer[_LENGTH_BYTES:end])
            del buffer[:end]
            self.frame_received(frame)

    @abstractmethod
    def frame_received(self, frame: bytes) -> None: ...

    @abstractmethod
    def connection_lost(self, error: Exception | None) -> None: ...

    def close(self) -> None:
        """Now, with what was not sent. Safe twice, and before there is a connection."""
        if self._transport is not None:
            self._transport.abort()


AnyConnection = TypeVar("AnyConnection", bound=FramedConnection)


class TicketServer:
    """Where other processes connect to this one. For use on one event loop."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._address = ("", 0)
        self._expected: dict[bytes, FramedConnection] = {}

    async def start(self, host: str) -> None:
        """Listen on a free port of `host`, an address that the others can reach. Raises TlsError."""
        loop = asyncio.get_running_loop()
        files = tls_files(os.environ)
        self._server = await loop.create_server(
            lambda: _Door(self._expected),
            host,
            0,
            ssl=None if files is None else files.server_context(),
            ssl_handshake_timeout=None if files is None else CONNECT_LIMIT_S,
        )
        self._address = (host, self._server.sockets[0].getsockname()[1])

    def ticket(self, connection: FramedConnection) -> Ticket:
        """`connection` is made when somebody comes with this ticket, within CONNECT_LIMIT_S."""
        secret = secrets.token_bytes(_SECRET_BYTES)
        self._expected[secret] = connection
        ticket = Ticket(*self._address, secret)
        asyncio.get_running_loop().call_later(CONNECT_LIMIT_S, self.withdraw, ticket)
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody may come with it any more."""
        self._expected.pop(ticket.secret, None)

    def close(self) -> None:
        """Take no more connections. Safe twice, and before `start`."""
        self._expected.clear()
        if self._server is not None:
            self._server.close()


class _Door(asyncio.Protocol):
    """Lets in who has a ticket."""

    def __init__(self, expected: dict[bytes, FramedConnection]) -> None:
        self._expected = expected
        self._secret = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._stranger = asyncio.get_running_loop().call_later(CONNECT_LIMIT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        self._secret += data
        if len(self._secret) < _SECRET_BYTES:
            return
        self._stranger.cancel()
        connection = self._expected.pop(self._secret[:_SECRET_BYTES], None)
        if connection is None:
            log.warning("connection without a ticket refused")
            self._transport.close()
            return
        self._transport.set_protocol(connection)
        connection.connection_made(self._transport)
        if len(self._secret) > _SECRET_BYTES:
            connection.data_received(self._secret[_SECRET_BYTES:])

    def connection_lost(self, _error: Exception | None) -> None:
        self._stranger.cancel()


async def connected(ticket: Ticket, connection: AnyConnection) -> AnyConnection:
    """`connection`, made to where `ticket` leads. Raises OSError, of which TimeoutError and TlsError are two."""
    loop = asyncio.get_running_loop()
    files = tls_files(os.environ)
    context = None if files is None else files.client_context()
    async with asyncio.timeout(CONNECT_LIMIT_S):
        transport, _ = await loop.create_connection(lambda: connection, ticket.host, ticket.port, ssl=context)
    transport.write(ticket.secret)
    return connection
