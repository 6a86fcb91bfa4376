"""The server under load: where it is, and what it takes, which is found out by asking.

Works with any OpenAI-compatible server: what it refuses of vLLM's parameters is left out.
"""

from __future__ import annotations

import json
import random
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import msgspec
from geventhttpclient import HTTPClient

from loadtests.load.completions import Completed, Failed, Request, complete
from loadtests.load.prompts import CALIBRATION_WORDS, Lengths, words
from loadtests.load.token_metrics import TokenMetrics

__all__ = ["Endpoint", "Served", "Unusable"]

_TIMEOUT_S = 600.0


class Unusable(Exception):
    """The server does not serve what is asked of it: the reason, for a person."""


class Served(msgspec.Struct, frozen=True):
    """What a server does."""

    model: str
    lengths: Lengths
    exact_tokens: bool
    """It generates as many tokens as it is told to."""
    continuous_usage: bool
    """Its chunks tell their tokens."""


class Endpoint:
    def __init__(self, url: str, key: str, *, insecure: bool = False) -> None:
        """`url` with or without the /v1 at its end; `insecure` takes any certificate."""
        self._origin = url
        self._base = urlsplit(url).path.rstrip("/").removesuffix("/v1")
        self._insecure = insecure
        self.completions_path = f"{self._base}/v1/completions"
        self.headers = {"content-type": "application/json"}
        if key:
            self.headers["authorization"] = f"Bearer {key}"

    def client(self, concurrency: int = 1, timeout_s: float = _TIMEOUT_S) -> HTTPClient:
        """For so many requests at a time; `timeout_s` is between two reads."""
        return HTTPClient.from_url(
            self._origin,
            concurrency=concurrency,
            network_timeout=timeout_s,
            connection_timeout=30.0,
            insecure=self._insecure,
        )

    def get(self, client: HTTPClient, path: str) -> Any:
        """What it answers, if that is JSON. Raises Failed, ValueError, or what the connection raises."""
        with client.request("GET", f"{self._base}{path}", headers=self.headers) as response:
            body = response.read()
            if response.status_code != 200:
                raise Failed(str(response.status_code), response.status_code)
        return json.loads(body)

    def explore(self, model: str, *, exact_tokens: bool) -> Served:
        """By some small requests. An empty `model` means the first that the server lists. Raises Unusable."""
        client = self.client(timeout_s=120.0)
        try:
            model = model or str(self.get(client, "/v1/models")["data"][0]["id"])
            short, long = (words(number, random.Random(number)) for number in CALIBRATION_WORDS)
            first, asked = self._first_accepted(client, Request(model, short, 0, 1, exact_tokens=exact_tokens))
            second = self._ask(client, asked._replace(prompt=long))
            lengths = Lengths.of(first.prompt_tokens, second.prompt_tokens)
            return Served(model, lengths, asked.exact_tokens, first.counted_on_the_way)
        except (Failed, OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            what = f"the model {model}" if model else "a model"
            reason = str(error) if isinstance(error, Failed) else repr(error)
            raise Unusable(f"{self._origin} does not serve {what} at {self.completions_path}: {reason}") from error
        finally:
            client.close()

    def _first_accepted(self, client: HTTPClient, request: Request) -> tuple[Completed, Request]:
        """The request with as many of vLLM's parameters as are taken."""
        fewer = request._replace(continuous_usage=False)
        for attempt in (request, fewer):
            try:
                return self._ask(client, attempt), attempt
            except Failed as error:
                if error.status not in (400, 422):
                    raise
        plain = fewer._replace(exact_tokens=False)
        return self._ask(client, plain), plain

    def _ask(self, client: HTTPClient, request: Request) -> Completed:
        return complete(client, self.completions_path, self.headers, request, TokenMetrics())
