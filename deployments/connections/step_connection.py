"""The connection between an ingress and an engine replica: step messages one way, commands the other way; both ends.

It is opened, and ended, by a call through Serve, which so knows that the replica is in use: its first item is the
ticket for the connection (ticketed_connection.py).

The ingress sends an empty frame for each message that it has dealt with; only then the next is made. So a receiver that
is busy gets fewer, larger messages, and nothing queues up between the two. Commands (contracts.EngineCommands) need no
answer of their own: messages tell what became of them, and if the connection breaks, they are lost with all else on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import structlog

from deployments.connections.ticketed_connection import (
    CONNECT_LIMIT_S,
    FramedConnection,
    Ticket,
    TicketServer,
    connected,
)

__all__ = ["StepLine", "StepServer", "step_line"]

log = structlog.get_logger()

_DONE = b""


class StepServer:
    """Where ingresses connect to an engine replica. For use on one event loop."""

    def __init__(
        self, steps: Callable[[str], AsyncGenerator[bytes, None]], take_commands: Callable[[str, bytes], None]
    ) -> None:
        """`steps(stream_id)` opens the stream and yields its messages until it is closed. `take_commands(stream_id,
        commands)` gets what comes the other way; what it raises ends the stream."""
        self._steps = steps
        self._take_commands = take_commands
        self._tickets = TicketServer()

    async def start(self, host: str) -> None:
        """Listen on a free port of `host`, an address that ingresses can reach."""
        await self._tickets.start(host)

    async def line(self, stream_id: str) -> AsyncGenerator[Ticket, None]:
        """Yields the ticket for `stream_id`, and ends with its connection; that ends when this is closed."""
        sender = _Sender(stream_id, self._steps, self._take_commands)
        ticket = self._tickets.ticket(sender)
        try:
            yield ticket
            try:
                async with asyncio.timeout(CONNECT_LIMIT_S):
                    await sender.connected.wait()
            except TimeoutError:
                log.warning("step stream never connected", stream=stream_id)
                return
            await sender.ended.wait()
        finally:
            self._tickets.withdraw(ticket)
            sender.end()

    def close(self) -> None:
        """Take no more connections; those there are end with their streams."""
        self._tickets.close()


class _Sender(FramedConnection):
    """The replica's end."""

    def __init__(
        self,
        stream_id: str,
        steps: Callable[[str], AsyncGenerator[bytes, None]],
        take_commands: Callable[[str, bytes], None],
    ) -> None:
        super().__init__()
        self.connected = asyncio.Event()
        self.ended = asyncio.Event()
        self._stream_id = stream_id
        self._steps = steps
        self._take_commands = take_commands
        self._done = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._pump = asyncio.create_task(self._send_all(), name=f"steps-{self._stream_id}")
        self._pump.add_done_callback(self._pump_ended)  # also when it is cancelled before it began
        self.connected.set()

    def frame_received(self, frame: bytes) -> None:
        if frame == _DONE:
            self._done.set()
            return
        try:
            self._take_commands(self._stream_id, frame)
        except Exception:
            log.exception("commands not taken", stream=self._stream_id)
            self.end()

    def connection_lost(self, _error: Exception | None) -> None:
        self.end()

    def end(self) -> None:
        """The stream, and the connection with it."""
        if self._pump is not None:
            self._pump.cancel()

    async def _send_all(self) -> None:
        try:
            async with aclosing(self._steps(self._stream_id)) as steps:
                async for message in steps:
                    self._done.clear()
                    self.send(message)
                    await self._done.wait()
        except Exception as error:
            log.warning("step stream failed", stream=self._stream_id, reason=repr(error))

    def _pump_ended(self, _pump: asyncio.Task[None]) -> None:
        assert self._transport is not None
        self._transport.close()  # what was sent still arrives
        self.ended.set()


class StepLine(FramedConnection):
    """The ingress's end."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue(2)  # the next comes after one is dealt with
        self._received = False

    async def receive(self) -> bytes | None:
        """The next message, None at the end; the one before is dealt with."""
        if self._received:
            self.send(_DONE)
        message = await self._messages.get()
        self._received = message is not None
        return message

    def frame_received(self, frame: bytes) -> None:
        self._messages.put_nowait(frame)

    def connection_lost(self, _error: Exception | None) -> None:
        self._messages.put_nowait(None)


@asynccontextmanager
async def step_line(ticket: Ticket) -> AsyncIterator[StepLine]:
    """The line that `ticket` leads to; leaving this ends the stream, too. Raises OSError."""
    line = await connected(ticket, StepLine())
    try:
        yield line
    finally:
        line.close()
