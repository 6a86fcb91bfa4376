"""Streams: their frames, their usage, their text, their order, and how they fail."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deployments.ingress.api.completions.chunks import ChoiceDelta
from deployments.ingress.api.completions.completion import CompletionInference
from tests.conformance.faces import EACH_FACE, Face, assert_error, assert_invalid
from tests.conformance.in_process import app_with_deadline, replayed
from tests.conformance.leaks import assert_no_leak
from tests.conftest import RunningCluster
from tests.deployments.ingress.memory_gateway import Exchange, Gateway, events, gateway
from tests.deployments.ingress.memory_replicas import LIMITS
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet, run_in_virtual_time

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

PROMPT = "The capital of France is"
BODY: dict[str, Any] = {"model": "sim-a", "prompt": PROMPT, "max_tokens": 60}
MANY = {**BODY, "prompt": [PROMPT, "Once upon a time"], "n": 3, "seed": 5, "max_tokens": 120}


async def whole(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await http.post("/v1/completions", json={**BODY, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def streamed(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The chunks, without `[DONE]`, which is there once and last."""
    response = await http.post("/v1/completions", json={**BODY, **fields, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in response.headers
    *chunks, done = events(response.content)
    assert done == "[DONE]"
    assert all(isinstance(chunk, dict) for chunk in chunks)
    return chunks


@pytest.fixture(scope="module")
async def text(http: httpx.AsyncClient) -> str:
    """That of BODY."""
    [choice] = (await whole(http))["choices"]
    text: str = choice["text"]
    return text


def choices_of(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(choice["text"] for choice in choices_of(chunks, index))


# --- frames --------------------------------------------------------------------------------------------------------


async def test_every_event_is_one_line_of_json_and_done_is_the_last(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={**BODY, "stream": True})
    assert response.content.endswith(b"}\n\ndata: [DONE]\n\n")
    assert response.content.count(b"[DONE]") == 1
    blocks = response.content.decode("utf-8", errors="strict").split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    for block in blocks[:-1]:
        json.loads(block.removeprefix("data: "))


async def test_all_chunks_have_the_same_head(http: httpx.AsyncClient) -> None:
    chunks = await streamed(http, stream_options={"include_usage": True})
    [(identity, kind, _, model, _)] = {
        (chunk["id"], chunk["object"], chunk["created"], chunk["model"], chunk["system_fingerprint"])
        for chunk in chunks
    }
    assert identity.startswith("cmpl-")
    assert (kind, model) == ("text_completion", "sim-a")
    assert type(chunks[0]["created"]) is int
    other = await streamed(http)
    assert other[0]["id"] != identity
    assert other[0]["system_fingerprint"] == (await whole(http))["system_fingerprint"]


async def test_chunks_have_the_fields_of_the_reference(http: httpx.AsyncClient) -> None:
    *chunks, last = await streamed(http)
    for chunk in [*chunks, last]:
        assert chunk.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        [choice] = chunk["choices"]
        assert choice.keys() >= {"index", "text", "logprobs", "finish_reason"}
        assert choice["logprobs"] is None
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"][0]["finish_reason"] == "length"


async def test_the_text_arrives_in_parts_and_is_that_of_a_whole_answer(http: httpx.AsyncClient, text: str) -> None:
    chunks = await streamed(http)
    assert len(chunks) > 5
    [choice] = (await whole(http))["choices"]
    assert text_of(chunks) == choice["text"]


def test_the_official_client_reads_it(official: openai.OpenAI) -> None:
    answer = official.completions.create(model="sim-a", prompt=PROMPT, max_tokens=60)
    chunks = list(official.completions.create(model="sim-a", prompt=PROMPT, max_tokens=60, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, None])
async def test_without_stream_the_answer_is_one_body(http: httpx.AsyncClient, stream: bool | None) -> None:
    response = await http.post("/v1/completions", json={**BODY, "stream": stream})
    assert response.headers["content-type"] == "application/json"
    assert response.json()["usage"]["completion_tokens"] == 60


async def test_no_tokens_are_one_chunk_with_a_reason(http: httpx.AsyncClient) -> None:
    [chunk, usage] = await streamed(http, max_tokens=0, stream_options={"include_usage": True})
    [choice] = chunk["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert usage["usage"]["completion_tokens"] == 0


# --- usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"continuous_usage_stats": True}])
async def test_usage_is_not_told_unless_asked_for(http: httpx.AsyncClient, options: dict[str, Any] | None) -> None:
    chunks = await streamed(http, stream_options=options)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert not any("usage" in chunk for chunk in chunks)


async def test_one_more_chunk_has_the_usage_and_all_others_null(http: httpx.AsyncClient) -> None:
    *chunks, last = await streamed(http, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"].keys() == {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}
    numbers = [last["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    assert numbers == [5, 60, 65]
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)


async def test_the_usage_is_that_of_a_whole_answer(http: httpx.AsyncClient) -> None:
    for fields in (MANY, {"stop": " the"}, {"echo": True, "logprobs": 2}, {"prompt": [1, 2, 3], "max_tokens": 1}):
        usages = [(await whole(http, **fields))["usage"]]
        usages.append((await streamed(http, **fields, stream_options={"include_usage": True}))[-1]["usage"])
        for usage in usages:
            usage.pop("prompt_tokens_details")  # what is cached changes
        assert usages[0] == usages[1], fields


async def test_continuous_usage_counts_up_in_every_chunk(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await streamed(http, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert 1 <= counts[0] < counts[-1] == 60
    for chunk in [*chunks, last]:
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == 5
        assert usage["total_tokens"] == 5 + usage["completion_tokens"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 60)


async def test_continuous_usage_is_of_the_chunks_choice_as_in_vllm(http: httpx.AsyncClient) -> None:
    """vLLM 0.32, completion_stream_generator: the prompt and the tokens of the choice; the last chunk has the sums."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await streamed(http, prompt=[[504, 3575, 282, 4649, 314], [1, 2, 3]], n=2, stream_options=options)
    for index in range(4):
        usages = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert {usage["prompt_tokens"] for usage in usages} == {5 if index < 2 else 3}
        assert usages[-1]["completion_tokens"] == 60
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (8, 240)


# --- several choices -----------------------------------------------------------------------------------------------


async def test_many_choices_come_interleaved_and_each_under_its_index(http: httpx.AsyncClient) -> None:
    answer = await whole(http, **MANY)
    expected = [choice["text"] for choice in answer["choices"]]
    assert len(set(expected)) == 6
    chunks = await streamed(http, **MANY)
    assert [text_of(chunks, index) for index in range(6)] == expected
    indexes = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
    assert set(indexes) == set(range(6))
    changes = sum(one != next_ for one, next_ in pairwise(indexes))
    assert changes > 5, "one choice after the other"


async def test_each_choice_has_one_reason_in_its_last_chunk(http: httpx.AsyncClient) -> None:
    chunks = await streamed(http, **MANY)
    reasons: dict[int, list[Any]] = defaultdict(list)
    for chunk in chunks:
        for choice in chunk["choices"]:
            reasons[choice["index"]].append(choice["finish_reason"])
    assert sorted(reasons) == list(range(6))
    for each in reasons.values():
        assert each == [None] * (len(each) - 1) + ["length"]


async def test_choices_that_stop_at_different_times_end_one_by_one(http: httpx.AsyncClient) -> None:
    texts = [choice["text"] for choice in (await whole(http, **MANY))["choices"]]
    stop = texts[0][30:34]
    assert stop not in texts[1]
    chunks = await streamed(http, **MANY, stop=stop)
    assert text_of(chunks, 0) == texts[0][: texts[0].index(stop)]
    assert text_of(chunks, 1) == texts[1]
    assert (choices_of(chunks, 0)[-1]["finish_reason"], choices_of(chunks, 1)[-1]["finish_reason"]) == (
        "stop",
        "length",
    )


async def test_best_of_is_refused_and_n_is_not(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={**BODY, "stream": True, "best_of": 2})
    assert_error(response, 400, None, "best_of")
    assert {choice["index"] for chunk in await streamed(http, n=2) for choice in chunk["choices"]} == {0, 1}


# --- text ----------------------------------------------------------------------------------------------------------


async def test_deltas_are_whole_characters(http: httpx.AsyncClient) -> None:
    """Made-up tokens hold bytes of characters that never become whole: those are U+FFFD in a whole answer, too."""
    fields = {"n": 4, "seed": 0, "max_tokens": 120}
    texts = [choice["text"] for choice in (await whole(http, **fields))["choices"]]
    assert len({character for text in texts for character in text if ord(character) > 127} - {"\ufffd"}) > 3
    chunks = await streamed(http, **fields)
    assert [text_of(chunks, index) for index in range(4)] == texts


async def test_characters_of_a_prompt_that_is_echoed_are_whole(http: httpx.AsyncClient) -> None:
    prompt = "日本 \U0001f469‍\U0001f680 é\x00ß"
    chunks = await streamed(http, prompt=prompt, echo=True, max_tokens=3)
    assert chunks[0]["choices"][0]["text"].startswith(prompt)
    assert text_of(chunks) == (await whole(http, prompt=prompt, echo=True, max_tokens=3))["choices"][0]["text"]


STOPS = [(0, 1), (1, 2), (7, 1), (10, 3), (20, 5), (31, 12), (50, 40), (90, 2), (120, 7)]


@pytest.mark.parametrize(("begin", "length"), STOPS)
@pytest.mark.parametrize("included", [False, True], ids=["left out", "included"])
async def test_no_part_of_a_stop_string_is_sent(
    http: httpx.AsyncClient, text: str, begin: int, length: int, included: bool
) -> None:
    stop = text[begin : begin + length]
    assert stop
    end = text.index(stop) + (len(stop) if included else 0)
    chunks = await streamed(http, stop=stop, include_stop_str_in_output=included)
    assert text_of(chunks) == text[:end]
    last = choices_of(chunks)[-1]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)


async def test_the_first_of_several_stop_strings_ends_it(http: httpx.AsyncClient, text: str) -> None:
    stops = [text[60:64], text[20:23], "never there", text[40:44]]
    first = min(text.index(stop) for stop in stops if stop in text)
    assert text_of(await streamed(http, stop=stops)) == text[:first]


async def test_what_only_begins_like_a_stop_string_is_sent_after_all(http: httpx.AsyncClient, text: str) -> None:
    chunks = await streamed(http, stop=[text[20:28] + "\x00", text[-3:] + "\x00"])
    assert text_of(chunks) == text
    assert choices_of(chunks)[-1]["finish_reason"] == "length"


async def test_the_tokens_of_a_stop_string_are_paid_and_those_behind_it_not(http: httpx.AsyncClient, text: str) -> None:
    fields = {"max_tokens": 500, "stop": text[40:44]}
    usage = (await whole(http, **fields))["usage"]
    assert usage["completion_tokens"] < 60
    *_, last = await streamed(http, **fields, stream_options={"include_usage": True})
    assert last["usage"]["completion_tokens"] == usage["completion_tokens"]


@pytest.mark.parametrize("echo", [False, True])
async def test_logprobs_come_with_their_chunks(http: httpx.AsyncClient, echo: bool) -> None:
    fields = {"logprobs": 2, "echo": echo, "max_tokens": 30}
    expected = (await whole(http, **fields))["choices"][0]["logprobs"]
    joined: dict[str, list[Any]] = {name: [] for name in expected}
    for choice in choices_of(await streamed(http, **fields)):
        for name, values in choice["logprobs"].items():
            joined[name] += values
    assert joined == expected
    assert expected.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}


# --- errors --------------------------------------------------------------------------------------------------------


@EACH_FACE
async def test_an_error_before_the_first_byte_is_a_status(
    http_without_key: httpx.AsyncClient, simulated_cluster: RunningCluster, face: Face
) -> None:
    async def answer(**fields: Any) -> httpx.Response:
        body = {**BODY, "stream": True, **fields}
        return await http_without_key.post(face.path, json=body, headers=face.headers(simulated_cluster.key))

    assert_invalid(await answer(temperature=3), face, "temperature")
    assert_invalid(await answer(max_tokens=5000), face, "prompt", "context_length_exceeded")
    assert_error(await answer(model="nobody"), 404, "model_not_found", "model")


def assert_failed_midway(exchange: Exchange, code: str | None) -> None:
    """Its chunks, then an error event and nothing more, which the official client raises."""
    assert (exchange.status, exchange.complete) == (200, True)
    assert b"[DONE]" not in exchange.body
    *chunks, last = exchange.events
    assert_no_leak(json.dumps(last))
    assert last.keys() == {"error"}
    error = last["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("server_error", code)
    told = [chunk for chunk in chunks if isinstance(chunk, dict)]
    assert [choice["finish_reason"] for chunk in told for choice in chunk["choices"]] == [None] * len(told)
    received: list[str] = []
    with replayed(200, exchange.body, {"content-type": "text/event-stream"}) as client:
        stream = client.completions.create(model="m", prompt="hello", stream=True)
        with pytest.raises(openai.APIError, match=error["message"][:20]) as caught:
            received.extend(chunk.choices[0].text for chunk in stream)
    assert received == [chunk["choices"][0]["text"] for chunk in told]
    assert caught.value.code == code


async def lose_the_replica(gate: Gateway) -> None:
    gate.replicas["r0"].reachable = False
    gate.replicas["r0"].break_streams()


@in_virtual_time
async def test_a_replica_that_is_lost_for_good_is_an_event_without_done(tmp_path: Path) -> None:
    async with gateway(tmp_path, limits=replace(LIMITS, resume_timeout_s=5.0)) as gate:
        exchange = gate.request(stream=True, max_tokens=100)
        await exchange.until(lambda: exchange.body.count(b"data: ") >= 3)
        await lose_the_replica(gate)
        await exchange.task
        assert_failed_midway(exchange, "model_not_ready")


@in_virtual_time
async def test_a_deadline_midway_is_an_event_without_done(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate, app_with_deadline(gate, 0.5):
        exchange = gate.request(stream=True, max_tokens=1000)
        await exchange.task
        assert_failed_midway(exchange, "deadline_exceeded")
        await quiet()
        assert gate.sequences == 0


def test_a_bug_midway_is_an_event_without_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    deltas = CompletionInference.deltas

    async def fragile(self: CompletionInference) -> list[ChoiceDelta]:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("/srv/secret/weights.bin")
        return await deltas(self)

    monkeypatch.setattr(CompletionInference, "deltas", fragile)

    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            exchange = gate.request(stream=True, max_tokens=100)
            await exchange.task
            assert_failed_midway(exchange, None)
            await quiet()
            assert gate.sequences == 0

    run_in_virtual_time(scenario())


# --- keep-alive ----------------------------------------------------------------------------------------------------


def waiting(then: Callable[[Gateway], None], tmp_path: Path) -> Exchange:
    """A stream that waits 50 s for a replica, until `then`."""

    async def scenario() -> Exchange:
        async with gateway(tmp_path, limits=replace(LIMITS, hold_timeout_s=55.0)) as gate:
            gate.pool.replicas_changed(frozenset())
            await quiet()
            exchange = gate.request(stream=True, max_tokens=5)
            await asyncio.sleep(14.9)
            assert exchange.status is None
            await asyncio.sleep(35.1)
            assert exchange.events == [": keep-alive"] * 3  # at 15, 30 and 45 s
            then(gate)
            await exchange.task
            return exchange

    return run_in_virtual_time(scenario())


def test_comments_keep_a_stream_alive_that_waits_and_clients_ignore_them(tmp_path: Path) -> None:
    exchange = waiting(lambda gate: gate.pool.replicas_changed(frozenset(gate.replicas)), tmp_path)
    *chunks, done = exchange.events[3:]
    assert done == "[DONE]"
    with replayed(200, exchange.body, {"content-type": "text/event-stream"}) as client:
        received = list(client.completions.create(model="m", prompt="hello", stream=True))
    assert [chunk.choices[0].text for chunk in received] == [chunk["choices"][0]["text"] for chunk in chunks]
    assert len(received) == 5


def test_an_error_after_a_comment_is_an_event(tmp_path: Path) -> None:
    exchange = waiting(lambda gate: None, tmp_path)
    assert len(exchange.events) == 4
    assert_failed_midway(exchange, "model_not_ready")


@in_virtual_time
async def test_a_stream_that_flows_needs_no_comments(tmp_path: Path) -> None:
    async with gateway(tmp_path, keep_alive_s=0.05) as gate:
        assert ": keep-alive" not in await gate.stream(max_tokens=200)
