"""A client that goes away frees the engine within a second, whatever it was waiting for."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import httpx
import pytest

from tests.conftest import RunningCluster, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

BODY = {"model": "sim-b", "prompt": "Once upon a time", "max_tokens": 2000}


async def _running(cluster: RunningCluster) -> int:
    return sum(load["running"] + load["waiting"] for load in await cluster.loads("sim-b"))


async def _until_running(cluster: RunningCluster) -> None:
    async def runs() -> bool:
        return await _running(cluster) > 0

    await eventually(runs, 10.0, every_s=0.01)


async def _until_idle_s(cluster: RunningCluster) -> float:
    async def idle() -> bool:
        return await _running(cluster) == 0

    return await eventually(idle, 5.0, every_s=0.02)


def _cancelled_rows(cluster: RunningCluster) -> list[tuple[str, int]]:
    with closing(sqlite3.connect(cluster.home / "ledger.db")) as ledger:
        return ledger.execute(
            "SELECT id, completion_tokens FROM requests WHERE status = 'cancelled' AND model = 'sim-b'"
        ).fetchall()


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "not streamed"])
async def test_a_closed_connection_aborts_the_engine(simulated_cluster: RunningCluster, streamed: bool) -> None:
    cluster = simulated_cluster
    await cluster.until_in_rotation("sim-b", 3)
    before = len(_cancelled_rows(cluster))
    async with cluster.client() as client:
        request = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": streamed}))
        await _until_running(cluster)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert await _until_idle_s(cluster) < 1.0

    async def recorded() -> bool:
        return len(_cancelled_rows(cluster)) == before + 1

    await eventually(recorded, 10.0)
    assert 0 < _cancelled_rows(cluster)[-1][1] < 2000


async def test_a_client_that_reads_one_chunk_and_leaves(simulated_cluster: RunningCluster) -> None:
    cluster = simulated_cluster
    await cluster.until_in_rotation("sim-b", 3)
    async with (
        cluster.client() as client,
        client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response,
    ):
        assert response.status_code == 200
        await anext(response.aiter_lines())
    assert await _until_idle_s(cluster) < 1.0


async def test_many_clients_leave_at_once(simulated_cluster: RunningCluster) -> None:
    cluster = simulated_cluster
    await cluster.until_in_rotation("sim-b", 3)

    async def leave() -> None:
        async with cluster.client() as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json=BODY, timeout=1.0)

    await asyncio.gather(*(leave() for _ in range(32)))
    assert await _until_idle_s(cluster) < 1.0
