"""Completions as HTTP: one JSON body, or a stream of server-sent events.

Both watch the connection while the engines work, and settle exactly once, however the request ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType

import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.ingress.api.completions.chunks import (
    DONE,
    KEEP_ALIVE,
    ChoiceDelta,
    ChunkTemplate,
    WrittenChoice,
    completion_body,
    error_event,
)
from deployments.ingress.api.completions.completion import CompletionInference
from deployments.ingress.errors import (
    ApiError,
    ClientGone,
    DeadlineExceeded,
    ErrorAnswer,
    InternalError,
    rate_limit_headers,
)
from deployments.ingress.http.direct_writes import CONNECTION, Connection

__all__ = ["CompletionResponse"]

log = structlog.get_logger()


class CompletionResponse(Response):
    """Runs an admitted completion and answers it. An error before the first byte is answered as an HTTP status."""

    media_type = None

    def __init__(
        self,
        completion: CompletionInference,
        *,
        keep_alive_s: float,
        deadline_s: float | None = None,
        answer_error: Callable[[ApiError], ErrorAnswer] = ApiError.answer,
        extras: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`keep_alive_s`: an SSE comment is written when the stream was idle for so long. `deadline_s`: the request
        fails when it takes longer. `answer_error` and `extras`, fields of the answer, are the dialect's."""
        self._completion = completion
        self._keep_alive_s = keep_alive_s
        self._deadline_s = deadline_s
        self._answer_error = answer_error
        self._head = {
            **extras,
            "id": completion.id,
            "object": "text_completion",
            "created": completion.created,
            "model": completion.model.entry.name,
            "system_fingerprint": completion.model.entry.fingerprint,
        }
        self._limits = rate_limit_headers(completion.rate_limits)
        self._cold_keep_alive_s = _COLD_KEEP_ALIVE_S
        self._started = False
        self._connection: Connection | None = None
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        completion = self._completion
        self._connection = scope.get("extensions", {}).get(CONNECTION)
        try:
            async with _watched(completion, receive), self._deadline():
                await completion.start()
                if completion.request.stream:
                    await self._stream(send)
                else:
                    await self._answer(send)
        except ClientGone:
            log.info("client gone", request=completion.id)
        except ApiError as error:
            completion.settle("failed")
            await self._fail(send, error)
        except Exception:
            completion.settle("failed")
            log.exception("request failed", request=completion.id)
            await self._fail(send, InternalError())
        finally:
            completion.settle("cancelled")  # unless it has ended before; also when Serve cancels it with its client

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        limit = asyncio.timeout(self._deadline_s)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"The request took longer than {self._deadline_s:g} s. Ask for fewer tokens, or retry it when there is "
                "less load."
            ) from None

    async def _answer(self, send: Send) -> None:
        completion = self._completion
        deltas: dict[int, list[ChoiceDelta]] = {}
        while not completion.finished:
            for delta in await completion.deltas():
                deltas.setdefault(delta.choice, []).append(delta)
        choices: list[WrittenChoice | msgspec.Raw] = []
        for index, number in enumerate(completion.best()):
            choice = WrittenChoice.joined(index, deltas.pop(number))
            if completion.request.prompt_positions is None:
                choices.append(choice)
            else:  # tens of milliseconds each, of a long prompt
                choices.append(msgspec.Raw(msgspec.json.encode(choice)))
                await asyncio.sleep(0)
        completion.settle("finished")
        await _send_whole(send, 200, completion_body(self._head, choices, completion.usage()), self._limits)

    async def _stream(self, send: Send) -> None:
        completion = self._completion
        options = completion.request.stream_options
        usage_follows = options is not None and bool(options.include_usage)
        obfuscated = options is not None and bool(options.include_obfuscation)
        continuous = usage_follows and options is not None and bool(options.continuous_usage_stats)  # as in vLLM
        template = ChunkTemplate(self._head, usage_follows=usage_follows)
        idle = _IdleTimer(self._idle_limit_s, completion.wake)
        try:
            while not completion.finished:
                chunks = [
                    template.chunk(delta, completion.usage_of(delta.choice) if continuous else None)
                    for delta in await completion.deltas()
                ]
                if completion.finished and usage_follows:
                    chunks.append(template.usage(completion.usage()))
                if obfuscated:
                    chunks = list(map(template.obfuscated, chunks))
                if completion.finished:
                    chunks.append(DONE)
                    completion.settle("finished")
                elif not chunks and idle.due:
                    chunks.append(KEEP_ALIVE)
                    self._cold_keep_alive_s *= 2
                if chunks:
                    await self._send(send, b"".join(chunks), more=not completion.finished)
                    idle.restart()
        finally:
            idle.stop()

    def _idle_limit_s(self) -> float:
        limit_s = self._keep_alive_s
        return min(self._cold_keep_alive_s, limit_s) if self._completion.awaits_cold_start else limit_s

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        if not self._started:
            self._started = True
            limits = [(name.encode(), value.encode()) for name, value in self._limits.items()]
            await send({"type": "http.response.start", "status": 200, "headers": [*_STREAM_HEADERS, *limits]})
        if more and self._connection is not None and self._connection.write(body):
            return
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _fail(self, send: Send, error: ApiError) -> None:
        if self._started:
            await self._send(send, error_event(error.body()), more=False)
        else:
            answer = self._answer_error(error)
            await _send_whole(send, answer.status, answer.body, answer.headers)


_COLD_KEEP_ALIVE_S = 1.0
"""A client that waits for the first replica of a pool sees from the first second on that something happens. Then the
comments come half as often each time, since there are clients that give up after so many lines without data (go-openai:
300)."""


class _IdleTimer:
    """Calls `wake` when nothing was written for `limit_s()`. One timer for the whole stream: a write costs no timer."""

    def __init__(self, limit_s: Callable[[], float], wake: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._wake = wake
        self.restart()
        self._timer = self._loop.call_at(self._last_write + limit_s(), self._check)

    @property
    def due(self) -> bool:
        return self._loop.time() >= self._last_write + self._limit_s()

    def restart(self) -> None:
        """Something was written."""
        self._last_write = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        if self.due:
            self._wake()
            self._timer = self._loop.call_later(self._limit_s(), self._check)
        else:
            self._timer = self._loop.call_at(self._last_write + self._limit_s(), self._check)


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
async def _watched(completion: CompletionInference, receive: Receive) -> AsyncIterator[None]:
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
