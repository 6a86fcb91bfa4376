"""The running cluster through its own HTTP API, as the command line uses it with the admin key."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

__all__ = ["ClusterApi", "ClusterApiError", "token_times"]


class ClusterApiError(Exception):
    """The cluster gave no answer, or refused what it was asked; the text says what it said."""


class ClusterApi:
    def __init__(
        self, url: str, key: str, *, timeout_s: float = 60.0, transport: httpx.BaseTransport | None = None
    ) -> None:
        """`timeout_s` is between two reads; idle streams bring a comment every `ingress.keep_alive_s`."""
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=timeout_s,
            transport=transport,
            trust_env=False,
        )

    def close(self) -> None:
        """Let go of its connections."""
        self._client.close()

    def replicas(self) -> list[dict[str, Any]]:
        """The card of each engine replica as an ingress sees it. All methods raise ClusterApiError."""
        return self._ask("GET", "/admin/v1/replicas")["data"]  # type: ignore[no-any-return]

    def context_lengths(self) -> dict[str, int]:
        """`max_model_len` by model, without aliases."""
        cards = self._ask("GET", "/v1/models")["data"]
        return {card["id"]: card["max_model_len"] for card in cards if card["parent"] is None}

    def tokenize(self, model: str, text: str) -> list[int]:
        """Without special tokens."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return self._ask("POST", "/tokenize", body)["tokens"]  # type: ignore[no-any-return]

    def complete(self, model: str, prompts: list[list[int]], max_tokens: int) -> list[list[float]]:
        """Generate exactly so many tokens for each of the prompts at once, greedily.

        For each prompt: when its tokens arrived, in seconds since the request was sent.
        """
        body = msgspec.json.encode(
            {
                "model": model,
                "prompt": prompts,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,  # also tokens that make no text yet are told, and can be counted
            }
        )
        arrivals: list[tuple[float, bytes]] = []
        begun = time.perf_counter()
        with _told(), self._stream(body) as response:
            for data in response.iter_bytes():
                arrivals.append((time.perf_counter() - begun, data))  # read first, understood later
        times = token_times(arrivals, len(prompts))
        if any(len(each) != max_tokens for each in times):
            raise ClusterApiError(f"a completion of {model} ended before its {max_tokens} tokens")
        return times

    @contextmanager
    def _stream(self, body: bytes) -> Iterator[httpx.Response]:
        headers = {"Content-Type": "application/json"}
        with self._client.stream("POST", "/v1/completions", content=body, headers=headers) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal(response)
            yield response

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        with _told():
            response = self._client.request(method, path, json=body)
        if response.status_code != 200:
            raise _refusal(response)
        answer: dict[str, Any] = response.json()
        return answer


def token_times(arrivals: list[tuple[float, bytes]], choices: int) -> list[list[float]]:
    """When each token of each choice came, from the pieces of an event stream and when they did.

    Raises ClusterApiError for an error that the stream ends with.
    """
    times: list[list[float]] = [[] for _ in range(choices)]
    rest = b""
    for at_s, data in arrivals:
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: {"):
                continue  # a comment that keeps the connection open, or the end
            chunk = msgspec.json.decode(event.removeprefix(b"data: "))
            if "error" in chunk:
                raise ClusterApiError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                times[choice["index"]] += [at_s] * len(choice["token_ids"] or ())
    return times


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise ClusterApiError(f"the cluster does not answer: {error!r}") from error


def _refusal(response: httpx.Response) -> ClusterApiError:
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        reason = response.text[:200]
    return ClusterApiError(f"{response.request.url.path} answered {response.status_code}: {reason}")
