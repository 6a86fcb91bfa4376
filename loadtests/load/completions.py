"""One completion over HTTP as a load test sees it: streamed, timed, and checked.

On geventhttpclient, which comes with locust and reads an event when it arrives. A stream must end with `[DONE]`, and
what was generated must be what was asked for and what the chunks said on the way.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

from gevent import GreenletExit
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError

from loadtests.load.token_metrics import TokenMetrics

__all__ = ["Completed", "Failed", "Request", "complete"]


class Failed(Exception):
    """The answer is not what it should be. `status` is that of the answer, where it is what is wrong."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class Request(NamedTuple):
    model: str
    prompt: str
    prompt_tokens: int
    """As wanted; what the server counts may differ."""
    max_tokens: int
    n: int = 1
    stream: bool = True
    exact_tokens: bool = True
    """Ask for `max_tokens` whatever the model says (`ignore_eos` of vLLM)."""
    continuous_usage: bool = True
    """Ask each chunk for the tokens of its choice so far (`continuous_usage_stats` of vLLM)."""

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "prompt": self.prompt, "max_tokens": self.max_tokens}
        if self.n != 1:
            body["n"] = self.n
        if self.exact_tokens:
            body["ignore_eos"] = True
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            if self.continuous_usage:
                body["stream_options"]["continuous_usage_stats"] = True
        return body


class Completed(NamedTuple):
    text: str
    """Of the first choice."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    bytes: int
    first_token_s: float | None = None
    """None when it was not streamed, or without a text."""
    between_tokens_s: float | None = None
    """The mean."""
    counted_on_the_way: bool = False
    """Whether the chunks told their tokens."""


def complete(client: HTTPClient, path: str, headers: dict[str, str], request: Request, to: TokenMetrics) -> Completed:
    """Counts into `to`, and raises what went wrong: Failed, or what the connection raises."""
    to.at(time.time()).begun += 1
    begun = time.perf_counter()
    try:
        response = client.request("POST", path, body=json.dumps(request.body()), headers=headers)
        with response:
            if response.status_code != 200:
                raise Failed(f"{response.status_code}: {_code(response.read())}", response.status_code)
            done = _Stream(begun, to).read(response) if request.stream else _read_whole(response, begun)
        _check(request, done)
    except GreenletExit:
        to.abandoned += 1
        to.at(time.time()).ended += 1
        raise
    except Exception as error:
        to.fail(time.time(), str(error) if isinstance(error, Failed) else type(error).__name__)
        raise
    interval = to.at(time.time())
    interval.ended += 1
    if not request.stream:
        interval.tokens += done.completion_tokens
    elif done.first_token_s is not None and done.seconds > done.first_token_s:
        to.stream_tokens_per_s.add(done.completion_tokens / (done.seconds - done.first_token_s))
    to.requests += 1
    to.asked_prompt_tokens += request.prompt_tokens
    to.prompt_tokens += done.prompt_tokens
    to.completion_tokens += done.completion_tokens
    to.end_to_end_s.add(done.seconds)
    return done


def _read_whole(response: Any, begun: float) -> Completed:
    body = response.read()
    elapsed_s = time.perf_counter() - begun
    try:
        answer = json.loads(body)
        usage = answer["usage"]
        text = answer["choices"][0]["text"]
        return Completed(text, usage["prompt_tokens"], usage["completion_tokens"], elapsed_s, len(body))
    except (ValueError, LookupError, TypeError) as error:
        raise Failed("the answer is no completion of OpenAI's") from error


class _Stream:
    """One that is being read."""

    def __init__(self, begun: float, to: TokenMetrics) -> None:
        self._begun = begun
        self._to = to
        self._text: list[str] = []
        self._usage: dict[str, int] | None = None
        """Of the whole request, which most servers tell in a chunk without choices."""
        self._usage_is_final = False
        self._first_at: float | None = None
        self._reads = 0
        self._last: dict[int, tuple[int, float]] = {}
        """By choice, of a text: in which read, and when, it came."""
        self._gaps = 0
        self._gaps_s = 0.0
        self._counted: dict[int, int] = {}
        """Tokens by choice, where the chunks tell them."""
        self._in_timeline: dict[int, int] = {}
        """Tokens by choice."""

    def read(self, response: Any) -> Completed:
        ended = False
        size = 0
        self._count_reads(response)
        try:
            while line := response.readline(b"\n"):  # which ends a line in whichever way the server ends them
                size += len(line)
                name, _, data = line.partition(b":")
                if name != b"data":
                    continue  # the end of an event, or a comment that keeps the connection alive
                data = data.strip()
                if data == b"[DONE]":
                    ended = True
                    continue
                self._take(data)
        except HTTPParseError as error:
            raise Failed("the stream broke off") from error
        if not ended:
            raise Failed("the stream ended without [DONE]")
        if self._usage is None:
            raise Failed("the stream told no usage")
        return self._completed(size)

    def _count_reads(self, response: Any) -> None:
        """What comes in one read came at one time, however many events it is."""
        feed = response.feed

        def counted(data: bytes) -> None:
            self._reads += 1
            feed(data)

        response.feed = counted

    def _take(self, data: bytes) -> None:
        try:
            chunk = json.loads(data)
            if "error" in chunk:
                raise Failed(f"error in the stream: {_code(data)}")
            choices = chunk.get("choices") or []
            usage = chunk.get("usage")
            for choice in choices:
                self._take_choice(choice["index"], choice["text"], usage)
            if usage:
                self._usage = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
                self._usage_is_final = not choices
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Failed("a chunk is none of OpenAI's") from error

    def _take_choice(self, index: int, text: str, usage: dict[str, int] | None) -> None:
        now = time.time()
        told = self._in_timeline.get(index, 0)
        tokens = told + bool(text)  # without a count a chunk is a token, or nearly
        if usage:
            tokens = usage["completion_tokens"]
            if tokens < self._counted.get(index, 0):
                raise Failed("the chunks' count of tokens went down")
            self._counted[index] = tokens
        self._in_timeline[index] = tokens
        self._to.at(now).tokens += tokens - told
        if not text:
            return
        at = time.perf_counter()
        read, last_at = self._last.get(index, (-1, 0.0))
        if read == self._reads:
            self._to.bunched += 1
        else:
            if read >= 0:
                self._gaps += 1
                self._gaps_s += at - last_at
                self._to.between_tokens(now, at - last_at)
            self._last[index] = (self._reads, at)
        if self._first_at is None:
            self._first_at = at
            self._to.first_token(now, at - self._begun)
        if index == 0:
            self._text.append(text)

    def _completed(self, size: int) -> Completed:
        assert self._usage is not None
        counted = sum(self._counted.values())
        if self._counted and self._usage_is_final and counted != self._usage["completion_tokens"]:
            raise Failed("the chunks' count of tokens is not that of the usage")
        return Completed(
            "".join(self._text),
            self._usage["prompt_tokens"],
            self._usage["completion_tokens"],
            time.perf_counter() - self._begun,
            size,
            None if self._first_at is None else self._first_at - self._begun,
            self._gaps_s / self._gaps if self._gaps else None,
            bool(self._counted),
        )


def _check(request: Request, done: Completed) -> None:
    most = request.max_tokens * request.n
    if done.completion_tokens > most:
        raise Failed("more tokens than were asked for")
    if request.exact_tokens and done.completion_tokens < most:
        raise Failed("fewer tokens than were asked for")


def _code(body: bytes) -> str:
    """What an error's body says, short and without what differs from request to request."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("type") or "no code")
    except (ValueError, KeyError, AttributeError, TypeError):
        return "no OpenAI error"
