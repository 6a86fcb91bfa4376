"""/tokenize and /detokenize: vLLM's shapes and results, strictly checked."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from deployments.contracts import KeyInfo
from deployments.ingress.api import tokens as tokenization
from deployments.ingress.api.tokens import TOKENS
from deployments.ingress.app import IngressSettings, build_app
from deployments.ingress.routing.catalog import Catalog, CatalogEntry
from deployments.ingress.routing.engine_pool import EnginePool
from tests.deployments.accounts import RecordedOutbox
from tests.deployments.ingress.letter_tokenizer import letter_tokenizer
from tests.deployments.ingress.memory_gateway import AUTHORIZED, Gateway, gateway, meter_client_of
from tests.deployments.ingress.memory_meter import MemoryMeter
from tests.deployments.ingress.memory_replicas import LIMITS
from tests.deployments.ingress.virtual_time import in_virtual_time, run_in_virtual_time, write_scheduler

HELLO = [9, 6, 13, 13, 16]


async def tokenize(gate: Gateway, **fields: Any) -> httpx.Response:
    return await gate.client.post("/tokenize", json=fields)


async def detokenize(gate: Gateway, **fields: Any) -> httpx.Response:
    return await gate.client.post("/detokenize", json=fields)


@in_virtual_time
async def test_a_text_becomes_tokens(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        response = await tokenize(gate, model="m", prompt="hello")
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
        assert response.json() == {"count": 5, "max_model_len": 2048, "tokens": HELLO, "token_strs": None}
        response = await tokenize(gate, prompt=" é", return_token_strs=True)
        assert response.json()["token_strs"] == ["Ġ", "Ã", "©"]
        empty = (await tokenize(gate, prompt="", return_token_strs=True)).json()
        assert empty == {"count": 0, "max_model_len": 2048, "tokens": [], "token_strs": []}


@in_virtual_time
async def test_a_text_of_too_many_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_MAX_TOKENS", 5)
    async with gateway(tmp_path) as gate:
        assert (await tokenize(gate, prompt="hello")).json()["count"] == 5
        error = (await tokenize(gate, prompt="hellos")).json()["error"]
        assert (error["param"], error["message"]) == ("prompt", "The text has 6 tokens; expected at most 5.")


@in_virtual_time
async def test_a_text_that_would_take_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_MAX_TEXT_BYTES", 5)
    async with gateway(tmp_path) as gate:
        assert (await tokenize(gate, prompt="hello")).json()["count"] == 5
        error = (await tokenize(gate, prompt="éèê")).json()["error"]
        message = "The text has 6 bytes; expected at most 5. Tokenize it in parts."
        assert (error["param"], error["message"]) == ("prompt", message)


@in_virtual_time
async def test_tokens_become_a_text(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        response = await detokenize(gate, model="m", tokens=HELLO)
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
        assert response.json() == {"prompt": "hello"}
        assert (await detokenize(gate, tokens=[])).json() == {"prompt": ""}
        assert (await detokenize(gate, tokens=[2, 0, 3])).json() == {"prompt": "a<|end|>b"}


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_the_model_may_be_left_out_when_there_is_one(tmp_path: Path, path: str) -> None:
    fields: dict[str, Any] = {"prompt": "a"} if path == "/tokenize" else {"tokens": [2]}

    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            assert (await gate.client.post(path, json=fields)).status_code == 200
            assert (await gate.client.post(path, json={**fields, "model": None})).status_code == 200
            response = await gate.client.post(path, json={**fields, "model": "x"})
            assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        async with gateway(tmp_path, models=("m", "a")) as gate:
            response = await gate.client.post(path, json=fields)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
            assert (await gate.client.post(path, json={**fields, "model": "a"})).status_code == 200

    run_in_virtual_time(scenario())


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "Missing"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "expected a string"),
        ("/tokenize", {"prompt": 1}, "prompt", "expected a string"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", "true or false"),
        ("/tokenize", {"prompt": "a", "x": 1}, "x", "Unrecognized"),
        ("/tokenize", {"prompt": "a", "messages": []}, "messages", "only a prompt can be tokenized, not a chat"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "not a chat"),
        ("/detokenize", {}, "tokens", "Missing"),
        ("/detokenize", {"tokens": "a"}, "tokens", "expected an array"),
        ("/detokenize", {"tokens": [1.5]}, "tokens.0", "expected an integer"),
        ("/detokenize", {"tokens": [True]}, "tokens.0", "expected an integer"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0", "greater than or equal to 0"),
        ("/detokenize", {"tokens": [2**31]}, "tokens.0", "less than or equal to"),
        ("/detokenize", {"tokens": [1, 257]}, "tokens", "Token id 257 is out of vocabulary."),
        ("/detokenize", {"tokens": [1], "prompt": "a"}, "prompt", "Unrecognized"),
    ],
)
def test_what_is_refused(tmp_path: Path, path: str, fields: dict[str, Any], param: str, words: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            response = await gate.client.post(path, json=fields)
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["param"] == param
            assert words in error["message"]

    run_in_virtual_time(scenario())


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_a_key_is_needed_as_for_completions(tmp_path: Path, path: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            response = await gate.client.post(path, headers={"authorization": ""}, content=b"not read")
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            gate.meter.grant("", KeyInfo("anonymous", "anonymous", admin=False))
            response = await gate.client.post(path, headers={"authorization": ""}, content=b"{}")
            assert response.status_code == 415

    run_in_virtual_time(scenario())


# --- a tokenizer that adds special tokens and that training has left with a truncation ------------------------------


def save_framing_tokenizer(folder: Path) -> None:
    words = {word: number for number, word in enumerate(["<s>", "</s>", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="b"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"))


async def client_of(folder: Path) -> httpx.AsyncClient:
    async def existing(_applications: object) -> frozenset[str]:
        return frozenset(["model-m"])

    async def open_pool(entry: CatalogEntry) -> EnginePool:
        return EnginePool(
            entry.name,
            _no_replica,
            ingress_id="i",
            limits=entry.limits,
            writes=write_scheduler(),
            checkpoint=RecordedOutbox().checkpoint,
        )

    catalog = Catalog(existing, open_pool)
    await catalog.replace(
        [
            CatalogEntry(
                name="m", application="model-m", folder=folder, max_model_len=99, fingerprint="fp", limits=LIMITS
            )
        ]
    )
    meter = MemoryMeter({"m": letter_tokenizer()})
    app = build_app(catalog, meter_client_of(meter, folder), IngressSettings(2**21, 15.0), endpoints=(TOKENS,))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway", headers=AUTHORIZED)


async def tokenized(client: httpx.AsyncClient, text: str, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.post("/tokenize", json={"prompt": text, **fields})).json()
    return answer


def _no_replica(replica_id: str) -> Any:
    raise AssertionError(replica_id)


async def test_special_tokens_are_added_unless_not_wanted(tmp_path: Path) -> None:
    save_framing_tokenizer(tmp_path)
    client = await client_of(tmp_path)
    assert (await tokenized(client, "a b"))["tokens"] == [0, 2, 3, 1]
    assert (await tokenized(client, "a b", add_special_tokens=False))["tokens"] == [2, 3]


async def test_nothing_is_cut_and_nothing_padded(tmp_path: Path) -> None:
    save_framing_tokenizer(tmp_path)
    client = await client_of(tmp_path)
    assert (await tokenized(client, "a " * 100))["count"] == 102
    assert (await tokenized(client, "a"))["count"] == 3


async def test_long_texts_leave_the_event_loop_free(tmp_path: Path) -> None:
    save_framing_tokenizer(tmp_path)
    client = await client_of(tmp_path)
    worst_s = 0.0
    begin = time.perf_counter()
    work = asyncio.create_task(tokenized(client, "a " * 200_000))
    while not work.done():
        before = time.perf_counter()
        await asyncio.sleep(0)
        worst_s = max(worst_s, time.perf_counter() - before)
    assert (await work)["count"] == 200_002
    assert worst_s < (time.perf_counter() - begin) / 2
