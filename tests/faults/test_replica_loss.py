"""A lost engine replica that no client notices: killed, stopped, and its model's neighbours undisturbed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
from contextlib import closing

import pytest

from tests.conftest import THOROUGH, RunningCluster, eventually
from tests.streaming import Streamed, stream

pytestmark = pytest.mark.cluster

STREAMS = 64
TOKENS = 400


def _prompts(seed: int) -> list[str]:
    source = random.Random(seed)
    words = ["river", "stone", "light", "engine", "cloud", "paper", "winter", "bridge", "signal", "garden"]
    return [" ".join(source.choices(words, k=source.randint(3, 60))) for _ in range(STREAMS)]


async def _all_streams(cluster: RunningCluster, model: str, prompts: list[str]) -> list[Streamed]:
    async with cluster.client() as client:
        return await asyncio.gather(
            *(stream(client, model=model, prompt=prompt, max_tokens=TOKENS, temperature=0) for prompt in prompts)
        )


async def _busiest(cluster: RunningCluster, model: str) -> str:
    """Replica with the most generations, once it has enough of them."""
    busiest = ""

    async def most_run() -> bool:
        nonlocal busiest
        loads = await cluster.loads(model)
        most = max(loads, key=lambda load: load["running"])
        busiest = most["id"]
        return int(most["running"]) >= STREAMS // 8

    await eventually(most_run, 20.0, every_s=0.01)
    return busiest


async def _out_of_rotation(cluster: RunningCluster, model: str, replica: str, limit_s: float) -> float:
    async def gone() -> bool:
        return all(not load["in_rotation"] for load in await cluster.loads(model) if load["id"] == replica)

    return await eventually(gone, limit_s, every_s=0.02)


def _recorded(cluster: RunningCluster, completion_ids: list[str]) -> dict[str, int]:
    """Completion tokens by request id, as the ledger has them."""
    marks = ",".join("?" * len(completion_ids))
    with closing(sqlite3.connect(cluster.home / "ledger.db")) as ledger:
        rows = ledger.execute(f"SELECT id, completion_tokens FROM requests WHERE id IN ({marks})", completion_ids)
        return dict(rows.fetchall())


async def _assert_ledger_agrees(cluster: RunningCluster, streamed: list[Streamed]) -> None:
    counted = {each.completion_id: each.completion_tokens for each in streamed}

    async def recorded() -> bool:
        return len(_recorded(cluster, list(counted))) == len(counted)

    await eventually(recorded, 10.0)
    assert _recorded(cluster, list(counted)) == counted


@pytest.mark.timeout(180)
@pytest.mark.parametrize("round_number", range(20 if THOROUGH else 5))
async def test_a_killed_replica_ends_no_stream(simulated_cluster: RunningCluster, round_number: int) -> None:
    """64 streams over three replicas, one of which dies: texts and token counts are those of an undisturbed run."""
    cluster, model = simulated_cluster, "sim-a"
    prompts = _prompts(round_number)
    await cluster.until_in_rotation(model, 3)
    undisturbed = await _all_streams(cluster, model, prompts)
    pids = {replica["id"]: replica["pid"] for replica in cluster.replicas(f"model-{model}")}

    streams = asyncio.create_task(_all_streams(cluster, model, prompts))
    victim = await _busiest(cluster, model)
    os.kill(pids[victim], signal.SIGKILL)
    assert await _out_of_rotation(cluster, model, victim, 2.0) < 2.0
    disturbed = await streams

    assert [each[:3] for each in disturbed] == [each[:3] for each in undisturbed]
    assert {each.completion_tokens for each in disturbed} == {TOKENS}
    await _assert_ledger_agrees(cluster, disturbed)
    await cluster.until_in_rotation(model, 3)


@pytest.mark.timeout(180)
async def test_a_stopped_replica_ends_no_stream(simulated_cluster: RunningCluster) -> None:
    """A replica that hangs is noticed by its silence within 3 s, and its streams go on elsewhere."""
    cluster, model = simulated_cluster, "sim-a"
    prompts = _prompts(100)
    await cluster.until_in_rotation(model, 3)
    undisturbed = await _all_streams(cluster, model, prompts)
    pids = {replica["id"]: replica["pid"] for replica in cluster.replicas(f"model-{model}")}

    streams = asyncio.create_task(_all_streams(cluster, model, prompts))
    victim = await _busiest(cluster, model)
    os.kill(pids[victim], signal.SIGSTOP)
    try:
        assert await _out_of_rotation(cluster, model, victim, 4.0) < 4.0
        async with asyncio.timeout(10.0):
            disturbed = await streams
    finally:
        os.kill(pids[victim], signal.SIGCONT)
    assert [each[:3] for each in disturbed] == [each[:3] for each in undisturbed]
    await _assert_ledger_agrees(cluster, disturbed)
    await cluster.until_in_rotation(model, 3)
