"""HTTP by hand, for what no client library sends."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from tests.conformance.leaks import assert_no_leak
from tests.conftest import RunningCluster

__all__ = ["STALLS", "RawAnswer", "connected", "head_of", "read_answer", "request_of", "round_trip"]


STALLS: Final = {
    "no body": ("Content-Length: 100", b""),
    "half a body": ("Content-Length: 100", b'{"model":'),
    "no chunk": ("Transfer-Encoding: chunked", b""),
    "half a chunk": ("Transfer-Encoding: chunked", b'40\r\n{"model":'),
    "no last chunk": ("Transfer-Encoding: chunked", b'9\r\n{"model":\r\n'),
}
"""Uploads that stop on their way: how they say their length, and what comes of them."""


class RawAnswer(NamedTuple):
    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @classmethod
    def of(cls, data: bytes) -> RawAnswer:
        """Of one answer, to the end of its connection."""
        head, _, body = data.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        answer = cls(int(line.split()[1]), headers, body)
        if answer.status >= 400:
            assert_no_leak(body.decode())
        return answer

    @property
    def error(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        parsed = json.loads(self.body)
        assert parsed.keys() == {"error"}
        error: dict[str, Any] = parsed["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


def head_of(cluster: RunningCluster, *fields: str) -> bytes:
    """Of a POST to /v1/completions, without the lengths of the body."""
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: cluster",
        f"Authorization: Bearer {cluster.key}",
        "Content-Type: application/json",
        *fields,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def request_of(cluster: RunningCluster, *fields: str, **body: Any) -> bytes:
    """Head and body."""
    content = json.dumps({"model": "sim-a", "prompt": "Once upon a time", **body}).encode()
    return head_of(cluster, f"Content-Length: {len(content)}", *fields) + content


@asynccontextmanager
async def connected(
    cluster: RunningCluster, **options: Any
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """`options` are those of asyncio.open_connection."""
    if "sock" not in options:
        options |= {"host": "127.0.0.1", "port": cluster.port}
    reader, writer = await asyncio.open_connection(**options)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def round_trip(cluster: RunningCluster, *data: bytes, limit_s: float = 20.0) -> RawAnswer:
    """What comes until the server closes the connection: ask for it with `Connection: close`."""
    async with connected(cluster) as (reader, writer), asyncio.timeout(limit_s):
        for piece in data:
            writer.write(piece)
            await writer.drain()
        return RawAnswer.of(await reader.read())


async def read_answer(reader: asyncio.StreamReader) -> RawAnswer:
    """One that says its length, on a connection that may stay open."""
    head = await reader.readuntil(b"\r\n\r\n")
    [length] = re.findall(rb"(?i)\r\ncontent-length:\s*(\d+)\r\n", head)
    return RawAnswer.of(head + await reader.readexactly(int(length)))
