"""The HTTP connection of a request: how long either direction may stall, the request's id, and browsers (CORS).

Apart from the routes because it holds for all of them and for every error. It is pure ASGI and wraps the whole app.
HAProxy in front neither buffers a request nor bounds its body, and gives a client an hour to read on; Ray Serve puts on
each answer an id that it has not checked.

Out of reach is what others answer before a request comes here. HAProxy, in HTML and without an id: what is no HTTP
(400), and everything while nothing is up behind it (500); without an id: Serve's own routes, which it closes (404).
Ray's proxy, HAProxy's stand-in while no ingress runs, and a stopping replica, in plain text: 503, with the id as it
came. Ray Serve: an x-request-id that is no UTF-8 (500, no id).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import structlog
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.ingress.errors import ClientGone, RequestTimeout
from deployments.ingress.http.direct_writes import CONNECTION, Connection

__all__ = ["ConnectionMiddleware"]

log = structlog.get_logger()

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
"""What is taken from a caller: safe in headers, logs, URLs and file names."""
_PIECE_BYTES = 64 * 1024
"""A larger body is written in pieces of this size. A server holds back the write after one that has filled its buffer,
so an answer in one piece would never be held back, and nobody would notice that the client does not take it."""
_CORS_RESPONSE_HEADERS = (
    "x-request-id",
    "retry-after",
    "x-should-retry",
    # As OpenAI names them; there are no patterns in Access-Control-Expose-Headers.
    *(f"x-ratelimit-{part}-{unit}" for part in ("limit", "remaining", "reset") for unit in ("requests", "tokens")),
)


class ConnectionMiddleware:
    """Wraps the whole app of the ingress, which finds the request's id as `request.state.request_id`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        upload_timeout_s: float,
        write_timeout_s: float,
        cors_origins: Sequence[str] = (),
    ) -> None:
        """
        upload_timeout_s: for a request's body to arrive whole, from when the app first asks for it. Beyond, `receive`
            raises RequestTimeout.
        write_timeout_s: for a single `send` that is held back because the client does not read. Beyond, it raises
            ClientGone, as does every later one, and the connection is reset.
        cors_origins: of web pages that may read the answers, or `*`; none: no CORS header is ever sent.
        """
        if cors_origins:
            app = CORSMiddleware(
                app,
                allow_origins=cors_origins,
                allow_methods=("GET", "HEAD", "POST"),
                # Whatever the page asks for: clients send headers of their own (x-stainless-… of OpenAI's), which have
                # no effect here, and the browser refuses the whole request over one that is not allowed.
                allow_headers=("*",),
                allow_credentials=False,
                # To a server on the user's own machine or network, by pages that the operator has named.
                allow_private_network="*" not in cors_origins,
                expose_headers=_CORS_RESPONSE_HEADERS,
            )
        self._app = app
        self._upload_timeout_s = upload_timeout_s
        self._write_timeout_s = write_timeout_s
        self._told: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            upload = _Upload(receive, self._upload_timeout_s)
            connection = Connection.behind(send)
            self._tell("connection" if connection is not None else "every layer")
            scope.setdefault("extensions", {})[CONNECTION] = connection
            answer = _WatchedAnswer(
                send, connection, self._write_timeout_s, request_id, chunks=scope.get("http_version") != "1.0"
            )
            try:
                await self._app(scope, upload.receive, answer.send)
            except ClientGone:
                if not answer.cut_off:
                    raise
            finally:
                answer.stop()

    def _tell(self, where: str) -> None:
        """Once each: Serve's own proxy, which may bring the first requests, has no connection to write to."""
        if where not in self._told:
            self._told.add(where)
            log.info("where answers are written", to=where)


