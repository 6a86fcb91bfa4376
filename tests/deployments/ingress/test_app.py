"""The HTTP surface over simulated engines and a meter in memory."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from deployments.contracts import KeyInfo, Sampling
from deployments.ingress.api.completions.chunks import ChoiceDelta
from deployments.ingress.api.completions.completion import CompletionInference
from deployments.ingress.openapi.document import openapi_document
from deployments.meter.remote.meter_transport import MeterUnreachable
from tests.deployments.ingress.letter_tokenizer import letter_tokenizer, text_of
from tests.deployments.ingress.memory_gateway import BODY_LIMIT_BYTES, Exchange, Gateway, gateway
from tests.deployments.ingress.memory_meter import ADMIN_KEY, USER_KEY
from tests.deployments.ingress.memory_replicas import LIMITS, SETTINGS, undisturbed
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet, run_in_virtual_time

SECRET = "/srv/secret/weights.bin"
STEP_S = SETTINGS.step_s


def made_up(prompt: str, max_tokens: int = 16, *, seed: int | None = None) -> str:
    """What the simulated engine answers: one letter a token."""
    tokens, _ = undisturbed(letter_tokenizer().encode(prompt).ids, Sampling(max_tokens=max_tokens, seed=seed))
    return text_of(tokens)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def text_in(chunks: list[Any], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


def reasons_in(chunks: list[Any], index: int = 0) -> list[str]:
    return [
        c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["index"] == index and c["finish_reason"]
    ]


# --- a completion in one piece -------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_completion(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        response = await gate.complete()
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        body = response.json()
        assert body.pop("id").startswith("cmpl-")
        assert isinstance(body.pop("created"), int)
        assert body == {
            "object": "text_completion",
            "model": "m",
            "system_fingerprint": "fp_1",
            "choices": [
                {
                    "index": 0,
                    "text": made_up("hello"),
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                    "token_ids": None,
                    "prompt_token_ids": None,
                    "prompt_logprobs": None,
                }
            ],
            "usage": usage(5, 16),
        }
        settled = await gate.settlement()
        assert settled.account.request_id == response.json()["id"]
        assert (settled.account.key_id, settled.account.model, settled.status) == ("key-user", "m", "finished")
        assert (settled.prompt_tokens, settled.completion_tokens, settled.account.choices, settled.resumes) == (
            5,
            16,
            1,
            0,
        )
        assert settled.first_token_s is not None
        assert 0 <= settled.first_token_s <= settled.total_s


@in_virtual_time
async def test_what_the_meter_is_asked_for(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        response = await gate.complete(prompt=["ab", "c"], max_tokens=7, n=3)
        [admission] = gate.meter.admissions
        assert admission.request_id == response.json()["id"]
        assert (admission.key_id, admission.model, admission.prompts) == ("key-user", "m", ["ab", "c"])
        assert (admission.max_tokens, admission.choices) == (7, 3)


@pytest.mark.parametrize("streamed", [False, True])
def test_several_prompts_and_choices_come_in_order(tmp_path: Path, streamed: bool) -> None:
    fields: dict[str, Any] = {"prompt": ["ab", "xyz"], "n": 2, "seed": 7, "max_tokens": 9}
    expected = [made_up(prompt, 9, seed=seed) for prompt in ("ab", "xyz") for seed in (7, 8)]
    assert len(set(expected)) == 4

    async def scenario() -> None:
        async with gateway(tmp_path, replicas=3) as gate:
            if streamed:
                chunks = (await gate.stream(**fields))[:-1]
                texts = [text_in(chunks, index) for index in range(4)]
                reasons = [reasons_in(chunks, index) for index in range(4)]
                assert reasons == [["length"]] * 4
            else:
                body = (await gate.complete(**fields)).json()
                assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
                assert body["usage"] == usage(5, 36)
                texts = [choice["text"] for choice in body["choices"]]
            assert texts == expected
            settled = await gate.settlement()
            assert (settled.prompt_tokens, settled.completion_tokens, settled.account.choices) == (5, 36, 4)

    run_in_virtual_time(scenario())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("prompt", "echoed"),
    [("hello", ["hello"]), ([[2, 3], [4]], ["ab", "c"]), ([9, 6, 13, 13, 16], ["hello"]), (["é€", "x"], ["é€", "x"])],
)
def test_echo_puts_the_prompt_before_the_text(tmp_path: Path, streamed: bool, prompt: Any, echoed: list[str]) -> None:
    fields = {"prompt": prompt, "echo": True, "max_tokens": 4}
    expected = [each + made_up(each, 4) for each in echoed]

    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            if streamed:
                chunks = (await gate.stream(**fields))[:-1]
                texts = [text_in(chunks, index) for index in range(len(echoed))]
            else:
                texts = [choice["text"] for choice in (await gate.complete(**fields)).json()["choices"]]
            assert texts == expected

    run_in_virtual_time(scenario())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_ends_text_count_and_engine(tmp_path: Path, streamed: bool, included: bool) -> None:
    whole = made_up("hello", 200)
    stop = whole[20:23]
    begin = whole.index(stop)
    expected = whole[: begin + 3] if included else whole[:begin]
    fields = {"max_tokens": 200, "stop": ["~~", stop], "include_stop_str_in_output": included}

    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            if streamed:
                chunks = (await gate.stream(**fields))[:-1]
                assert (text_in(chunks), reasons_in(chunks)) == (expected, ["stop"])
            else:
                body = (await gate.complete(**fields)).json()
                [choice] = body["choices"]
                assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
                assert body["usage"] == usage(5, begin + 3)
            await quiet()
            assert gate.sequences == 0
            assert len(gate.replicas["r0"].aborts) == 1
            settled = await gate.settlement()
            assert (settled.status, settled.completion_tokens) == ("finished", begin + 3)

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_a_stop_token_counts_and_is_no_text(tmp_path: Path) -> None:
    tokens, reason = undisturbed([9, 6, 13, 13, 16], Sampling(max_tokens=200, stop_token_ids=(5,)))
    assert reason == "stop_token"
    async with gateway(tmp_path) as gate:
        body = (await gate.complete(max_tokens=200, stop_token_ids=[5])).json()
        assert body["choices"][0]["text"] == text_of(tokens[:-1])
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"] == usage(5, len(tokens))


@in_virtual_time
async def test_cached_prompt_tokens_are_told(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        prompt = "a" * 64
        await gate.complete(prompt=prompt)
        body = (await gate.complete(prompt=[prompt, prompt])).json()
        assert body["usage"]["prompt_tokens"] == 128
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 126}
        await quiet()
        assert [settled.cached_tokens for settled in gate.meter.settlements] == [0, 126]


# --- a stream ------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_stream(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        *chunks, done = await gate.stream()
        assert done == "[DONE]"
        [id_] = {chunk["id"] for chunk in chunks}
        [created] = {chunk["created"] for chunk in chunks}
        assert all(
            chunk.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices"} for chunk in chunks
        )
        assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {("text_completion", "m")}
        assert text_in(chunks) == made_up("hello")
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 15 + ["length"]
        assert isinstance(created, int)
        settled = await gate.settlement()
        assert (settled.account.request_id, settled.status, settled.completion_tokens) == (id_, "finished", 16)


@in_virtual_time
async def test_usage_comes_in_a_last_chunk_and_is_null_before(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        *chunks, last, done = await gate.stream(stream_options={"include_usage": True})
        assert done == "[DONE]"
        assert (last["choices"], last["usage"]) == ([], usage(5, 16))
        assert [chunk["usage"] for chunk in chunks] == [None] * 16


@in_virtual_time
async def test_usage_may_come_with_every_chunk(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, last, _done = await gate.stream(stream_options=options, max_tokens=5)
        assert [chunk["usage"] for chunk in chunks] == [usage(5, tokens) for tokens in range(1, 6)]
        assert (last["choices"], last["usage"]) == ([], usage(5, 5))


@in_virtual_time
async def test_continuous_usage_without_usage_is_none_as_in_vllm(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        *chunks, _done = await gate.stream(stream_options={"continuous_usage_stats": True})
        assert not any("usage" in chunk for chunk in chunks)


@in_virtual_time
async def test_each_token_is_sent_when_it_is_made(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        exchange = gate.request(stream=True, max_tokens=100)
        await exchange.until(lambda: exchange.body != b"")
        loop = asyncio.get_running_loop()
        begin, known = loop.time(), len(exchange.events)
        await asyncio.sleep(10 * STEP_S)
        assert len(exchange.events) - known == pytest.approx(10, abs=1)
        await exchange.task
        assert loop.time() - begin == pytest.approx(99 * STEP_S, abs=STEP_S)
        assert exchange.complete


@in_virtual_time
async def test_comments_keep_a_waiting_stream_alive(tmp_path: Path) -> None:
    async with gateway(tmp_path, limits=replace(LIMITS, hold_timeout_s=100.0)) as gate:
        gate.pool.replicas_changed(frozenset())
        await quiet()
        exchange = gate.request(stream=True)
        await asyncio.sleep(14.9)
        assert exchange.status is None
        await asyncio.sleep(35.0)
        assert exchange.status == 200
        assert exchange.events == [": keep-alive"] * 3
        gate.pool.replicas_changed(frozenset(gate.replicas))
        await exchange.task
        assert text_in(exchange.events[3:-1]) == made_up("hello")


@in_virtual_time
async def test_a_stream_that_waits_for_a_pool_at_zero_hears_comments_ever_less_often(tmp_path: Path) -> None:
    async with gateway(tmp_path, limits=replace(LIMITS, cold_start_timeout_s=100.0)) as gate:
        gate.pool.replicas_changed(frozenset())
        await quiet()
        exchange = gate.request(stream=True)
        await asyncio.sleep(0.9)
        assert exchange.status is None
        await asyncio.sleep(0.2)
        assert exchange.events == [": keep-alive"]
        await asyncio.sleep(94.0)  # after 1, 3, 7, 15 s, then each keep_alive_s
        comments = exchange.events.count(": keep-alive")
        assert comments == 4 + (95 - 15) // 15
        gate.pool.replicas_changed(frozenset(gate.replicas))
        await exchange.task
        assert text_in(exchange.events[comments:-1]) == made_up("hello")
        # Clients that split at blank lines, and those that read lines.
        body = exchange.body.decode()
        blocks = [block for block in body.split("\n\n") if block and not block.startswith(":")]
        lines = [line for line in body.splitlines() if line.startswith("data: ")]
        assert blocks == lines


@in_virtual_time
async def test_a_pool_at_zero_that_gets_no_replica_is_told_as_an_error(tmp_path: Path) -> None:
    async with gateway(tmp_path, limits=replace(LIMITS, cold_start_timeout_s=20.0)) as gate:
        gate.pool.replicas_changed(frozenset())
        await quiet()
        stream, whole = gate.request(stream=True), gate.request()
        await asyncio.gather(stream.task, whole.task)
        assert whole.status == 503
        assert stream.status == 200
        assert stream.events[-1]["error"]["code"] == "model_not_ready"


@in_virtual_time
async def test_a_stream_that_flows_has_no_comments(tmp_path: Path) -> None:
    async with gateway(tmp_path, keep_alive_s=1.5 * STEP_S) as gate:
        assert not any(isinstance(event, str) for event in (await gate.stream(max_tokens=100))[:-1])


@in_virtual_time
async def test_a_stream_survives_the_loss_of_its_replica(tmp_path: Path) -> None:
    async with gateway(tmp_path, replicas=2) as gate:
        exchange = gate.request(stream=True, max_tokens=60, stream_options={"include_usage": True})
        await exchange.until(lambda: len(exchange.body) > 0)
        for replica in gate.replicas.values():
            if replica.sequences:
                replica.reachable = False
                replica.break_streams()
        await exchange.task
        *chunks, last, done = exchange.events
        assert (text_in(chunks), done, last["usage"]) == (made_up("hello", 60), "[DONE]", usage(5, 60))
        settled = await gate.settlement()
        assert (settled.status, settled.completion_tokens, settled.resumes) == ("finished", 60, 1)


# --- errors --------------------------------------------------------------------------------------------------------


def assert_error(response: Any, status: int, code: str | None, *, param: str | None = None, words: str = "") -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert words in error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer  ", f"Basic {USER_KEY}", USER_KEY, "Bearer sk-wrong", "Bearer \xe9"]
)
def test_without_a_valid_key_nothing_is_answered_and_nothing_read(tmp_path: Path, header: str | None) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            del gate.client.headers["authorization"]
            headers: dict[bytes, bytes] = {} if header is None else {b"authorization": header.encode("latin-1")}
            for method, path in [
                ("POST", "/v1/completions"),
                ("GET", "/v1/models"),
                ("GET", "/v1/models/m"),
                ("GET", "/v1/models/unknown"),
                ("GET", "/admin/v1/replicas"),
            ]:
                response = await gate.client.request(method, path, headers=headers)
                assert_error(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
            exchange = Exchange(gate.app, b"{}", headers={} if header is None else {"authorization": header})
            await exchange.task
            assert (exchange.status, exchange.asked) == (401, 0)

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_a_cluster_that_requires_no_keys_asks_for_none(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        gate.meter.grant("", KeyInfo("anonymous", "anonymous", admin=False))
        del gate.client.headers["authorization"]
        assert (await gate.complete()).status_code == 200
        assert (await gate.settlement()).account.key_id == "anonymous"
        assert_error(await gate.client.get("/admin/v1/replicas"), 403, "permission_denied")


@in_virtual_time
async def test_the_scheme_of_the_key_is_case_insensitive(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        response = await gate.client.get("/v1/models", headers={"authorization": f"bearer  {USER_KEY} "})
        assert response.status_code == 200


@in_virtual_time
async def test_cards_of_models_have_what_vllms_clients_read(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        [card] = (await gate.client.get("/v1/models")).json()["data"]
        assert (await gate.client.get("/v1/models/m")).json() == card
        created = card["created"]
        [permission] = card.pop("permission")
        assert card == {
            "id": "m",
            "object": "model",
            "created": created,
            "owned_by": "millstream",
            "root": "m",
            "parent": None,
            "max_model_len": 2048,
        }
        assert permission.keys() == {
            *("id", "object", "created", "organization", "group", "is_blocking"),
            *("allow_create_engine", "allow_sampling", "allow_logprobs", "allow_search_indices", "allow_view"),
            "allow_fine_tuning",
        }


@in_virtual_time
async def test_a_model_answers_to_its_aliases_and_is_metered_under_its_own_name(tmp_path: Path) -> None:
    name = "Qwen/Qwen2.5-7B"
    async with gateway(tmp_path, models=(name, "other"), aliases=("gpt-4", "Qwen/latest")) as gate:
        cards = (await gate.client.get("/v1/models")).json()["data"]
        own = [(name, None), ("gpt-4", name), ("Qwen/latest", name)]
        assert [(card["id"], card["parent"]) for card in cards] == [*own, ("other", None)]
        assert {card["root"] for card in cards} == {name, "other"}
        for asked, parent in own:
            for url in (asked, asked.replace("/", "%2F")):
                card = (await gate.client.get(f"/v1/models/{url}")).json()
                assert (card["id"], card["parent"]) == (asked, parent)
            assert (await gate.complete(model=asked)).json()["model"] == name
            assert {chunk["model"] for chunk in (await gate.stream(model=asked))[:-1]} == {name}
            tokens = await gate.client.post("/tokenize", json={"model": asked, "prompt": "ab"})
            assert tokens.json()["count"] == 2
        await quiet()
        assert {admission.model for admission in gate.meter.admissions} == {name}
        assert {settled.account.model for settled in gate.meter.settlements} == {name}
        for allowed in (name, "Qwen/latest"):  # a key for one of its names sees them all
            gate.meter.grant("k", KeyInfo("key-k", "k", admin=False, models=(allowed,)))
            seen = (await gate.client.get("/v1/models", headers={"authorization": "Bearer k"})).json()["data"]
            assert [(card["id"], card["parent"]) for card in seen] == own
            await asyncio.sleep(5)
        missing = await gate.client.get("/v1/models/Qwen/none")
        assert_error(missing, 404, "model_not_found", param="model", words="'Qwen/none'")


@pytest.mark.parametrize("usage_too", [False, True])
def test_obfuscated_chunks_are_of_like_sizes(tmp_path: Path, usage_too: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            options = {"include_obfuscation": True, "include_usage": usage_too}
            response = await gate.complete(stream=True, stream_options=options, logprobs=2)
            *events, done = response.content.removesuffix(b"\n\n").split(b"\n\n")
            assert done == b"data: [DONE]"
            assert {(len(event) + 2) % 256 for event in events} == {0}
            chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
            assert text_in(chunks) == made_up("hello")
            assert len({chunk["obfuscation"] for chunk in chunks}) > 1
            plain = await gate.stream(stream_options={"include_obfuscation": False})
            assert all("obfuscation" not in chunk for chunk in plain[:-1])

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_unknown_models_routes_and_methods(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        assert_error(await gate.complete(model="x"), 404, "model_not_found", param="model", words="'x'")
        assert_error(await gate.client.get("/v1/models/x"), 404, "model_not_found", param="model", words="'x'")
        assert_error(await gate.client.post("/v1/chat/completions"), 404, None, words="POST /v1/chat/completions")
        assert_error(await gate.client.get("/"), 404, None)
        response = await gate.client.get("/v1/completions")
        assert_error(response, 405, None, words="GET is not allowed on /v1/completions")
        assert response.headers["allow"] == "POST"
        assert_error(await gate.client.delete("/v1/models"), 405, None)
        await quiet()
        assert (gate.meter.admissions, gate.meter.settlements) == ([], [])


PACKED = {"content-type": "application/json", "content-encoding": "gzip"}


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity", ""])
def test_a_body_may_be_packed_with_gzip(tmp_path: Path, encoding: str) -> None:
    plain = b'{"model":"m","prompt":"hello"}'
    body = gzip.compress(plain[:9]) + gzip.compress(plain[9:]) if "gzip" in encoding.lower() else plain

    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            for path in ("/v1/completions", "/tokenize"):
                response = await gate.client.post(path, content=body, headers=PACKED | {"content-encoding": encoding})
                assert response.status_code == 200, response.text
            await quiet()

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_a_packed_body_is_unpacked_no_further_than_the_limit(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        many = gzip.compress(b" " * BODY_LIMIT_BYTES) + gzip.compress(b" ")
        for bomb in (gzip.compress(b" " * 2**20), many):
            assert len(bomb) < BODY_LIMIT_BYTES
            response = await gate.client.post("/v1/completions", content=bomb, headers=PACKED)
            assert_error(response, 413, None, words="4096 bytes, once it is unpacked")
        packed = gzip.compress(b"{}")
        for broken, words in (
            (b"{}", "not what gzip makes"),
            (packed[:-1], "ends before"),
            (packed + b"xyz", "not what"),
            (packed * 9, "more than 8 pieces"),
        ):
            response = await gate.client.post("/v1/completions", content=broken, headers=PACKED)
            assert_error(response, 400, None, words=words)
        assert (await gate.client.post("/v1/completions", content=b"", headers=PACKED)).status_code == 400
        await quiet()
        assert (gate.meter.admissions, gate.meter.settlements) == ([], [])


@in_virtual_time
async def test_other_encodings_are_refused_with_the_one_there_is(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        for encoding in ("deflate", "br", "zstd", "gzip, gzip", "x" * 1000):
            headers = PACKED | {"content-encoding": encoding}
            response = await gate.client.post("/v1/completions", content=b"{}", headers=headers)
            assert_error(response, 415, None, words="expected 'gzip'")
            assert response.headers["accept-encoding"] == "gzip"


@in_virtual_time
async def test_a_body_beyond_the_limit_is_not_read_to_its_end(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        fits = json.dumps({"model": "m", "prompt": "p"}).encode().ljust(BODY_LIMIT_BYTES)
        headers = {"content-type": "application/json"}
        assert (await gate.client.post("/v1/completions", content=fits, headers=headers)).status_code == 200
        response = await gate.client.post("/v1/completions", content=fits + b" ", headers=headers)
        assert_error(response, 413, None, words="4096 bytes")

        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 1024
                yield b" " * 1024

        response = await gate.client.post("/v1/completions", content=endless(), headers=headers)
        assert_error(response, 413, None)
        assert sent == BODY_LIMIT_BYTES + 1024


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "json"])
def test_other_content_types_are_refused(tmp_path: Path, content_type: str | None) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            headers = {} if content_type is None else {"content-type": content_type}
            response = await gate.client.post("/v1/completions", content=b"{}", headers=headers)
            assert_error(response, 415, None, words="application/json")

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_the_content_type_may_have_parameters(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        response = await gate.client.post("/v1/completions", content=b'{"model":"m","prompt":"p"}', headers=headers)
        assert response.status_code == 200


@in_virtual_time
async def test_invalid_requests_reach_no_engine_and_no_ledger(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        assert_error(await gate.complete(max_tokens=-1), 400, None, param="max_tokens")
        assert_error(await gate.complete(unheard_of=1), 400, None, param="unheard_of")
        assert_error(await gate.complete(prompt=[]), 400, None, param="prompt")
        assert_error(await gate.complete(max_tokens=10**30), 400, None, param="max_tokens")
        assert_error(await gate.complete(top_k=10**30), 400, None, param="top_k")
        assert_error(await gate.complete(stop_token_ids=[257]), 400, None, param="stop_token_ids", words="257")
        assert_error(await gate.complete(max_tokens=5000), 400, "context_length_exceeded", param="prompt", words="2048")
        response = await gate.client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        assert_error(response, 400, None, words="not valid JSON")
        await quiet()
        assert (gate.replicas["r0"].submissions, gate.meter.settlements) == ([], [])


@in_virtual_time
async def test_an_absent_meter_is_503(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        await gate.client.get("/v1/models")  # the key is known
        gate.meter.error = MeterUnreachable("gone")
        response = await gate.complete()
        assert_error(response, 503, None)
        assert response.headers["retry-after"] == "5"
        assert gate.replicas["r0"].submissions == []
        gate.meter.error = None


@pytest.mark.parametrize("streamed", [False, True])
def test_full_replicas_are_503_and_settled_once(tmp_path: Path, streamed: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, settings=replace(SETTINGS, max_num_seqs=1), max_waiting=1) as gate:
            taken = []
            for _ in range(2):  # one that runs and one that waits
                taken.append(gate.request(max_tokens=1000))
                await asyncio.sleep(2 * STEP_S)
            response = await gate.complete(stream=streamed)
            assert_error(response, 503, "overloaded")
            assert response.headers["retry-after"] == "1"
            settled = await gate.settlement()
            assert (settled.status, settled.completion_tokens) == ("failed", 0)
            for exchange in taken:
                exchange.hang_up()
                await exchange.task

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_no_replica_is_503_after_the_hold_time(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        gate.pool.replicas_changed(frozenset())
        await quiet()
        response = await gate.complete()
        assert_error(response, 503, "model_not_ready")
        assert response.headers["retry-after"] == "10"
        assert (await gate.settlement()).status == "failed"


@in_virtual_time
async def test_what_no_engine_can_run_is_400(tmp_path: Path) -> None:
    async with gateway(tmp_path, settings=replace(SETTINGS, kv_blocks=2)) as gate:
        assert_error(await gate.complete(max_tokens=100), 400, None, words="KV blocks")
        assert (await gate.settlement()).status == "failed"


@in_virtual_time
async def test_an_error_in_a_stream_is_an_event_and_no_done_follows(tmp_path: Path) -> None:
    async with gateway(tmp_path, limits=replace(LIMITS, resume_timeout_s=5.0)) as gate:
        exchange = gate.request(stream=True, max_tokens=100)
        await exchange.until(lambda: len(exchange.body) > 0)
        gate.replicas["r0"].reachable = False
        gate.replicas["r0"].break_streams()
        await exchange.task
        *chunks, error = exchange.events
        assert exchange.status == 200
        assert error["error"]["code"] == "model_not_ready"
        assert text_in(chunks) == made_up("hello", len(chunks))
        assert reasons_in(chunks) == []
        settled = await gate.settlement()
        assert (settled.status, settled.completion_tokens) == ("failed", len(chunks))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_an_unexpected_error_tells_nothing_of_the_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool, after: int
) -> None:
    calls = 0
    deltas = CompletionInference.deltas

    async def fragile(self: CompletionInference) -> list[ChoiceDelta]:
        nonlocal calls
        calls += 1
        if calls > after:
            raise RuntimeError(SECRET)
        return await deltas(self)

    monkeypatch.setattr(CompletionInference, "deltas", fragile)

    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            exchange = gate.request(stream=streamed, max_tokens=100)
            await exchange.task
            assert b"secret" not in exchange.body
            assert b"Error" not in exchange.body
            if streamed and after:
                assert exchange.status == 200
                assert exchange.events[-1]["error"]["type"] == "server_error"
            else:
                assert exchange.status == 500
                assert json.loads(exchange.body)["error"]["type"] == "server_error"
            await quiet()
            assert gate.sequences == 0
            settled = await gate.settlement()
            assert (settled.status, settled.completion_tokens) == ("failed", after)

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_an_unexpected_error_before_admission_is_500_without_internals(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        await gate.client.get("/v1/models")
        gate.meter.error = RuntimeError(SECRET)
        response = await gate.complete()
        assert_error(response, 500, None)
        assert "secret" not in response.text
        gate.meter.error = None
        settled = await gate.settlement()  # for the meter may have reserved
        assert (settled.status, settled.prompt_tokens, settled.completion_tokens) == ("failed", 0, 0)


# --- clients that leave --------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_client_that_leaves_a_stream_frees_the_engine_and_pays_for_what_was_made(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        exchange = gate.request(stream=True, max_tokens=1000)
        await exchange.until(lambda: exchange.body.count(b"data: ") == 7)
        exchange.hang_up()
        await exchange.task
        await quiet()
        assert gate.sequences == 0
        assert not exchange.complete
        settled = await gate.settlement()
        assert (settled.status, settled.prompt_tokens, settled.completion_tokens) == ("cancelled", 5, 7)


@in_virtual_time
async def test_a_client_that_leaves_before_the_answer_frees_the_engine_and_pays_for_what_was_made(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path, replicas=2) as gate:
        exchange = gate.request(max_tokens=1000, n=3)
        await asyncio.sleep(10.5 * STEP_S)
        assert gate.sequences == 3
        exchange.hang_up()
        await exchange.task
        await quiet()
        assert gate.sequences == 0
        assert exchange.status is None
        settled = await gate.settlement()
        assert (settled.status, settled.completion_tokens, settled.account.choices) == ("cancelled", 30, 3)


@in_virtual_time
async def test_a_client_that_leaves_while_no_replica_is_up_is_settled_with_no_tokens(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        gate.pool.replicas_changed(frozenset())
        await quiet()
        exchange = gate.request(stream=True)
        await asyncio.sleep(1)
        exchange.hang_up()
        await exchange.task
        settled = await gate.settlement()
        assert (settled.status, settled.completion_tokens, settled.first_token_s) == ("cancelled", 0, None)
        gate.pool.replicas_changed(frozenset(gate.replicas))
        await asyncio.sleep(1)
        assert gate.replicas["r0"].submissions == []


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_that_serve_cancels_is_settled_once(tmp_path: Path, streamed: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            exchange = gate.request(stream=streamed, max_tokens=1000)
            await asyncio.sleep(10.5 * STEP_S)
            exchange.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await exchange.task
            await quiet()
            assert gate.sequences == 0
            settled = await gate.settlement()
            assert (settled.status, settled.completion_tokens) == ("cancelled", 10)

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_a_request_that_serve_cancels_while_it_is_admitted_gives_its_reservation_back(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        await gate.client.get("/v1/models")
        gate.meter.answering.clear()
        exchange = gate.request()
        await quiet()
        exchange.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange.task
        gate.meter.answering.set()
        settled = await gate.settlement()
        assert settled.account.request_id == gate.meter.admissions[0].request_id
        assert (settled.status, settled.prompt_tokens, settled.completion_tokens) == ("cancelled", 0, 0)


@in_virtual_time
async def test_a_client_that_leaves_before_its_body_is_whole_is_no_error(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        with capture_logs() as logs:
            exchange = Exchange(gate.app, b'{"model":"m",', whole_body=False)
            await quiet()
            exchange.hang_up()
            await exchange.task
        assert exchange.status is None
        assert [log["event"] for log in logs if log["log_level"] == "error"] == []
        assert gate.meter.admissions == []


# --- everything else -----------------------------------------------------------------------------------------------


@in_virtual_time
async def test_models_are_listed(tmp_path: Path) -> None:
    async with gateway(tmp_path, models=("m", "a")) as gate:
        listed = (await gate.client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["a", "m"]
        card = (await gate.client.get("/v1/models/m")).json()
        assert card == listed["data"][1]
        assert isinstance(card["created"], int)
        assert (card["owned_by"], card["max_model_len"]) == ("millstream", 2048)


@in_virtual_time
async def test_replicas_are_listed_for_the_admin_key_only(tmp_path: Path) -> None:
    async with gateway(tmp_path, replicas=2) as gate:
        assert_error(await gate.client.get("/admin/v1/replicas"), 403, "permission_denied")
        exchange = gate.request(max_tokens=100)
        await asyncio.sleep(5 * STEP_S)
        response = await gate.client.get("/admin/v1/replicas", headers={"authorization": f"Bearer {ADMIN_KEY}"})
        cards = response.json()["data"]
        assert sorted(card["id"] for card in cards) == ["r0", "r1"]
        assert {card["model"] for card in cards} == {"m"}
        assert sorted(card["running"] for card in cards) == [0, 1]
        assert all(card["in_rotation"] and not card["draining"] for card in cards)
        await exchange.task


@in_virtual_time
async def test_health_needs_no_key_and_no_meter(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        gate.meter.error = MeterUnreachable("gone")
        del gate.client.headers["authorization"]
        for path in ("/healthz", "/health"):
            response = await gate.client.get(path)
            assert (response.status_code, response.json()) == (200, {"status": "ok"})
        gate.meter.error = None


@in_virtual_time
async def test_head_is_answered_like_get_on_every_route(tmp_path: Path) -> None:
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    not_in_memory = ("/v1/usage", "/v1/organization/", "/admin/v1/keys", "/admin/v1/teams")
    gets = [path for path, methods in openapi_document()["paths"].items() if "get" in methods]
    async with gateway(tmp_path) as gate:
        for path in gets:
            if path.startswith(not_in_memory):
                continue
            url = path.replace("{model}", "m")
            got = await gate.client.get(url, headers=admin)
            head = await gate.client.head(url, headers=admin)
            assert (head.status_code, head.headers["content-type"]) == (200, got.headers["content-type"]), path
        assert (await gate.client.head("/metrics")).status_code == 403
        assert (await gate.client.head("/v1/completions")).status_code == 405


async def readiness(gate: Gateway) -> tuple[int, dict[str, Any]]:
    response = await gate.client.get("/readyz", headers={"authorization": ""})
    return response.status_code, response.json()


@in_virtual_time
async def test_ready_means_routes_meter_and_a_model(tmp_path: Path) -> None:
    ready = {"status": "ready", "routes": True, "meter": True, "models": {"a": True, "m": True}}
    async with gateway(tmp_path, models=("m", "a")) as gate:
        assert await readiness(gate) == (200, ready)

        gate.pool.replicas_changed(frozenset())
        await quiet()
        assert await readiness(gate) == (200, {**ready, "models": {"a": True, "m": False}})

        gate.catalog.find("a").pool.replicas_changed(frozenset())
        await quiet()
        nothing = {"status": "not ready", "models": {"a": False, "m": False}}
        assert await readiness(gate) == (503, {**ready, **nothing})

        for model in gate.catalog.models():
            model.pool.replicas_changed(frozenset(gate.replicas))
        await quiet()
        gate.meter.error = MeterUnreachable("gone")
        assert await readiness(gate) == (503, {**ready, "status": "not ready", "meter": False})
        gate.meter.error = None
        gate.meter.answering.clear()
        assert await readiness(gate) == (503, {**ready, "status": "not ready", "meter": False})
        gate.meter.answering.set()
        assert await readiness(gate) == (200, ready)


@pytest.mark.parametrize("turns", range(40))
@pytest.mark.parametrize("streamed", [True, False])
@in_virtual_time
async def test_a_client_that_leaves_at_any_moment_frees_the_engine(tmp_path: Path, streamed: bool, turns: int) -> None:
    async with gateway(tmp_path) as gate:
        exchange = gate.request(stream=streamed, max_tokens=1000)
        for _ in range(turns):  # of the event loop
            await asyncio.sleep(0)
        exchange.hang_up()
        await exchange.task
        await asyncio.sleep(0.1)  # for the abort to follow its submission
        assert gate.sequences == 0
