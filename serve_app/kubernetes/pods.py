"""The pods of a cluster as KubeRay's templates: environment, volumes, probes, rights, their end.

KubeRay adds what it knows better: the `ray start` command, the address of the head, Ray's token, shared memory.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Final

from serve_app.config import ClusterConfig
from serve_app.kubernetes.groups import WorkerGroup
from serve_app.kubernetes_config import KubernetesSecrets
from serve_app.ray_node import client_timeout_s, serve_environment
from serve_app.running_cluster import DASHBOARD_PORT, POD_CLUSTER, POD_DATABASE, POD_HTTP_PORT

__all__ = [
    "AUTOSCALER_ACCOUNT_MOUNT",
    "CONTAINER_SECURITY",
    "GROUP_LABEL",
    "HOME",
    "INSTANCE_LABEL",
    "PORTS",
    "head_template",
    "pod_database",
    "secret_name",
    "secret_reference",
    "worker_template",
]

HOME: Final = Path("/var/lib/millstream")
"""MILLSTREAM_HOME in all pods."""
_METER_FOLDER: Final = HOME / "meter"
"""Where the meter's volume is mounted."""
GROUP_LABEL: Final = "millstream-group"
"""Label of pods and of Ray's nodes, by which Ray places replicas, Services and policies choose pods."""
INSTANCE_LABEL: Final = "app.kubernetes.io/instance"
PORTS: Final = {"gcs-server": 6379, "dashboard": DASHBOARD_PORT, "metrics": 8080, "agent": 52365}
"""Of each pod's Ray processes, the first two of the head's only; KubeRay's defaults."""

CONTAINER_SECURITY: Final = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""Of KubeRay's autoscaler, too, which has an image of its own."""
_POD_SECURITY: Final = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 1000,
    "fsGroup": 1000,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}

_ACCOUNT_FOLDER: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
_ACCOUNT_VOLUME: Final = "autoscaler-account"
AUTOSCALER_ACCOUNT_MOUNT: Final = {"name": _ACCOUNT_VOLUME, "mountPath": _ACCOUNT_FOLDER, "readOnly": True}
"""The autoscaler speaks with the API server; nothing else does, Ray's own container of the same pod included."""

_DRAIN_VARIABLE: Final = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""How long a Ray node that is told to end drains: Serve starts replacements elsewhere and lets the replicas here finish
what they have. It ends as soon as they are gone."""
_RAY_CPUS: Final = 0.5
"""For Ray's own processes in each pod, besides what replicas reserve."""
_INLINE_BYTES: Final = 2**20
_START_UP_S: Final = 120.0
"""For a replica that replaces one on a node that is being drained, in excess of the longest drain."""
_METER_CLOSE_S: Final = 30
_EXIT_S: Final = 30
"""For Ray's processes to end once the replicas are gone."""


def secret_name(config: ClusterConfig, kind: str) -> str:
    """Name of the Secret that KubernetesSecrets calls `kind`."""
    assert kind in KubernetesSecrets.model_fields
    chosen: str | None = getattr(config.kubernetes.secrets, kind)
    return chosen or f"{config.cluster.name}-{kind.replace('_', '-')}"


def secret_reference(config: ClusterConfig, kind: str, key: str, *, optional: bool = False) -> dict[str, Any]:
    """The `valueFrom` of a variable."""
    reference: dict[str, Any] = {"name": secret_name(config, kind), "key": key}
    return {"secretKeyRef": reference | ({"optional": True} if optional else {})}


def pod_database(config: ClusterConfig) -> str:
    """`meter.database` as the meter's pod has it: a file of SQLite stands on the meter's volume, under its own name."""
    database = config.meter.database
    if not database.startswith("sqlite:"):
        return database
    return f"sqlite:///{_METER_FOLDER}/{database.rpartition('/')[2]}"


def head_template(config: ClusterConfig, *, autoscaled: bool) -> dict[str, Any]:
    """Ray's head: it runs no replica. `autoscaled` gives KubeRay's autoscaler beside it the account of its own."""
    agent = {"httpGet": {"path": "/api/healthz", "port": "agent"}}
    container = {
        "name": "ray-head",
        "image": config.kubernetes.cpu_image,
        "ports": _ports(config, *PORTS),
        "env": [*_environment(config), {"name": _DRAIN_VARIABLE, "value": "0"}],
        "resources": _resources(1 + _RAY_CPUS, config.kubernetes.memory.head),
        **_probes(agent, readiness={"httpGet": {"path": "/api/gcs_healthz", "port": "dashboard"}}),
    }
    template = _template(config, "head", container)
    template["spec"]["terminationGracePeriodSeconds"] = _EXIT_S
    if autoscaled:
        del template["spec"]["serviceAccountName"]  # KubeRay makes one with the autoscaler's rights
        template["spec"]["volumes"].append(_account_volume())
    return template


