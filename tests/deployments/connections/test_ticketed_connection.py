"""Who gets a connection, and that frames arrive whole however the network cuts them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from deployments.connections import ticketed_connection
from deployments.connections.ticketed_connection import (
    MAX_FRAME_BYTES,
    FramedConnection,
    Ticket,
    TicketServer,
    connected,
)


class Recording(FramedConnection):
    """Keeps what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.lost = asyncio.Event()

    def frame_received(self, frame: bytes) -> None:
        self.frames.put_nowait(frame)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()


@pytest.fixture
async def server() -> AsyncIterator[TicketServer]:
    server = TicketServer()
    await server.start("127.0.0.1")
    yield server
    server.close()
    server.close()


async def until(condition: asyncio.Event) -> None:
    async with asyncio.timeout(5.0):
        await condition.wait()


async def test_frames_travel_in_both_directions(server: TicketServer) -> None:
    theirs = Recording()
    ours = await connected(server.ticket(theirs), Recording())
    ours.send(b"first")  # in one piece with the secret, it may be
    ours.send(b"")
    async with asyncio.timeout(5.0):
        assert [await theirs.frames.get() for _ in range(2)] == [b"first", b""]
        theirs.send(bytes(1_000_000))
        assert await ours.frames.get() == bytes(1_000_000)
    ours.close()
    await until(theirs.lost)
    theirs.send(b"to nobody")


@pytest.mark.parametrize("piece_bytes", [1, 3, 4, 5, 7, 100])
def test_frames_arrive_whole_however_they_are_cut(piece_bytes: int) -> None:
    connection = Recording()
    frames = [b"", b"one", b"", b"three" * 5]
    data = b"".join(len(frame).to_bytes(4) + frame for frame in frames)
    for begin in range(0, len(data), piece_bytes):
        connection.data_received(data[begin : begin + piece_bytes])
    assert [connection.frames.get_nowait() for _ in frames] == frames
    assert connection.frames.empty()


async def test_only_the_ticket_leads_in_and_only_once(server: TicketServer) -> None:
    theirs = Recording()
    ticket = server.ticket(theirs)
    forged = await connected(Ticket(ticket.host, ticket.port, bytes(16)), Recording())
    await until(forged.lost)
    first = await connected(ticket, Recording())
    theirs_sends = asyncio.create_task(theirs.frames.get())
    first.send(b"in")
    async with asyncio.timeout(5.0):
        assert await theirs_sends == b"in"
    again = await connected(ticket, Recording())
    await until(again.lost)
    assert not first.lost.is_set()
    first.close()


async def test_a_ticket_that_was_withdrawn_leads_nowhere(server: TicketServer) -> None:
    ticket = server.ticket(Recording())
    server.withdraw(ticket)
    late = await connected(ticket, Recording())
    await until(late.lost)


async def test_a_ticket_is_good_for_a_while(server: TicketServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticketed_connection, "CONNECT_LIMIT_S", 0.01)
    ticket = server.ticket(Recording())
    monkeypatch.undo()
    gone = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, gone.set)  # later than the ticket's own end
    await until(gone)
    late = await connected(ticket, Recording())
    await until(late.lost)


async def test_nobody_may_connect_and_say_nothing(server: TicketServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticketed_connection, "CONNECT_LIMIT_S", 0.05)
    ticket = server.ticket(Recording())
    reader, writer = await asyncio.open_connection(ticket.host, ticket.port)
    async with asyncio.timeout(5.0):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_an_end_that_only_waits_asks_whether_the_other_is_there(server: TicketServer) -> None:
    """Without that, a host that is cut off for longer than it takes the other end to give up never learns of it."""
    theirs = Recording()
    ours = await connected(server.ticket(theirs), Recording())
    ours.send(b"in")
    async with asyncio.timeout(5.0):
        await theirs.frames.get()
    for end in (ours, theirs):
        assert end._transport is not None
        connection = end._transport.get_extra_info("socket")
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < 10
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
    ours.close()
    await until(theirs.lost)


async def test_a_frame_beyond_the_bound_is_neither_sent_nor_waited_for(
    server: TicketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Recording()
    ours = await connected(server.ticket(theirs), Recording())
    with pytest.raises(ValueError, match="bytes"):
        ours.send(bytes(MAX_FRAME_BYTES + 1))
    ours.send(b"whole")
    async with asyncio.timeout(5.0):
        assert await theirs.frames.get() == b"whole"
    monkeypatch.setattr(ticketed_connection, "MAX_FRAME_BYTES", 10)
    theirs.data_received((11).to_bytes(4))
    await until(ours.lost)
    assert theirs.frames.empty()
