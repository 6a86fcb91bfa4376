"""What each parameter does to what a real engine generates: SmolLM2-135M on vLLM.

Few tokens, since this engine makes 14 a second. That values equal those of vLLM's own server is in test_values.py.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from deployments.ingress.api.completions.request import CompletionRequest
from tests.conformance.faces import D2, D3, assert_completion, assert_error
from tests.conftest import RunningCluster
from tests.deployments.ingress.memory_gateway import events

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "smollm2-135m"
PROMPT = "The capital of France is"
PROMPT_TOKENS = [504, 3575, 282, 4649, 314]
PARIS, COMMA = 7042, 28
EOS = 2
GREEDY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
HOT: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 1.5}


@pytest.fixture(scope="module")
async def vllm(vllm_cluster: RunningCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with vllm_cluster.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(vllm_cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{vllm_cluster.url}/v1", api_key=vllm_cluster.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


async def complete(vllm: httpx.AsyncClient, path: str = D3.path, **body: Any) -> dict[str, Any]:
    return assert_completion(await vllm.post(path, json=body), MODEL)


async def choice_of(vllm: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    """Of a request that has only one."""
    [choice] = (await complete(vllm, **body))["choices"]
    found: dict[str, Any] = choice
    return found


async def texts_of(vllm: httpx.AsyncClient, *bodies: dict[str, Any]) -> list[str]:
    """Of requests of one choice each, made together."""
    return [choice["text"] for choice in await asyncio.gather(*(choice_of(vllm, **body) for body in bodies))]


async def chunks_of(vllm: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    response = await vllm.post("/v1/completions", json={**body, "stream": True})
    assert response.status_code == 200, response.text
    *chunks, done = events(response.content)
    assert done == "[DONE]"
    return chunks


@pytest.fixture(scope="module")
async def greedy(vllm: httpx.AsyncClient) -> dict[str, Any]:
    """The choice of GREEDY, with its tokens and their log probabilities."""
    return await choice_of(vllm, **GREEDY, logprobs=1, return_token_ids=True)


# --- which tokens may be sampled -----------------------------------------------------------------------------------


async def test_logit_bias_forces_and_forbids(vllm: httpx.AsyncClient, greedy: dict[str, Any]) -> None:
    assert greedy["token_ids"][0] == PARIS
    body = {**HOT, "max_tokens": 3, "return_token_ids": True}
    forced, forbidden = await asyncio.gather(
        choice_of(vllm, **body, logit_bias={str(COMMA): 100}),
        choice_of(vllm, **{**body, "temperature": 0}, logit_bias={str(PARIS): -100}),
    )
    assert forced["token_ids"] == [COMMA] * 3
    assert forced["text"] == ",,,"
    assert PARIS not in forbidden["token_ids"]


async def test_allowed_token_ids_are_the_only_ones(vllm: httpx.AsyncClient) -> None:
    allowed = [28, 198, 260, 284]
    choice = await choice_of(vllm, **HOT, allowed_token_ids=allowed, return_token_ids=True)
    assert len(choice["token_ids"]) == 8
    assert set(choice["token_ids"]) <= set(allowed)


async def test_bad_words_are_not_generated(vllm: httpx.AsyncClient, greedy: dict[str, Any]) -> None:
    assert greedy["text"].startswith(" Paris")
    assert "Paris" not in (await choice_of(vllm, **GREEDY, bad_words=["Paris"]))["text"]


@pytest.mark.parametrize(
    "fields", [{"top_k": 1}, {"min_p": 1}, {"top_p": 0}, {"temperature": 0, "top_k": 5, "seed": 3}]
)
async def test_what_leaves_only_the_likeliest_token_is_greedy(
    vllm: httpx.AsyncClient, greedy: dict[str, Any], fields: dict[str, Any]
) -> None:
    choice = await choice_of(vllm, **{**GREEDY, "temperature": 1.5, "max_tokens": 6, **fields}, return_token_ids=True)
    assert choice["token_ids"] == greedy["token_ids"][:6]


async def test_top_k_samples_among_so_many(vllm: httpx.AsyncClient) -> None:
    body = {**HOT, "temperature": 2, "max_tokens": 1, "return_token_ids": True, "n": 16}
    likely = (await choice_of(vllm, **{**GREEDY, "max_tokens": 1}, logprobs=2))["logprobs"]["top_logprobs"][0]
    narrow, wide = await asyncio.gather(complete(vllm, **body, top_k=2, seed=1), complete(vllm, **body, seed=1))
    assert {choice["text"] for choice in narrow["choices"]} == set(likely)
    assert len({choice["text"] for choice in wide["choices"]}) > 8


async def test_the_default_temperature_is_1_and_0_in_d2(vllm: httpx.AsyncClient, greedy: dict[str, Any]) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "seed": 11}
    plain, one, d2 = await asyncio.gather(
        complete(vllm, **body), complete(vllm, **body, temperature=1), complete(vllm, D2.path, **body)
    )
    assert plain["choices"] == one["choices"]
    assert plain["choices"][0]["text"] != d2["choices"][0]["text"]
    assert greedy["text"].startswith(d2["choices"][0]["text"])


# --- seeds and several choices -------------------------------------------------------------------------------------


async def test_a_seed_repeats(vllm: httpx.AsyncClient) -> None:
    first, again, other, none = await texts_of(vllm, *({**HOT, "seed": seed} for seed in (7, 7, 8, None)))
    assert first == again
    assert len({first, other, none}) == 3


async def test_n_choices_are_distinct_and_each_has_the_next_seed(vllm: httpx.AsyncClient) -> None:
    body = await complete(vllm, **HOT, n=3, seed=40)
    texts = [choice["text"] for choice in body["choices"]]
    assert len(set(texts)) == 3
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5, 24)
    assert await texts_of(vllm, *({**HOT, "seed": 40 + number} for number in range(3))) == texts


async def test_best_of_answers_the_likeliest_per_token(vllm: httpx.AsyncClient) -> None:
    body = {**HOT, "seed": 3, "logprobs": 0, "stop": "e"}  # the candidates end at different lengths
    every = await complete(vllm, **body, n=5)
    ranked = sorted(
        every["choices"],
        key=lambda choice: sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["token_logprobs"]),
        reverse=True,
    )
    best = await complete(vllm, **body, n=2, best_of=5)
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]
    del body["logprobs"]
    [unasked] = (await complete(vllm, **body, best_of=5))["choices"]
    assert (unasked["text"], unasked["logprobs"]) == (ranked[0]["text"], None)


# --- penalties -----------------------------------------------------------------------------------------------------

REPEATING = {**GREEDY, "prompt": "one one one one one one one one", "max_tokens": 8, "return_token_ids": True}


@pytest.mark.parametrize("fields", [{"repetition_penalty": 2}, {"frequency_penalty": 2, "presence_penalty": 2}])
async def test_penalties_end_a_repetition(vllm: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    repeated, penalized = await asyncio.gather(choice_of(vllm, **REPEATING), choice_of(vllm, **REPEATING, **fields))
    assert len(set(repeated["token_ids"])) < len(set(penalized["token_ids"]))
    assert len(set(repeated["token_ids"])) <= 3


async def test_negative_penalties_favour_what_is_there(vllm: httpx.AsyncClient) -> None:
    body = {**GREEDY, "return_token_ids": True, "max_tokens": 8}
    plain, repeating = await asyncio.gather(
        choice_of(vllm, **body), choice_of(vllm, **body, frequency_penalty=-2, presence_penalty=-2)
    )
    assert len(set(repeating["token_ids"])) < len(set(plain["token_ids"]))


async def test_repetition_detection_ends_a_choice(vllm: httpx.AsyncClient) -> None:
    detection = {"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 3}
    body = await complete(vllm, **GREEDY, logit_bias={str(COMMA): 100}, repetition_detection=detection)
    [choice] = body["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "repetition_detected")
    assert body["usage"]["completion_tokens"] < 12


# --- the end of a choice -------------------------------------------------------------------------------------------

ENDING = {**GREEDY, "max_tokens": 6, "logit_bias": {str(EOS): 100}}


async def test_the_end_of_text_ends_it_unless_min_tokens_or_ignore_eos(vllm: httpx.AsyncClient) -> None:
    at_once, later, never = await asyncio.gather(
        complete(vllm, **ENDING), complete(vllm, **ENDING, min_tokens=3), complete(vllm, **ENDING, ignore_eos=True)
    )
    ends = [
        (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) for body in (at_once, later, never)
    ]
    assert ends == [(1, "stop"), (4, "stop"), (6, "length")]
    assert (at_once["choices"][0]["text"], at_once["choices"][0]["stop_reason"]) == ("", None)
    assert later["choices"][0]["text"] != ""


async def test_special_tokens_are_skipped_unless_they_are_not(vllm: httpx.AsyncClient) -> None:
    ignoring = {**ENDING, "max_tokens": 2, "ignore_eos": True}
    skipped, kept = await texts_of(vllm, ignoring, {**ignoring, "skip_special_tokens": False})
    assert skipped == ""
    assert kept.replace(" ", "") == "<|im_end|><|im_end|>"
    [together] = await texts_of(
        vllm, {**ignoring, "skip_special_tokens": False, "spaces_between_special_tokens": False}
    )
    assert together == "<|im_end|><|im_end|>"


async def test_include_stop_keeps_the_end_of_text(vllm: httpx.AsyncClient) -> None:
    choice = await choice_of(vllm, **ENDING, include_stop_str_in_output=True, skip_special_tokens=False)
    assert (choice["text"], choice["finish_reason"]) == ("<|im_end|>", "stop")


@pytest.mark.parametrize(
    ("begin", "length", "others"),
    [(0, 1, []), (1, 5, []), (3, 6, ["\x00", "never there"]), (9, 3, ["xyz", "\x00", "nope"])],
    ids=["first character", "one word", "within tokens", "of four"],
)
async def test_stop_strings_end_it_before_them(
    vllm: httpx.AsyncClient, greedy: dict[str, Any], begin: int, length: int, others: list[str]
) -> None:
    text = greedy["text"]
    stop = text[begin : begin + length]
    asked: Any = [*others, stop] if others else stop
    left, kept = await asyncio.gather(
        choice_of(vllm, **GREEDY, stop=asked), choice_of(vllm, **GREEDY, stop=asked, include_stop_str_in_output=True)
    )
    end = text.index(stop)
    assert (left["text"], kept["text"]) == (text[:end], text[: end + len(stop)])
    assert {(each["finish_reason"], each["stop_reason"]) for each in (left, kept)} == {("stop", stop)}


async def test_stop_strings_end_nothing_before_min_tokens(vllm: httpx.AsyncClient, greedy: dict[str, Any]) -> None:
    stop = greedy["text"][0]
    body = await complete(vllm, **GREEDY, stop=stop, min_tokens=4)
    assert body["usage"]["completion_tokens"] > 4
    assert greedy["text"].startswith(body["choices"][0]["text"])


async def test_stop_token_ids_end_it_before_them(
    vllm: httpx.AsyncClient, greedy: dict[str, Any], tokenizer: Tokenizer
) -> None:
    ids = greedy["token_ids"]
    stop = ids[3]
    end = ids.index(stop)
    body = {**GREEDY, "stop_token_ids": [stop, 49000]}
    left, kept = await asyncio.gather(complete(vllm, **body), choice_of(vllm, **body, include_stop_str_in_output=True))
    [choice] = left["choices"]
    assert choice["text"] == tokenizer.decode(ids[:end])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert left["usage"]["completion_tokens"] == end + 1
    assert kept["text"] == tokenizer.decode(ids[: end + 1])


# --- the form of the output ----------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "city": {"enum": ["Paris", "Rome"]}},
    "required": ["ok", "city"],
    "additionalProperties": False,
}
YES_OR_NO = 'root ::= "yes" | "no"'
LARK = 'start: "yes" | "no"'
LONGER = {**GREEDY, "max_tokens": 60}
JSON_SCHEMAS: dict[str, dict[str, Any]] = {
    "structured_outputs": {"structured_outputs": {"json": SCHEMA}},
    "as text": {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    "response_format": {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
    "guided_json": {"guided_json": SCHEMA},
}


@pytest.mark.parametrize("fields", JSON_SCHEMAS.values(), ids=JSON_SCHEMAS)
async def test_a_json_schema_is_conformed_to(vllm: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    choice = await choice_of(vllm, **LONGER, **fields)
    assert choice["finish_reason"] == "stop"
    Draft202012Validator(SCHEMA).validate(json.loads(choice["text"]))


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"structured_outputs": {"regex": r"[a-c]{2,4}-[0-9]"}}, r"[a-c]{2,4}-[0-9]"),
    "guided_regex": ({"guided_regex": r"[x-z]{3}"}, r"[x-z]{3}"),
    "choice": ({"structured_outputs": {"choice": ["London", "Rome"]}}, "London|Rome"),
    "guided_choice": ({"guided_choice": ["Oslo", "Bern"]}, "Oslo|Bern"),
    "grammar": ({"structured_outputs": {"grammar": YES_OR_NO}}, "yes|no"),
    "Lark": ({"structured_outputs": {"grammar": LARK}}, "yes|no"),
    "guided_grammar": ({"guided_grammar": YES_OR_NO}, "yes|no"),
    "multi-byte": ({"structured_outputs": {"choice": ["猫🎉é"]}}, "猫🎉é"),
}


@pytest.mark.parametrize(("fields", "pattern"), FORMS.values(), ids=FORMS)
async def test_the_output_has_the_form_asked_for(vllm: httpx.AsyncClient, fields: dict[str, Any], pattern: str) -> None:
    choice = await choice_of(vllm, **LONGER, **fields)
    assert re.fullmatch(pattern, choice["text"]), choice["text"]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "fields", [{"structured_outputs": {"json_object": True}}, {"response_format": {"type": "json_object"}}]
)
async def test_a_json_object_is_one(vllm: httpx.AsyncClient, tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    few = [*(tokenizer.token_to_id(token) for token in ("{", "}", "{}", '"', "a", ":", "1")), EOS]
    choice = await choice_of(vllm, **LONGER, **fields, logit_bias={str(tokenizer.token_to_id("}")): 20}, seed=1)
    assert None not in few
    assert choice["finish_reason"] == "stop"
    assert isinstance(json.loads(choice["text"]), dict)


async def test_a_format_of_text_constrains_nothing(vllm: httpx.AsyncClient, greedy: dict[str, Any]) -> None:
    choice = await choice_of(vllm, **GREEDY, response_format={"type": "text"})
    assert choice["text"] == greedy["text"]


async def test_a_form_holds_in_streams_and_for_each_choice(vllm: httpx.AsyncClient) -> None:
    chunks = await chunks_of(vllm, **LONGER, n=2, structured_outputs={"choice": ["猫🎉é", "日本 ß"]})
    for index in range(2):
        deltas = [choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(deltas) in ("猫🎉é", "日本 ß")
        assert not any("\ufffd" in delta for delta in deltas)


def rejected(parameter: str, value: Any, **inner: Any) -> Any:
    name = parameter if not inner else f"{parameter}.{next(iter(inner))}"
    return pytest.param({parameter: inner or value}, parameter, id=f"{name}={str(value or inner)[:30]}")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        rejected("structured_outputs", None, regex="("),
        rejected("structured_outputs", None, regex="[z-a]"),
        rejected("structured_outputs", None, json={"type": "nonsense"}),
        rejected("structured_outputs", None, json="not JSON"),
        rejected("structured_outputs", None, grammar="root ::= ("),
        rejected("structured_outputs", None, grammar="root ::= nowhere"),
        rejected("structured_outputs", None, structural_tag="{}"),
        rejected("guided_regex", "("),
        rejected("guided_json", {"type": "nonsense"}),
        rejected("guided_json", "not JSON"),
        rejected("guided_grammar", "root ::= ("),
        rejected("response_format", {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": 5}}}),
        rejected("response_format", {"type": "structural_tag", "format": {"type": "nonsense"}}),
    ],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_form_that_no_output_can_have_is_refused_by_name(
    vllm: httpx.AsyncClient, fields: dict[str, Any], name: str, streamed: bool
) -> None:
    response = await vllm.post("/v1/completions", json={**GREEDY, "max_tokens": 2, **fields, "stream": streamed})
    assert response.status_code == 400, response.text
    param = response.json()["error"]["param"]
    assert param is not None
    assert param.partition(".")[0] == name
    assert_error(response, 400, response.json()["error"]["code"], param)


# --- log probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [0, 1, 5])
async def test_logprobs_tell_so_many_of_the_likeliest(
    vllm: httpx.AsyncClient, greedy: dict[str, Any], logprobs: int
) -> None:
    told = (await choice_of(vllm, **{**GREEDY, "max_tokens": 4}, logprobs=logprobs))["logprobs"]
    assert told.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert told["tokens"] == greedy["logprobs"]["tokens"][:4]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(top) == max(1, logprobs)
        assert top[token] == logprob == max(top.values()) <= 0
        assert list(top.values()) == sorted(top.values(), reverse=True)


async def test_without_logprobs_there_are_none(vllm: httpx.AsyncClient) -> None:
    assert (await choice_of(vllm, **{**GREEDY, "max_tokens": 1}))["logprobs"] is None


async def test_max_tokens_0_with_echo_scores_a_prompt(vllm: httpx.AsyncClient) -> None:
    """What lm-evaluation-harness does."""
    prompts = [[*PROMPT_TOKENS, PARIS], [*PROMPT_TOKENS, 260]]
    body = await complete(vllm, model=MODEL, prompt=prompts, max_tokens=0, echo=True, logprobs=1, temperature=0)
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (12, 0)
    likely, unlikely = (choice["logprobs"] for choice in body["choices"])
    assert [choice["text"] for choice in body["choices"]] == [f"{PROMPT} Paris", f"{PROMPT} the"]
    assert likely["tokens"] == ["The", " capital", " of", " France", " is", " Paris"]
    assert likely["token_logprobs"][0] is likely["top_logprobs"][0] is None
    assert likely["token_logprobs"][1:5] == pytest.approx(unlikely["token_logprobs"][1:5], abs=1e-3)
    assert likely["token_logprobs"][5] > unlikely["token_logprobs"][5]
    assert set(unlikely["top_logprobs"][5]) == {" the", " Paris"}


async def test_echo_puts_the_prompts_tokens_before_those_generated(
    vllm: httpx.AsyncClient, greedy: dict[str, Any]
) -> None:
    choice = await choice_of(vllm, **{**GREEDY, "max_tokens": 3}, echo=True, logprobs=1)
    told = choice["logprobs"]
    assert choice["text"] == "".join(told["tokens"])
    assert choice["text"].startswith(PROMPT + " Paris")
    assert len(told["tokens"]) == 8
    assert told["token_logprobs"][5:] == pytest.approx(greedy["logprobs"]["token_logprobs"][:3], abs=1e-3)


async def test_prompt_logprobs_agree_with_an_echo(vllm: httpx.AsyncClient) -> None:
    body = {**GREEDY, "max_tokens": 1}
    choice, echoed = await asyncio.gather(
        choice_of(vllm, **body, prompt_logprobs=2), choice_of(vllm, **body, echo=True, logprobs=2)
    )
    first, *told = choice["prompt_logprobs"]
    assert first is None
    for position, token_id, text, logprob in zip(
        told,
        PROMPT_TOKENS[1:],
        echoed["logprobs"]["tokens"][1:5],
        echoed["logprobs"]["token_logprobs"][1:5],
        strict=True,
    ):
        assert 2 <= len(position) <= 3
        here = position[str(token_id)]
        assert here.keys() == {"logprob", "rank", "decoded_token"}
        assert here["decoded_token"] == text
        assert here["logprob"] == pytest.approx(logprob, abs=1e-3)
        assert {1, 2, here["rank"]} == {each["rank"] for each in position.values()}


async def test_logprob_token_ids_are_told_at_each_position(vllm: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = {**GREEDY, "max_tokens": 2, "logprobs": 1, "return_tokens_as_token_ids": True}
    told = (await choice_of(vllm, **body, logprob_token_ids=[260, COMMA]))["logprobs"]
    for token, top in zip(told["tokens"], told["top_logprobs"], strict=True):
        assert top.keys() == {token, "token_id:260", f"token_id:{COMMA}"}


async def test_tokens_may_be_told_as_token_ids(vllm: httpx.AsyncClient, greedy: dict[str, Any]) -> None:
    body = {**GREEDY, "max_tokens": 3, "logprobs": 2, "echo": True}
    told = (await choice_of(vllm, **body, return_tokens_as_token_ids=True))["logprobs"]
    assert told["tokens"] == [f"token_id:{token}" for token in [*PROMPT_TOKENS, *greedy["token_ids"][:3]]]
    assert all(re.fullmatch(r"token_id:\d+", name) for top in told["top_logprobs"][1:] for name in top)


async def test_token_ids_may_be_told(vllm: httpx.AsyncClient, greedy: dict[str, Any], tokenizer: Tokenizer) -> None:
    assert greedy["prompt_token_ids"] == PROMPT_TOKENS
    assert len(greedy["token_ids"]) == 12
    assert tokenizer.decode(greedy["token_ids"]) == greedy["text"]


MULTI_BYTE = ["In 日本の首都は🎉 é", "A 🎉🎂👩‍🚀 ok", "naïve façade ☃"]


@pytest.mark.parametrize("prompt", MULTI_BYTE)
async def test_text_offsets_count_characters(vllm: httpx.AsyncClient, prompt: str) -> None:
    choice = await choice_of(vllm, model=MODEL, prompt=prompt, max_tokens=0, echo=True, logprobs=0)
    assert choice["text"] == prompt
    assert_offsets(choice)


async def test_text_offsets_count_characters_of_what_is_generated(vllm: httpx.AsyncClient) -> None:
    choice = await choice_of(vllm, **LONGER, logprobs=0, structured_outputs={"choice": ["猫 🎉 é ok"]})
    assert choice["text"] == "猫 🎉 é ok"
    told = choice["logprobs"]
    ends = [offset for offset, token in zip(told["text_offset"], told["tokens"], strict=True) if token != "<|im_end|>"]
    assert ends == sorted(ends)
    assert_offsets(choice)


def assert_offsets(choice: dict[str, Any]) -> None:
    """Each token's text stands at its offset; those of the parts of a character are empty but for one."""
    text, told = choice["text"], choice["logprobs"]
    spoken = [(offset, token) for offset, token in zip(told["text_offset"], told["tokens"], strict=True)]
    if spoken[-1][1] == "<|im_end|>":  # the end of text has a probability and no place
        assert spoken.pop()[0] == len(text)
    assert "".join(token for _, token in spoken) == text
    assert [text[offset : offset + len(token)] for offset, token in spoken] == [token for _, token in spoken]
    assert spoken[0][0] == 0
    assert len(spoken) > len([token for _, token in spoken if token])  # some are parts of characters


