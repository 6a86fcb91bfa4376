"""The check of error bodies finds what it is for, and nothing in what errors ought to say."""

from __future__ import annotations

import json
import socket

import httpx
import httpx2
import openai
import pytest

from deployments.ingress.api.description.operations import error_classes
from deployments.ingress.errors import ApiError, GivenUp, InternalError, NotResumable, RateLimitExceeded
from tests.conformance.leaks import assert_no_leak, leaks_in

LEAKS = [
    "Cannot read /root/.millstream/models/x/config",
    "Cannot read /tmp",
    "no folder /srv/model",
    "see ~/x",
    "in ./deployments/x",
    "model.safetensors is missing",
    "tokenizer.json is missing",
    "grammar_compiler.cc:120: Check failed",
    "Invalid: ValueError",
    "1 validation error for CompletionRequest",
    "JSONDecodeError",
    'File "x", line 3, in y',
    "Traceback (most recent call last)",
    "<Engine object at 0x7f12345678>",
    "pydantic says no",
    "vllm refused it",
    "ray is down",
    "Connection to 10.0.0.7 failed",
    "The key sk-ms-abcdefgh is wrong",
    f"on {socket.gethostname()}",
]
HARMLESS = [
    "Unknown request URL: GET /nowhere/at/all. Completions are at POST /v1/completions.",
    "The model '/etc/passwd' does not exist. GET /v1/models lists the models you can use.",
    "Content-Type is 'text/plain'; expected 'application/json'. With curl, add -H 'Content-Type: application/json'.",
    "Invalid value for 'structured_outputs.json': expected a JSON schema, as an object or as text.",
    "Retry after the seconds in Retry-After.",
    "The body is not valid JSON: EOF while parsing a string at line 1 column 20.",
    "The body is not valid JSON: EOF while parsing an object at line 1 column 20.",
    "temperature is 2.5; expected 0 <= x <= 2. Use n and/or best_of with OpenAI's API.",
]
SENT = "http://127.0.0.1:8000/nowhere/at/all /etc/passwd"


@pytest.mark.parametrize("body", LEAKS)
def test_a_leak_is_found(body: str) -> None:
    assert leaks_in(body, SENT)
    with pytest.raises(AssertionError):
        assert_no_leak(body, SENT)


@pytest.mark.parametrize("body", HARMLESS)
def test_what_errors_say_is_no_leak(body: str) -> None:
    assert leaks_in(body, SENT) == []


def test_what_the_caller_sent_may_be_told_back() -> None:
    def telling(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, text=f"No {request.url.path} for {json.loads(request.content)['model']}")

    with httpx.Client(transport=httpx.MockTransport(telling)) as client:
        assert client.post("http://x/%41/b", json={"model": "/é/ü"}).text == "No /A/b for /é/ü"


def test_only_what_the_caller_sent_may_be_told_back() -> None:
    assert leaks_in("no model /srv/model", "/srv/model") == []
    assert leaks_in("no model /srv/model", "/srv/other") == ["a path: /srv/model"]


@pytest.mark.parametrize("kind", list(error_classes()), ids=lambda kind: kind.__name__)
def test_no_class_of_error_leaks_by_itself(kind: type[ApiError]) -> None:
    error: ApiError
    if kind in (InternalError, GivenUp, NotResumable):
        error = kind()  # theirs is one message
    elif issubclass(kind, RateLimitExceeded):
        error = kind("No.", None, None)
    else:
        error = kind("No.")
    assert_no_leak(error.body().decode())


def test_every_client_is_watched() -> None:
    def leaking(request: object) -> httpx.Response:
        return httpx.Response(500, text="of /srv/model")

    def leaking2(request: object) -> httpx2.Response:
        return httpx2.Response(400, json={"error": {"message": "/srv/model"}})

    with (
        httpx.Client(transport=httpx.MockTransport(leaking)) as client,
        pytest.raises(AssertionError, match="a path: /srv/model"),
    ):
        client.get("http://x/")
    with (
        httpx2.Client(transport=httpx2.MockTransport(leaking2)) as http_client,
        openai.OpenAI(base_url="http://x/v1", api_key="k", http_client=http_client, max_retries=0) as official,
        pytest.raises(AssertionError, match="a path: /srv/model"),
    ):
        official.completions.create(model="m", prompt="p", stream=True)


async def test_every_async_client_is_watched() -> None:
    def leaking(request: object) -> httpx.Response:
        return httpx.Response(500, text="of /srv/model")

    def leaking2(request: object) -> httpx2.Response:
        return httpx2.Response(500, text="of /srv/model")

    async with httpx.AsyncClient(transport=httpx.MockTransport(leaking)) as client:
        with pytest.raises(AssertionError, match="a path: /srv/model"):
            async with client.stream("GET", "http://x/"):
                pass
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(leaking2)) as other:
        with pytest.raises(AssertionError, match="a path: /srv/model"):
            await other.get("http://x/")
