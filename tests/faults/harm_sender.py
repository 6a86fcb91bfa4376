"""Sends harmful requests, in a process of its own: to draw and write megabytes must not hold up who measures, nor the
cluster, whose processes Ray runs at a niceness of 15.

Its orders come as one line of JSON, and it goes on until its standard input is closed. Each request is told twice, as a
line of JSON: when it begins, and with its outcome.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import suppress
from typing import Any, Final

import msgspec

from tests.faults.harmful_requests import EXAMPLES, HarmfulRequest, drawn, example

__all__ = ["Ended", "Orders", "caller_request_id"]

TIME_LIMIT_S: Final = 10.0
"""After which the client of a harmful request goes away."""
_MAX_KEPT_BYTES = 2000


class Orders(msgspec.Struct, frozen=True):
    port: int
    keys: list[str]
    model: str
    seed: int
    at_a_time: int
    only: str | None = None
    """Families whose names begin so."""
    examples: bool = False
    """What was seen to harm, one after the other and once each, instead of what is drawn."""


class Ended(msgspec.Struct, frozen=True):
    number: int
    family: str
    manner: str
    sent_bytes: int
    began: float
    """By time.monotonic, which all processes of a machine share."""
    ended: float
    outcome: str
    """The status, with the code of an error event; or how it ended without one."""
    told: str
    """The beginning of an error."""


def caller_request_id(seed: int, number: int) -> str:
    """By which the ledger knows it."""
    return f"harm-{seed}-{number}"


async def _exchange(orders: Orders, number: int, request: HarmfulRequest) -> tuple[str, str]:
    """Outcome, and what an error said."""
    key = request.key or orders.keys[number % len(orders.keys)]
    head = (
        f"POST {request.path} HTTP/1.1\r\nHost: cluster\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(request.body)}\r\n"
        f"X-Request-Id: {caller_request_id(orders.seed, number)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", orders.port)
    try:
        body = request.body[: len(request.body) // 2] if request.manner == "truncated" else request.body
        writer.write(head.encode() + body)
        with suppress(ConnectionError):  # refused before it was read whole: the answer is there
            await writer.drain()
        if request.manner == "truncated":
            return "truncated", ""
        answer = b""
        while len(answer) < _MAX_KEPT_BYTES and (piece := await reader.read(65_536)):
            answer += piece
        status = answer[9:12].decode() or "closed"
        if request.manner == "leave" and status == "200":
            return "200 left", ""
        tail = answer
        while piece := await reader.read(1 << 20):
            tail = (tail + piece)[-_MAX_KEPT_BYTES:]
    except ConnectionError as error:
        return type(error).__name__, ""
    finally:
        writer.transport.abort()
    if status != "200":
        return status, answer.partition(b"\r\n\r\n")[2][:300].decode(errors="replace")
    if (at := tail.rfind(b'data: {"error"')) >= 0:
        return "200 error event", tail[at : at + 300].decode(errors="replace")
    if b"text/event-stream" in answer and b"data: [DONE]" not in tail:
        return "200 cut off", ""
    return "200", ""


async def _send(orders: Orders, number: int, stopped: asyncio.Event) -> bool:
    """False when there is nothing left to send."""
    if orders.examples:
        names = list(EXAMPLES)
        if number >= len(names):
            return False
        request = example(names[number], orders.model)
    else:
        request = drawn(orders.seed, number, orders.model, only=orders.only)
    began = time.monotonic()
    _tell({"number": number, "family": request.family, "began": began})
    outcome, told = "client gone", ""
    with suppress(TimeoutError):
        async with asyncio.timeout(TIME_LIMIT_S):
            outcome, told = await _exchange(orders, number, request)
    _tell(Ended(number, request.family, request.manner, len(request.body), began, time.monotonic(), outcome, told))
    if orders.examples:  # what it stalls can be seen before the next one comes
        with suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), 4.0)
    return True


def _tell(what: dict[str, Any] | Ended) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
    sys.stdout.buffer.flush()


async def _main() -> None:
    os.nice(19)
    orders = msgspec.convert(json.loads(sys.stdin.readline()), Orders)
    stopped = asyncio.Event()
    waiting = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    waiting.add_done_callback(lambda _task: stopped.set())
    numbers = iter(range(10**9))

    async def go_on() -> None:
        while not stopped.is_set() and await _send(orders, next(numbers), stopped):
            pass

    async with asyncio.TaskGroup() as group:
        for _ in range(1 if orders.examples else orders.at_a_time):
            group.create_task(go_on())
    _tell({"done": True})
    await waiting


if __name__ == "__main__":
    asyncio.run(_main())
