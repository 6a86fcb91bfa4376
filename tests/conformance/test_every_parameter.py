"""Every parameter of docs/api.md that claims an effect has it on a real engine, and no value of any makes a 500.

Where an effect takes more than one look, its test is in test_parameter_effects.py, which is named here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import httpx
import pytest

from deployments.ingress.api.completions.request import CompletionRequest
from tests.conformance import test_parameter_effects
from tests.conformance.faces import D1, D3
from tests.conformance.test_parameters import RANGES
from tests.conftest import RunningCluster
from tests.deployments.ingress.memory_gateway import events

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "smollm2-135m"
GREEDY: dict[str, Any] = {
    "model": MODEL,
    "prompt": "The capital of France is",
    "max_tokens": 3,
    "temperature": 0,
    "return_token_ids": True,
}
HOT: dict[str, Any] = {**GREEDY, "temperature": 2, "max_tokens": 1, "n": 16, "seed": 1}
COMMA = 28
COMMAS: dict[str, Any] = {**GREEDY, "max_tokens": 12, "logit_bias": {str(COMMA): 100}}
REPEATING: dict[str, Any] = {**GREEDY, "prompt": "one one one one one one one one", "max_tokens": 8}


@pytest.fixture(scope="module")
async def vllm(vllm_cluster: RunningCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with vllm_cluster.client() as client:
        yield client


class Effect(NamedTuple):
    """What differs between the answers of `base` and of `base` with the parameter."""

    base: dict[str, Any]
    value: Any
    seen: Callable[[dict[str, Any], dict[str, Any]], bool]
    """Given the answer without it and the one with it."""


def tokens(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


def distinct(answer: dict[str, Any]) -> int:
    """How many different texts its choices have."""
    return len({choice["text"] for choice in answer["choices"]})


def variety(answer: dict[str, Any]) -> int:
    """How many different tokens its first choice has."""
    return len(set(answer["choices"][0]["token_ids"]))


def generated(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["completion_tokens"]
    return count


EFFECTS: dict[str, Effect] = {
    "prompt": Effect(GREEDY, [15, 17], lambda a, b: b["choices"][0]["prompt_token_ids"] == [15, 17]),
    "max_tokens": Effect(GREEDY, 2, lambda a, b: generated(b) == 2 and tokens(a)[0][:2] == tokens(b)[0]),
    "temperature": Effect({**GREEDY, "n": 8, "seed": 1}, 2, lambda a, b: distinct(a) == 1 < distinct(b)),
    "top_p": Effect(HOT, 0.3, lambda a, b: distinct(b) < distinct(a)),
    "n": Effect(GREEDY, 2, lambda a, b: len(b["choices"]) == 2 and generated(b) == 6),
    "echo": Effect(GREEDY, True, lambda a, b: b["choices"][0]["text"] == GREEDY["prompt"] + a["choices"][0]["text"]),
    "presence_penalty": Effect({**GREEDY, "max_tokens": 24}, 2, lambda a, b: variety(a) < variety(b)),
    "frequency_penalty": Effect(REPEATING, 2, lambda a, b: variety(a) < variety(b)),
    "repetition_penalty": Effect(REPEATING, 2, lambda a, b: variety(a) < variety(b)),
    "seed": Effect({**HOT, "seed": 2}, 3, lambda a, b: tokens(a) != tokens(b) and tokens(a)[1:] == tokens(b)[:-1]),
    "top_k": Effect(HOT, 2, lambda a, b: distinct(b) <= 2 < distinct(a)),
    "min_p": Effect(HOT, 0.9, lambda a, b: distinct(b) < distinct(a)),
    "return_token_ids": Effect(
        {**GREEDY, "return_token_ids": False},
        True,
        lambda a, b: a["choices"][0]["token_ids"] is None and variety(b) > 0,
    ),
    "truncate_prompt_tokens": Effect(GREEDY, 2, lambda a, b: b["usage"]["prompt_tokens"] == 2),
    "truncation_side": Effect(
        {**GREEDY, "truncate_prompt_tokens": 2},
        "right",
        lambda a, b: a["choices"][0]["prompt_token_ids"] != b["choices"][0]["prompt_token_ids"],
    ),
    "repetition_detection": Effect(
        COMMAS, {"max_pattern_size": 1, "min_count": 3}, lambda a, b: generated(b) < generated(a) == 12
    ),
}
ELSEWHERE = {
    "suffix": "test_suffix_is_refused_where_the_model_fills_no_gaps",
    "best_of": "test_best_of_answers_the_likeliest_per_token",
    "stream": "test_without_it_each_token_may_come_alone",
    "logprobs": "test_logprobs_tell_so_many_of_the_likeliest",
    "stop": "test_stop_strings_end_it_before_them",
    "logit_bias": "test_logit_bias_forces_and_forbids",
    "min_tokens": "test_the_end_of_text_ends_it_unless_min_tokens_or_ignore_eos",
    "stop_token_ids": "test_stop_token_ids_end_it_before_them",
    "ignore_eos": "test_the_end_of_text_ends_it_unless_min_tokens_or_ignore_eos",
    "include_stop_str_in_output": "test_include_stop_keeps_the_end_of_text",
    "skip_special_tokens": "test_special_tokens_are_skipped_unless_they_are_not",
    "spaces_between_special_tokens": "test_special_tokens_are_skipped_unless_they_are_not",
    "return_tokens_as_token_ids": "test_tokens_may_be_told_as_token_ids",
    "prompt_logprobs": "test_prompt_logprobs_agree_with_an_echo",
    "logprob_token_ids": "test_logprob_token_ids_are_told_at_each_position",
    "allowed_token_ids": "test_allowed_token_ids_are_the_only_ones",
    "bad_words": "test_bad_words_are_not_generated",
    "priority": "test_priority_is_refused_where_nothing_is_scheduled_by_it",
    "stream_interval": "test_a_stream_interval_gathers_tokens",
    "vllm_xargs": "test_what_has_no_effect",  # without a plugin that reads it
    "add_special_tokens": "test_truncate_prompt_tokens_keeps_so_many",  # this tokenizer adds none
}
HERE = {"model", "stream_options", "cache_salt"}
FORMS = {"response_format", "structured_outputs"}


def test_each_parameter_has_a_test() -> None:
    fields = CompletionRequest.model_fields
    without_effect = {name for name, field in fields.items() if str(field.description).startswith("Of no effect")}
    names = {
        name
        for name, field in fields.items()
        if not any(type(each).__name__ == "NotServed" for each in field.metadata)
        and not name.startswith("guided_")
        and name not in FORMS
    }
    assert names - without_effect == EFFECTS.keys() | ELSEWHERE.keys() | HERE
    assert without_effect <= set().union(*test_parameter_effects.WITHOUT_EFFECT)
    for name in ELSEWHERE.values():
        assert callable(getattr(test_parameter_effects, name))


async def answered(vllm: httpx.AsyncClient, path: str = D3.path, **body: Any) -> dict[str, Any]:
    response = await vllm.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("name", EFFECTS)
async def test_a_parameter_has_its_effect(vllm: httpx.AsyncClient, name: str) -> None:
    base, value, seen = EFFECTS[name]
    without, with_it = await asyncio.gather(answered(vllm, **base), answered(vllm, **{**base, name: value}))
    assert seen(without, with_it), (without, with_it)


@pytest.mark.parametrize(
    ("detection", "ends_at"),
    [
        ({"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 5}, 5),
        ({"max_pattern_size": 2, "min_pattern_size": 2, "min_count": 3}, 6),
        ({"max_pattern_size": 0}, 12),
    ],
)
async def test_each_field_of_repetition_detection_counts(
    vllm: httpx.AsyncClient, detection: dict[str, Any], ends_at: int
) -> None:
    assert generated(await answered(vllm, **COMMAS, repetition_detection=detection)) == ends_at


async def test_a_seed_of_minus_one_is_none(vllm: httpx.AsyncClient) -> None:
    first, second = await asyncio.gather(*(answered(vllm, **{**HOT, "seed": -1}) for _ in range(2)))
    assert tokens(first) != tokens(second)


async def test_only_requests_of_one_salt_share_the_prefix_cache(vllm: httpx.AsyncClient) -> None:
    """Of three requests two meet on one of the two replicas."""
    body = {**GREEDY, "prompt": "salt and pepper " * 150, "max_tokens": 1}

    async def cached(salts: list[str]) -> list[int]:
        answers = [await answered(vllm, **body, cache_salt=salt) for salt in salts]
        return [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]

    assert max(await cached(["salt"] * 3)) > 0
    assert await cached(["a", "b", "c"]) == [0, 0, 0]


async def test_stream_options_tell_the_usage(vllm: httpx.AsyncClient) -> None:
    async def chunks(**options: bool) -> list[dict[str, Any]]:
        body = {**GREEDY, "stream": True, "stream_options": options}
        *told, done = events((await vllm.post("/v1/completions", json=body)).content)
        assert done == "[DONE]"
        return told

    plain, counted, continuous = await asyncio.gather(
        chunks(), chunks(include_usage=True), chunks(include_usage=True, continuous_usage_stats=True)
    )
    assert not any("usage" in chunk for chunk in plain)
    assert [chunk["usage"] is None for chunk in counted] == [True] * (len(counted) - 1) + [False]
    assert (counted[-1]["choices"], counted[-1]["usage"]["completion_tokens"]) == ([], 3)
    assert [chunk["usage"]["prompt_tokens"] for chunk in continuous] == [5] * len(continuous)
    assert continuous[-2]["usage"]["completion_tokens"] == 3


async def test_the_dialects_own_parameters_count(vllm: httpx.AsyncClient, vllm_cluster: RunningCluster) -> None:
    assert generated(await answered(vllm, D1.path, **GREEDY, max_completion_tokens=1)) == 1
    headers = {"x-llm-api-key": vllm_cluster.key}
    body = {**GREEDY, "model": "nowhere"}
    in_query = await vllm.post("/v1/completions", params={"model": MODEL}, json=body, headers=headers)
    assert (in_query.status_code, in_query.json()["model"]) == (200, MODEL)
    assert (await vllm.post("/v1/completions", json=body)).status_code == 404


@pytest.mark.parametrize("name", [name for name in RANGES if name != "model"])
async def test_no_value_that_is_accepted_makes_the_engine_fail(vllm: httpx.AsyncClient, name: str) -> None:
    """The ends of each range: answered, or refused by name."""
    asked = RANGES[name]
    bodies = [{**GREEDY, "max_tokens": 2, **asked.beside, name: value} for value in asked.accepted]
    for body in bodies:  # few tokens, whatever is tried
        body["max_tokens"] = min(body["max_tokens"], 8)
    for response in await asyncio.gather(*(vllm.post("/v1/completions", json=body) for body in bodies)):
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            assert str(response.json()["error"]["param"]).partition(".")[0] == name, response.text
