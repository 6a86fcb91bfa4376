"""An OpenAI-compatible server that streams one token per request every 2 ms and costs next to nothing.

    python costless_server.py PORT

What LiteLLM's proxy has behind it where only the serving layer is measured. One timer serves all streams.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final, cast

import httptools
import uvloop

STEP_S: Final = 0.002
_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
    fields = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "relay", "choices": choices}
    return b"data: " + json.dumps({**fields, "usage": usage}).encode() + b"\n\n"


def _chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


_TOKENS: Final = [
    _chunked(_event([{"index": 0, "text": f"word{number} ", "logprobs": None, "finish_reason": None}]))
    for number in range(10)
]
"""In turn: LiteLLM takes a text that repeats itself for a broken model."""


class _Connection(asyncio.Protocol):
    running: Final[dict[_Connection, int]] = {}
    """Tokens that each has to send yet."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def connection_lost(self, _error: Exception | None) -> None:
        self.running.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self._body:  # GET /v1/models
            models = b'{"object": "list", "data": [{"id": "relay", "object": "model"}]}'
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(models), models))
            return
        self._max_tokens = json.loads(self._body)["max_tokens"]
        self._body = b""
        self._transport.write(_HEAD)
        self.running[self] = self._max_tokens

    def step(self) -> None:
        self._transport.write(_TOKENS[self.running[self] % len(_TOKENS)])
        self.running[self] -= 1
        if not self.running[self]:
            del self.running[self]
            usage = {"prompt_tokens": 1, "completion_tokens": self._max_tokens, "total_tokens": 1 + self._max_tokens}
            self._transport.write(_chunked(_event([], usage) + b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def main(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", port)
    step_ends = loop.time()
    async with server:
        while True:
            step_ends = max(step_ends + STEP_S, loop.time())
            await asyncio.sleep(step_ends - loop.time())
            for connection in list(_Connection.running):
                connection.step()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
