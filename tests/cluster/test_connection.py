"""What clients do to a connection, through HAProxy and Ray Serve: ids of their own, half a close, HTTP that is none.

The time-outs of deployments/ingress/http/connection_middleware.py are in
tests/deployments/ingress/http/test_connection.py, where they are short.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningCluster, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

OWN_ID = re.compile(r"[0-9a-f]{32}")
SERVES_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def request(
    cluster: RunningCluster, *headers: str, target: str = "POST /v1/completions", length: int | None = None, **body: Any
) -> bytes:
    """As bytes on the wire; `length` is told in place of the body's own."""
    content = json.dumps({"model": "sim-b", "prompt": "Once upon a time", "max_tokens": 4, **body}).encode()
    head = [
        f"{target} HTTP/1.1",
        "Host: cluster",
        f"Authorization: Bearer {cluster.key}",
        "Content-Type: application/json",
        f"Content-Length: {len(content) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + content


@asynccontextmanager
async def connected(cluster: RunningCluster) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer_to(cluster: RunningCluster, data: bytes, *, half_close: bool = False) -> bytes:
    """All that comes until the connection is closed."""
    async with connected(cluster) as (reader, writer), asyncio.timeout(10.0):
        writer.write(data)
        if half_close:
            writer.write_eof()
        return await reader.read()


async def running(cluster: RunningCluster) -> int:
    return sum(load["running"] + load["waiting"] for load in await cluster.loads("sim-b"))


async def assert_it_works(cluster: RunningCluster) -> None:
    async with cluster.client() as client:
        answer = await client.post("/v1/completions", json={"model": "sim-b", "prompt": "p", "max_tokens": 2})
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 2


async def until_idle_s(cluster: RunningCluster) -> float:
    async def idle() -> bool:
        return await running(cluster) == 0

    return await eventually(idle, 20.0, every_s=0.02)


# --- request ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], SERVES_ID),
        (["x-request-id: req_1.2-3"], re.compile(r"req_1\.2-3")),
        (["X-Request-ID: " + "a" * 128], re.compile("a{128}")),
        (["x-request-id: " + "a" * 129], OWN_ID),
        (["x-request-id: a b"], OWN_ID),
        (['x-request-id: {"x":"<y>"}'], OWN_ID),
        (["x-request-id: "], OWN_ID),
        (["x-request-id: one", "x-request-id: two"], OWN_ID),
    ],
    ids=["none", "valid", "longest", "too long", "space", "odd", "empty", "two"],
)
async def test_each_answer_has_one_valid_id(
    simulated_cluster: RunningCluster, given: list[str], expected: re.Pattern[str]
) -> None:
    for target, status, fields in (
        ("POST /v1/completions", 200, {}),
        ("POST /v1/completions", 200, {"stream": True}),
        ("POST /v1/completions", 400, {"max_tokens": -1}),
        ("GET /v1/completions", 405, {}),
        ("GET /nowhere", 404, {}),
        ("GET /healthz", 200, {}),
    ):
        data = request(simulated_cluster, "Connection: close", *given, target=target, **fields)
        head = (await answer_to(simulated_cluster, data)).partition(b"\r\n\r\n")[0].decode()
        assert head.startswith(f"HTTP/1.1 {status} ")
        [answered] = re.findall(r"(?im)^x-request-id:[ \t]*(.*?)\r?$", head)
        assert expected.fullmatch(answered), (target, answered)


# --- browsers ------------------------------------------------------------------------------------------------------


async def test_without_configuration_a_preflight_is_405_without_cors(simulated_cluster: RunningCluster) -> None:
    async with simulated_cluster.client() as client:
        headers = {"Origin": "https://chat.example.com", "Access-Control-Request-Method": "POST"}
        answer = await client.options("/v1/completions", headers=headers)
    assert answer.status_code == 405
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not [name for name in answer.headers if name.startswith("access-control-")]


# --- half-closed ---------------------------------------------------------------------------------------------------


