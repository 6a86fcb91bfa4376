"""Calls to a meter over real sockets: several at a time, and what becomes of them when either side goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError

from deployments.connections.ticketed_connection import FramedConnection, connected
from deployments.contracts import pack
from deployments.meter.errors import LedgerUnavailable
from deployments.meter.remote import meter_connection
from deployments.meter.remote.meter_connection import MeterConnection, MeterMethod, MeterServer, MeterUnreachable
from deployments.meter.remote.remote_meter import RemoteMeter

pytestmark = pytest.mark.usefixtures("plain_and_tls")


class Meter:
    """Answers each call with its argument, once `open`; and Serve's handle of its deployment."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None
        self.calls: list[tuple[MeterMethod, bytes]] = []
        self.answered = 0
        self.came = asyncio.Event()
        """A call has."""
        self.server = MeterServer(self.answer)
        self.connects = 0
        self.connect_error: Exception | None = None
        self.connect = self

    async def answer(self, method: MeterMethod, argument: bytes) -> bytes:
        self.calls.append((method, argument))
        self.came.set()
        if argument != b"at once":
            await self.open.wait()
        self.answered += 1
        if self.error is not None:
            raise self.error
        return argument

    def options(self, **_options: Any) -> Meter:
        return self

    async def remote(self) -> bytes:
        self.connects += 1
        if self.connect_error is not None:
            raise self.connect_error
        return pack(self.server.ticket())


@pytest.fixture
async def meter() -> AsyncIterator[Meter]:
    meter = Meter()
    await meter.server.start("127.0.0.1")
    yield meter
    meter.open.set()
    await meter.server.close()


@pytest.fixture
async def remote(meter: Meter) -> AsyncIterator[RemoteMeter]:
    remote = RemoteMeter(cast(Any, meter))
    yield remote
    remote.close()


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110  # sockets tell of nothing that could be waited for
            await asyncio.sleep(0.001)


