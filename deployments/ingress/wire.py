"""How completions look on the wire: the JSON answer and the server-sent events of a stream.

A stream's chunks differ in a few characters only, so the rest is encoded once per request and a chunk is put together
from bytes: a third of the time of building a dictionary and dumping it with msgspec, 1/14 of json's.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

__all__ = ["DONE", "KEEP_ALIVE", "ChunkTemplate", "Usage", "completion_body", "error_event"]

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_to_json = msgspec.json.encode


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request: of the prompts, each once, and over all choices generated."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def fields(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class ChunkTemplate:
    """The chunks of one stream: all have the same id, created and model."""

    def __init__(self, completion_id: str, created: int, model: str, *, usage_follows: bool) -> None:
        """`usage_follows`: the stream ends with a usage chunk, so all others say `"usage":null`."""
        head = _to_json({"id": completion_id, "object": "text_completion", "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._index = self._head + b'{"index":'
        self._tail = b'}],"usage":null}\n\n' if usage_follows else b"}]}\n\n"

    def text(
        self,
        index: int,
        text: str,
        finish_reason: Literal["stop", "length"] | None,
        usage: Usage | None = None,
    ) -> bytes:
        """A delta of choice `index`; with `usage` as it is so far where the caller asked for it on every chunk."""
        reason = b'"%b"' % finish_reason.encode() if finish_reason else b"null"
        tail = self._tail if usage is None else b'}],"usage":%b}\n\n' % _to_json(usage.fields())
        return b'%b%d,"text":%b,"logprobs":null,"finish_reason":%b%b' % (
            self._index,
            index,
            _to_json(text),
            reason,
            tail,
        )

    def usage(self, usage: Usage) -> bytes:
        """The last chunk of a stream whose caller asked for usage: no choices."""
        return b'%b],"usage":%b}\n\n' % (self._head, _to_json(usage.fields()))


def error_event(body: bytes) -> bytes:
    """An error after the first byte; no DONE follows, so the client raises it."""
    return b"data: %b\n\n" % body


def completion_body(
    completion_id: str,
    created: int,
    model: str,
    choices: list[tuple[str, Literal["stop", "length"]]],
    usage: Usage,
) -> bytes:
    """The answer of a request that does not stream; `choices` are text and finish reason by index."""
    return _to_json(
        {
            "id": completion_id,
            "object": "text_completion",
            "created": created,
            "model": model,
            "choices": [
                {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
                for index, (text, reason) in enumerate(choices)
            ],
            "usage": usage.fields(),
        }
    )
