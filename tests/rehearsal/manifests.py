"""What `millstream render kubernetes` says, and what KubeRay makes of it: the pods' commands and environments.

Written after KubeRay 1.6 (ray-operator/controllers/ray/common/pod.go): which parameters and variables the operator adds
to a template, and the sidecar that is its autoscaler; and, after 1.7, what `tlsOptions` adds.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from loadtests.certificates import variables

__all__ = ["DASHBOARD_PORT", "GCS_PORT", "HEAD_GROUP", "Container", "Manifests", "PodTemplate", "Secrets", "rendered"]

Secrets = dict[str, dict[str, str]]
"""Keys and values by name of the Secret."""

GCS_PORT: Final = 6379
DASHBOARD_PORT: Final = 8265
_AUTOSCALER: Final = "autoscaler"
HEAD_GROUP: Final = "headgroup"
_NAMESPACE: Final = "default"
_TLS_MOUNT: Final[dict[str, Any]] = {"name": "ray-tls", "mountPath": "/var/lib/ray-tls", "readOnly": True}
"""KubeRay's is at /etc/ray/tls: here it lies below what no pod has of the machine, so that nothing is left there."""
_MEMORY_UNITS: Final = {"Mi": 2**20, "Gi": 2**30}


@dataclass(frozen=True)
class Container:
    name: str
    arguments: list[str]
    environment: dict[str, str]
    mounts: list[dict[str, Any]]
    """As in the manifest: name, mountPath, readOnly."""


@dataclass(frozen=True)
class PodTemplate:
    """A pod before it has a name and an address."""

    group: str
    labels: dict[str, str]
    containers: list[Container]
    volumes: dict[str, dict[str, Any]]
    """By name, as in the manifest."""
    ports: dict[str, int]
    """By name."""
    grace_s: float
    """Between SIGTERM and SIGKILL."""


