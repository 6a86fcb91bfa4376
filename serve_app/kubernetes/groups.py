"""Which pods a cluster needs: worker groups with their sizes, and which of them runs what.

Each kind of replica has a group of its own, chosen by a node label, so that nothing small takes a place on an expensive
node and every pod mounts what its replicas need. Free of Kubernetes' and Ray's formats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from serve_app.config import ClusterConfig, ModelConfig

__all__ = ["GATEWAY_GROUP", "METER_GROUP", "WorkerGroup", "engine_group_name", "ingress_cpus", "worker_groups"]

GATEWAY_GROUP: Final = "gateway"
METER_GROUP: Final = "meter"


@dataclass(frozen=True)
class WorkerGroup:
    """Pods that are alike, each a Ray node."""

    name: str
    kind: Literal["gateway", "meter", "engine"]
    min_pods: int
    max_pods: int
    cpus: int
    """What the node offers to Ray, and what its container requests for replicas."""
    gpus: int = 0
    accelerator: str | None = None


def worker_groups(config: ClusterConfig) -> list[WorkerGroup]:
    """The gateway's, the meter's, then those of engines in the order of the models that need them first: KubeRay adds a
    group to a running cluster when it stands behind all others."""
    return [_gateway(config), _meter(config), *_engines(config.models)]


def engine_group_name(model: ModelConfig) -> str:
    """The group that runs the replicas of `model`: one for each type and number of GPUs."""
    return _group_name(model.resources.accelerator, _pod_gpus(model))


def ingress_cpus(config: ClusterConfig) -> float:
    """CPUs that an ingress replica reserves on Kubernetes: its share of a pod, so that no pod takes more of them."""
    return _gateway(config).cpus / _ingresses_in_a_pod(config)


def _gateway(config: ClusterConfig) -> WorkerGroup:
    """Room for every ingress replica, and for one more, which starts while another still finishes its streams."""
    replicas, in_a_pod = config.ingress.replicas, _ingresses_in_a_pod(config)
    fewest, most = math.ceil(replicas.min / in_a_pod), math.ceil((replicas.max + 1) / in_a_pod)
    return WorkerGroup(
        GATEWAY_GROUP, "gateway", fewest, most, max(1, math.ceil(in_a_pod * config.ingress.resources.cpus))
    )


def _ingresses_in_a_pod(config: ClusterConfig) -> int:
    """Where there are to be several, at most half of them: Serve fills the first pod that is up."""
    replicas, cpus = config.ingress.replicas, config.ingress.resources.cpus
    fitting = int(config.kubernetes.gateway_cpus / cpus) if cpus else replicas.max + 1
    return fitting if replicas.min == 1 else max(1, min(fitting, replicas.min // 2))


def _meter(config: ClusterConfig) -> WorkerGroup:
    """One pod with all meters: their files are on a volume that one node mounts. Twice the CPUs, so that a new meter
    can start while the old one closes."""
    cpus = math.ceil(2 * config.meter.replicas * config.meter.resources.cpus)
    return WorkerGroup(METER_GROUP, "meter", 1, 1, max(1, cpus))


def _engines(models: Iterable[ModelConfig]) -> list[WorkerGroup]:
    groups: dict[str, WorkerGroup] = {}
    for model in models:
        name = engine_group_name(model)
        in_a_pod = _replicas_in_a_pod(model)
        before = groups.get(name, WorkerGroup(name, "engine", 0, 0, 0))
        groups[name] = WorkerGroup(
            name,
            "engine",
            min_pods=before.min_pods + math.ceil(model.replicas.min / in_a_pod),
            max_pods=before.max_pods + math.ceil(model.replicas.max / in_a_pod),
            cpus=max(before.cpus, math.ceil(in_a_pod * model.resources.cpus)),
            gpus=_pod_gpus(model),
            accelerator=model.resources.accelerator,
        )
    return list(groups.values())


def _pod_gpus(model: ModelConfig) -> int:
    return math.ceil(model.resources.gpus)


def _replicas_in_a_pod(model: ModelConfig) -> int:
    """1, but for replicas that share a GPU."""
    return int(1 / model.resources.gpus) if 0 < model.resources.gpus < 1 else 1


def _group_name(accelerator: str | None, gpus: int) -> str:
    """Such as `engine-cpu`, `engine-1-gpu` or `engine-4-h100`."""
    if not gpus:
        return "engine-cpu"
    return f"engine-{gpus}-{re.sub('[^a-z0-9]+', '-', accelerator.lower()).strip('-') if accelerator else 'gpu'}"
