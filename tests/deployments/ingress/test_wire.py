"""The bytes of answers and chunks are the JSON that dumping a dictionary would give."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deployments.ingress.errors import InvalidRequest
from deployments.ingress.wire import DONE, KEEP_ALIVE, ChunkTemplate, Usage, completion_body, error_event

texts = st.text() | st.text(alphabet='\x00\x1f\x7f"\\/\n\r\t\u2028\u2029\ufeff\ufffd€日👩‍🚀%{}b', max_size=20)
reasons: st.SearchStrategy[Literal["stop", "length"] | None] = st.sampled_from(["stop", "length", None])
usages = st.builds(Usage, *[st.integers(0, 2**40)] * 3)


def usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


@given(texts, texts, st.integers(0, 1023), reasons, st.none() | usages, st.booleans())
@example('a"b\\c\n\u2028\u2029\x00%b%d%%', "m", 0, None, None, True)
def test_a_chunk_is_the_dumped_dictionary(
    text: str,
    model: str,
    index: int,
    reason: Literal["stop", "length"] | None,
    usage: Usage | None,
    usage_follows: bool,
) -> None:
    chunk = ChunkTemplate("cmpl-1", 1700000000, model, usage_follows=usage_follows).text(index, text, reason, usage)
    expected: dict[str, Any] = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1700000000,
        "model": model,
        "choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": reason}],
    }
    if usage is not None:
        expected["usage"] = usage_fields(usage)
    elif usage_follows:
        expected["usage"] = None
    assert chunk == event(expected)
    assert json.loads(chunk.removeprefix(b"data: ")) == expected
    assert len(chunk.splitlines()) == 2  # an event is one line of data, whatever the text


@given(texts, usages)
def test_the_usage_chunk_is_the_dumped_dictionary(model: str, usage: Usage) -> None:
    chunk = ChunkTemplate("cmpl-1", 1, model, usage_follows=True).usage(usage)
    fields = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": model}
    assert chunk == event({**fields, "choices": [], "usage": usage_fields(usage)})


@given(texts, st.lists(st.tuples(texts, st.sampled_from(["stop", "length"])), max_size=3), usages)
def test_a_whole_answer_is_the_dumped_dictionary(model: str, choices: list[tuple[str, Any]], usage: Usage) -> None:
    body = completion_body("cmpl-1", 1, model, choices, usage)
    assert json.loads(body) == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": model,
        "choices": [
            {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
            for index, (text, reason) in enumerate(choices)
        ],
        "usage": usage_fields(usage),
    }


@given(texts)
def test_an_error_is_one_event(message: str) -> None:
    chunk = error_event(InvalidRequest(message, param="prompt", code="c").body())
    assert chunk.startswith(b"data: ")
    assert chunk.endswith(b"\n\n")
    assert chunk.count(b"\n") == 2
    assert json.loads(chunk.removeprefix(b"data: ")) == {
        "error": {"message": message, "type": "invalid_request_error", "param": "prompt", "code": "c"}
    }


@pytest.mark.parametrize("frame", [DONE, KEEP_ALIVE])
def test_frames_end_with_a_blank_line(frame: bytes) -> None:
    assert frame.endswith(b"\n\n")
    assert frame.count(b"\n") == 2
    assert frame.startswith((b"data: ", b":"))
