"""What stands around the RayService: who reaches its pods, what they keep, who may evict and who scrapes them."""

from __future__ import annotations

from typing import Any

from serve_app.config import ClusterConfig
from serve_app.kubernetes.groups import GATEWAY_GROUP, worker_groups
from serve_app.kubernetes.pods import GROUP_LABEL, INSTANCE_LABEL
from serve_app.kubernetes_config import Volume

__all__ = [
    "disruption_budgets",
    "network_policies",
    "pod_monitor",
    "service",
    "service_account",
    "volume_claims",
]

_NAMESPACE_LABEL = "kubernetes.io/metadata.name"
_OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


def _named(config: ClusterConfig, api_version: str, kind: str, suffix: str = "") -> dict[str, Any]:
    name = config.cluster.name
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": name + suffix, "labels": {INSTANCE_LABEL: name}},
    }


def service_account(config: ClusterConfig) -> dict[str, Any]:
    return {**_named(config, "v1", "ServiceAccount"), "automountServiceAccountToken": False}


def service(config: ClusterConfig) -> dict[str, Any]:
    """Leads to the gateway's pods only, unlike the one that KubeRay makes: GPU nodes come and go without breaking
    clients' connections."""
    return {
        **_named(config, "v1", "Service"),
        "spec": {
            "selector": {INSTANCE_LABEL: config.cluster.name, GROUP_LABEL: GATEWAY_GROUP},
            "ports": [{"name": "http", "port": 80, "targetPort": "serve", "appProtocol": "http"}],
        },
    }


def network_policies(config: ClusterConfig) -> list[dict[str, Any]]:
    """Pods of the cluster reach each other on all ports: engines listen for step streams, Ray's workers for calls, on
    free ones. From elsewhere come clients, the operator and Prometheus, each to its port."""
    instance = {"matchLabels": {INSTANCE_LABEL: config.cluster.name}}
    workers = {**instance, "matchExpressions": [{"key": GROUP_LABEL, "operator": "NotIn", "values": ["head"]}]}
    head = {"matchLabels": {INSTANCE_LABEL: config.cluster.name, GROUP_LABEL: "head"}}
    operator = {
        "namespaceSelector": {"matchLabels": {_NAMESPACE_LABEL: config.kubernetes.operator_namespace}},
        "podSelector": {"matchLabels": _OPERATOR},
    }
    policies = [
        _policy(config, "-cluster", instance, {"from": [{"podSelector": instance}]}),
        _policy(config, "-clients", workers, {"ports": _tcp("serve")}),
        _policy(config, "-operator", head, {"from": [operator], "ports": _tcp("dashboard", "serve")}),
    ]
    if config.kubernetes.monitoring_namespace is not None:
        prometheus = {"namespaceSelector": {"matchLabels": {_NAMESPACE_LABEL: config.kubernetes.monitoring_namespace}}}
        policies.append(_policy(config, "-metrics", instance, {"from": [prometheus], "ports": _tcp("metrics")}))
    return policies


def _policy(config: ClusterConfig, suffix: str, pods: dict[str, Any], rule: dict[str, Any]) -> dict[str, Any]:
    return {
        **_named(config, "networking.k8s.io/v1", "NetworkPolicy", suffix),
        "spec": {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": [rule]},
    }


def _tcp(*ports: str) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def volume_claims(config: ClusterConfig) -> list[dict[str, Any]]:
    storage = config.kubernetes.storage
    return [
        _volume_claim(config, "-models", storage.models, "ReadWriteMany"),
        _volume_claim(config, "-meter", storage.meter, "ReadWriteOnce"),
    ]


def _volume_claim(config: ClusterConfig, suffix: str, volume: Volume, access_mode: str) -> dict[str, Any]:
    return {
        **_named(config, "v1", "PersistentVolumeClaim", suffix),
        "spec": {
            "accessModes": [access_mode],
            **({"storageClassName": volume.storage_class} if volume.storage_class else {}),
            "resources": {"requests": {"storage": volume.size}},
        },
    }


def disruption_budgets(config: ClusterConfig) -> list[dict[str, Any]]:
    """One pod of a group at a time. Groups of one pod have none: it would keep their nodes from ever being drained.

    `minAvailable`, because `maxUnavailable` is for pods of controllers that Kubernetes knows, which KubeRay is not:
    https://kubernetes.io/docs/tasks/run-application/configure-pdb/#arbitrary-controllers-and-selectors
    """
    return [
        {
            **_named(config, "policy/v1", "PodDisruptionBudget", f"-{group.name}"),
            "spec": {
                "minAvailable": group.min_pods - 1,
                "selector": {"matchLabels": {INSTANCE_LABEL: config.cluster.name, GROUP_LABEL: group.name}},
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
            },
        }
        for group in worker_groups(config)
        if group.min_pods > 1
    ]


def pod_monitor(config: ClusterConfig) -> dict[str, Any]:
    return {
        **_named(config, "monitoring.coreos.com/v1", "PodMonitor"),
        "spec": {
            "selector": {"matchLabels": {INSTANCE_LABEL: config.cluster.name}},
            "podTargetLabels": [GROUP_LABEL],
            "podMetricsEndpoints": [{"port": "metrics", "path": "/metrics", "interval": "15s"}],
        },
    }