def begun(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(call)


async def test_all_calls_go_over_one_connection(meter: Meter, remote: RemoteMeter) -> None:
    assert await asyncio.gather(*(remote.admit(b"%d" % number) for number in range(20))) == [
        b"%d" % number for number in range(20)
    ]
    assert await remote.authenticate(b"digest") == b"digest"
    assert await remote.usage(b"query") == b"query"
    assert await remote.counters() == b""
    await remote.renew("ingress")
    await remote.settle(bytes(3_000_000))
    assert meter.connects == 1
    assert meter.calls[-2:] == [("renew", b"ingress"), ("settle", bytes(3_000_000))]


async def test_a_call_that_takes_long_holds_up_no_other(meter: Meter, remote: RemoteMeter) -> None:
    meter.open.clear()
    slow = begun(remote.usage(b"slow"))
    assert await remote.admit(b"at once") == b"at once"
    assert not slow.done()
    meter.open.set()
    assert await slow == b"slow"


async def test_what_one_turn_calls_and_answers_travels_in_one_frame(
    meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await connected(meter.server.ticket(), MeterConnection())
    assert await connection.call("ping", b"") == b""
    frames: list[str] = []

    def told(end: FramedConnection, name: str) -> None:
        send = end.send

        def told_send(frame: bytes) -> None:
            frames.append(name)
            send(frame)

        monkeypatch.setattr(end, "send", told_send)

    told(connection, "calls")
    [caller] = meter.server._callers
    told(caller, "answers")
    meter.open.clear()
    calls = [begun(connection.call("admit", b"%d" % number)) for number in range(100)]
    await soon(lambda: len(meter.calls) == 101)
    assert frames == ["calls"]
    calls.append(begun(connection.call("admit", b"at once")))  # while the others are under way
    assert await calls[-1] == b"at once"
    assert frames == ["calls", "calls", "answers"]
    meter.open.set()
    await asyncio.gather(*calls)
    assert frames == ["calls", "calls", "answers", "answers"]
    connection.close()


async def test_a_frame_ends_with_the_message_that_makes_it_large(meter: Meter) -> None:
    connection = await connected(meter.server.ticket(), MeterConnection())
    assert await connection.call("ping", b"") == b""
    received: list[int] = []
    [caller] = meter.server._callers
    receive = caller.frame_received

    def told(frame: bytes) -> None:
        received.append(len(frame))
        receive(frame)

    caller.frame_received = told  # type: ignore[method-assign]
    arguments = [bytes(100_000)] * 10
    assert await asyncio.gather(*(connection.call("admit", argument) for argument in arguments)) == arguments
    assert len(received) == 4
    assert max(received) < 310_000
    connection.close()


async def test_many_calls_that_take_long_do_not_stop_the_reading_of_others(meter: Meter, remote: RemoteMeter) -> None:
    meter.open.clear()
    slow = [begun(remote.admit(b"%d" % number)) for number in range(2000)]
    await soon(lambda: len(meter.calls) == 2000)
    assert await remote.admit(b"at once") == b"at once"
    meter.open.set()
    assert len(await asyncio.gather(*slow)) == 2000


@pytest.mark.parametrize("error", [LedgerUnavailable("away"), ValueError("a bug")])
async def test_what_the_meter_raises_is_told_by_its_name(meter: Meter, remote: RemoteMeter, error: Exception) -> None:
    meter.error = error
    with pytest.raises(MeterUnreachable, match=type(error).__name__):
        await remote.admit(b"")
    meter.error = None
    assert await remote.admit(b"again") == b"again"
    assert meter.connects == 1


async def test_a_caller_that_gives_up_disturbs_no_other(meter: Meter, remote: RemoteMeter) -> None:
    meter.open.clear()
    calls = [begun(remote.admit(b"%d" % number)) for number in range(2)]
    await soon(lambda: len(meter.calls) == 2)
    calls[0].cancel()
    meter.open.set()
    assert await calls[1] == b"1"
    assert await remote.admit(b"2") == b"2"
    assert (meter.connects, meter.answered) == (1, 3)


async def test_a_caller_that_gives_up_while_connecting_disturbs_no_other(meter: Meter, remote: RemoteMeter) -> None:
    calls = [begun(remote.admit(b"%d" % number)) for number in range(2)]
    await asyncio.sleep(0)
    calls[0].cancel()
    assert await calls[1] == b"1"
    assert meter.connects == 1


async def test_calls_that_wait_when_the_connection_breaks_fail_and_later_ones_connect_anew(
    meter: Meter, remote: RemoteMeter
) -> None:
    meter.open.clear()
    waiting = begun(remote.settle(b"1"))
    await soon(lambda: len(meter.calls) == 1)
    [caller] = meter.server._callers
    caller.close()
    with pytest.raises(MeterUnreachable):
        await waiting
    meter.open.set()
    assert await remote.admit(b"2") == b"2"
    await soon(lambda: meter.answered == 2)  # what was begun goes on
    assert meter.connects == 2


async def test_a_meter_that_serve_does_not_reach_is_asked_for_again_at_the_next_call(
    meter: Meter, remote: RemoteMeter
) -> None:
    meter.connect_error = RayActorError()
    for _ in range(2):
        with pytest.raises(MeterUnreachable, match="RayActorError"):
            await remote.admit(b"")
    meter.connect_error = None
    assert await remote.admit(b"1") == b"1"
    assert meter.connects == 3


async def test_a_meter_that_hangs_is_left_and_looked_for_anew(
    meter: Meter, remote: RemoteMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter_connection, "CALL_LIMIT_S", 0.1)
    monkeypatch.setattr(meter_connection, "ALIVE_S", 60.0)  # as if its event loop stood still
    meter.open.clear()
    given_up = begun(remote.admit(b"1"))
    await soon(lambda: len(meter.calls) == 1)
    given_up.cancel()  # whoever waits for an answer: it is due
    with pytest.raises(MeterUnreachable, match="no sign of life"):
        await remote.admit(b"2")
    meter.open.set()
    assert await remote.admit(b"3") == b"3"
    assert meter.connects == 2


async def test_a_call_may_take_longer_than_a_meter_may_be_silent(
    meter: Meter, remote: RemoteMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter_connection, "CALL_LIMIT_S", 0.5)
    monkeypatch.setattr(meter_connection, "ALIVE_S", 0.05)
    meter.open.clear()
    slow = begun(remote.admit(b"slow"))
    await asyncio.sleep(1.5)
    assert not slow.done()
    meter.open.set()
    assert await slow == b"slow"
    assert meter.connects == 1


async def test_a_meter_that_answers_anything_does_not_hang(
    meter: Meter, remote: RemoteMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter_connection, "CALL_LIMIT_S", 0.2)
    monkeypatch.setattr(meter_connection, "ALIVE_S", 60.0)
    meter.open.clear()
    slow = begun(remote.usage(b"slow"))
    until = asyncio.get_running_loop().time() + 0.5
    while asyncio.get_running_loop().time() < until:
        await remote.admit(b"at once")
        await asyncio.sleep(0.01)
    assert not slow.done()
    meter.open.set()
    assert await slow == b"slow"
    assert meter.connects == 1


async def test_a_meter_that_closes_answers_what_it_has_begun_and_takes_nothing_more(meter: Meter) -> None:
    connection = await connected(meter.server.ticket(), MeterConnection())
    meter.open.clear()
    begun_before = begun(connection.call("settle", b"1"))
    await soon(lambda: len(meter.calls) == 1)
    closing = begun(meter.server.close())
    await asyncio.sleep(0)
    late = begun(connection.call("settle", b"2"))
    await asyncio.sleep(0.02)
    meter.open.set()
    assert await begun_before == b"1"
    with pytest.raises(MeterUnreachable):
        await late
    await closing
    with pytest.raises(MeterUnreachable):
        await connection.call("settle", b"3")
    assert [argument for _, argument in meter.calls] == [b"1"]


@pytest.mark.parametrize(("bound", "at_most"), [("_MAX_UNDER_WAY", 2), ("_MAX_BYTES_UNDER_WAY", 2)])
async def test_no_more_is_read_than_the_meter_may_work_on(
    meter: Meter, monkeypatch: pytest.MonkeyPatch, bound: str, at_most: int
) -> None:
    monkeypatch.setattr(meter_connection, bound, at_most)
    connection = await connected(meter.server.ticket(), MeterConnection())
    meter.open.clear()
    calls = []
    for number in range(5):
        calls.append(begun(connection.call("admit", b"%d" % number)))
        await asyncio.sleep(0.01)  # else they come in one piece, which is read as a whole
    assert len(meter.calls) == 2
    meter.open.set()
    assert await asyncio.gather(*calls) == [b"%d" % number for number in range(5)]
    connection.close()
