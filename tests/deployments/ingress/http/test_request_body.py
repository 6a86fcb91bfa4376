"""Bodies are refused before they are parsed where parsing would hold the event loop, and what is left takes no time."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.ingress.api.completions.request import CompletionRequest, parse_completion_request
from deployments.ingress.api.keys.bodies import CreateKeyRequest
from deployments.ingress.api.tokens import DetokenizeRequest, TokenizeRequest
from deployments.ingress.errors import InvalidRequest
from deployments.ingress.http.json_body import Body, parse_body, parsed

LIMIT = 8 << 20
"""The default of `request_body_limit_bytes`."""
TURN_S = 0.1
"""Twice what a turn may take: beside other processes the same work takes up to twice as long."""


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "p", **fields}, ensure_ascii=False).encode()


def with_(text: bytes) -> bytes:
    return b'{"model":"m",' + text + b'"prompt":"p"}'


def seconds(data: bytes, kind: type[Body] = CompletionRequest) -> tuple[float, InvalidRequest | None]:
    """Of the processor, at best, so that what else runs here does not count."""
    refused = None
    best = 1e9
    for _ in range(5):
        begun = time.thread_time()
        try:
            if issubclass(kind, CompletionRequest):
                parse_completion_request(data, kind)
            else:
                parse_body(data, kind)
        except InvalidRequest as error:
            refused = error
        best = min(best, time.thread_time() - begun)
    return best, refused


ACCEPTED = {
    "text": body(prompt="x" * (LIMIT - 100)),
    "text of three bytes": body(prompt="猫" * ((LIMIT - 100) // 3)),
    "escaped text": json.dumps({"model": "m", "prompt": "猫" * 2**19}).encode(),
    "line ends": body(prompt="\n" * 2**19 + "x" * (LIMIT - 2**20 - 100)),
    "texts": body(prompt=["x" * 8000] * 1024),
    "suffix": body(suffix="x" * (LIMIT - 100)),
    "token ids": body(prompt=[49151] * 2**17),
    "arrays of token ids": body(prompt=[[49151] * 128] * 1024),
    "parameters": body(
        allowed_token_ids=[2**31 - 1] * 8192,
        logit_bias={str(token_id): 1.5 for token_id in range(1024)},
        stop=["\\" * 512] * 4,
        prompt='\\"' * 50_000,
    ),
}


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED)
def test_the_largest_bodies_there_may_be_are_parsed_in_a_turn(data: bytes) -> None:
    took_s, refused = seconds(data)
    assert refused is None
    assert took_s < TURN_S


REFUSED = {
    "token ids": (body(prompt=[1] * 2**19), "prompt", "at most 131072 token ids; it has 524288"),
    "as many as fit": (body(prompt=[1]).replace(b"[1]", b"[" + b"1," * (LIMIT // 2 - 50) + b"1]"), "prompt", "131072"),
    "arrays": (body(prompt=[[1]] * 20_000), "prompt", "at most 1024 arrays; it has 20000"),
    "empty arrays": (body(prompt=[[]] * 2**17), "prompt", "at most 1024 arrays"),
    "texts": (body(prompt=["some text"] * 10_000), "prompt", "at most 1024 strings; it has 10000"),
    "empty texts": (body(prompt=[""] * 2**21), None, "strings; expected at most 65536"),
    "numbers behind a text": (body(prompt=["a", *[1] * 2**19]), "prompt", "expected an array of strings, of token ids"),
    "many numbers behind a text": (body(prompt=["a", *[1] * 2**21]), None, "numbers, brackets and spaces; expected"),
    "an object": (body(prompt={"a": [1] * 2**20}), "prompt", "expected a string or an array"),
    "line ends": (body(prompt="\n" * (LIMIT // 2 - 50)), None, "backslashes; expected at most 524288"),
    "a suffix of numbers": (body(suffix=[1] * 2**21), "suffix", "most of them of 'suffix'; expected at most 4194304"),
    "a name": (body(model="x" * (LIMIT - 100)), "model", "at most 131072 bytes of JSON"),
    "token ids that are no prompt": (body(allowed_token_ids=[1] * 2**20), "allowed_token_ids", "bytes of JSON"),
    "a word": (body(bad_words=["x" * 1_800_000]), "bad_words", "bytes of JSON"),
    "a schema": (body(guided_json={"enum": ["x" * 600_000]}), "guided_json", "bytes of JSON"),
    "a number": (with_(b'"seed":' + b"9" * (2**22 - 100) + b","), "seed", "bytes of JSON"),
    "a longer number": (with_(b'"seed":' + b"9" * (LIMIT - 100) + b","), "seed", "bytes of numbers"),
    "whitespace": (with_(b" " * (2**22 - 100)), None, "beside prompt and suffix; expected at most 262144"),
    "more whitespace": (with_(b" " * (LIMIT - 100)), None, "numbers, brackets and spaces; expected at most 4194304"),
    "one key many times": (with_(b'"n":1,' * 1_000_000), None, "strings"),
    "one key as often as allowed": (with_(b'"n":1,' * 60_000), None, "beside prompt and suffix"),
    "an array of its largest size": (
        with_(b'"stop_token_ids":[' + b"1," * 50_000 + b"1],"),
        "stop_token_ids",
        "array of at most 128",
    ),
    "prompts many times": (b'{"model":"m"' + (b',"prompt":[' + b"1," * 60_000 + b"1]") * 34 + b"}", None, "beside"),
    "prompts more times": (
        b'{"model":"m"' + (b',"prompt":[' + b"1," * 60_000 + b"1]") * 60 + b"}",
        "prompt",
        "bytes of",
    ),
    "unknown keys": (with_(b"".join(b'"k%d":1,' % number for number in range(60_000))), "k0", "Unrecognized"),
    "a long key": (body(**{"k" * (LIMIT - 100): 1}), "k" * 200, "Unrecognized"),
    "nested": (body(prompt=0)[:-2] + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}", None, "nested too deeply"),
    "cut off": (body(prompt=[1] * 2**20)[:-2], None, "not valid JSON"),
    "no UTF-8": (body(prompt="x" * 2**21)[:-2] + b"\xff" + b'"}', None, "not valid JSON"),
    "no object": (json.dumps([1] * 2**20).encode(), None, "must be a JSON object"),
    "wrong items": (with_(b'"stop_token_ids":[' + b"{}," * 40_000 + b"1],"), "stop_token_ids.0", "an integer"),
    "labels that are none": (with_(b'"guided_choice":[' + b"{}," * 40_000 + b"1],"), "guided_choice.0", "a string"),
    "unknown keys inside": (
        body(stream_options={f"k{number}": 1 for number in range(9000)}),
        "stream_options.k0",
        "Unrecognized",
    ),
}


@pytest.mark.parametrize(("data", "param", "words"), REFUSED.values(), ids=REFUSED)
def test_what_would_take_longer_is_refused_in_less(data: bytes, param: str | None, words: str) -> None:
    took_s, refused = seconds(data[: LIMIT + 100])
    assert refused is not None
    assert (refused.param, words in refused.message) == (param, True), refused.message
    assert len(refused.message) < 500
    assert took_s < TURN_S


def test_other_bodies_are_looked_at_as_well() -> None:
    ids = json.dumps({"tokens": [1] * 2**21}).encode()
    took_s, refused = seconds(ids, DetokenizeRequest)
    assert refused is not None
    assert (refused.param, took_s < TURN_S) == ("tokens", True)
    took_s, refused = seconds(json.dumps({"prompt": "x" * (LIMIT - 100)}).encode(), TokenizeRequest)
    assert (refused, took_s < TURN_S) == (None, True)
    took_s, refused = seconds(json.dumps({"name": "k", "labels": {"a": "x" * 2**20}}).encode(), CreateKeyRequest)
    assert refused is not None
    assert (refused.param, took_s < TURN_S) == ("labels", True)


@given(st.lists(st.text(), min_size=1, max_size=20), st.booleans())
def test_quotes_and_backslashes_of_texts_are_told_from_those_of_json(texts: list[str], ascii_only: bool) -> None:
    """A large body with any texts in it is accepted as a small one is."""
    fields = {"model": "m", "prompt": [*texts, "x" * 70_000], "stop": "\\"}
    data = json.dumps(fields, ensure_ascii=ascii_only).encode()
    assert parse_completion_request(data, CompletionRequest).prompt == fields["prompt"]


@pytest.mark.parametrize(("size", "elsewhere"), [(64 * 1024, False), (64 * 1024 + 1, True)])
async def test_a_large_body_is_parsed_off_the_event_loop(size: int, elsewhere: bool) -> None:
    def thread_of(data: bytes) -> int:
        assert len(data) == size
        return threading.get_ident()

    assert (await parsed(b" " * size, thread_of) != threading.get_ident()) is elsewhere
