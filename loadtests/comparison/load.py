"""Streaming load that costs next to nothing, since it shares the machine with what it measures.

One process, one connection per client, kept alive. httptools takes the HTTP apart and a regular expression the events;
JSON is not parsed. Loads any OpenAI-compatible completions endpoint.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import httptools

from loadtests.load.prompts import words

__all__ = ["Endpoint", "Outcome", "Stream", "load"]

_TEXT = re.compile(rb'"text": ?"(?!")')
"""Of an event that carries some: a quote within a text is escaped, so this is not found in one."""
_REQUEST_LIMIT_S = 60.0
"""A system that keeps a stream for longer is too slow for that load: the request counts as failed."""
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True)
class Endpoint:
    """Where a system takes completions."""

    url: str
    """Of the completions route."""
    model: str
    key: str


class Outcome(NamedTuple):
    """What some streams together were like. Times in seconds."""

    requests: int
    tokens: int
    elapsed_s: float
    first_token_s: array[float]
    """Of each request."""
    gaps_s: array[float]
    """Between two arrivals of text in one stream."""
    bunched_tokens: int
    """An upper bound of those that arrived together with another of their stream: all text of one read counts, and
    twice the tokens that share a chunk."""
    errors: Counter[str]


@dataclass
class _Tally:
    first_token_s: array[float] = field(default_factory=lambda: array("d"))
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    requests: int = 0
    tokens: int = 0
    bunched_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class Stream(asyncio.Protocol):
    """One connection, on which `complete` runs one request after another."""

    def __init__(self, tally: _Tally) -> None:
        self._tally = tally
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None

    async def complete(self, request: bytes, max_tokens: int) -> None:
        """Send `request` and count its answer into the tally; what goes wrong is counted, too."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._texts = self._chunks = self._bunched = 0
        self._first_token_s: float | None = None
        self._gaps_s = array("d")
        self._tokens: int | None = None
        self._ended = False
        self._error: str | None = None
        self._last_at: float | None = None
        self._done = self._loop.create_future()
        self._begun_at = perf_counter()
        self._transport.write(request)
        tally = self._tally
        try:
            async with asyncio.timeout(_REQUEST_LIMIT_S):
                await self._done
        except TimeoutError:
            self.close()
            self._transport = None
            self._error = f"not ended after {_REQUEST_LIMIT_S:g} s"
        error = self._error
        if error is None and not self._ended:
            error = "ended without [DONE]"
        if error is None and self._tokens != max_tokens:
            error = f"{self._tokens} tokens by usage, {max_tokens} asked for"
        if error is not None:
            tally.errors[error] += 1
            return
        tally.requests += 1
        tally.tokens += max_tokens
        if self._first_token_s is not None:
            tally.first_token_s.append(self._first_token_s)
        tally.gaps_s.extend(self._gaps_s)
        tally.bunched_tokens += min(max_tokens, self._bunched + 2 * (max_tokens - self._chunks))

    @property
    def connected(self) -> bool:
        return self._transport is not None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # --- of asyncio ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._done is not None and not self._done.done():
            self._fail(f"connection lost: {exc!r}")

    def data_received(self, data: bytes) -> None:
        self._texts = 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {error}")
            self.close()
            return
        if self._texts:
            now = perf_counter()
            if self._last_at is None:
                self._first_token_s = now - self._begun_at
            else:
                self._gaps_s.append(now - self._last_at)
            self._last_at = now
            self._chunks += self._texts
            if self._texts > 1:
                self._bunched += self._texts

    # --- of httptools -------------------------------------------------------------------------------------------------

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self._error = f"{self._parser.get_status_code()} {body[:200]!r}"
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            if _TEXT.search(event):
                self._texts += 1
            elif event == b"data: [DONE]":
                self._ended = True
            elif b'"error"' in event:
                self._error = f"error event {event[:200]!r}"
            if (usage := _USAGE.search(event)) is not None:
                self._tokens = int(usage[1])

    def on_message_complete(self) -> None:
        assert self._done is not None
        if not self._done.done():
            self._done.set_result(None)

    def _fail(self, reason: str) -> None:
        self._error = reason
        self.on_message_complete()


async def load(
    endpoint: Endpoint, *, streams: int, max_tokens: int, seconds: float | None = None, requests: int | None = None
) -> Outcome:
    """So many clients, each with one request after another: begun for `seconds`, or `requests` in all."""
    url = urlsplit(endpoint.url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    loop = asyncio.get_running_loop()
    tally = _Tally()
    numbers = iter(range(requests if requests is not None else 10**9))
    begun = perf_counter()  # uvloop's own clock counts milliseconds

    async def client() -> None:
        stream = Stream(tally)
        try:
            for number in numbers:
                if seconds is not None and perf_counter() - begun >= seconds:
                    return
                if not stream.connected:
                    try:
                        await loop.create_connection(lambda: stream, host, port)
                    except OSError as error:
                        tally.errors[f"no connection: {error.strerror or error!r}"] += 1
                        continue
                await stream.complete(_request(endpoint, url.netloc, url.path, number, max_tokens), max_tokens)
        finally:
            stream.close()

    await asyncio.gather(*(client() for _ in range(streams)))
    return Outcome(
        tally.requests,
        tally.tokens,
        perf_counter() - begun,
        tally.first_token_s,
        tally.gaps_s,
        tally.bunched_tokens,
        tally.errors,
    )


def _request(endpoint: Endpoint, host: str, path: str, number: int, max_tokens: int) -> bytes:
    body: dict[str, Any] = {
        "model": endpoint.model,
        "prompt": words(24, random.Random(number)),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {endpoint.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data
