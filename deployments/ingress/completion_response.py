"""Completions as HTTP: one JSON body, or a stream of server-sent events.

Both watch the connection while the engines work, and settle exactly once, however the request ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.contracts import SettlementStatus
from deployments.ingress.completion import ChoiceDelta, ClientGone, Completion
from deployments.ingress.errors import ApiError, InternalError
from deployments.ingress.wire import DONE, KEEP_ALIVE, ChunkTemplate, completion_body, error_event

__all__ = ["CompletionResponse"]

log = structlog.get_logger()


class CompletionResponse(Response):
    """Runs an admitted completion and answers it. An error before the first byte is answered as an HTTP status."""

    media_type = None

    def __init__(self, completion: Completion, *, keep_alive_s: float) -> None:
        """`keep_alive_s`: an SSE comment is written when the stream was idle for so long."""
        self._completion = completion
        self._keep_alive_s = keep_alive_s
        self._started = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        completion = self._completion
        status: SettlementStatus = "cancelled"  # also when Serve cancels the request because the client is gone
        try:
            async with _watched(completion, receive):
                completion.start()
                if completion.request.stream:
                    await self._stream(send)
                else:
                    await self._answer(send)
            status = "finished"
        except ClientGone:
            log.info("client gone", completion=completion.id)
        except ApiError as error:
            status = "failed"
            await self._fail(send, error)
        except Exception:
            status = "failed"
            log.exception("completion failed", completion=completion.id)
            await self._fail(send, InternalError())
        finally:
            completion.settle(status)

    async def _answer(self, send: Send) -> None:
        completion = self._completion
        choices: dict[int, list[str]] = {}
        reasons: dict[int, ChoiceDelta] = {}
        while not completion.finished:
            for delta in await completion.deltas():
                choices.setdefault(delta.choice, []).append(delta.text)
                reasons[delta.choice] = delta
        echo = completion.echo if completion.request.echo else lambda _choice: ""
        body = completion_body(
            completion.id,
            completion.created,
            completion.request.model,
            [
                (echo(choice) + "".join(choices[choice]), reasons[choice].finish_reason or "length")
                for choice in range(len(choices))
            ],
            completion.usage(),
        )
        await _send_whole(send, 200, body)

    async def _stream(self, send: Send) -> None:
        completion = self._completion
        options = completion.request.stream_options
        usage_follows = options is not None and options.include_usage
        continuous = usage_follows and options is not None and options.continuous_usage_stats  # as in vLLM
        template = ChunkTemplate(
            completion.id, completion.created, completion.request.model, usage_follows=usage_follows
        )
        echoed: set[int] = set()
        idle = _IdleTimer(self._keep_alive_s, completion.wake)
        try:
            while not completion.finished:
                chunks: list[bytes] = []
                for choice, delta, finish_reason in await completion.deltas():
                    text = delta
                    if completion.request.echo and choice not in echoed:
                        echoed.add(choice)
                        text = completion.echo(choice) + delta
                    usage = completion.usage() if continuous else None
                    chunks.append(template.text(choice, text, finish_reason, usage))
                if completion.finished:
                    if usage_follows:
                        chunks.append(template.usage(completion.usage()))
                    chunks.append(DONE)
                elif not chunks and idle.due:
                    chunks.append(KEEP_ALIVE)
                if chunks:
                    await self._send(send, b"".join(chunks), more=not completion.finished)
                    idle.restart()
        finally:
            idle.stop()

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _fail(self, send: Send, error: ApiError) -> None:
        if self._started:
            await self._send(send, error_event(error.body()), more=False)
        else:
            await _send_whole(send, error.status, error.body(), error.headers())


class _IdleTimer:
    """Calls `wake` when nothing was written for `limit_s`. One timer for the whole stream: a write costs no timer."""

    def __init__(self, limit_s: float, wake: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._wake = wake
        self.restart()
        self._timer = self._loop.call_at(self._last_write + limit_s, self._check)

    @property
    def due(self) -> bool:
        return self._loop.time() >= self._last_write + self._limit_s

    def restart(self) -> None:
        """Something was written."""
        self._last_write = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        if self.due:
            self._wake()
            self._timer = self._loop.call_later(self._limit_s, self._check)
        else:
            self._timer = self._loop.call_at(self._last_write + self._limit_s, self._check)


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def _send_whole(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def _watched(completion: Completion, receive: Receive) -> AsyncIterator[None]:
    """Tells `completion` when the client closes the connection."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        completion.client_gone()

    watcher = asyncio.create_task(watch(), name=f"watch-{completion.id}")
    try:
        yield
    finally:
        watcher.cancel()