def _request_id(scope: Scope) -> str:
    """The caller's, if it is one and valid, or Ray Serve's, which stands in its place when there is none; else new."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return str(given[0], "ascii")
    return uuid4().hex


class _Upload:
    """What the client sends, its body within a bound."""

    def __init__(self, receive: Receive, limit_s: float) -> None:
        self._receive = receive
        self._limit_s = limit_s
        self._deadline: float | None = None
        self._whole = False

    async def receive(self) -> Message:
        """Raises RequestTimeout. Once the body is there, and the wait is for the client to leave, without a bound."""
        if self._whole:
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._limit_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeout(
                f"The body of the request did not arrive within {self._limit_s:g} s. Send it whole, right after the "
                "headers and as long as Content-Length says, or send less of it at a time."
            ) from None
        self._whole = not message.get("more_body", False)
        return message


class _WatchedAnswer:
    """What the client is sent. One timer watches over all of it: a stream writes thousands of times a second."""

    def __init__(
        self, send: Send, connection: Connection | None, limit_s: float, request_id: str, *, chunks: bool
    ) -> None:
        """`chunks`: the client knows the chunked encoding."""
        self.cut_off = False
        self._chunks = chunks
        self._ends_by_closing = False
        self._send = send
        self._connection = connection
        self._limit_s = limit_s
        self._request_id = request_id
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.Task[Any] | None = None
        """That is inside a `send` now, which it has called at `_since_s` on the loop's clock."""
        self._since_s = 0.0

    async def send(self, message: Message) -> None:
        """Raises ClientGone."""
        if message["type"] == "http.response.start":
            message = _FinalStart(message, self._request_id)
            if not self._chunks and self._connection is not None and not _has_length(message):
                self._ends_by_closing = self._connection.end_body_by_closing()
        body = message.get("body", b"")
        if len(body) > _PIECE_BYTES:
            last = (len(body) - 1) // _PIECE_BYTES * _PIECE_BYTES
            for begin in range(0, last, _PIECE_BYTES):
                piece = body[begin : begin + _PIECE_BYTES]
                await self._write({"type": message["type"], "body": piece, "more_body": True})
            message = {**message, "body": body[last:]}
        await self._write(message)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def _write(self, message: Message) -> None:
        if self.cut_off:
            raise ClientGone
        writer = self._writer = asyncio.current_task()
        assert writer is not None
        self._since_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(self._since_s + self._limit_s, self._check)
        if self._ends_by_closing and self._connection is not None:
            self._connection.expect(len(message.get("body", b"")))
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if self.cut_off and writer.uncancel() == 0:  # it was `_check`, and nobody else as well
                raise ClientGone from None
            raise
        finally:
            self._writer = None

    def _check(self) -> None:
        now_s = self._loop.time()
        begun_s = now_s if self._writer is None else self._since_s
        if now_s < begun_s + self._limit_s:
            self._timer = self._loop.call_at(begun_s + self._limit_s, self._check)
            return
        self.cut_off = True
        log.info("client does not read, cut off", write_timeout_s=self._limit_s)
        if self._writer is not None:
            self._writer.cancel()
        if self._connection is not None:
            self._connection.reset()


def _has_length(start: Message) -> bool:
    return any(name.lower() == b"content-length" for name, _ in start["headers"])


class _FinalStart(dict[str, Any]):
    """A `http.response.start` with the request's id, and with headers that nobody changes any more.

    For Ray Serve takes the caller's x-request-id unchecked and appends it to each answer by Starlette's MutableHeaders,
    which first puts a list of its own into the message (ray/serve/_private/http_util.py, RequestIdMiddleware).
    """

    def __init__(self, message: Message, request_id: str) -> None:
        headers = [(name, value) for name, value in message.get("headers", ()) if name.lower() != b"x-request-id"]
        super().__init__(message, headers=[*headers, (b"x-request-id", request_id.encode())])

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "headers":
            super().__setitem__(key, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Only Ray's own proxy (`cluster.proxy: ray`) gets messages pickled, and then adds the id itself."""
        return dict, ({**self, "headers": self["headers"][:-1]},)
