"""The bytes of answers and chunks are the JSON that dumping a dictionary would give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deployments.ingress.api.completions.chunks import (
    DONE,
    KEEP_ALIVE,
    ChoiceDelta,
    ChunkTemplate,
    WrittenChoice,
    completion_body,
    error_event,
)
from deployments.ingress.api.completions.logprobs import WrittenLogprobs
from deployments.ingress.errors import InvalidRequest
from deployments.ingress.inference.inference import TokenUsage

texts = st.text() | st.text(alphabet='\x00\x1f\x7f"\\/\n\r\t\u2028\u2029\ufeff\ufffd€日👩‍🚀%{}b', max_size=20)
reasons: st.SearchStrategy[Literal["stop", "length"] | None] = st.sampled_from(["stop", "length", None])
stop_reasons = st.none() | st.integers(0, 2**31) | texts
counts = st.integers(0, 2**40)
usages = st.builds(TokenUsage, counts, counts, counts)
token_ids = st.lists(st.integers(0, 2**31), max_size=4)
numbers = st.floats(-9999.0, 0.0)
positions = st.tuples(counts, st.none() | numbers, texts, st.none() | st.dictionaries(texts, numbers, max_size=3))
prompt_logprobs = st.lists(
    st.none()
    | st.dictionaries(
        st.integers(0, 2**31).map(str),
        st.fixed_dictionaries({"logprob": numbers, "rank": st.integers(1, 2**31), "decoded_token": texts}),
        max_size=2,
    ),
    max_size=3,
)


def logprobs_of(told: Sequence[tuple[int, float | None, str, dict[str, float] | None]]) -> WrittenLogprobs:
    return WrittenLogprobs(
        text_offset=[offset for offset, *_ in told],
        token_logprobs=[logprob for _, logprob, *_ in told],
        tokens=[token for *_, token, _ in told],
        top_logprobs=[top for *_, top in told],
    )


all_logprobs = st.lists(positions, max_size=3).map(logprobs_of)


def logprobs_fields(logprobs: WrittenLogprobs | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    return {
        "text_offset": logprobs.text_offset,
        "token_logprobs": logprobs.token_logprobs,
        "tokens": logprobs.tokens,
        "top_logprobs": logprobs.top_logprobs,
    }


def usage_fields(usage: TokenUsage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def head(model: str) -> dict[str, Any]:
    return {"$schema": "http://h/s", "id": "cmpl-1", "object": "text_completion", "created": 1700000000, "model": model}


# --- chunks --------------------------------------------------------------------------------------------------------


@st.composite
def choice_deltas(draw: st.DrawFn) -> ChoiceDelta:
    token_ids_told = draw(st.none() | token_ids)
    return ChoiceDelta(
        draw(st.integers(0, 1023)),
        draw(texts),
        draw(reasons),
        draw(stop_reasons),
        draw(st.none() | all_logprobs),
        token_ids_told,
        None if token_ids_told is None else draw(st.none() | token_ids),
    )


@given(choice_deltas(), texts, st.none() | usages, st.booleans())
@example(ChoiceDelta(0, 'a"b\\c\n\u2028\u2029\x00%b%d%%', None), "m%b", None, True)
@example(ChoiceDelta(0, "", "stop", "%b%d"), "m", None, True)
def test_a_chunk_is_the_dumped_dictionary(
    delta: ChoiceDelta, model: str, usage: TokenUsage | None, usage_follows: bool
) -> None:
    chunk = ChunkTemplate(head(model), usage_follows=usage_follows).chunk(delta, usage)
    choice: dict[str, Any] = {
        "index": delta.choice,
        "text": delta.text,
        "logprobs": logprobs_fields(delta.logprobs),
        "finish_reason": delta.finish_reason,
        "stop_reason": None if delta.finish_reason is None else delta.stop_reason,
        "token_ids": delta.token_ids,
        "prompt_token_ids": delta.prompt_token_ids,
    }
    expected: dict[str, Any] = {**head(model), "choices": [choice]}
    if usage is not None:
        expected["usage"] = usage_fields(usage)
    elif usage_follows:
        expected["usage"] = None
    assert chunk == event(expected)
    assert json.loads(chunk.removeprefix(b"data: ")) == expected
    assert len(chunk.splitlines()) == 2  # an event is one line of data, whatever the text


@given(texts, usages)
def test_the_usage_chunk_is_the_dumped_dictionary(model: str, usage: TokenUsage) -> None:
    chunk = ChunkTemplate(head(model), usage_follows=True).usage(usage)
    assert chunk == event({**head(model), "choices": [], "usage": usage_fields(usage)})


# --- whole answers -------------------------------------------------------------------------------------------------

choices = st.builds(
    WrittenChoice,
    index=st.integers(0, 1023),
    text=texts,
    logprobs=st.none() | all_logprobs,
    finish_reason=st.sampled_from(["stop", "length"]),
    stop_reason=stop_reasons,
    token_ids=st.none() | token_ids,
    prompt_token_ids=st.none() | token_ids,
    prompt_logprobs=st.none() | prompt_logprobs,
)


@given(texts, st.lists(choices, max_size=3), usages)
def test_a_whole_answer_is_the_dumped_dictionary(model: str, told: list[WrittenChoice], usage: TokenUsage) -> None:
    expected: list[dict[str, Any]] = []
    for choice in told:
        fields: dict[str, Any] = {
            "index": choice.index,
            "text": choice.text,
            "logprobs": logprobs_fields(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids,
            "prompt_token_ids": choice.prompt_token_ids,
            "prompt_logprobs": choice.prompt_logprobs,
        }
        expected.append(fields)
    body = completion_body(head(model), told, usage)
    assert body == msgspec.json.encode({**head(model), "choices": expected, "usage": usage_fields(usage)})


NOT_ASKED_FOR = {"stop_reason": None, "token_ids": None, "prompt_token_ids": None}


def test_what_nobody_asked_for_is_null_as_in_vllm() -> None:
    delta = ChoiceDelta(0, "a", "length")
    [told] = json.loads(completion_body({}, [WrittenChoice.joined(0, [delta])], TokenUsage(1, 1, 0)))["choices"]
    plain = {"index": 0, "text": "a", "logprobs": None, "finish_reason": "length"}
    assert told == {**plain, **NOT_ASKED_FOR, "prompt_logprobs": None}
    chunk = ChunkTemplate(head("m"), usage_follows=False).chunk(ChoiceDelta(0, "a", None))
    [told] = json.loads(chunk.removeprefix(b"data: "))["choices"]
    assert told == {**plain, **NOT_ASKED_FOR, "finish_reason": None}


# --- choices of many deltas ----------------------------------------------------------------------------------------


def test_a_choice_is_joined_from_its_deltas() -> None:
    scored: list[dict[str, Any] | None] = [None, {"3": {"logprob": -1.0, "rank": 1, "decoded_token": "p"}}]
    deltas = [
        ChoiceDelta(7, "ab", None, None, logprobs_of([(0, -1.0, "ab", {"ab": -1.0})]), [5], [2, 3], scored),
        ChoiceDelta(7, "", None, None, logprobs_of([(2, -2.0, "", {"": -2.0}), (2, None, "c", None)]), [6, 7]),
        ChoiceDelta(7, "c", "stop", "!", logprobs_of([]), []),
    ]
    assert WrittenChoice.joined(1, deltas) == WrittenChoice(
        1,
        "abc",
        logprobs_of([(0, -1.0, "ab", {"ab": -1.0}), (2, -2.0, "", {"": -2.0}), (2, None, "c", None)]),
        "stop",
        "!",
        token_ids=[5, 6, 7],
        prompt_token_ids=[2, 3],
        prompt_logprobs=scored,
    )


def test_joining_leaves_the_deltas_as_they_are() -> None:
    deltas = [
        ChoiceDelta(0, "a", None, None, logprobs_of([(0, -1.0, "a", None)]), [5]),
        ChoiceDelta(0, "b", "length", None, logprobs_of([(1, -1.0, "b", None)]), [6]),
    ]
    once, again = WrittenChoice.joined(0, deltas), WrittenChoice.joined(0, deltas)
    assert once == again
    assert deltas[0].logprobs == logprobs_of([(0, -1.0, "a", None)])
    assert deltas[0].token_ids == [5]


@given(st.lists(st.tuples(texts, token_ids, st.lists(positions, max_size=2)), min_size=1, max_size=5), st.data())
def test_how_a_choice_came_in_pieces_does_not_show(
    pieces: list[tuple[str, list[int], list[tuple[int, float | None, str, dict[str, float] | None]]]],
    data: st.DataObject,
) -> None:
    reason: Literal["stop", "length"] = data.draw(st.sampled_from(["stop", "length"]))
    stop_reason = data.draw(stop_reasons)
    last = len(pieces) - 1
    deltas = [
        ChoiceDelta(
            3,
            text,
            reason if place == last else None,
            stop_reason if place == last else None,
            logprobs_of(told),
            ids,
            [9] if place == 0 else None,
        )
        for place, (text, ids, told) in enumerate(pieces)
    ]
    whole = ChoiceDelta(
        3,
        "".join(text for text, *_ in pieces),
        reason,
        stop_reason,
        logprobs_of([position for *_, told in pieces for position in told]),
        [token_id for _, ids, _ in pieces for token_id in ids],
        [9],
    )
    assert WrittenChoice.joined(0, deltas) == WrittenChoice.joined(0, [whole])


# --- everything else -----------------------------------------------------------------------------------------------


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
