"""How completions look on the wire: the JSON answer and the server-sent events of a stream.

A stream's chunks differ in a few characters only, so the rest is encoded once per request and a chunk is put together
from bytes: a third of the time of building a dictionary and dumping it with msgspec, 1/14 of json's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from secrets import token_hex
from typing import Any, Literal, NamedTuple

import msgspec

from deployments.ingress.api.completions.logprobs import WrittenLogprobs
from deployments.ingress.inference.inference import TokenUsage

__all__ = [
    "DONE",
    "KEEP_ALIVE",
    "ChoiceDelta",
    "ChunkTemplate",
    "WrittenChoice",
    "completion_body",
    "error_event",
]

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment with a blank line behind it: of clients that split at blank lines and skip what begins with a colon, as
`vllm bench serve`, it would take the next event with it otherwise."""

_OBFUSCATED_BYTES = 256
_OBFUSCATED_END = b'"}\n\n'

_to_json = msgspec.json.encode


class ChoiceDelta(NamedTuple):
    """What one choice gained."""

    choice: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    logprobs: WrittenLogprobs | None = None
    token_ids: list[int] | None = None
    """Where asked for, and so the next."""
    prompt_token_ids: list[int] | None = None
    """With the choice's first delta."""
    prompt_logprobs: Sequence[Mapping[str, Any] | None] | None = None
    """The same."""


class WrittenChoice(msgspec.Struct):
    """One choice as a whole, in the order of the wire. Source: the Completions reference; from `stop_reason` on, vLLM's
    CompletionResponseChoice, in which what nobody asked for is null."""

    index: int
    text: str
    logprobs: WrittenLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: Sequence[Mapping[str, Any] | None] | None = None

    @classmethod
    def joined(cls, index: int, deltas: Sequence[ChoiceDelta]) -> WrittenChoice:
        """Of all deltas of one candidate, at least one, the last of which has the reason."""
        first, last = deltas[0], deltas[-1]
        logprobs = None
        if first.logprobs is not None:
            logprobs = WrittenLogprobs()
            for delta in deltas:
                if delta.logprobs is not None:
                    logprobs.extend(delta.logprobs)
        return cls(
            index,
            "".join([delta.text for delta in deltas]),
            logprobs,
            last.finish_reason or "length",
            last.stop_reason,
            None if first.token_ids is None else [each for delta in deltas for each in delta.token_ids or ()],
            first.prompt_token_ids,
            first.prompt_logprobs,
        )


class ChunkTemplate:
    """The chunks of one stream: all have the same head."""

    def __init__(self, head: Mapping[str, Any], *, usage_follows: bool) -> None:
        """`head`: id, object, created, model and what else all chunks share. `usage_follows`: the stream ends with a
        usage chunk, so all others say `"usage":null`."""
        self._head = b"data: " + _to_json(head)[:-1] + b',"choices":['
        self._index = self._head + b'{"index":'
        self._tail = b'}],"usage":null}\n\n' if usage_follows else b"}]}\n\n"

    def chunk(self, delta: ChoiceDelta, usage: TokenUsage | None = None) -> bytes:
        """With `usage` as it is so far where the caller asked for it on every chunk."""
        reason = _NO_REASON
        if delta.finish_reason is not None:
            reason = b'"%b","stop_reason":%b' % (delta.finish_reason.encode(), _to_json(delta.stop_reason))
        return b'%b%d,"text":%b,"logprobs":%b,"finish_reason":%b%b%b' % (
            self._index,
            delta.choice,
            _to_json(delta.text),
            b"null" if delta.logprobs is None else _to_json(delta.logprobs),
            reason,
            _NO_TOKEN_IDS if delta.token_ids is None else _token_ids(delta),
            self._tail if usage is None else b'}],"usage":%b}\n\n' % _to_json(_usage_fields(usage)),
        )

    @staticmethod
    def obfuscated(chunk: bytes) -> bytes:
        """`chunk` with a field of random letters that makes its length a multiple of _OBFUSCATED_BYTES. In OpenAI's
        streams it stands against those who tell texts by the sizes of encrypted packets."""
        begin = chunk.removesuffix(b"}\n\n") + b',"obfuscation":"'
        missing = -(len(begin) + len(_OBFUSCATED_END)) % _OBFUSCATED_BYTES
        return begin + token_hex(missing)[:missing].encode() + _OBFUSCATED_END

    def usage(self, usage: TokenUsage) -> bytes:
        """The last chunk of a stream whose caller asked for usage: no choices."""
        return b'%b],"usage":%b}\n\n' % (self._head, _to_json(_usage_fields(usage)))


_NO_REASON = b'null,"stop_reason":null'
_NO_TOKEN_IDS = b',"token_ids":null,"prompt_token_ids":null'
"""As in vLLM's chunks, whose clients read both without asking whether they are there."""


def _token_ids(delta: ChoiceDelta) -> bytes:
    return b',"token_ids":%b,"prompt_token_ids":%b' % (_to_json(delta.token_ids), _to_json(delta.prompt_token_ids))


def _usage_fields(usage: TokenUsage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def error_event(body: bytes) -> bytes:
    """An error after the first byte; no DONE follows, so the client raises it."""
    return b"data: %b\n\n" % body


def completion_body(
    head: Mapping[str, Any], choices: Sequence[WrittenChoice | msgspec.Raw], usage: TokenUsage
) -> bytes:
    """The answer of a request that does not stream; a choice may be JSON already."""
    return _to_json({**head, "choices": choices, "usage": _usage_fields(usage)})
