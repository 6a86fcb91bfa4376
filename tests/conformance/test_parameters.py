"""Every parameter at the ends of its range, and what lies beyond refused by name in each dialect's shape.

The ranges are those of OpenAI's Completions reference and of vLLM 0.32's CompletionRequest, and of the seeds where they
name one; docs/api.md lists them. What the parameters do is in test_parameter_effects.py, what single dialects narrow in
test_dialects.py.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from deployments.ingress.api.completions.request import CompletionRequest
from tests.conformance.faces import D3, EACH_FACE, FACES, Face, assert_completion, assert_invalid
from tests.conftest import RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

MINIMAL: dict[str, Any] = {"model": "sim-a", "prompt": "The capital of France is"}
BRIEF = {**MINIMAL, "max_tokens": 2}
INT32, INT64 = 2**31 - 1, 2**63 - 1
LAST_TOKEN = 49151
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NO_INTEGERS: list[Any] = ["1", 0.5, 1.0, True, [1], {}]
NO_NUMBERS: list[Any] = ["1", True, [1], {}]
NO_STRINGS: list[Any] = [1, True, [], ["x"], {}]


@dataclass(frozen=True)
class Range:
    accepted: list[Any]
    refused: list[Any]
    beside: dict[str, Any] = field(default_factory=dict)
    """What else the request needs."""


def integer(low: int, high: int, **beside: Any) -> Range:
    return Range([low, high], [low - 1, high + 1, 10**30, -(10**30), *NO_INTEGERS], beside)


def number(low: float, high: float) -> Range:
    return Range([low, float(high), (low + high) / 2], [low - 0.01, high + 0.01, 10**30, -1e300, *NO_NUMBERS])


def flag() -> Range:
    return Range([True, False], ["true", 1, 0, [], {}])


def text(longest: int) -> Range:
    return Range(["", "x" * longest, "\x00\U0001f389"], ["x" * (longest + 1), *NO_STRINGS])


def not_served(neutral: Any, *others: Any) -> Range:
    """Known from vLLM: null and what has no effect there are taken."""
    return Range([neutral], list(others))


def form(accepted: list[Any], refused: list[Any]) -> Range:
    """Of the output: the rules for all its parameters are the same."""
    return Range(accepted, refused)


RANGES: dict[str, Range] = {
    "model": Range(["sim-a", "sim-b"], [None, "x" * 257, *NO_STRINGS]),
    "prompt": Range(
        ["x", ["x"], ["x"] * 8, [0], [LAST_TOKEN], [[0, LAST_TOKEN]], [[1], [2], [3, 4]]],
        [None, "", [""], [], [[]], [-1], [LAST_TOKEN + 1], [[1], []], ["x", 1], 1, True, {}],
    ),
    "suffix": Range([None], ["", "x", *NO_STRINGS]),  # no model here was trained to fill gaps
    "max_tokens": Range([0, 1, 40], [-1, INT32 + 1, *NO_INTEGERS]),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "n": integer(1, 128),
    "best_of": integer(1, 128),
    "stream": flag(),
    "stream_options": Range(
        [
            {},
            {"include_usage": True},
            {"include_usage": False},
            {"include_usage": True, "continuous_usage_stats": True},
            {"include_obfuscation": True},
            {"include_obfuscation": False},
        ],
        [
            [],
            "x",
            1,
            {"include_usage": 1},
            {"continuous_usage_stats": "true"},
            {"include_obfuscation": 1},
            {"unheard_of": True},
        ],
        {"stream": True},
    ),
    "logprobs": integer(0, 5),
    "echo": flag(),
    "stop": Range(
        ["x", [], ["x"], ["1", "2", "3", "4"], "\U0001f389", "\x00", "x" * 512],
        ["", [""], "x" * 513, ["x", ""], ["1", "2", "3", "4", "5"], 1, [1], [["x"]], [None], {}, True],
    ),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": Range(
        [{}, {"0": -100}, {str(LAST_TOKEN): 100.0}, {str(token): 0.5 for token in range(1024)}],
        [
            {"1": -100.1},
            {"1": 100.1},
            {str(LAST_TOKEN + 1): 1},
            {"-1": 1},
            {"x": 1},
            {"": 1},
            {"1": "1"},
            {"1": None},
            {str(token): 1 for token in range(1025)},
            [1],
            "x",
            1,
        ],
    ),
    "seed": integer(-INT64 - 1, INT64),
    "user": Range(["", "somebody", "x" * 1024], ["x" * 1025, *NO_STRINGS]),
    "top_k": integer(-1, INT32),
    "min_p": number(0, 1),
    "repetition_penalty": Range([1e-6, 1, 2], [0, -1, 2.01, 10**30, *NO_NUMBERS]),
    "min_tokens": Range([0, 1, 2], [-1, 3, INT32, INT32 + 1, *NO_INTEGERS]),  # at most max_tokens
    "stop_token_ids": Range(
        [[], [0], [LAST_TOKEN] * 128], [[-1], [LAST_TOKEN + 1], [INT32 + 1], [0] * 129, ["1"], [0.5], [None], 1, {}]
    ),
    "ignore_eos": flag(),
    "include_stop_str_in_output": flag(),
    "skip_special_tokens": flag(),
    "spaces_between_special_tokens": flag(),
    "return_tokens_as_token_ids": flag(),
    "return_token_ids": flag(),
    "prompt_logprobs": integer(0, 20),
    "logprob_token_ids": Range(
        [[0], [LAST_TOKEN], list(range(128))],
        [[], list(range(129)), [-1], [LAST_TOKEN + 1], ["1"], 1, {}],
        {"logprobs": 1},
    ),
    "truncate_prompt_tokens": Range([-1, 1, INT32], [0, -2, INT32 + 1, *NO_INTEGERS]),
    "truncation_side": Range(["left", "right"], ["", "middle", "LEFT", 1, True, []]),
    "add_special_tokens": flag(),
    "allowed_token_ids": Range(
        [[0], [LAST_TOKEN], list(range(8192))],
        [[], list(range(8193)), [-1], [LAST_TOKEN + 1], [INT32 + 1], ["1"], [1.5], 1, {}],
    ),
    "bad_words": Range(
        [[], ["x"], ["x"] * 64, ["x" * 128] * 16],
        [[""], ["x"] * 65, ["x" * 129], ["x" * 1_800_000], ["x" * 128] * 17, ["x", 1], "x", 1, {}],
    ),
    "response_format": form(
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "description": "d", "schema": SCHEMA, "strict": True},
            },
            {
                "type": "structural_tag",
                "structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}],
                "triggers": ["<a>"],
            },
        ],
        [
            {},
            {"type": "xml"},
            {"type": "json_schema"},
            {"type": "json_schema", "json_schema": {"name": "n"}},
            {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": "x"}},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "unheard_of": 1}},
            {"type": "structural_tag"},
            {"type": "structural_tag", "format": {"type": "any_text"}},
            {"type": "json_object", "unheard_of": 1},
            "json_object",
            [],
            1,
        ],
    ),
    "structured_outputs": form(
        [
            {"json": SCHEMA},
            {"json": "{}"},
            {"regex": "a+"},
            {"choice": ["a", "b"]},
            {"grammar": 'root ::= "a"'},
            {"json_object": True},
            {"structural_tag": '{"structures":[{"begin":"<a>","schema":{},"end":"</a>"}],"triggers":["<a>"]}'},
            {"json": SCHEMA, "disable_any_whitespace": True, "disable_additional_properties": True},
            {"json": SCHEMA, "whitespace_pattern": "[ ]*"},
        ],
        [
            {},
            {"json_object": False},
            {"json": 5},
            {"json": [SCHEMA]},
            {"regex": ""},
            {"choice": []},
            {"choice": [1]},
            {"choice": "a"},
            {"grammar": ""},
            {"structural_tag": {}},
            {"regex": "a", "choice": ["a"]},
            {"regex": "a", "unheard_of": 1},
            {"regex": "a", "disable_any_whitespace": 1},
            {"regex": "a", "whitespace_pattern": "[ ]*"},
            {"json": SCHEMA, "whitespace_pattern": "((("},
            {"json": {"not": {}}},
            {"regex": "("},
            "a",
            [],
            1,
        ],
    ),
    "guided_json": form([SCHEMA, "{}"], [1, [], True]),
    "guided_regex": form(["a+"], ["", *NO_STRINGS]),
    "guided_choice": form([["a"], ["a", "b"]], [[], "a", [1], {}, 1]),
    "guided_whitespace_pattern": Range([], ["((", *NO_STRINGS]),  # only with guided_json
    "guided_grammar": form(['root ::= "a"'], ["", *NO_STRINGS]),
    "repetition_detection": Range(
        [
            {},
            {"max_pattern_size": 4096, "min_pattern_size": 4096, "min_count": 2},
            {"max_pattern_size": 1, "min_count": INT32},
        ],
        [
            {"max_pattern_size": 4097, "min_count": 2},
            {"max_pattern_size": -1},
            {"max_pattern_size": 4, "min_count": 1},
            {"max_pattern_size": 4},
            {"max_pattern_size": 1, "min_pattern_size": 2, "min_count": 2},
            {"min_count": INT32 + 1},
            {"unheard_of": 1},
            [],
            1,
        ],
    ),
    "thinking_token_budget": not_served(-1, 0, 1, -2, 1.5),
    "priority": Range([0], [1, -1, -INT32 - 1, INT32, INT32 + 1, *NO_INTEGERS]),  # no model here schedules by it
    "cache_salt": Range(["s", "s" * 128, "\U0001f389"], ["", "s" * 129, "a/b", "a@b", "a\\b", "a\x00b", *NO_STRINGS]),
    "stream_interval": integer(1, INT32, stream=True),
    "vllm_xargs": Range(
        [{}, {"a": "x", "b": 1, "c": 0.5, "d": ["x", 1, -0.5], "e": []}, {str(number): number for number in range(64)}],
        [
            {"a": "x" * 16_384},
            {"a": {}},
            {"a": None},
            {"a": True},
            {"a": [[]]},
            {"a": INT64 + 1},
            {str(number): number for number in range(65)},
            [],
            "x",
            1,
        ],
    ),
    "session_id": text(256),
    "request_id": text(256),
    "prompt_embeds": not_served(None, "AAAA", ["AAAA"]),
    "use_beam_search": not_served(False, True, 0),
    "length_penalty": not_served(1.0, 1.1, 0),
    "watermarking": not_served(False, True),
    "kv_transfer_params": not_served(None, {}, {"a": 1}),
    "ec_transfer_params": not_served(None, {}, {"a": 1}),
    "routed_experts_prompt_start": not_served(0, 1),
    "return_token_offsets": not_served(False, True),
    "mm_payload": not_served("tensors", "x"),
    "return_mm_kwargs": not_served(True, False),
    "guided_decoding_backend": not_served(None, "xgrammar"),
    "early_stopping": not_served(False, True, 0.5),
    "num_beams": not_served(1, 7, "x"),
    "do_sample": not_served(True, False, 0.5),
    "max_new_tokens": not_served(None, 8, {}),
    "auto_max_new_tokens": not_served(False, True, 0.5),
    "max_tokens_second": not_served(0, 7, "x"),
    "min_length": not_served(0, 7, "x"),
    "typical_p": not_served(1.0, 0.25, "x"),
    "tfs": not_served(1.0, 0.25, "x"),
    "tfs_z": not_served(1.0, 0.25, "x"),
    "top_a": not_served(0.0, 0.25, "x"),
    "top_n_sigma": not_served(0.0, 0.25, "x"),
    "epsilon_cutoff": not_served(0.0, 0.25, "x"),
    "eta_cutoff": not_served(0.0, 0.25, "x"),
    "smoothing_factor": not_served(0.0, 0.25, "x"),
    "dynamic_temperature": not_served(False, True, 0.5),
    "dynatemp_range": not_served(0.0, 0.25, "x"),
    "temperature_last": not_served(False, True, 0.5),
    "sampler_priority": not_served("", "x", ["x"]),
    "xtc_probability": not_served(0.0, 0.25, "x"),
    "dry_multiplier": not_served(0.0, 0.25, "x"),
    "repeat_penalty": not_served(1.0, 0.25, "x"),
    "encoder_repetition_penalty": not_served(1.0, 0.25, "x"),
    "no_repeat_ngram_size": not_served(0, 7, "x"),
    "penalty_alpha": not_served(0.0, 0.25, "x"),
    "guidance_scale": not_served(1.0, 0.25, "x"),
    "negative_prompt": not_served("", "x", ["x"]),
    "mirostat": not_served(0, 7, "x"),
    "mirostat_mode": not_served(0, 7, "x"),
    "add_bos_token": not_served(True, False, 0.5),
    "ban_eos_token": not_served(False, True, 0.5),
    "custom_token_bans": not_served("", "x", ["x"]),
    "banned_strings": not_served("", "x", ["x"]),
    "stopping_strings": not_served("", "x", ["x"]),
    "grammar_string": not_served("", "x", ["x"]),
    "grammar": not_served("", "x", ["x"]),
    "json_schema": not_served(None, 8, {}),
    "truncation_length": not_served(0, 7, "x"),
    "n_predict": not_served(-1, 7, "x"),
    "n_probs": not_served(0, 7, "x"),
    "n_keep": not_served(0, 7, "x"),
    "id_slot": not_served(-1, 7, "x"),
    "timings_per_token": not_served(False, True, 0.5),
    "store": not_served(False, True, 0.5),
    "repetition_penalty_range": not_served(0, 7, "x"),
    "repeat_last_n": not_served(-1, 7, "x"),
    "mirostat_tau": Range([0, 0.5, 7], NO_NUMBERS),
    "mirostat_eta": Range([0, 0.5, 7], NO_NUMBERS),
    "xtc_threshold": Range([0, 0.5, 7], NO_NUMBERS),
    "dry_base": Range([0, 0.5, 7], NO_NUMBERS),
    "dry_allowed_length": Range([0, 0.5, 7], NO_NUMBERS),
    "dry_penalty_last_n": Range([0, 0.5, 7], NO_NUMBERS),
    "smoothing_curve": Range([0, 0.5, 7], NO_NUMBERS),
    "dynatemp_low": Range([0, 0.5, 7], NO_NUMBERS),
    "dynatemp_high": Range([0, 0.5, 7], NO_NUMBERS),
    "dynatemp_exponent": Range([0, 0.5, 7], NO_NUMBERS),
    "cache_prompt": flag(),
    "metadata": Range([{}, {"a": "b"}], [{"a": 1}, {str(number): "" for number in range(17)}, [], "x", 1]),
    "service_tier": Range(["auto", "default"], ["flex", "priority", "", 1]),
}
REQUIRED = ("model", "prompt")
WIDER: dict[tuple[str, str], list[Any]] = {
    (face, name): value
    for face in ("D1", "D2")
    for name, value in (("logprobs", [6]), ("stop", [["1", "2", "3", "4", "5"]]))
}
"""What the documents of two dialects do not narrow as OpenAI's does: vLLM's limits hold there (test_dialects.py)."""


def test_every_parameter_is_here() -> None:
    assert RANGES.keys() == CompletionRequest.model_fields.keys()


async def every(
    client: httpx.AsyncClient, face: Face, key: str, bodies: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], httpx.Response]]:
    headers = face.headers(key)
    answers = await asyncio.gather(*(client.post(face.path, json=body, headers=headers) for body in bodies))
    return list(zip(bodies, answers, strict=True))


@pytest.mark.parametrize("name", RANGES)
async def test_the_ends_of_its_range_are_accepted(http: httpx.AsyncClient, name: str) -> None:
    asked = RANGES[name]
    bodies = [{**BRIEF, **asked.beside, name: value} for value in asked.accepted]
    answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
    for body, response in zip(bodies, answers, strict=True):
        if body.get("stream"):
            assert response.status_code == 200, (body, response.text)
            assert response.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in response.text
            continue
        prompts = len(body["prompt"]) if isinstance(body["prompt"], list) and type(body["prompt"][0]) is not int else 1
        choices = assert_completion(response, body["model"])["choices"]
        assert len(choices) == prompts * body.get("n", 1), body


@pytest.mark.parametrize("name", [name for name in RANGES if name not in REQUIRED])
async def test_null_is_its_default(http: httpx.AsyncClient, name: str) -> None:
    response = await http.post("/v1/completions", json={**MINIMAL, name: None})
    [choice] = assert_completion(response, "sim-a")["choices"]
    default = (await http.post("/v1/completions", json=MINIMAL)).json()["choices"]
    assert [choice] == default


@EACH_FACE
@pytest.mark.parametrize("name", RANGES)
async def test_what_lies_beyond_its_range_is_refused_by_name(
    http_without_key: httpx.AsyncClient, simulated_cluster: RunningCluster, face: Face, name: str
) -> None:
    asked = RANGES[name]
    wider = WIDER.get((face.name, name), ())
    bodies = [{**BRIEF, **asked.beside, name: value} for value in asked.refused if value not in wider]
    for body, response in await every(http_without_key, face, simulated_cluster.key, bodies):
        assert_named(response, face, name, body)


def assert_named(response: httpx.Response, face: Face, name: str, body: dict[str, Any]) -> None:
    """Refused, with `name` or a part of it told as the culprit."""
    assert response.status_code == face.invalid, (body.get(name), response.text)
    answer = response.json()
    told = answer["error"]["param"] if face.invalid == 400 else ".".join(map(str, answer["detail"][0]["loc"][1:]))
    assert told == name or told.startswith(f"{name}."), (body.get(name), answer)
    code = answer["error"]["code"] if face.invalid == 400 else None
    if face.invalid == 400:
        assert_invalid(response, face, told, code)
    else:
        [detail] = answer["detail"]
        assert detail.keys() == {"loc", "msg", "type"}
    message = answer["error"]["message"] if face.invalid == 400 else answer["detail"][0]["msg"]
    assert message


# --- what parameters demand of each other --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"stream": True, "best_of": 2}, "best_of"),
        ({"stream": True, "n": 2, "best_of": 3}, "best_of"),
        ({"prompt": ["x"] * 9, "n": 128}, "n"),
        ({"prompt": ["x"] * 9, "best_of": 128}, "best_of"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"max_tokens": None, "min_tokens": 17}, "min_tokens"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
@EACH_FACE
async def test_what_one_parameter_forbids_another_is_refused_by_name(
    http_without_key: httpx.AsyncClient,
    simulated_cluster: RunningCluster,
    face: Face,
    fields: dict[str, Any],
    name: str,
) -> None:
    body = {**BRIEF, **fields}
    if face.name in ("D1", "D2") and isinstance(body["prompt"], list):
        name = "prompt"  # one text only
    [(_, response)] = await every(http_without_key, face, simulated_cluster.key, [body])
    assert_invalid(response, face, name)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2, "best_of": 2},
        {"stream": True, "best_of": 1},
        {"stream": True, "n": 4},
        {"prompt": ["x"] * 8, "n": 128, "max_tokens": 1},
        {"max_tokens": 3, "min_tokens": 3},
        {"max_tokens": None, "min_tokens": 16},
        {"response_format": {"type": "text"}, "guided_regex": "a"},
        {"echo": True, "max_tokens": 0, "logprobs": 5},
    ],
    ids="+".join,
)
async def test_what_they_allow_each_other_is_accepted(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    response = await http.post("/v1/completions", json={**BRIEF, **fields})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("n", [None, 1])
async def test_too_many_prompts_are_refused_as_such(http: httpx.AsyncClient, n: int | None) -> None:
    """Not as the fault of `n`, which is the least there can be or was not sent."""
    response = await http.post("/v1/completions", json={**BRIEF, "prompt": ["x"] * 1025, "n": n})
    assert "1025" in assert_invalid(response, D3, "prompt")


# --- the context ---------------------------------------------------------------------------------------------------

CONTEXT = 2048


@pytest.mark.parametrize(("prompt", "max_tokens"), [(CONTEXT - 1, 1), (CONTEXT - 8, 8), (CONTEXT - 1, 0)])
async def test_prompt_and_max_tokens_may_fill_the_context(
    http: httpx.AsyncClient, prompt: int, max_tokens: int
) -> None:
    body = {"model": "sim-a", "prompt": [504] * prompt, "max_tokens": max_tokens}
    usage = assert_completion(await http.post("/v1/completions", json=body), "sim-a")["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, max_tokens)


@pytest.mark.parametrize("face", FACES, ids=[face.name for face in FACES])
@pytest.mark.parametrize("max_tokens", [CONTEXT, 10**6, INT32])
async def test_max_tokens_beyond_the_context_say_both_numbers(
    http_without_key: httpx.AsyncClient, simulated_cluster: RunningCluster, face: Face, max_tokens: int
) -> None:
    body = {**MINIMAL, "max_tokens": max_tokens}
    [(_, response)] = await every(http_without_key, face, simulated_cluster.key, [body])
    message = assert_invalid(response, face, "prompt", "context_length_exceeded")
    assert f" {CONTEXT} tokens" in message
    assert f" {max_tokens + 5} tokens" in message