def worker_template(config: ClusterConfig, group: WorkerGroup) -> dict[str, Any]:
    kubernetes = config.kubernetes
    # Nothing can replace a meter before its volume is free, so it only closes in order.
    drain_s = _METER_CLOSE_S if group.kind == "meter" else math.ceil(config.longest_drain_s + _START_UP_S)
    ending = [{"name": _DRAIN_VARIABLE, "value": str(drain_s)}]
    memory: str = getattr(kubernetes.memory, group.kind)
    container: dict[str, Any] = {
        "name": "ray-worker",
        "image": kubernetes.gpu_image if group.gpus else kubernetes.cpu_image,
        "ports": _ports(config, "metrics", "agent"),
        "env": [*_environment(config), *ending, *_own_environment(config, group)],
        "resources": _resources(group.cpus + _RAY_CPUS, _times(memory, max(1, group.gpus)), group.gpus),
        "volumeMounts": [
            {"name": "models", "mountPath": f"{HOME}/models", **({} if group.kind == "engine" else {"readOnly": True})},
            *([{"name": "meter", "mountPath": str(_METER_FOLDER)}] if group.kind == "meter" else []),
        ],
        **_probes(
            {"httpGet": {"path": "/api/local_raylet_healthz", "port": "agent"}},
            readiness={"httpGet": {"path": "/-/healthz", "port": "serve"}},
        ),
    }
    template = _template(config, group.name, container)
    spec = template["spec"]
    spec["terminationGracePeriodSeconds"] = drain_s + _EXIT_S
    if group.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if group.accelerator:
        spec["nodeSelector"] = dict(sorted(kubernetes.accelerators[group.accelerator].items()))
    if group.max_pods > 1:
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": _labels(config, group.name)},
            }
            for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
        ]
    spec["volumes"].append({"name": "models", "persistentVolumeClaim": {"claimName": f"{config.cluster.name}-models"}})
    if group.kind == "meter":
        spec["volumes"].append(
            {"name": "meter", "persistentVolumeClaim": {"claimName": f"{config.cluster.name}-meter"}}
        )
    return template


def _labels(config: ClusterConfig, group: str) -> dict[str, str]:
    return {INSTANCE_LABEL: config.cluster.name, GROUP_LABEL: group}


def _template(config: ClusterConfig, group: str, container: dict[str, Any]) -> dict[str, Any]:
    """A pod of one container, which can write to its own folders alone: /tmp has Ray's files and what vLLM compiles."""
    secret = config.kubernetes.image_pull_secret
    container["volumeMounts"] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "home", "mountPath": str(HOME)},
        *container.get("volumeMounts", ()),
    ]
    container["securityContext"] = {**CONTAINER_SECURITY, "readOnlyRootFilesystem": True}
    return {
        "metadata": {"labels": _labels(config, group)},
        "spec": {
            "serviceAccountName": config.cluster.name,
            "automountServiceAccountToken": False,
            "securityContext": _POD_SECURITY,
            **({"imagePullSecrets": [{"name": secret}]} if secret else {}),
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "home", "emptyDir": {}}],
        },
    }


def _ports(config: ClusterConfig, *names: str) -> list[dict[str, Any]]:
    """KubeRay finds Serve's by its name, in the head's container too."""
    numbers = {name: PORTS[name] for name in names} | {"serve": config.cluster.http.port}
    return [{"name": name, "containerPort": number} for name, number in numbers.items()]


def _environment(config: ClusterConfig) -> list[dict[str, Any]]:
    """Of all pods alike: Serve's controller, on the head, and the proxies must agree."""
    variables = {
        "MILLSTREAM_HOME": str(HOME),
        POD_CLUSTER: config.cluster.name,
        **serve_environment(config.cluster.proxy, client_timeout_s(config), config.longest_drain_s),
        # Serve's answers from a replica that starts are larger than what Ray sends without its object store, and a node
        # that holds an object is never idle: it would not be given back, nor end before its time when it drains.
        "RAY_max_direct_call_object_size": str(_INLINE_BYTES),
    }
    if config.cluster.proxy == "haproxy":
        variables |= {
            "RAY_SERVE_HAPROXY_BINARY_PATH": "/usr/local/bin/millstream-haproxy",  # made by k8s/Dockerfile
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, config.kubernetes.gateway_cpus)),
        }
    return [{"name": name, "value": value} for name, value in variables.items()]


def _own_environment(config: ClusterConfig, group: WorkerGroup) -> list[dict[str, Any]]:
    """What pods of one kind have besides: secrets go where they are needed and nowhere else."""
    if group.kind == "meter":
        database = pod_database(config)
        variable = database.removeprefix("env://")
        return [
            *(
                [{"name": variable, "valueFrom": secret_reference(config, "database", "url")}]
                if variable != database
                else []
            ),
            {"name": "MILLSTREAM_ADMIN_KEY", "valueFrom": secret_reference(config, "admin_key", "key")},
            {"name": POD_DATABASE, "value": database},  # what `millstream` needs in this pod
            {"name": POD_HTTP_PORT, "value": str(config.cluster.http.port)},
        ]
    if group.kind == "engine":
        return [
            {"name": "HF_HOME", "value": f"{HOME}/models/.huggingface"},
            {"name": "HF_TOKEN", "valueFrom": secret_reference(config, "hub", "token", optional=True)},
        ]
    return []


def _probes(alive: dict[str, Any], *, readiness: dict[str, Any]) -> dict[str, Any]:
    """`alive` may take five minutes to say so at first and two to say so again: less would end what a slow node or a
    restart of Ray's head leaves intact."""
    return {
        "startupProbe": {**alive, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 60},
        "livenessProbe": {**alive, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 12},
        "readinessProbe": {**readiness, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 2},
    }


def _resources(cpus: float, memory: str, gpus: int = 0) -> dict[str, Any]:
    """No limit on CPUs, which would stall a process that does more for a moment."""
    gpu = {"nvidia.com/gpu": gpus} if gpus else {}
    return {
        "requests": {"cpu": f"{round(1000 * cpus)}m", "memory": memory, **gpu},
        "limits": {"memory": memory, **gpu},
    }


def _times(memory: str, factor: int) -> str:
    """`memory`, such as 32Gi, so many times."""
    return re.sub(r"^\d+", lambda number: str(int(number[0]) * factor), memory)


def _account_volume() -> dict[str, Any]:
    """What Kubernetes would mount into every container of the pod by itself."""
    return {
        "name": _ACCOUNT_VOLUME,
        "projected": {
            "sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
            ]
        },
    }
