"""The dialect table of ../shared/completions.md: one test per cell, rows from top to bottom.

`model not ready` and the default temperature are seen in memory: the cluster has all its models up, and its simulated
engines sample nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.conformance.faces import D0, D1, D2, D3, EACH_FACE, Face, assert_completion, assert_error, assert_invalid
from tests.conformance.in_process import speaking
from tests.conftest import RunningCluster
from tests.deployments.ingress.memory_gateway import events, gateway
from tests.deployments.ingress.memory_replicas import LIMITS
from tests.deployments.ingress.virtual_time import quiet, run_in_virtual_time

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

MINIMAL = {"model": "sim-a", "prompt": "The capital of France is"}
PROMPT_TOKENS = [504, 3575, 282, 4649, 314]  # SmolLM2's of that prompt
BRIEF = {**MINIMAL, "max_tokens": 2}


class Caller:
    """Posts as a client of one dialect does."""

    def __init__(self, client: httpx.AsyncClient, face: Face, key: str) -> None:
        self.client = client
        self.face = face
        self.key = key

    async def post(
        self, body: dict[str, Any], query: str = "", headers: dict[str, str] | None = None
    ) -> httpx.Response:
        given = self.face.headers(self.key) if headers is None else headers
        return await self.client.post(self.face.path + query, json=body, headers=given)


@pytest.fixture
def caller(http_without_key: httpx.AsyncClient, face: Face, simulated_cluster: RunningCluster) -> Caller:
    return Caller(http_without_key, face, simulated_cluster.key)


# --- path ----------------------------------------------------------------------------------------------------------


@EACH_FACE
async def test_path(caller: Caller, face: Face) -> None:
    body = assert_completion(await caller.post(MINIMAL), "sim-a")
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length"]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5, 16)
    refused = await caller.client.get(face.path, headers=face.headers(caller.key))
    assert_error(refused, 405, None)
    assert refused.headers["allow"] == "POST"


# --- chosen by -----------------------------------------------------------------------------------------------------


@EACH_FACE
async def test_chosen_by(caller: Caller, face: Face) -> None:
    """The header counts on the path that two dialects share, and nowhere else."""
    key = caller.key
    invalid = {**MINIMAL, "max_tokens": -1}
    bearer, own = {"Authorization": f"Bearer {key}"}, {"x-llm-api-key": key}
    if face is D0:
        for headers in (own, bearer | own, bearer | {"x-llm-api-key": ""}):
            assert_invalid(await caller.post(invalid, headers=headers), face, "max_tokens")
        return
    assert_invalid(await caller.post(invalid, headers=bearer), face, "max_tokens")
    if face is not D3:
        assert_invalid(await caller.post(invalid, headers=bearer | own), face, "max_tokens")
        assert_error(await caller.post(invalid, headers=own), 401, "invalid_api_key")


# --- credential ----------------------------------------------------------------------------------------------------

ACCEPTED_KEYS = {
    D0: [
        {"x-llm-api-key": "{key}"},
        {"x-llm-api-key": "Bearer {key}"},
        {"x-llm-api-key": "", "Authorization": "Bearer {key}"},
        {"Authorization": "Bearer {key}"},
    ],
    D1: [{"Authorization": "Bearer {key}"}, {"Authorization": "bearer {key}"}],
    D2: [{"Authorization": "{key}"}, {"Authorization": "Bearer {key}"}],
    D3: [{"Authorization": "Bearer {key}"}, {"Authorization": "bearer {key}"}],
}
REFUSED_KEYS = {
    D0: [{"x-llm-api-key": "{key}x"}, {"x-llm-api-key": "Bearer"}, {"x-llm-api-key": "", "Authorization": "{key}"}],
    D1: [{"Authorization": "{key}"}, {"Authorization": "Basic {key}"}, {"Authorization": "Bearer {key}x"}],
    D2: [{"Authorization": "{key}x"}, {"Authorization": "Bearer {key}x"}, {"Authorization": "Basic {key}"}],
    D3: [{"Authorization": "{key}"}, {"Authorization": "Basic {key}"}, {"Authorization": "Bearer {key}x"}],
}


@EACH_FACE
async def test_credential(caller: Caller, face: Face) -> None:
    def filled(headers: dict[str, str]) -> dict[str, str]:
        return {name: value.format(key=caller.key) for name, value in headers.items()}

    for headers in ACCEPTED_KEYS[face]:
        response = await caller.post(BRIEF, headers=filled(headers))
        assert response.status_code == 200, (headers, response.text)
    for headers in [*REFUSED_KEYS[face], {}, {face.header: ""}]:
        response = await caller.post(BRIEF, headers=filled(headers))
        assert_error(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


# --- model ---------------------------------------------------------------------------------------------------------


@EACH_FACE
async def test_model(caller: Caller, face: Face) -> None:
    nameless = {"prompt": "x", "max_tokens": 1}
    assert (await caller.post(BRIEF)).json()["model"] == "sim-a"
    assert_invalid(await caller.post(nameless), face, "model")
    assert_invalid(await caller.post({**nameless, "model": 1}), face, "model")
    named_twice = (await caller.post(BRIEF, "?model=sim-b")).json()
    if face is D0:
        assert named_twice["model"] == "sim-b"
        assert (await caller.post(nameless, "?model=sim-b")).json()["model"] == "sim-b"
        assert_error(await caller.post(BRIEF, "?model=nobody"), 404, "model_not_found", "model")
    else:
        assert named_twice["model"] == "sim-a"
        assert_invalid(await caller.post(nameless, "?model=sim-b"), face, "model")


# --- prompt --------------------------------------------------------------------------------------------------------


@EACH_FACE
async def test_prompt(caller: Caller, face: Face) -> None:
    text = MINIMAL["prompt"]
    many: list[tuple[Any, int]] = [
        ([text], 1),
        ([text, "Once"], 2),
        (PROMPT_TOKENS, 1),
        ([PROMPT_TOKENS], 1),
        ([PROMPT_TOKENS, [15, 17]], 2),
    ]
    expected = assert_completion(await caller.post({**BRIEF, "prompt": text}), "sim-a")["choices"][0]
    for prompt, prompts in many:
        response = await caller.post({**BRIEF, "prompt": prompt})
        if face in (D1, D2):
            assert_invalid(response, face, "prompt")
            continue
        choices = assert_completion(response, "sim-a")["choices"]
        assert len(choices) == prompts
        assert choices[0] == expected
    assert_invalid(await caller.post({"model": "sim-a"}), face, "prompt")


# --- default temperature -------------------------------------------------------------------------------------------


@EACH_FACE
def test_default_temperature(tmp_path: Path, face: Face) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate, speaking(gate, face) as client:
            for fields in ({}, {"temperature": None}, {"temperature": 0.5}):
                response = await client.post(face.path, json={"model": "m", "prompt": "hello", **fields})
                assert response.status_code == 200, response.text
            await quiet()
            temperatures = [submission.sampling.temperature for submission in gate.replicas["r0"].submissions]
            default = 0.0 if face is D2 else 1.0
            assert temperatures == [default, default, 0.5]

    run_in_virtual_time(scenario())


# --- own parameters ------------------------------------------------------------------------------------------------

OWN_ACCEPTED: dict[Face, list[dict[str, Any]]] = {
    D1: [
        {"include_stop_str_in_output": True},
        {"max_completion_tokens": 1},
        {"min_p": 0},
        {"min_p": 1},
        {"return_tokens_as_token_ids": True},
        {"skip_special_tokens": False},
        {"top_k": 123},
        {"seed": 123},
        {"stop": ["<string>"]},
        {"stop": []},
        {"stop": ["x"] * 64},
        {"logprobs": 20},
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 0},
        {"top_p": 1},
        {"stream": False},
    ],
    D2: [
        {"n": 1},
        {"n": 3},
        {"stop": ["<string>"]},
        {"max_tokens": 1},
        {"seed": 0},
        {"stop": ["x"] * 64},
        {"logprobs": 20},
        {"temperature": 0},
        {"temperature": 2},
        {"stream": False},
    ],
    D3: [
        {"logprobs": 0},
        {"logprobs": 5},
        {"echo": True},
        {"best_of": 2},
        {"presence_penalty": -2},
        {"presence_penalty": 2.0},
        {"frequency_penalty": -2.0},
        {"frequency_penalty": 2},
        {"logit_bias": {"50": -100, "51": 100}},
        {"stop": "<string>"},
        {"stop": ["1", "2", "3", "4"]},
        {"n": 2},
        {"user": "somebody"},
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 1},
        {"stream": False},
    ],
}
OWN_REFUSED: dict[Face, list[dict[str, Any]]] = {
    D1: [
        {"include_stop_str_in_output": "yes"},
        {"max_completion_tokens": -1},
        {"min_p": -0.01},
        {"min_p": 1.01},
        {"return_tokens_as_token_ids": 1},
        {"skip_special_tokens": "no"},
        {"top_k": 0.5},
        {"seed": 0.5},
        {"stop": "<string>"},
        {"stop": ["x"] * 65},
        {"logprobs": 21},
        {"temperature": 2.01},
        {"temperature": -0.01},
        {"top_p": 1.01},
        {"stream": "true"},
    ],
    D2: [
        {"n": 0},
        {"stop": []},
        {"stop": "<string>"},
        {"stop": ["x"] * 65},
        {"logprobs": 21},
        {"max_tokens": 0},
        {"seed": "0"},
        {"temperature": 2.01},
        {"temperature": -0.01},
        {"stream": 1},
    ],
    D3: [
        {"logprobs": 6},
        {"logprobs": True},
        {"echo": 1},
        {"suffix": "the model has no infilling"},
        {"best_of": 0},
        {"presence_penalty": -2.01},
        {"presence_penalty": 2.01},
        {"frequency_penalty": -2.01},
        {"frequency_penalty": 2.01},
        {"logit_bias": {"50": -100.1}},
        {"logit_bias": {"50": 100.1}},
        {"stop": ["1", "2", "3", "4", "5"]},
        {"n": 0},
        {"user": 1},
        {"temperature": 2.01},
        {"top_p": 1.01},
        {"max_completion_tokens": 1},  # D1's alone
    ],
}
OWN_ACCEPTED[D0], OWN_REFUSED[D0] = OWN_ACCEPTED[D3], OWN_REFUSED[D3]


def own(cases: dict[Face, list[dict[str, Any]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("face", "fields"),
        [
            pytest.param(face, fields, id=f"{face.name}-{'-'.join(f'{k}={v}' for k, v in fields.items())}")
            for face in (D0, D1, D2, D3)
            for fields in cases[face]
        ],
    )


@own(OWN_ACCEPTED)
async def test_own_parameter_is_accepted(caller: Caller, face: Face, fields: dict[str, Any]) -> None:
    assert_completion(await caller.post({**BRIEF, **fields}), "sim-a")


@own(OWN_REFUSED)
async def test_own_parameter_is_refused(caller: Caller, face: Face, fields: dict[str, Any]) -> None:
    [name] = fields
    assert_invalid(await caller.post({**BRIEF, **fields}), face, name)


@pytest.mark.parametrize("face", [D1], ids=["D1"])
async def test_max_completion_tokens_wins_over_max_tokens(caller: Caller) -> None:
    for fields, tokens in (
        ({"max_tokens": 9, "max_completion_tokens": 3}, 3),
        ({"max_tokens": 3, "max_completion_tokens": 9}, 9),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 4, "max_completion_tokens": None}, 4),
    ):
        body = assert_completion(await caller.post({**MINIMAL, **fields}), "sim-a")
        assert body["usage"]["completion_tokens"] == tokens


VLLMS = {
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "min_tokens": 1,
    "stop_token_ids": [7],
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "return_tokens_as_token_ids": True,
    "prompt_logprobs": 1,
    "truncate_prompt_tokens": 3,
    "structured_outputs": {"regex": "a+"},
    "guided_choice": ["a", "b"],
    "priority": 0,
}


@EACH_FACE
async def test_every_dialect_takes_vllms_extras(caller: Caller, face: Face) -> None:
    together = {name: value for name, value in VLLMS.items() if name not in ("guided_choice", "ignore_eos")}
    body = assert_completion(await caller.post({**BRIEF, **together}), "sim-a")
    assert body["usage"]["prompt_tokens"] == 3
    for name in ("guided_choice", "ignore_eos"):  # each is refused beside another form
        assert_completion(await caller.post({**BRIEF, name: VLLMS[name]}), "sim-a")


@EACH_FACE
async def test_an_unknown_parameter_is_refused_by_name(caller: Caller, face: Face) -> None:
    for name in ("unheard_of", "Temperature", "max-tokens", "messages", ""):
        message = assert_invalid(await caller.post({**BRIEF, name: 1}), face, name)
        assert f": {name}." in message
    nested = {**BRIEF, "stream": True, "stream_options": {"include_usages": True}}
    assert_invalid(await caller.post(nested), face, "stream_options.include_usages")


# --- invalid body --------------------------------------------------------------------------------------------------


@EACH_FACE
async def test_invalid_body(caller: Caller, face: Face) -> None:
    assert_invalid(await caller.post({**MINIMAL, "temperature": "hot"}), face, "temperature")
    headers = {**face.headers(caller.key), "content-type": "application/json"}
    assert_invalid(await caller.client.post(face.path, content=b'{"model":', headers=headers), face, None)


# --- unknown model -------------------------------------------------------------------------------------------------


@EACH_FACE
async def test_unknown_model(caller: Caller, face: Face) -> None:
    response = await caller.post({**MINIMAL, "model": "gpt-4"})
    assert "gpt-4" in assert_error(response, 404, "model_not_found", "model")


# --- model not ready -----------------------------------------------------------------------------------------------


@EACH_FACE
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_model_not_ready(tmp_path: Path, face: Face, streamed: bool) -> None:
    """A stream that has begun to be kept alive by comments meanwhile is in test_streaming.py."""

    async def scenario() -> None:
        limits = replace(LIMITS, hold_timeout_s=10.0)
        async with gateway(tmp_path, limits=limits) as gate, speaking(gate, face) as client:
            gate.pool.replicas_changed(frozenset())
            await quiet()
            response = await client.post(face.path, json={"model": "m", "prompt": "hello", "stream": streamed})
            status = 400 if face is D2 else 503
            assert response.status_code == status, response.text
            error = response.json()["error"]
            assert (error["code"], error["type"], error["param"]) == ("model_not_ready", "server_error", None)
            assert int(response.headers["retry-after"]) >= 1

    run_in_virtual_time(scenario())


# --- extra in the answer -------------------------------------------------------------------------------------------


@EACH_FACE
async def test_extra_in_the_answer(caller: Caller, face: Face, simulated_cluster: RunningCluster) -> None:
    whole = assert_completion(await caller.post({**BRIEF, "logprobs": 1}), "sim-a")
    streamed = await caller.post({**BRIEF, "stream": True})
    *chunks, _done = events(streamed.content)
    if face is not D1:
        assert "$schema" not in whole
        assert not any("$schema" in chunk for chunk in chunks)
        return
    url = f"{simulated_cluster.url}/openai/schemas/Completion.json"
    assert whole["$schema"] == url
    served = await caller.client.get(url)  # without a key: it is public
    assert served.status_code == 200
    schema = Draft202012Validator(served.json())
    schema.validate(whole)
    assert not schema.is_valid({**whole, "choices": None})
