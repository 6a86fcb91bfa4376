"""Keys, limits and usage on a cluster of three ingresses and two meters on PostgreSQL, as its users meet them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.schema import REQUESTS
from tests.conftest import MeteredCluster, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CLIENTS = 64
LIMIT_TOKENS = 10_000
LIMIT_TEST_S = float(os.environ.get("MILLSTREAM_LIMIT_TEST_S", "80"))
"""How long the clients press on: until the first minute has come back once; 180 for the whole proof."""


def create_key(metered: MeteredCluster, name: str, *options: str) -> dict[str, Any]:
    result = metered.cluster.millstream("keys", "create", name, "--json", *options)
    assert result.returncode == 0, result.stderr
    created: dict[str, Any] = json.loads(result.stdout)
    return created


def headers_of(key: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {key['key']}"}


def rows_of(metered: MeteredCluster, key_id: str) -> list[Any]:
    database = open_database(metered.database_url)
    try:
        with database.connect() as connection:
            return list(connection.execute(sa.select(REQUESTS).where(REQUESTS.c.key_id == key_id)))
    finally:
        database.dispose()


async def settled_rows(metered: MeteredCluster, key_id: str, count: int) -> list[Any]:
    async def recorded() -> bool:
        return len(await asyncio.to_thread(rows_of, metered, key_id)) >= count

    await eventually(recorded, 20.0, every_s=0.2)
    return rows_of(metered, key_id)


# --- keys -------------------------------------------------------------------------------------------------------------


async def test_a_key_works_at_once_and_a_revoked_one_nowhere_after_five_seconds(
    metered_cluster: MeteredCluster,
) -> None:
    key = create_key(metered_cluster, "short-lived")
    assert key["key"].startswith(key["prefix"])

    async def statuses() -> set[int]:
        async with metered_cluster.cluster.client() as client:  # new connections, which go to all ingresses
            answers = await asyncio.gather(*(client.get("/v1/models", headers=headers_of(key)) for _ in range(24)))
        return {answer.status_code for answer in answers}

    assert await statuses() == {200}
    assert metered_cluster.cluster.millstream("keys", "revoke", key["id"]).returncode == 0
    revoked_at = time.monotonic()

    async def refused() -> bool:
        return await statuses() == {401}

    await eventually(refused, 10.0, every_s=0.2)
    assert time.monotonic() - revoked_at < 5.0
    for _ in range(3):
        assert await statuses() == {401}


async def test_a_key_is_kept_to_its_models(metered_cluster: MeteredCluster) -> None:
    key = create_key(metered_cluster, "elsewhere", "--models", "some-other-model")
    async with metered_cluster.cluster.client() as client:
        body = {"model": "sim-a", "prompt": "x"}
        answer = await client.post("/v1/completions", json=body, headers=headers_of(key))
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "model_not_allowed"
        assert (await client.get("/v1/models", headers=headers_of(key))).json()["data"] == []


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(LIMIT_TEST_S + 120)
async def test_a_limit_holds_in_every_minute_is_used_up_and_tells_when_to_come_back(
    metered_cluster: MeteredCluster,
) -> None:
    patient = asyncio.create_task(come_back_when_told(metered_cluster))  # takes a minute, too
    key = create_key(metered_cluster, "limited", "--tokens-per-minute", str(LIMIT_TOKENS))
    source = random.Random(4)
    loop = asyncio.get_running_loop()
    end = loop.time() + LIMIT_TEST_S
    admitted, refused = 0, 0

    async def press_on(client: httpx.AsyncClient) -> None:
        nonlocal admitted, refused
        while loop.time() < end:
            body = {
                "model": "sim-a",
                "prompt": [source.randrange(1000, 40_000) for _ in range(source.randint(1, 60))],
                "max_tokens": source.randint(20, 100),
                "ignore_eos": True,
            }
            answer = await client.post("/v1/completions", json=body, headers=headers_of(key))
            if answer.status_code == 200:
                admitted += 1
                continue
            assert answer.status_code == 429, answer.text
            refused += 1
            assert answer.headers["x-ratelimit-limit-tokens"] == str(LIMIT_TOKENS)
            wait_s = int(answer.headers["retry-after"])
            assert 1 <= wait_s <= 60
            await asyncio.sleep(min(wait_s, max(0.0, end - loop.time())))

    async with metered_cluster.cluster.client() as client:
        await asyncio.gather(*(press_on(client) for _ in range(CLIENTS)))
    assert refused >= CLIENTS
    rows = await settled_rows(metered_cluster, key["id"], admitted)
    assert len(rows) == admitted
    entries = sorted((row.admitted_at, row.reserved_tokens) for row in rows)
    assert all(row.reserved_tokens == row.prompt_tokens + row.completion_tokens for row in rows)
    for number, (begin, _) in enumerate(entries):
        within = sum(tokens for at, tokens in entries[number:] if at < begin + 60.0)
        assert within <= LIMIT_TOKENS
    bursts = 1 + int((LIMIT_TEST_S - 2.0) // 60)  # Retry-After is in whole seconds
    assert sum(tokens for _, tokens in entries) >= 0.95 * LIMIT_TOKENS * bursts
    await patient


async def come_back_when_told(metered_cluster: MeteredCluster) -> None:
    """Nobody else uses this key: the retry succeeds."""
    key = create_key(metered_cluster, "patient", "--requests-per-minute", "2")
    async with metered_cluster.cluster.client() as client:

        async def ask() -> httpx.Response:
            body = {"model": "sim-a", "prompt": "x", "max_tokens": 1}
            return await client.post("/v1/completions", json=body, headers=headers_of(key))

        assert [(await ask()).status_code for _ in range(2)] == [200, 200]
        refusal = await ask()
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refusal.headers["x-ratelimit-remaining-requests"] == "0"
        await asyncio.sleep(int(refusal.headers["retry-after"]))
        assert (await ask()).status_code == 200


async def test_a_team_shares_its_limits(metered_cluster: MeteredCluster) -> None:
    assert metered_cluster.cluster.millstream("teams", "set", "red", "--concurrency", "2").returncode == 0
    keys = [create_key(metered_cluster, f"red-{number}", "--team", "red") for number in range(3)]
    body = {"model": "sim-a", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    async with metered_cluster.cluster.client() as client:
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json=body, headers=headers_of(key)) for key in keys)
        )
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429]

        async def admitted_again() -> bool:
            return (await client.post("/v1/completions", json=body, headers=headers_of(keys[0]))).status_code == 200

        await eventually(admitted_again, 5.0)


# --- usage ------------------------------------------------------------------------------------------------------------


def random_parameters(source: random.Random) -> dict[str, Any]:
    n = source.randint(1, 3)
    parameters: dict[str, Any] = {
        "prompt": source.choice(
            ["Once upon a time", ["one", "two words"], [504, 3575, 282], [[504], [3575, 282]], "x " * 200]
        ),
        "n": n,
        "max_tokens": source.randint(1, 40),
        "stream": source.random() < 0.5,
        "extra_body": {"ignore_eos": source.random() < 0.5},
    }
    if source.random() < 0.3:
        parameters["echo"] = True
        if source.random() < 0.3 and not parameters["stream"]:
            parameters["max_tokens"] = 0
    if source.random() < 0.3:
        parameters["logprobs"] = source.randint(0, 3)
    if source.random() < 0.3:
        parameters["stop"] = source.choice([" the", ["e", "zz"], ["ing"]])
    if source.random() < 0.3 and not parameters["stream"] and parameters["max_tokens"]:
        parameters["best_of"] = n + source.randint(0, 2)
    if parameters["stream"]:
        parameters["stream_options"] = {"include_usage": True}
    return parameters


async def test_the_ledger_agrees_with_what_the_official_client_sees(metered_cluster: MeteredCluster) -> None:
    cluster = metered_cluster.cluster
    key = create_key(metered_cluster, "counting", "--tokens-per-minute", "1000000")
    source = random.Random(7)
    seen: dict[str, tuple[int, int]] = {}
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key=key["key"], max_retries=0) as client:
        for _ in range(60):
            parameters = random_parameters(source)
            answer = await client.completions.create(model="sim-a", **parameters)
            if parameters["stream"]:
                async for chunk in answer:
                    completion_id, usage = chunk.id, chunk.usage
            else:
                completion_id, usage = answer.id, answer.usage
            seen[completion_id] = (usage.prompt_tokens, usage.completion_tokens)
    rows = await settled_rows(metered_cluster, key["id"], len(seen))
    assert {row.id: (row.prompt_tokens, row.completion_tokens) for row in rows} == seen
    assert {row.status for row in rows} == {"finished"}
    for row in rows:
        assert row.cost == pytest.approx((0.10 * row.prompt_tokens + 0.40 * row.completion_tokens) / 1e6)
    prompt, completion = (sum(counts) for counts in zip(*seen.values(), strict=True))

    async with cluster.client() as http:
        own = await http.get("/v1/usage", headers=headers_of(key))
        assert own.status_code == 200
        [used] = own.json()["data"]
        assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (60, prompt, completion)
        left = await http.post(
            "/v1/completions", json={"model": "sim-a", "prompt": [1], "max_tokens": 1}, headers=headers_of(key)
        )
        assert int(left.headers["x-ratelimit-remaining-tokens"]) == 1_000_000 - prompt - completion - 2

        async def counted() -> bool:
            lines = (await http.get("/metrics")).text.splitlines()
            return any(
                line.startswith(f'millstream_prompt_tokens_total{{key="{key["id"]}",meter="Meter')
                and line.endswith(f',model="sim-a",team=""}} {prompt + 1}.0')
                for line in lines
            )

        await eventually(counted, 5.0)
    told = json.loads(cluster.millstream("usage", "--by", "model,key", "--key", key["id"], "--json").stdout)
    assert [row["completion_tokens"] for row in told] == [completion + 1]


async def test_one_scrape_tells_of_all_ingress_replicas_and_meters(metered_cluster: MeteredCluster) -> None:
    async with metered_cluster.cluster.client() as http:
        body = {"model": "sim-a", "prompt": "a", "max_tokens": 2}
        for _ in range(30):
            (await http.post("/v1/completions", json=body)).raise_for_status()

        async def told(label: str, name: str) -> dict[str, float]:
            text = (await http.get("/metrics")).text
            samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
            return {sample.labels[label]: sample.value for sample in samples if sample.name == name}

        async def all_tell() -> bool:  # also after a test that has killed some
            first_tokens = await told("ingress", "millstream_first_token_seconds_count")
            up = await told("meter", "millstream_meter_up")
            return len(first_tokens) == 3 and sum(first_tokens.values()) >= 30 and up == {"Meter": 1, "Meter-1": 1}

        await eventually(all_tell, 30.0)
