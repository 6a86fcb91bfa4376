"""What the cluster answers with real vLLM is what vLLM's own server answers on the same weights."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.conformance.answers import answer_of, assert_equal_answers
from tests.conftest import THOROUGH, RunningCluster

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "smollm2-135m"
PROMPTS: list[Any] = [
    "The capital of France is",
    "Write the word for 'cat' in Japanese, Korean and Chinese: 猫,",
    "🎉🎂👩‍🚀 means",
    "Q: What is 7 times 8?\nA:",
    ["Once upon a time", "日本の首都は"],
    [504, 3575, 282, 4649, 314],
    [[504, 3575, 282, 4649, 314], [15, 17, 19]],
    "x = [1, 2, 3]\nfor i in x:\n    print(",
]
EOS = 2
COMBINATIONS = 64 if THOROUGH else 40

Draw = Callable[[random.Random], Any]
PARAMETERS: dict[str, Draw] = {
    "temperature": lambda r: r.choice([0.0, 0.3, 1.0, 1.7]),
    "top_p": lambda r: r.choice([0.2, 0.9, 1.0]),
    "top_k": lambda r: r.choice([-1, 0, 1, 5, 40]),
    "min_p": lambda r: r.choice([0.0, 0.05, 0.5]),
    "n": lambda r: r.choice([1, 2, 3]),
    "logprobs": lambda r: r.choice([0, 1, 2, 5]),
    "echo": lambda r: r.choice([True, True, False]),
    "stop": lambda r: r.choice(["\n", [".", " the"], [" is", "a", "、"], "は"]),
    "include_stop_str_in_output": lambda r: True,
    "presence_penalty": lambda r: r.choice([-1.5, 0.7, 2.0]),
    "frequency_penalty": lambda r: r.choice([-0.5, 1.2]),
    "repetition_penalty": lambda r: r.choice([0.8, 1.3]),
    "logit_bias": lambda r: {"28": r.choice([-100.0, 5.0]), "260": r.choice([-5.0, 3.0])},
    "min_tokens": lambda r: r.choice([1, 4]),
    "ignore_eos": lambda r: True,
    "stop_token_ids": lambda r: r.choice([[28, 30], [260], [198]]),
    "skip_special_tokens": lambda r: False,
    "spaces_between_special_tokens": lambda r: False,
    "return_tokens_as_token_ids": lambda r: True,
    "return_token_ids": lambda r: True,
    "prompt_logprobs": lambda r: r.choice([0, 2]),
    "truncate_prompt_tokens": lambda r: r.choice([2, 3, -1]),
    "truncation_side": lambda r: r.choice(["left", "right"]),
    "add_special_tokens": lambda r: False,
    "allowed_token_ids": lambda r: [28, 198, 260, 284, 314, EOS, 7042],
    "bad_words": lambda r: r.choice([[" Paris"], ["the", "a"]]),
    "logprob_token_ids": lambda r: [7042, 28],
    "structured_outputs": lambda r: r.choice(
        [{"regex": r"[a-c]{2,4}[0-9]"}, {"choice": ["Paris", "London", "Rome"]}, {"json_object": True}]
    ),
    "response_format": lambda r: {
        "type": "json_schema",
        "json_schema": {
            "name": "city",
            "schema": {
                "type": "object",
                "properties": {"c": {"type": "string", "maxLength": 5}},
                "required": ["c"],
                "additionalProperties": False,
            },
        },
    },
    "repetition_detection": lambda r: {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 2},
    "cache_salt": lambda r: "pepper",
    "user": lambda r: "somebody",
}


def combinations(count: int, seed: int = 20261122) -> list[dict[str, Any]]:
    """Bodies with three to six parameters each, and every parameter several times."""
    drawn = random.Random(seed)
    names = list(PARAMETERS)
    bodies: list[dict[str, Any]] = []
    for number in range(count):
        chosen = {names[number % len(names)], *drawn.sample(names, drawn.randint(2, 5))}
        body = {
            "model": MODEL,
            "prompt": drawn.choice(PROMPTS),
            "max_tokens": drawn.randint(4, 12),
            "seed": drawn.randint(0, 1000),
            "stream": drawn.random() < 0.4,
            **{name: PARAMETERS[name](drawn) for name in names if name in chosen},
        }
        bodies.append(_consistent(body))
    return bodies


def _consistent(body: dict[str, Any]) -> dict[str, Any]:
    """Without what vLLM's server refuses, and without where this cluster means to differ (docs/api.md)."""
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
        body.pop("prompt_logprobs", None)
    if "structured_outputs" in body:
        body.pop("response_format", None)
    if "structured_outputs" in body or "response_format" in body:
        body.pop("allowed_token_ids", None)  # a form that those tokens cannot make ends in an error on both servers
        body.pop("ignore_eos", None)  # refused here: vLLM writes anything behind the form
        body.pop("min_tokens", None)  # beyond the end of the form vLLM writes anything; here that is an error
    if "logprob_token_ids" in body:
        body["logprobs"] = 2
    if body.get("echo"):
        body.pop("return_token_ids", None)  # there vLLM leaves the prompt's text out
        body.pop("truncate_prompt_tokens", None)  # there vLLM echoes what was cut off
    return body


def test_every_parameter_is_drawn() -> None:
    bodies = combinations(COMBINATIONS)
    assert {name for body in bodies for name in body} >= set(PARAMETERS)


@pytest.mark.parametrize("number", range(COMBINATIONS))
async def test_a_random_combination_of_parameters_gives_what_vllms_server_gives(
    vllm_cluster: RunningCluster, vllm_reference: str, number: int
) -> None:
    body = combinations(COMBINATIONS)[number]
    async with (
        vllm_cluster.client() as ours,
        httpx.AsyncClient(base_url=vllm_reference, timeout=120.0, trust_env=False) as theirs,
    ):
        our, their = await asyncio.gather(answer_of(ours, body), answer_of(theirs, body))
    assert_equal_answers(our, their)
