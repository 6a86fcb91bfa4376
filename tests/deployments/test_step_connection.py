"""The connection of a step stream, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from unittest.mock import Mock

import pytest

from deployments import step_connection
from deployments.step_connection import StepServer, StepTicket, received_steps


class Replica:
    """Its stream ends after `messages`, or goes on until it is closed."""

    def __init__(self, messages: list[bytes] | None = None) -> None:
        self.messages = messages
        self.made = 0
        self.streams: list[str] = []
        self.closed = asyncio.Event()

    async def steps(self, stream_id: str) -> AsyncGenerator[bytes, None]:
        self.streams.append(stream_id)
        try:
            while self.messages is None or self.made < len(self.messages):
                self.made += 1
                yield b"news" if self.messages is None else self.messages[self.made - 1]
        finally:
            self.closed.set()


@asynccontextmanager
async def serving(replica: Replica) -> AsyncIterator[StepServer]:
    server = StepServer(replica.steps)
    await server.start("127.0.0.1")
    try:
        yield server
    finally:
        server.close()


@asynccontextmanager
async def line(server: StepServer, stream_id: str = "s") -> AsyncIterator[tuple[StepTicket, asyncio.Task[None]]]:
    """The ticket, and the call that gave it, which ends when the stream does."""
    tickets = server.line(stream_id)
    async with aclosing(tickets):
        ticket = await anext(tickets)

        async def last() -> None:
            async for _ in tickets:
                raise AssertionError("one ticket is enough")

        call = asyncio.create_task(last())
        yield ticket, call
        call.cancel()
        await asyncio.wait([call])


async def until(condition: asyncio.Event) -> None:
    async with asyncio.timeout(5.0):
        await condition.wait()


async def test_messages_of_any_size_arrive_whole_and_in_order() -> None:
    messages = [b"", b"a", bytes(3_000_000), b"end" * 70_000]
    async with serving(replica := Replica(messages)) as server, line(server, "i/m/r#1") as (ticket, call):
        assert [message async for message in received_steps(ticket)] == messages
        async with asyncio.timeout(5.0):
            await call  # Serve may stop the replica now
    assert replica.streams == ["i/m/r#1"]


async def test_the_next_message_is_made_when_the_one_before_is_dealt_with() -> None:
    async with (
        serving(replica := Replica()) as server,
        line(server) as (ticket, _),
        aclosing(received_steps(ticket)) as steps,
    ):
        for number in range(1, 20):
            assert await anext(steps) == b"news"
            await asyncio.sleep(0.001)  # time enough to run ahead
            assert replica.made == number


async def test_closing_the_receiving_end_closes_the_stream() -> None:
    async with serving(replica := Replica()) as server, line(server) as (ticket, call):
        async with aclosing(received_steps(ticket)) as steps:
            await anext(steps)
        await until(replica.closed)
        async with asyncio.timeout(5.0):
            await call


async def test_closing_the_call_closes_the_stream_and_ends_the_receiving_end() -> None:
    async with serving(replica := Replica()) as server:
        tickets = server.line("s")
        async with aclosing(received_steps(await anext(tickets))) as steps:
            await anext(steps)
            await tickets.aclose()
            await until(replica.closed)
            assert [message async for message in steps] == []


async def test_an_ingress_that_leaves_as_soon_as_it_has_come_ends_the_call() -> None:
    """Before the stream has been opened for it."""
    async with serving(replica := Replica()) as server, line(server) as (ticket, call):
        sender = step_connection._Sender(server._expected, replica.steps)
        transport = Mock()
        sender.connection_made(transport)
        sender.data_received(ticket.secret)
        sender.connection_lost(None)
        async with asyncio.timeout(3.0):
            await call
    assert replica.streams == []


async def test_a_stream_that_fails_ends_its_connection() -> None:
    class Broken(Replica):
        async def steps(self, stream_id: str) -> AsyncGenerator[bytes, None]:
            yield b"one"
            raise RuntimeError("engine gone")

    async with serving(Broken()) as server, line(server) as (ticket, call):
        assert [message async for message in received_steps(ticket)] == [b"one"]
        async with asyncio.timeout(5.0):
            await call


async def test_only_the_ticket_opens_the_stream_and_only_once() -> None:
    async with serving(replica := Replica()) as server, line(server) as (ticket, _):
        forged = StepTicket(ticket.host, ticket.port, bytes(16))
        assert [message async for message in received_steps(forged)] == []
        async with aclosing(received_steps(ticket)) as steps:
            await anext(steps)
            assert [message async for message in received_steps(ticket)] == []
    assert replica.streams == ["s"]


async def test_nobody_may_connect_and_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_connection, "_CONNECT_LIMIT_S", 0.05)
    async with serving(Replica()) as server, line(server) as (ticket, call):
        reader, writer = await asyncio.open_connection(ticket.host, ticket.port)
        async with asyncio.timeout(5.0):
            assert await reader.read() == b""
            await call  # whose ingress has not come either
        writer.close()
        await writer.wait_closed()


async def test_a_replica_that_is_gone_refuses() -> None:
    async with serving(Replica()) as server, line(server) as (ticket, _):
        pass
    with pytest.raises(ConnectionRefusedError):
        await anext(received_steps(ticket))
