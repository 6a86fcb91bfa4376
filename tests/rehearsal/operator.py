"""What KubeRay does with a RayService: pods of its groups, again when they end, and its configuration for Serve."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections import Counter
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from typing import Any, Final

import structlog

from serve_app.serve_api import ServeApi, ServeApiError
from tests.rehearsal.kubernetes_api import serve_api
from tests.rehearsal.manifests import DASHBOARD_PORT, HEAD_GROUP, Manifests, Secrets
from tests.rehearsal.network import GATEWAY, Network, command
from tests.rehearsal.network_policies import Endpoint, ruleset
from tests.rehearsal.pods import Pod, PodFiles

__all__ = ["Operator"]

log = structlog.get_logger()

_OPERATOR: Final = Endpoint(GATEWAY.ip, {"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system")
_START_LIMIT_S: Final = 180.0


class Operator:
    """Stands at the bridge's address, from where the manifests let it reach the dashboard."""

    def __init__(self, manifests: Manifests, secrets: Secrets, network: Network, files: PodFiles) -> None:
        self.manifests = manifests
        self.pods: dict[str, Pod] = {}
        """By name, those that are ending included."""
        self._secrets = secrets
        self._network = network
        self._files = files
        self._numbers: Counter[str] = Counter()
        self._ray_cluster: dict[str, Any] = {
            "metadata": {"name": manifests.name, "namespace": "default", "resourceVersion": "1"},
            "spec": copy.deepcopy(manifests.cluster),
        }
        self._wanted = asyncio.Event()
        self._head_ready = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.api: ServeApi

    @contextlib.asynccontextmanager
    async def running(self, head_address: IPv4Address) -> AsyncIterator[None]:
        """The cluster with the pods of its groups, Serve's configuration applied; all gone at the end."""
        account = self._files.account
        async with (
            serve_api(str(GATEWAY.ip), account, self._ray_cluster, self._described, self._wanted.set),
            asyncio.TaskGroup() as group,
        ):
            token = self._secrets[self.manifests.cluster["authOptions"]["secretName"]]["auth_token"]
            self.api = ServeApi(f"http://{head_address}:{DASHBOARD_PORT}", token)
            head = f"{self.manifests.name}-head"
            try:
                await self._add(Pod(head, self.manifests.head(head, self._secrets), head_address, self._files))
                reconciling = group.create_task(self._reconcile())
                await asyncio.to_thread(self.api.wait_until_up, _START_LIMIT_S)
                self._head_ready.set()
                await self.apply(self.manifests)
                yield
                reconciling.cancel()
            finally:
                self.api.close()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*(pod.remove() for pod in self.pods.values()))

    # --- what a user does ------------------------------------------------------------------------------------------

    async def apply(self, manifests: Manifests) -> None:
        """A changed RayService: with `upgradeStrategy: None` KubeRay tells Serve and leaves the pods alone."""
        self.manifests = manifests
        deadline = time.monotonic() + _START_LIMIT_S
        while True:
            try:
                return await asyncio.to_thread(self.api.apply, manifests.serve_config)
            except ServeApiError:  # KubeRay, too, tries until it succeeds
                if time.monotonic() > deadline:
                    raise

    async def evict(self, pod: Pod) -> None:
        """As when its node is to be emptied: SIGTERM and time to end. Returns when it has; another is made at once."""
        pod.ending = True
        self._wanted.set()
        await pod.end()
        del self.pods[pod.name]
        self._filter_packets()

    def of_group(self, group: str) -> list[Pod]:
        """Pods that are not ending, the oldest first."""
        return [pod for pod in self.pods.values() if pod.group == group and not pod.ending]

    # --- faults ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def held_down(self, pod: Pod) -> AsyncIterator[None]:
        """All processes of the pod are killed, and start again only at the end of this."""
        pod.may_run.clear()
        await pod.kill()
        try:
            yield
        finally:
            pod.may_run.set()

    # --- reconciliation --------------------------------------------------------------------------------------------

    async def _reconcile(self) -> None:
        while True:
            self._wanted.clear()
            for group in self._ray_cluster["spec"]["workerGroupSpecs"]:
                for name in group.get("scaleStrategy", {}).get("workersToDelete", []):
                    if name in self.pods and not self.pods[name].ending:
                        log.info("pod given back", pod=name)
                        self._spawn(self.evict(self.pods[name]))
                for _ in range(group["replicas"] - len(self.of_group(group["groupName"]))):
                    self._numbers[group["groupName"]] += 1
                    name = f"{self.manifests.name}-{group['groupName']}-{self._numbers[group['groupName']]}"
                    template = self.manifests.worker(group, name, self._secrets)
                    log.info("pod added", pod=name)
                    await self._add(Pod(name, template, self._network.next_address(), self._files))
            await self._wanted.wait()

    async def _add(self, pod: Pod) -> None:
        self.pods[pod.name] = pod
        await pod.create(self._network)
        self._filter_packets()
        self._spawn(self._keep_running(pod))

    async def _keep_running(self, pod: Pod) -> None:
        """Kubernetes' `restartPolicy: Always`; first, workers wait for the head as KubeRay's init container does."""
        if pod.group != HEAD_GROUP:
            await self._head_ready.wait()
        await pod.start()
        while True:
            await pod.wait()
            if pod.ending:
                return
            await pod.may_run.wait()
            log.info("container ended, is started again", pod=pod.name)
            await pod.start()

    def _filter_packets(self) -> None:
        endpoints = [_OPERATOR, *(Endpoint(pod.address, pod.template.labels) for pod in self.pods.values())]
        for pod in self.pods.values():
            rules = ruleset(pod.template.labels, pod.template.ports, self.manifests.network_policies, endpoints)
            command("nsenter", "--target", str(pod.sandbox_pid), "--net", "nft", "-f", "-", stdin=rules)

    def _described(self) -> list[dict[str, Any]]:
        """The pods as Kubernetes describes them."""
        return [
            {
                "metadata": {
                    "name": pod.name,
                    "labels": pod.template.labels,
                    "resourceVersion": "1",
                    **({"deletionTimestamp": "2026-01-01T00:00:00Z"} if pod.ending else {}),
                },
                "spec": {},
                "status": {
                    "podIP": str(pod.address),
                    "containerStatuses": [{"state": {"running": {}} if pod.running else {"waiting": {}}}],
                },
            }
            for pod in self.pods.values()
        ]

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