def test_haproxy_waits_no_longer_for_headers_and_readers_than_it_is_told(simulated_cluster: RunningCluster) -> None:
    node = json.loads((simulated_cluster.home / "run" / "cluster.json").read_text())
    (path,) = Path(node["folder"]).glob("*/haproxy.cfg")
    settings = path.read_text()
    waits = re.findall(r"^ *timeout (?:client|http-request) (\S+)$", settings, re.MULTILINE)
    assert len(waits) >= 2
    assert set(waits) == {"65s"}  # the ingress gives up after 60 s


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "not streamed"])
async def test_half_a_close_while_the_engine_works_is_a_close(
    simulated_cluster: RunningCluster, streamed: bool
) -> None:
    cluster = simulated_cluster
    await cluster.until_in_rotation("sim-b", 3)

    async def works() -> bool:
        return await running(cluster) > 0

    async with connected(cluster) as (reader, writer), asyncio.timeout(10.0):
        writer.write(request(cluster, max_tokens=2000, stream=streamed))
        # HAProxy cuts a stream that has begun where it is, and answers by itself when there is nothing yet.
        if streamed:
            head = await reader.readuntil(b"data: ")
        else:
            head = b""
            await eventually(works, 10.0, every_s=0.01)
        writer.write_eof()
        assert await until_idle_s(cluster) < 1.0
        answer = head + await reader.read()
    assert answer.startswith(b"HTTP/1.1 200 " if streamed else b"HTTP/1.1 400 ")
    assert b"data: [DONE]" not in answer


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "not streamed"])
async def test_half_a_close_right_after_the_request_is_a_close(
    simulated_cluster: RunningCluster, streamed: bool
) -> None:
    cluster = simulated_cluster
    await cluster.until_in_rotation("sim-b", 3)
    answer = await answer_to(cluster, request(cluster, max_tokens=2000, stream=streamed), half_close=True)
    assert b"data: [DONE]" not in answer
    assert await until_idle_s(cluster) < 1.0


# --- HTTP that is none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZ\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nx-big: " + b"a" * 32_768 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n no-name\r\n\r\n",
    ],
    ids=["no request line", "TLS", "no length", "two lengths", "no chunk", "huge header", "no header name"],
)
async def test_what_is_no_http_is_refused_and_harms_nobody(simulated_cluster: RunningCluster, data: bytes) -> None:
    assert (await answer_to(simulated_cluster, data)).startswith(b"HTTP/1.1 400 ")  # by HAProxy, in HTML
    await assert_it_works(simulated_cluster)


async def test_a_body_longer_than_its_length_is_read_no_further(simulated_cluster: RunningCluster) -> None:
    answer = await answer_to(simulated_cluster, request(simulated_cluster, length=10))
    ours, _, rest = answer.partition(b"}HTTP/1.1 ")
    assert ours.startswith(b"HTTP/1.1 400 ")
    assert b"not valid JSON" in ours
    assert rest.startswith(b"400 ")  # HAProxy, of what it took for a second request
    await assert_it_works(simulated_cluster)


async def test_a_client_that_leaves_amid_its_body_harms_nobody(simulated_cluster: RunningCluster) -> None:
    async with connected(simulated_cluster) as (_, writer):
        writer.write(request(simulated_cluster, length=1000))
        await writer.drain()
    await assert_it_works(simulated_cluster)
    assert await until_idle_s(simulated_cluster) < 1.0


async def test_with_two_framings_the_chunks_count_and_the_connection_ends(simulated_cluster: RunningCluster) -> None:
    head, _, body = request(
        simulated_cluster, "Transfer-Encoding: chunked", length=5, user="nobody is smuggled in"
    ).partition(b"\r\n\r\n")
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    answer = await answer_to(simulated_cluster, head + b"\r\n\r\n" + chunked + request(simulated_cluster))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    await assert_it_works(simulated_cluster)


async def test_pipelined_requests_are_answered_in_order(simulated_cluster: RunningCluster) -> None:
    first = request(simulated_cluster, "x-request-id: first", max_tokens=50)
    second = request(simulated_cluster, "x-request-id: second", "Connection: close", max_tokens=1)
    answer = await answer_to(simulated_cluster, first + second)
    assert re.findall(rb"(?i)\r\nx-request-id: (\w+)\r\n", answer) == [b"first", b"second"]
    assert re.findall(rb'"completion_tokens":(\d+)', answer) == [b"50", b"1"]
