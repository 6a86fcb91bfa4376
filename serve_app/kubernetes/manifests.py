"""The manifests as files: the same cluster.yaml gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, Final, NamedTuple

from serve_app.config import ClusterConfig
from serve_app.kubernetes.ray_service import ray_service
from serve_app.kubernetes.surroundings import (
    disruption_budgets,
    network_policies,
    pod_monitor,
    service,
    service_account,
    volume_claims,
)
from serve_app.kubernetes.yaml_text import yaml_text

__all__ = ["RENDERED_FILES", "RenderedFolder", "as_stream", "render_folder"]

_HEADER: Final = "Rendered by `millstream render kubernetes`: change cluster.yaml and render anew."
_ABOUT: Final = {
    "service-account.yaml": "Who the pods are: nobody. They get no token of Kubernetes' API.",
    "service.yaml": "Where clients reach the cluster: the pods that run ingress replicas.",
    "network-policies.yaml": "Who reaches the pods: each other, clients at Serve's port, the operator and Prometheus\n"
    "at theirs. Ray's dashboard, its job API and its processes are closed to everybody else.",
    "pod-monitor.yaml": "What Prometheus scrapes: the metrics of each pod, which Ray's agent there collects.",
    "ray-service.yaml": "The cluster: KubeRay makes the pods and hands serveConfigV2 to Ray Serve.",
    "volume-claims.yaml": "What outlives pods: the models, which all of them mount, and the files of the meter, which\n"
    "one pod mounts.",
    "disruption-budgets.yaml": "How many pods a drain of nodes leaves in place.",
}
_BASE: Final = ("service-account.yaml", "service.yaml", "network-policies.yaml", "pod-monitor.yaml")
"""Those that no model has a part in: clusters that differ in their models may share them."""
RENDERED_FILES: Final = frozenset((*_ABOUT, "kustomization.yaml"))


class RenderedFolder(NamedTuple):
    files: dict[str, str]
    """Text by name, kustomization.yaml among them."""
    base: dict[str, str]
    """The same of the folder that the first one builds on; empty without one."""


def render_folder(config: ClusterConfig, base: PurePath | None = None) -> RenderedFolder:
    """What a Kustomize folder for `config` holds. With `base`, a relative path, what no model has a part in is left to
    a folder there. `config` must have passed check_for_kubernetes."""
    objects = _objects(config)
    texts = {name: _file_text(name, items) for name, items in objects.items()}
    if base is None:
        return RenderedFolder({**texts, "kustomization.yaml": _kustomization(texts)}, {})
    shared = {name: text for name, text in texts.items() if name in _BASE}
    own = {name: text for name, text in texts.items() if name not in _BASE}
    return RenderedFolder(
        {**own, "kustomization.yaml": _kustomization([base.as_posix(), *own])},
        {**shared, "kustomization.yaml": _kustomization(shared)},
    )


def as_stream(config: ClusterConfig) -> str:
    """All manifests as one text, for `kubectl apply -f -`."""
    return "---\n".join(_file_text(name, items) for name, items in _objects(config).items())


def _objects(config: ClusterConfig) -> dict[str, list[dict[str, Any]]]:
    """By file, without files that would be empty."""
    objects = {
        "service-account.yaml": [service_account(config)],
        "service.yaml": [service(config)],
        "network-policies.yaml": network_policies(config),
        "pod-monitor.yaml": [pod_monitor(config)] if config.kubernetes.monitoring_namespace is not None else [],
        "volume-claims.yaml": volume_claims(config),
        "disruption-budgets.yaml": disruption_budgets(config),
        "ray-service.yaml": [ray_service(config)],
    }
    return {name: items for name, items in objects.items() if items}


def _file_text(name: str, objects: list[dict[str, Any]]) -> str:
    return _comment(_ABOUT[name]) + "---\n".join(map(yaml_text, objects))


def _kustomization(resources: Iterable[str]) -> str:
    return _comment("What belongs together: `kubectl apply -k` takes this folder.") + yaml_text(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": list(resources),
        }
    )


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in (*text.splitlines(), _HEADER))
