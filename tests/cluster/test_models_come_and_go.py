"""A model leaves and comes back while another serves: nobody's stream fails and nothing is restarted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, RunningCluster, eventually
from tests.streaming import StreamFailed, complete, stream

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

BOTH = ROOT / "loadtests" / "clusters" / "simulated.yaml"


async def _apply(cluster: RunningCluster, file: Path) -> None:
    result = await asyncio.to_thread(cluster.millstream, "up", str(file), "--port", str(cluster.port))
    assert result.returncode == 0, result.stdout + result.stderr


async def _models(cluster: RunningCluster) -> list[str]:
    async with cluster.client() as client:
        return [model["id"] for model in (await client.get("/v1/models")).json()["data"]]


async def test_a_model_is_removed_and_redeployed_while_another_serves(
    simulated_cluster: RunningCluster, tmp_path: Path
) -> None:
    cluster = simulated_cluster
    config = yaml.safe_load(BOTH.read_text())
    config["models"] = [model for model in config["models"] if model["name"] == "sim-a"]
    only_a = tmp_path / "cluster.yaml"
    only_a.write_text(yaml.safe_dump(config))
    await cluster.until_in_rotation("sim-a", 3)
    ingress = cluster.replicas("gateway", "Ingress")
    engines = cluster.replicas("model-sim-a")
    served = 0
    stop = asyncio.Event()

    async def keep_streaming(number: int) -> None:
        nonlocal served
        async with cluster.client() as client:
            while not stop.is_set():
                streamed = await stream(client, model="sim-a", prompt=f"number {number}", max_tokens=200)
                assert streamed.completion_tokens == 200
                served += 1

    async with asyncio.TaskGroup() as group:
        streams = [group.create_task(keep_streaming(number)) for number in range(8)]
        await _apply(cluster, only_a)

        async def removed() -> bool:
            return await _models(cluster) == ["sim-a"]

        await eventually(removed, 30.0)
        async with cluster.client() as client:
            with pytest.raises(StreamFailed, match=r"404.*model_not_found"):
                await complete(client, model="sim-b", prompt="x")
        await _apply(cluster, BOTH)
        await cluster.until_in_rotation("sim-b", 3)
        async with cluster.client() as client:
            assert (await complete(client, model="sim-b", prompt="x", max_tokens=3)).completion_tokens == 3
        stop.set()
        await asyncio.wait(streams)
    assert served >= 8
    ids = [[replica["id"] for replica in replicas] for replicas in (ingress, engines)]
    after = cluster.replicas("gateway", "Ingress"), cluster.replicas("model-sim-a")
    assert [[replica["id"] for replica in replicas] for replicas in after] == ids
