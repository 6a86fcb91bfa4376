"""The ingress is small and starts quickly: its process has neither torch nor vLLM. And it leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.ray_node import RayNode
from tests.conftest import RunningCluster, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

RSS_LIMIT_BYTES = 350e6
START_LIMIT_S = 10.0


def test_an_ingress_replica_is_small(simulated_cluster: RunningCluster) -> None:
    for replica in simulated_cluster.replicas("gateway", "Ingress"):
        assert psutil.Process(replica["pid"]).memory_info().rss < RSS_LIMIT_BYTES


async def test_serves_layers_leave_a_way_to_the_connection(simulated_cluster: RunningCluster) -> None:
    """Fails when Ray Serve or uvicorn changes what deployments/ingress/http/direct_writes.py knows of them."""

    async def written_to_the_connection() -> bool:
        async with simulated_cluster.client() as client:
            (await client.get("/v1/models")).raise_for_status()
        return "connection" in [
            json.loads(line[line.index("{") :])["to"]
            for log in _serve_logs(simulated_cluster).glob("replica_gateway_Ingress_*.log")
            for line in log.read_text().splitlines()
            if "where answers are written" in line
        ]

    await eventually(written_to_the_connection, 30.0)


def _serve_logs(cluster: RunningCluster) -> Path:
    node = RayNode.running(cluster.home)
    assert node is not None
    return Path(node.folder, "session_latest", "logs", "serve")


def _start_s(cluster: RunningCluster, replica_id: str) -> float | None:
    """How long Serve took from asking for the replica to having it, by the controller's log."""
    [log] = _serve_logs(cluster).glob("controller_[0-9]*.log")
    told = re.search(rf"Replica\(id='{replica_id}'.* started successfully .* after ([\d.]+)s", log.read_text())
    return float(told[1]) if told else None


async def test_a_killed_ingress_is_replaced_quickly_and_leaves_no_work_behind(
    simulated_cluster: RunningCluster,
) -> None:
    cluster = simulated_cluster
    await cluster.until_in_rotation("sim-b", 3)
    [before] = cluster.replicas("gateway", "Ingress")
    async with cluster.client() as client:
        body = {"model": "sim-b", "prompt": "Once upon a time", "max_tokens": 2000, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            os.kill(before["pid"], signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                _ = [line async for line in lines]

    async def replaced() -> bool:
        running = await asyncio.to_thread(cluster.replicas, "gateway", "Ingress")
        return bool(running) and running[0]["id"] != before["id"] and _start_s(cluster, running[0]["id"]) is not None

    await eventually(replaced, 60.0)
    [after] = cluster.replicas("gateway", "Ingress")
    start_s = _start_s(cluster, after["id"])
    assert start_s is not None
    assert start_s < START_LIMIT_S

    async def ready() -> bool:
        try:
            return len(await cluster.loads("sim-b")) == 3
        except httpx.HTTPError:
            return False

    await eventually(ready, 30.0)
    await cluster.until_in_rotation("sim-b", 3)
    assert all(load["running"] + load["waiting"] == 0 for load in await cluster.loads("sim-b"))
