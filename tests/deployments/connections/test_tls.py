"""TLS between processes: who is let in, who is not, and what either side is told."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import pytest
import uvloop
from structlog.testing import capture_logs
from structlog.typing import EventDict

from deployments.connections.ticketed_connection import Ticket, TicketServer, connected
from deployments.connections.tls import TlsError, tls_files
from loadtests.certificates import Authority
from tests.conftest import eventually
from tests.deployments.connections.test_ticketed_connection import Recording


class Encrypted(Recording):
    @property
    def tls(self) -> ssl.SSLObject:
        assert self._transport is not None
        found: ssl.SSLObject = self._transport.get_extra_info("ssl_object")
        return found


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"))


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


async def started(variables: Mapping[str, str]) -> TicketServer:
    server = TicketServer()
    with environment(variables):
        await server.start("127.0.0.1")
    return server


@pytest.fixture
async def server(authority: Authority) -> AsyncIterator[TicketServer]:
    server = await started(authority.environment())
    yield server
    server.close()


async def refused(ticket: Ticket, variables: Mapping[str, str]) -> list[EventDict]:
    """Somebody with these variables comes with `ticket` and does not get in; what is logged of it on both sides."""
    with capture_logs() as logs, environment(variables):
        try:
            ours = await connected(ticket, Encrypted())
        except OSError:
            pass
        else:
            async with asyncio.timeout(5.0):
                await ours.lost.wait()
        await eventually(logged(logs), 5.0, every_s=0.001)
    return [entry for entry in logs if entry["event"] == "connection refused"]


def logged(logs: list[EventDict]) -> Callable[[], Awaitable[bool]]:
    async def some() -> bool:
        return bool(logs)

    return some


async def test_both_ends_show_a_certificate_and_frames_travel_in_both_directions(
    server: TicketServer, authority: Authority
) -> None:
    theirs = Encrypted()
    with environment(authority.environment()):
        ours = await connected(server.ticket(theirs), Encrypted())
    ours.send(b"first")
    async with asyncio.timeout(5.0):
        assert await theirs.frames.get() == b"first"
        theirs.send(bytes(1_000_000))
        assert await ours.frames.get() == bytes(1_000_000)
    for end in (ours, theirs):
        assert end.tls.version() == "TLSv1.3"
        assert end.tls.getpeercert()
    ours.close()
    async with asyncio.timeout(5.0):
        await theirs.lost.wait()


async def test_an_end_that_closes_sends_what_it_was_given_first(server: TicketServer, authority: Authority) -> None:
    theirs = Encrypted()
    with environment(authority.environment()):
        ours = await connected(server.ticket(theirs), Encrypted())
    ours.send(b"last")
    assert ours._transport is not None
    ours._transport.close()
    async with asyncio.timeout(5.0):
        await theirs.lost.wait()
        await ours.lost.wait()
    assert theirs.frames.get_nowait() == b"last"


async def test_a_ticket_alone_does_not_let_in(server: TicketServer, authority: Authority, stranger: Authority) -> None:
    """In plain text, with a certificate of another authority, with one that has expired; and what each is told."""
    theirs = Encrypted()
    expected = {
        "plain": ({}, "All processes need RAY_USE_TLS=1"),
        "other authority": (stranger.environment(), "use one authority in all pods"),
        "expired": (authority.environment("expired", expired=True), "has expired. Renew it, then replace the pods"),
    }
    for name, (variables, advice) in expected.items():
        logs = await refused(server.ticket(theirs), variables)
        assert any(advice in entry["reason"] for entry in logs), (name, logs)
    assert theirs._transport is None


async def test_without_a_certificate_of_its_own_nobody_is_let_in(server: TicketServer, authority: Authority) -> None:
    files = tls_files(authority.environment())
    assert files is not None
    context = ssl.create_default_context(cafile=files.authority)
    ticket = server.ticket(Encrypted())
    with capture_logs() as logs:
        reader, writer = await asyncio.open_connection(ticket.host, ticket.port, ssl=context)
        writer.write(ticket.secret)
        with suppress(OSError):  # told by an alert, if it still came
            assert await reader.read() == b""
        writer.transport.abort()
    [entry] = logs
    assert "peer did not return a certificate" in entry["reason"]
    assert "without a certificate, is refused" in entry["reason"]


async def test_nobody_with_tls_connects_to_one_without(authority: Authority) -> None:
    server = await started({})
    theirs = Encrypted()
    with environment(authority.environment()), pytest.raises(OSError):  # noqa: PT011  # as the kernel has it
        await connected(server.ticket(theirs), Encrypted())
    assert theirs._transport is None
    server.close()


async def test_a_server_whose_certificate_is_for_another_address_is_not_believed(authority: Authority) -> None:
    server = await started(authority.environment("elsewhere", "10.0.0.1"))
    theirs = Encrypted()
    [entry] = await refused(server.ticket(theirs), authority.environment())
    assert "subject alternative names must have that address" in entry["reason"]
    assert theirs._transport is None
    server.close()


async def test_nobody_may_connect_and_say_nothing(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.connections.ticketed_connection.CONNECT_LIMIT_S", 0.05)
    server = await started(authority.environment())
    ticket = server.ticket(Encrypted())
    reader, writer = await asyncio.open_connection(ticket.host, ticket.port)
    async with asyncio.timeout(5.0):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    server.close()


def test_it_is_the_same_on_the_event_loop_of_rays_workers(authority: Authority, stranger: Authority) -> None:
    async def both_ways() -> None:
        server = await started(authority.environment())
        await test_both_ends_show_a_certificate_and_frames_travel_in_both_directions(server, authority)
        await test_an_end_that_closes_sends_what_it_was_given_first(server, authority)
        await test_a_ticket_alone_does_not_let_in(server, authority, stranger)
        await test_without_a_certificate_of_its_own_nobody_is_let_in(server, authority)
        server.close()

    uvloop.run(both_ways())


def test_without_the_switch_nothing_is_asked_of_the_other_variables() -> None:
    assert tls_files({}) is None
    assert tls_files({"RAY_USE_TLS": "0", "RAY_TLS_SERVER_CERT": "nowhere"}) is None


@pytest.mark.parametrize("missing", ["RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"])
def test_each_file_must_be_named_and_be_there(authority: Authority, missing: str) -> None:
    variables = authority.environment()
    with pytest.raises(TlsError, match=f"{missing} must be the absolute path .* got 'tls.pem'"):
        tls_files({**variables, missing: "tls.pem"})
    files = tls_files({**variables, missing: "/absent.pem"})
    assert files is not None
    with pytest.raises(TlsError, match=f"{missing}=/absent.pem.*: no such file or directory. Expected"):
        files.server_context()


def test_files_that_do_not_belong_together_are_told_before_anything_starts(
    authority: Authority, stranger: Authority
) -> None:
    good = authority.environment()
    files = tls_files(good)
    assert files is not None
    files.check("127.0.0.1")
    with pytest.raises(TlsError, match="must have that address"):
        files.check("10.0.0.1")
    others = stranger.environment()
    for changed, said in (
        ({"RAY_TLS_CA_CERT": others["RAY_TLS_CA_CERT"]}, "use one authority"),
        ({"RAY_TLS_SERVER_KEY": others["RAY_TLS_SERVER_KEY"]}, "key values mismatch"),
        (authority.environment("expired", expired=True), "has expired"),
        ({"RAY_TLS_CA_CERT": good["RAY_TLS_SERVER_KEY"]}, "Expected a PEM file of the authority's certificate"),
    ):
        broken = tls_files({**good, **changed})
        assert broken is not None
        with pytest.raises(TlsError, match=said):
            broken.check("127.0.0.1")
