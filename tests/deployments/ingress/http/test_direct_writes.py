"""Chunks that go to the connection past ASGI: the client must see no difference."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import uvloop
from starlette.types import Receive, Scope, Send

from deployments.ingress.http.direct_writes import CONNECTION, Connection
from tests.deployments.ingress.http.test_connection import limited, read_body, served

START = {"type": "http.response.start", "status": 200, "headers": []}


def of(scope: Scope) -> Connection:
    connection = scope["extensions"][CONNECTION]
    assert isinstance(connection, Connection)
    return connection


@pytest.mark.parametrize("protocol", ["httptools", "h11"])
def test_a_body_is_whole_whichever_way_its_parts_went(protocol: str) -> None:
    written: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(scope, receive, send)
        await send(dict(START))
        for part in (b"one", b"two" * 5000, b"three"):
            written.append(of(scope).write(part))
            if not written[-1]:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"four"})
        written.append(of(scope).write(b"after the end"))

    async def scenario() -> None:
        async with (
            served(limited(app), protocol) as serving,
            httpx.AsyncClient(trust_env=False, verify=False) as client,
        ):
            for _ in range(2):  # on one connection
                answer = await client.get(f"http://127.0.0.1:{serving.port}/")
                assert answer.content == b"one" + b"two" * 5000 + b"threefour"
            assert len(serving.server.server_state.connections) == 1

    uvloop.run(scenario())
    assert written == [protocol == "httptools"] * 3 + [False] + [protocol == "httptools"] * 3 + [False]


def test_nothing_is_written_behind_what_a_client_does_not_read() -> None:
    held_back = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(scope, receive, send)
        await send(dict(START))
        while of(scope).write(b"x" * 10_000):
            pass
        held_back.set()
        await send({"type": "http.response.body", "body": b"end"})

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with served(limited(app), "httptools") as serving:
            with await serving.connect() as connection:
                await loop.sock_sendall(connection, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                await asyncio.wait_for(held_back.wait(), 10.0)
                answer = b""
                while part := await loop.sock_recv(connection, 1 << 20):
                    answer += part
                assert answer.endswith(b"x\r\n3\r\nend\r\n0\r\n\r\n")

    uvloop.run(scenario())


def test_an_answer_with_a_length_is_left_alone() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(scope, receive, send)
        await send({**START, "headers": [(b"content-length", b"4")]})
        assert not of(scope).write(b"four")
        await send({"type": "http.response.body", "body": b"four"})

    async def scenario() -> None:
        async with (
            served(limited(app), "httptools") as serving,
            httpx.AsyncClient(trust_env=False, verify=False) as client,
        ):
            assert (await client.get(f"http://127.0.0.1:{serving.port}/")).content == b"four"

    uvloop.run(scenario())


def test_behind_another_server_there_is_no_connection() -> None:
    async def send(_message: object) -> None: ...

    assert Connection.behind(send) is None
    assert Connection.behind(asyncio.Queue[object]().put) is None
