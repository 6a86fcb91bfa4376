"""Reads a streamed completion as a strict client does: whole chunks, a finish reason, usage, `[DONE]`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx

__all__ = ["StreamFailed", "Streamed", "complete", "stream"]


class Streamed(NamedTuple):
    """What one choice said."""

    text: str
    finish_reason: str | None
    completion_tokens: int
    completion_id: str


class StreamFailed(AssertionError):
    """The stream ended without `[DONE]`, or with an error event."""


async def stream(
    client: httpx.AsyncClient, on_chunk: Callable[[dict[str, Any]], None] | None = None, **body: Any
) -> Streamed:
    """One streamed completion of one choice. `on_chunk` sees each chunk as it comes."""
    body = {"stream_options": {"include_usage": True}, **body, "stream": True}
    text: list[str] = []
    finish_reason: str | None = None
    tokens = -1
    completion_id = ""
    done = False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise StreamFailed(f"{response.status_code} {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise StreamFailed(line)
            if on_chunk is not None:
                on_chunk(chunk)
            completion_id = chunk["id"]
            for choice in chunk["choices"]:
                text.append(choice["text"])
                finish_reason = choice["finish_reason"] or finish_reason
            if chunk["usage"] is not None:  # the last of them counts
                tokens = chunk["usage"]["completion_tokens"]
    if not done:
        raise StreamFailed("the stream ended without [DONE]")
    return Streamed("".join(text), finish_reason, tokens, completion_id)


async def complete(client: httpx.AsyncClient, **body: Any) -> Streamed:
    """The same without streaming."""
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise StreamFailed(f"{response.status_code} {response.text}")
    answer = response.json()
    choice = answer["choices"][0]
    return Streamed(choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"], answer["id"])