# --- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, PROMPT_TOKENS[-3:]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, PROMPT_TOKENS[:3]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, PROMPT_TOKENS[-3:]),
        ({"truncate_prompt_tokens": 5}, PROMPT_TOKENS),
        ({"truncate_prompt_tokens": -1}, PROMPT_TOKENS),
        ({"add_special_tokens": False}, PROMPT_TOKENS),
    ],
    ids=lambda value: "+".join(map(str, value)) if isinstance(value, dict) else "",
)
async def test_truncate_prompt_tokens_keeps_so_many(
    vllm: httpx.AsyncClient, fields: dict[str, Any], kept: list[int]
) -> None:
    body = await complete(vllm, **{**GREEDY, "max_tokens": 1}, **fields, return_token_ids=True)
    assert body["choices"][0]["prompt_token_ids"] == kept
    assert body["usage"]["prompt_tokens"] == len(kept)


async def test_truncation_makes_a_prompt_fit(vllm: httpx.AsyncClient) -> None:
    body = {**GREEDY, "prompt": "word " * 3000, "max_tokens": 1}
    assert_error(await vllm.post("/v1/completions", json=body), 400, "context_length_exceeded", "prompt")
    usage = (await complete(vllm, **body, truncate_prompt_tokens=20))["usage"]
    assert usage["prompt_tokens"] == 20


