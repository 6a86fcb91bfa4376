"""On real vLLM: what comes back with `finish_reason: "stop"` conforms, or the request was a 400, whatever came before.

MILLSTREAM_PROPERTY_SECONDS=1800 draws schemas for so long and tells how many cases ran.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.conftest import THOROUGH, RunningCluster
from tests.deployments.ingress.memory_gateway import events
from tests.random_schemas import random_schema, violation

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "smollm2-135m"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "JSON:", "max_tokens": 24, "temperature": 1, "seed": 5}
EOS = 2
SECONDS = float(os.environ.get("MILLSTREAM_PROPERTY_SECONDS", "300" if THOROUGH else "25"))
AT_ONCE = 8


@pytest.fixture(scope="module")
async def vllm(vllm_cluster: RunningCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with vllm_cluster.client() as client:
        yield client


async def answer(vllm: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await vllm.post("/v1/completions", json={**BODY, **fields})


def assert_held_or_refused(response: httpx.Response, schema: Any) -> str:
    """Which of both."""
    if response.status_code == 400:
        assert response.json()["error"]["param"].startswith(("structured_outputs", "guided_json", "response_format"))
        return "refused"
    assert response.status_code == 200, response.text
    for choice in response.json()["choices"]:
        if choice["finish_reason"] == "stop":
            assert violation(schema, choice["text"]) is None, (json.dumps(schema), choice["text"])
    reasons = {choice["finish_reason"] for choice in response.json()["choices"]}
    return "stop" if "stop" in reasons else "length"


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "string"}, {"enum": ["yes", "no"]}]},
        {"type": "array", "items": [{"type": "string"}]},
        {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": {"type": "null"}},
        {"$ref": "#"},
        {"type": "string", "pattern": r"^\p{L}+$", "maxLength": 3},
        {"if": {"type": "string"}, "then": {"maxLength": 1}},
        {"$ref": "https://example.com/schema.json"},
        {"type": "object", "required": ["a"], "additionalProperties": {"type": "null"}},
    ],
    ids=str,
)
async def test_every_schema_is_held_or_refused_whatever_came_first(vllm: httpx.AsyncClient, schema: Any) -> None:
    first = {"structured_outputs": {"choice": ["a", "b"]}}
    for before in (first, None):  # on both replicas, and again once they have held others
        if before is not None:
            await asyncio.gather(*(answer(vllm, **before) for _ in range(4)))
        responses = await asyncio.gather(*(answer(vllm, guided_json=schema, n=2, seed=seed) for seed in range(4)))
        assert len({assert_held_or_refused(response, schema) == "refused" for response in responses}) == 1


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": r"\p{L}{2,4}"}, r"[^\W\d_]{2,4}"),
        ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"grammar": 'start: "yes" | "no"'}, "yes|no"),
        ({"choice": ["", "", "é\U0001f389"]}, "|é\U0001f389"),
        ({"json": {"const": 'a ::= "b"\nstart: c'}}, r'"a ::= \\"b\\"\\nstart: c"'),
    ],
    ids=str,
)
async def test_the_engine_holds_the_text_as_it_was_checked(
    vllm: httpx.AsyncClient, outputs: dict[str, Any], pattern: str
) -> None:
    response = await answer(vllm, structured_outputs=outputs, n=3)
    assert response.status_code == 200, response.text
    for choice in response.json()["choices"]:
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["text"]), choice["text"]


@pytest.mark.parametrize("grammar", ["root ::= root", 'root ::= root "a"', "start: x\nx: x", 'start: start "a"'])
async def test_a_grammar_without_output_is_refused(vllm: httpx.AsyncClient, grammar: str) -> None:
    response = await answer(vllm, guided_grammar=grammar)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "guided_grammar"


OBJECT = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}


async def test_what_shapes_json_is_in_effect(vllm: httpx.AsyncClient) -> None:
    biased = {"logit_bias": {"216": 30, "1116": 30, "28": 5}}  # two kinds of blanks, and commas
    compact, pattern, closed = await asyncio.gather(
        answer(vllm, structured_outputs={"json": OBJECT, "disable_any_whitespace": True}, **biased, n=4),
        answer(vllm, structured_outputs={"json": OBJECT, "whitespace_pattern": r"[\n]*"}, **biased, n=4),
        answer(vllm, structured_outputs={"json": OBJECT, "disable_additional_properties": True}, **biased, n=4),
    )
    for response in (compact, pattern, closed):
        assert response.status_code == 200, response.text
    assert not any(text.startswith(("{ ", "{\n")) for text in texts(compact))
    assert not any(text.startswith("{ ") for text in texts(pattern))
    assert not any('1, "' in text or '1,"' in text for text in texts(closed))
    for refused in ("(((", "[ ]?"):
        response = await answer(vllm, structured_outputs={"json": OBJECT, "whitespace_pattern": refused})
        assert response.status_code == 400
        assert "whitespace_pattern" in response.json()["error"]["message"]


def texts(response: httpx.Response) -> list[str]:
    return [choice["text"] for choice in response.json()["choices"]]


CHOICE = {"structured_outputs": {"choice": ["London", "Rome"]}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({**CHOICE, "allowed_token_ids": [28, 198]}, "allowed_token_ids"),
        ({**CHOICE, "min_tokens": 20}, "min_tokens"),
        (
            {
                "structured_outputs": {"choice": ["0", "1"]},
                "logit_bias": {"32": -100, "33": -100},
            },
            "logit_bias",
        ),
    ],
    ids=str,
)
async def test_a_contradiction_is_refused_by_name(vllm: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await answer(vllm, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "(aaaaaa|bbbbbb){1,2}"}, "min_tokens": 20},
        {"structured_outputs": {"regex": "[ab]{4}"}, "allowed_token_ids": [81, 82]},
    ],
    ids=str,
)
async def test_a_contradiction_that_shows_late_is_an_error(vllm: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    response = await answer(vllm, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    if error["code"] == "output_not_conforming":
        assert "retry" not in error["message"].lower()
        streamed = await answer(vllm, **fields, stream=True)
        last = events(streamed.content)[-1]
        assert last["error"]["code"] == "output_not_conforming"


async def test_a_form_does_not_go_on_behind_its_end(vllm: httpx.AsyncClient) -> None:
    form = {"structured_outputs": {"regex": "[ab]{4}"}}
    response = await answer(vllm, **form, ignore_eos=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "ignore_eos"
    response = await answer(vllm, **form, logit_bias={str(EOS): -100})  # less likely, but all that is left
    assert re.fullmatch("[ab]{4}", texts(response)[0])


async def test_what_is_taken_is_held_in_any_order(vllm: httpx.AsyncClient) -> None:
    drawn = random.Random(None if THOROUGH else 29)
    ends = time.monotonic() + SECONDS
    counted: Counter[str] = Counter()
    while time.monotonic() < ends:
        schemas = [random_schema(drawn) for _ in range(AT_ONCE)]
        schemas = [schema for schema in schemas if isinstance(schema, dict)]
        orders = [schemas, schemas[::-1]]
        drawn.shuffle(orders)
        verdicts: list[dict[int, str]] = []
        for order in orders:
            noise = answer(vllm, structured_outputs={"choice": ["a", str(drawn.random())]}, max_tokens=4)
            responses, _ = await asyncio.gather(
                asyncio.gather(*(answer(vllm, guided_json=each, seed=drawn.randrange(999)) for each in order)), noise
            )
            verdicts.append(
                {
                    id(schema): assert_held_or_refused(response, schema)
                    for schema, response in zip(order, responses, strict=True)
                }
            )
            counted.update(verdicts[-1].values())
        one, other = verdicts
        assert all((one[each] == "refused") == (other[each] == "refused") for each in one)
    print(f"{counted.total()} requests in {SECONDS:g} s: {dict(counted)}")
    assert counted["stop"] > 0
