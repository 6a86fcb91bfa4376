"""A Prometheus server of the tests' own, from the binary of the machine, which scrapes one cluster."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve_app.ray_node import RayNode
from tests.conftest import ROOT, RunningCluster, eventually, free_port

__all__ = ["MONITORING", "Prometheus", "node_metrics_targets", "prometheus_of"]

MONITORING = ROOT / "k8s" / "monitoring"


class Prometheus:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def query(self, expression: str) -> list[Any]:
        """Now, as an instant vector; fails on what is no PromQL."""
        response = await self._client.get("/api/v1/query", params={"query": expression})
        assert response.status_code == 200, response.text
        data: list[Any] = response.json()["data"]["result"]
        return data

    async def rules(self) -> list[Any]:
        """All of them, with the health of their last evaluation."""
        response = await self._client.get("/api/v1/rules")
        return [rule for group in response.json()["data"]["groups"] for rule in group["rules"]]

    async def _ready(self) -> bool:
        try:
            return (await self._client.get("/-/ready")).status_code == 200
        except httpx.TransportError:
            return False


def discovery_file(cluster: RunningCluster) -> Path:
    """Where Ray lists the addresses of its nodes' metrics."""
    node = RayNode.running(cluster.home)
    assert node is not None
    return Path(node.folder) / "prom_metrics_service_discovery.json"


def node_metrics_targets(cluster: RunningCluster) -> list[str]:
    """The addresses in it."""
    groups = yaml.safe_load(discovery_file(cluster).read_text())
    return [target for group in groups for target in group["targets"]]


@asynccontextmanager
async def prometheus_of(cluster: RunningCluster, folder: Path) -> AsyncIterator[Prometheus]:
    """As k8s/monitoring/prometheus.yaml configures it, but once a second, and with this cluster's addresses."""
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / file) for file in config["rule_files"]]
    own, ray = config["scrape_configs"]
    own["authorization"]["credentials_file"] = str(cluster.home / "admin.key")
    own["static_configs"] = [{"targets": [f"127.0.0.1:{cluster.port}"]}]
    ray["file_sd_configs"] = [{"files": [str(discovery_file(cluster))]}]
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    binary = shutil.which("prometheus")
    assert binary is not None
    with (folder / "prometheus.log").open("w") as log:
        server = await asyncio.create_subprocess_exec(
            binary,
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            prometheus = Prometheus(client)
            await eventually(prometheus._ready, 30.0)
            yield prometheus
    finally:
        server.terminate()
        await server.wait()