async def test_suffix_is_refused_where_the_model_fills_no_gaps(vllm: httpx.AsyncClient) -> None:
    message = assert_error(await vllm.post("/v1/completions", json={**GREEDY, "suffix": "."}), 400, None, "suffix")
    assert MODEL in message


async def test_priority_is_refused_where_nothing_is_scheduled_by_it(vllm: httpx.AsyncClient) -> None:
    for priority in (1, -1):
        response = await vllm.post("/v1/completions", json={**GREEDY, "priority": priority})
        assert_error(response, 400, None, "priority")
    await complete(vllm, **{**GREEDY, "max_tokens": 1}, priority=0)


# --- streams -------------------------------------------------------------------------------------------------------


async def test_a_stream_interval_gathers_tokens(vllm: httpx.AsyncClient, greedy: dict[str, Any]) -> None:
    body = {**GREEDY, "return_token_ids": True}
    chunks = await chunks_of(vllm, **body, stream_interval=4)
    counts = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks]
    assert sum(counts) == 12
    assert counts[0] == 1
    assert all(count >= 4 for count in counts[1:-1])
    assert len(counts) <= 5
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == greedy["text"]


async def test_without_it_each_token_may_come_alone(vllm: httpx.AsyncClient, greedy: dict[str, Any]) -> None:
    chunks = await chunks_of(vllm, **GREEDY, return_token_ids=True)
    assert len(chunks) > 6
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == greedy["token_ids"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == greedy["text"]


# --- what has no effect, and the client ----------------------------------------------------------------------------


WITHOUT_EFFECT: list[dict[str, Any]] = [
    {"user": "somebody", "metadata": {"job": "nightly"}, "service_tier": "auto"},
    {"session_id": "s", "request_id": "r", "cache_prompt": True},
    {"vllm_xargs": {"nobody": "listens"}},
    {"length_penalty": 1.0, "use_beam_search": False},
    {"stream_interval": 9},
    {"mirostat_tau": 5.0, "mirostat_eta": 0.1, "xtc_threshold": 0.1, "smoothing_curve": 1.0},
    {"dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1},
    {"dynatemp_low": 0.5, "dynatemp_high": 1.5, "dynatemp_exponent": 1.0},
]


@pytest.mark.parametrize("fields", WITHOUT_EFFECT, ids="+".join)
async def test_what_has_no_effect(vllm: httpx.AsyncClient, greedy: dict[str, Any], fields: dict[str, Any]) -> None:
    choice = await choice_of(vllm, **{**GREEDY, "max_tokens": 4}, **fields, return_token_ids=True)
    assert choice["token_ids"] == greedy["token_ids"][:4]


def test_the_official_client_gets_all_of_it(client: openai.OpenAI, greedy: dict[str, Any]) -> None:
    completion = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=3,
        temperature=0,
        echo=True,
        logprobs=2,
        logit_bias={str(COMMA): -100},
        extra_body={"top_k": 5, "return_token_ids": True},
    )
    [choice] = completion.choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.text_offset is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[:3] == [0, 3, 11]
    assert choice.model_dump()["token_ids"] == greedy["token_ids"][:3]


def test_every_parameter_of_vllm_is_known() -> None:
    """Served, or refused with a reason."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "entrypoints" / "openai" / "completion" / "protocol.py"
    [request] = [
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "CompletionRequest"
    ]
    fields = {
        node.target.id for node in request.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    fields -= {"_DEFAULT_SAMPLING_PARAMS"}
    assert len(fields) > 30
    assert fields <= CompletionRequest.model_fields.keys()
