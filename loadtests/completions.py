"""One completion over HTTP as a load test sees it: streamed, timed, and checked.

On geventhttpclient, which comes with locust and reads an event when it arrives. A stream must end with `[DONE]`, and
what was generated must be what was asked for.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

from geventhttpclient import HTTPClient

from loadtests.token_metrics import TokenMetrics

__all__ = ["Completed", "Failed", "Request", "complete"]


class Failed(Exception):
    """The answer is not what it should be."""


class Request(NamedTuple):
    model: str
    prompt: str
    prompt_tokens: int
    """As wanted; what the server counts may differ."""
    max_tokens: int
    n: int = 1
    stream: bool = True
    exact_tokens: bool = True

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "prompt": self.prompt, "max_tokens": self.max_tokens, "n": self.n}
        if self.exact_tokens:
            body["ignore_eos"] = True
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


class Completed(NamedTuple):
    text: str
    """Of the first choice."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    first_token_s: float | None
    """None when it was not streamed, or without a text."""
    between_tokens_s: float | None
    """The mean."""
    bytes: int


def complete(client: HTTPClient, path: str, headers: dict[str, str], request: Request, to: TokenMetrics) -> Completed:
    """Counts into `to`, and raises what went wrong: Failed, or what the connection raises."""
    to.second(time.time()).begun += 1
    begun = time.perf_counter()
    try:
        response = client.request("POST", path, body=json.dumps(request.body()), headers=headers)
        with response:
            if response.status_code != 200:
                raise Failed(f"{response.status_code}: {_code(response.read())}")
            read = _read_stream if request.stream else _read_whole
            done = read(response, begun, to)
        _check(request, done)
    except Exception as error:
        to.fail(time.time(), str(error) if isinstance(error, Failed) else type(error).__name__)
        raise
    now = time.time()
    second = to.second(now)
    second.ended += 1
    if not request.stream:
        second.tokens += done.completion_tokens
    elif done.first_token_s is not None and done.seconds > done.first_token_s:
        to.stream_tokens_per_s.add(done.completion_tokens / (done.seconds - done.first_token_s))
    to.requests += 1
    to.asked_prompt_tokens += request.prompt_tokens
    to.prompt_tokens += done.prompt_tokens
    to.completion_tokens += done.completion_tokens
    to.end_to_end_s.add(done.seconds)
    return done


def _read_whole(response: Any, begun: float, _to: TokenMetrics) -> Completed:
    body = response.read()
    answer = json.loads(body)
    usage = answer["usage"]
    elapsed_s = time.perf_counter() - begun
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    return Completed(answer["choices"][0]["text"], *counts, elapsed_s, None, None, len(body))


def _read_stream(response: Any, begun: float, to: TokenMetrics) -> Completed:
    text: list[str] = []
    usage: dict[str, int] | None = None
    ended = False
    first_at = last_at = None
    arrivals = size = 0
    while event := response.readline(b"\n\n"):
        size += len(event)
        data = event.strip().removeprefix(b"data:").strip()
        if event.startswith(b":"):
            continue  # a comment that keeps the connection alive
        if data == b"[DONE]":
            ended = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise Failed(f"error in the stream: {_code(data)}")
        usage = chunk.get("usage") or usage
        pieces = [choice for choice in chunk.get("choices", ()) if choice["text"]]
        if not pieces:
            continue
        now = time.perf_counter()
        if last_at is None:
            first_at = now
            to.first_token_s.add(now - begun)
        else:
            arrivals += 1
            to.between_tokens_s.add(now - last_at)
        last_at = now
        to.second(time.time()).tokens += len(pieces)  # a chunk is a token, or nearly
        text += [choice["text"] for choice in pieces if choice["index"] == 0]
    if not ended:
        raise Failed("the stream ended without [DONE]")
    if usage is None:
        raise Failed("the stream told no usage")
    first_s = None if first_at is None else first_at - begun
    between_s = (last_at - first_at) / arrivals if arrivals and last_at is not None and first_at is not None else None
    elapsed_s = time.perf_counter() - begun
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    return Completed("".join(text), *counts, elapsed_s, first_s, between_s, size)


def _check(request: Request, done: Completed) -> None:
    most = request.max_tokens * request.n
    if done.completion_tokens > most or (request.exact_tokens and done.completion_tokens != most):
        raise Failed(f"{'not' if request.exact_tokens else 'more than'} as many tokens as were asked for")


def _code(body: bytes) -> str:
    """What an error's body says, short and without what differs from request to request."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("type") or "no code")
    except (ValueError, KeyError, AttributeError, TypeError):
        return "no OpenAI error"
