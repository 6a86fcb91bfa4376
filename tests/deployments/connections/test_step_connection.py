"""The connection between an ingress and an engine replica, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from unittest.mock import Mock

import pytest

from deployments.connections import step_connection, ticketed_connection
from deployments.connections.step_connection import StepLine, StepServer, step_line
from deployments.connections.ticketed_connection import Ticket

pytestmark = pytest.mark.usefixtures("plain_and_tls")


class Replica:
    """Its stream ends after `messages`, or goes on until it is closed."""

    def __init__(self, messages: list[bytes] | None = None) -> None:
        self.messages = messages
        self.made = 0
        self.streams: list[str] = []
        self.orders: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.closed = asyncio.Event()

    def take_commands(self, stream_id: str, orders: bytes) -> None:
        self.orders.put_nowait((stream_id, orders))

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
    server = StepServer(replica.steps, replica.take_commands)
    await server.start("127.0.0.1")
    try:
        yield server
    finally:
        server.close()


@asynccontextmanager
async def line(server: StepServer, stream_id: str = "s") -> AsyncIterator[tuple[Ticket, asyncio.Task[None]]]:
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


async def rest(line: StepLine) -> list[bytes]:
    """What still comes until the replica ends the stream."""
    messages = []
    async with asyncio.timeout(5.0):
        while (message := await line.receive()) is not None:
            messages.append(message)
    return messages


async def until(condition: asyncio.Event) -> None:
    async with asyncio.timeout(5.0):
        await condition.wait()


async def test_messages_of_any_size_arrive_whole_and_in_order() -> None:
    messages = [b"", b"a", bytes(3_000_000), b"end" * 70_000]
    async with serving(replica := Replica(messages)) as server, line(server, "i/m/r#1") as (ticket, call):
        async with step_line(ticket) as ours:
            assert await rest(ours) == messages
        async with asyncio.timeout(5.0):
            await call  # Serve may stop the replica now
    assert replica.streams == ["i/m/r#1"]


async def test_orders_of_any_size_arrive_whole_and_in_order() -> None:
    orders = [b"a", bytes(3_000_000), b"end" * 70_000]
    async with (
        serving(replica := Replica()) as server,
        line(server, "i/m/r#1") as (ticket, _),
        step_line(ticket) as ours,
    ):
        await ours.receive()
        for order in orders:
            ours.send(order)
        async with asyncio.timeout(5.0):
            assert [await replica.orders.get() for _ in orders] == [("i/m/r#1", order) for order in orders]
        assert await ours.receive() == b"news"


async def test_orders_that_the_replica_chokes_on_end_the_stream() -> None:
    class Choking(Replica):
        def take_commands(self, stream_id: str, orders: bytes) -> None:
            raise ValueError("no orders")

    async with serving(Choking()) as server, line(server) as (ticket, call):
        async with step_line(ticket) as ours:
            await ours.receive()
            ours.send(b"?")
            await rest(ours)
        async with asyncio.timeout(5.0):
            await call


async def test_what_is_sent_after_the_end_is_lost() -> None:
    async with serving(Replica([])) as server, line(server) as (ticket, _):
        async with step_line(ticket) as ours:
            assert await rest(ours) == []
            ours.send(b"too late")
        ours.send(b"later still")


async def test_the_next_message_is_made_when_the_one_before_is_dealt_with() -> None:
    async with (
        serving(replica := Replica()) as server,
        line(server) as (ticket, _),
        step_line(ticket) as ours,
    ):
        for number in range(1, 20):
            assert await ours.receive() == b"news"
            await asyncio.sleep(0.001)  # time enough to run ahead
            assert replica.made == number


async def test_closing_the_receiving_end_closes_the_stream() -> None:
    async with serving(replica := Replica()) as server, line(server) as (ticket, call):
        async with step_line(ticket) as ours:
            await ours.receive()
        await until(replica.closed)
        async with asyncio.timeout(5.0):
            await call


async def test_closing_the_call_closes_the_stream_and_ends_the_receiving_end() -> None:
    async with serving(replica := Replica()) as server:
        tickets = server.line("s")
        async with step_line(await anext(tickets)) as ours:
            await ours.receive()
            await tickets.aclose()
            await until(replica.closed)
            assert await rest(ours) == []


async def test_an_ingress_that_leaves_as_soon_as_it_has_come_ends_the_call() -> None:
    """Before the stream has been opened for it."""
    async with serving(replica := Replica()) as server, line(server) as (ticket, call):
        door = ticketed_connection._Door(server._tickets._expected)
        transport = Mock()
        door.connection_made(transport)
        door.data_received(ticket.secret)
        [sender] = transport.set_protocol.call_args.args
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
        async with step_line(ticket) as ours:
            assert await rest(ours) == [b"one"]
        async with asyncio.timeout(5.0):
            await call


async def test_an_ingress_that_never_comes_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_connection, "CONNECT_LIMIT_S", 0.05)
    async with serving(replica := Replica()) as server, line(server) as (_, call):
        async with asyncio.timeout(5.0):
            await call
    assert replica.streams == []


async def test_a_replica_that_is_gone_refuses() -> None:
    async with serving(Replica()) as server, line(server) as (ticket, _):
        pass
    with pytest.raises(ConnectionRefusedError):
        async with step_line(ticket):
            pass
