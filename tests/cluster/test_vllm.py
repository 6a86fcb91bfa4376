"""The real thing: SmolLM2-135M on two vLLM replicas, against vLLM's own server and through the loss of a replica."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster.listening import listening_sockets
from tests.conftest import THOROUGH, RunningCluster, eventually
from tests.streaming import Streamed, complete, stream

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "smollm2-135m"
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "The three primary colours are",
    "In 1969, humans first",
    "Water boils at",
    "My favourite recipe for bread starts with",
    "Q: What is 7 times 8?\nA:",
    "The quick brown fox",
    "List of European countries:\n1.",
    "Dear Sir or Madam,",
    "Der Himmel ist",
    "La vie est",
    "日本の首都は",
    "🎉 Happy birthday! 🎂 Today",
    "SELECT name FROM users WHERE",
    "<html>\n<head>",
    "Why did the chicken cross the road?",
    "E = mc^2 means that",
    "To be, or not to be,",
]
BODY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 32}
_BUSY_S = 10.0
"""Until a replica that hangs is noticed on a machine that does other work as well: an ingress that was itself held up
for a second gives replicas another. On one that does nothing else the bound is closer."""


async def _streams(cluster: RunningCluster, tokens: int) -> list[Streamed]:
    async with cluster.client() as client:
        return await asyncio.gather(
            *(
                stream(client, model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
                for prompt in PROMPTS[:8]
            )
        )


async def _busiest(cluster: RunningCluster, running: int) -> str:
    busiest = ""

    async def all_run() -> bool:
        nonlocal busiest
        loads = await cluster.loads(MODEL)
        busiest = max(loads, key=lambda load: load["running"])["id"]
        return sum(int(load["running"]) for load in loads) == running

    await eventually(all_run, 60.0)
    return busiest


async def _out_of_rotation(cluster: RunningCluster, replica: str, limit_s: float) -> float:
    async def gone() -> bool:
        return all(not load["in_rotation"] for load in await cluster.loads(MODEL) if load["id"] == replica)

    return await eventually(gone, limit_s, every_s=0.02)


async def test_the_capital_of_france_is_paris(vllm_cluster: RunningCluster) -> None:
    async with vllm_cluster.client() as client:
        answer = await complete(client, model=MODEL, prompt="The capital of France is", max_tokens=1, temperature=0)
    assert answer.text == " Paris"


async def test_texts_equal_those_of_vllms_own_server(vllm_cluster: RunningCluster, vllm_reference: str) -> None:
    """20 prompts, greedy, streamed and not: same text, token counts and finish reason."""
    async with httpx.AsyncClient(base_url=vllm_reference, timeout=120.0, trust_env=False) as client:
        expected = [(await complete(client, prompt=prompt, **BODY))[:3] for prompt in PROMPTS]
    assert len({text for text, _, _ in expected}) == len(PROMPTS)
    async with vllm_cluster.client() as client:
        whole = [(await complete(client, prompt=prompt, **BODY))[:3] for prompt in PROMPTS]
        streamed = [(await stream(client, prompt=prompt, **BODY))[:3] for prompt in PROMPTS]
    assert whole == expected
    assert streamed == expected


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "not streamed"])
async def test_a_closed_connection_aborts_vllm(vllm_cluster: RunningCluster, streamed: bool) -> None:
    cluster = vllm_cluster

    async def running() -> int:
        return sum(load["running"] + load["waiting"] for load in await cluster.loads(MODEL))

    async def runs() -> bool:
        return await running() > 0

    async def idle() -> bool:
        return await running() == 0

    async with cluster.client() as client:
        body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True}
        request = asyncio.create_task(client.post("/v1/completions", json={**body, "stream": streamed}))
        await eventually(runs, 30.0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert await eventually(idle, 5.0, every_s=0.02) < 1.0


async def test_a_killed_vllm_replica_ends_no_stream_and_is_replaced(vllm_cluster: RunningCluster) -> None:
    cluster = vllm_cluster
    await cluster.until_in_rotation(MODEL, 2)
    undisturbed = await _streams(cluster, 60)
    replicas = {replica["id"]: replica["pid"] for replica in cluster.replicas(f"model-{MODEL}")}

    streams = asyncio.create_task(_streams(cluster, 60))
    victim = await _busiest(cluster, 8)
    children = psutil.Process(replicas[victim]).children(recursive=True)
    os.kill(replicas[victim], signal.SIGKILL)
    assert await _out_of_rotation(cluster, victim, 2.0) < 2.0
    disturbed = await streams

    assert [each[:3] for each in disturbed] == [each[:3] for each in undisturbed]
    assert psutil.wait_procs(children, timeout=30)[1] == []  # vLLM's processes went with their replica
    await cluster.until_in_rotation(MODEL, 2, limit_s=240.0)
    assert victim not in {replica["id"] for replica in cluster.replicas(f"model-{MODEL}")}


async def test_a_stopped_vllm_replica_ends_no_stream(vllm_cluster: RunningCluster) -> None:
    cluster = vllm_cluster
    await cluster.until_in_rotation(MODEL, 2, limit_s=240.0)
    undisturbed = await _streams(cluster, 60)
    replicas = {replica["id"]: replica["pid"] for replica in cluster.replicas(f"model-{MODEL}")}

    streams = asyncio.create_task(_streams(cluster, 60))
    victim = await _busiest(cluster, 8)
    os.kill(replicas[victim], signal.SIGSTOP)
    try:
        assert await _out_of_rotation(cluster, victim, _BUSY_S) < (4.0 if THOROUGH else _BUSY_S)
        disturbed = await streams
    finally:
        os.kill(replicas[victim], signal.SIGCONT)
    assert [each[:3] for each in disturbed] == [each[:3] for each in undisturbed]


def test_vllm_listens_on_the_loopback_only(vllm_cluster: RunningCluster) -> None:
    assert [each for each in listening_sockets(vllm_cluster) if not each.on_loopback] == []