class Manifests:
    def __init__(self, documents: list[dict[str, Any]]) -> None:
        (self.ray_service,) = [each for each in documents if each["kind"] == "RayService"]
        self.network_policies = [each for each in documents if each["kind"] == "NetworkPolicy"]
        self.cluster: dict[str, Any] = self.ray_service["spec"]["rayClusterConfig"]
        self.name: str = self.ray_service["metadata"]["name"]

    @property
    def serve_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self.ray_service["spec"]["serveConfigV2"])
        return config

    @property
    def head_service(self) -> str:
        """Under which name the pods find the head."""
        return f"{self.name}-head-svc.{_NAMESPACE}.svc.cluster.local"

    @property
    def tls(self) -> bool:
        """Whether KubeRay has certificates made."""
        enabled: bool = self.cluster.get("tlsOptions", {}).get("enabled", False)
        return enabled

    def head(self, pod_name: str, secrets: Secrets) -> PodTemplate:
        group = self.cluster["headGroupSpec"]
        fault_tolerance = self.cluster["gcsFaultToleranceOptions"]
        environment = {
            "RAY_ADDRESS": f"127.0.0.1:{GCS_PORT}",
            "RAY_IP": "127.0.0.1",
            "REDIS_PASSWORD": _value(fault_tolerance["redisPassword"], secrets),
            "RAY_REDIS_ADDRESS": fault_tolerance["redisAddress"],
            "RAY_external_storage_namespace": self.name,
            "RAY_enable_autoscaler_v2": "1",
        }
        parameters = {"no-monitor": "true", "redis-password": "$REDIS_PASSWORD"}
        template = self._template(group, HEAD_GROUP, pod_name, secrets, ["--head"], parameters, environment)
        if self.cluster["enableInTreeAutoscaling"]:
            template.containers.append(self._autoscaler(pod_name, secrets))
        return template

    def worker(self, group: dict[str, Any], pod_name: str, secrets: Secrets) -> PodTemplate:
        environment = {
            "RAY_ADDRESS": f"{self.head_service}:{GCS_PORT}",
            "RAY_IP": self.head_service.partition(".")[0],
            "FQ_RAY_IP": self.head_service,
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        }
        labels = ",".join(f"{name}={value}" for name, value in sorted(group["labels"].items()))
        parameters = {"address": f"{self.head_service}:{GCS_PORT}", "labels": labels}
        return self._template(group, group["groupName"], pod_name, secrets, [], parameters, environment)

    def _template(
        self,
        group: dict[str, Any],
        group_name: str,
        pod_name: str,
        secrets: Secrets,
        options: list[str],
        parameters: dict[str, str],
        environment: dict[str, str],
    ) -> PodTemplate:
        template = group["template"]
        (container,) = template["spec"]["containers"]
        ray_start = self._ray_start(group, container, options, parameters)
        ray = Container(
            container["name"],
            ["/bin/bash", "-c", "--", f"ulimit -n 65536; {ray_start}"],
            {
                **_environment(container["env"], secrets),
                **environment,
                **self._token(secrets),
                **self._tls_variables,
                "KUBERAY_GEN_RAY_START_CMD": ray_start,
                "RAY_CLUSTER_NAME": self.name,
                "RAY_CLOUD_INSTANCE_ID": pod_name,
                "RAY_NODE_TYPE_NAME": group_name,
                "RAY_PORT": str(GCS_PORT),
                "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
            },
            [*container.get("volumeMounts", []), *self._tls_mounts],
        )
        return PodTemplate(
            group=group_name,
            labels={
                **template["metadata"]["labels"],
                "ray.io/cluster": self.name,
                "ray.io/group": group_name,
                "ray.io/node-type": "head" if "--head" in options else "worker",
            },
            containers=[ray],
            volumes={
                **{volume["name"]: volume for volume in template["spec"].get("volumes", [])},
                **({_TLS_MOUNT["name"]: {"secret": {}}} if self.tls else {}),
            },
            ports={port["name"]: port["containerPort"] for port in container["ports"]},
            grace_s=template["spec"]["terminationGracePeriodSeconds"],
        )

    def _ray_start(
        self, group: dict[str, Any], container: dict[str, Any], options: list[str], parameters: dict[str, str]
    ) -> str:
        memory = container["resources"]["limits"]["memory"]
        merged = {
            **group["rayStartParams"],
            **parameters,
            "memory": str(int(memory[:-2]) * _MEMORY_UNITS[memory[-2:]]),
            "metrics-export-port": "8080",
            "dashboard-agent-listen-port": "52365",
            "block": "true",
        }
        flags = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(merged.items())]
        return " ".join(["ray start", *options, *flags])

    def _autoscaler(self, pod_name: str, secrets: Secrets) -> Container:
        return Container(
            _AUTOSCALER,
            shlex.split(f"ray kuberay-autoscaler --cluster-name {self.name} --cluster-namespace {_NAMESPACE}"),
            {
                **self._token(secrets),
                **self._tls_variables,
                "RAY_CLUSTER_NAME": self.name,
                "RAY_CLUSTER_NAMESPACE": _NAMESPACE,
                "RAY_HEAD_POD_NAME": pod_name,
                "KUBERAY_CRD_VER": "v1",
            },
            [*self.cluster["autoscalerOptions"]["volumeMounts"], *self._tls_mounts],
        )

    @property
    def _tls_variables(self) -> dict[str, str]:
        return variables(Path(_TLS_MOUNT["mountPath"])) if self.tls else {}

    @property
    def _tls_mounts(self) -> list[dict[str, Any]]:
        return [_TLS_MOUNT] if self.tls else []

    def _token(self, secrets: Secrets) -> dict[str, str]:
        options = self.cluster["authOptions"]
        return {"RAY_AUTH_MODE": options["mode"], "RAY_AUTH_TOKEN": secrets[options["secretName"]]["auth_token"]}


def rendered(config: Path) -> Manifests:
    """Of a cluster.yaml, by the command that users run."""
    text = subprocess.run(
        [sys.executable, "-m", "serve_app.cli", "render", "kubernetes", str(config)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return Manifests(list(yaml.safe_load_all(text)))


def _environment(variables: list[dict[str, Any]], secrets: Secrets) -> dict[str, str]:
    """Those whose optional Secret is missing are left out."""
    values = {}
    for variable in variables:
        source = variable.get("valueFrom")
        if source is None:
            values[variable["name"]] = variable["value"]
        elif not (source["secretKeyRef"].get("optional") and source["secretKeyRef"]["name"] not in secrets):
            values[variable["name"]] = _value(variable, secrets)
    return values


def _value(variable: dict[str, Any], secrets: Secrets) -> str:
    reference = variable["valueFrom"]["secretKeyRef"]
    return secrets[reference["name"]][reference["key"]]
