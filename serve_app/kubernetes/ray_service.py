"""The RayService: KubeRay makes pods of its groups, then hands Serve the configuration that `millstream up` would."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from deployments.engine.model_source import model_folder
from serve_app.applications import ENGINE, INGRESS, serve_config
from serve_app.config import ClusterConfig
from serve_app.kubernetes.groups import (
    GATEWAY_GROUP,
    METER_GROUP,
    WorkerGroup,
    engine_group_name,
    ingress_cpus,
    worker_groups,
)
from serve_app.kubernetes.pods import (
    AUTOSCALER_ACCOUNT_MOUNT,
    CONTAINER_SECURITY,
    GROUP_LABEL,
    HOME,
    INSTANCE_LABEL,
    head_template,
    pod_database,
    secret_name,
    secret_reference,
    worker_template,
)
from serve_app.kubernetes.yaml_text import yaml_text
from serve_app.ray_node import OBJECT_STORE_BYTES

__all__ = ["placed_serve_config", "ray_service"]

_IDLE_S = 300
"""Before an empty pod is given back: shorter than starting an engine anew is worth."""


def ray_service(config: ClusterConfig) -> dict[str, Any]:
    name, kubernetes = config.cluster.name, config.kubernetes
    groups = worker_groups(config)
    autoscaled = any(group.max_pods > group.min_pods for group in groups)
    cluster: dict[str, Any] = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", "secretName": secret_name(config, "ray_token")},
        "enableInTreeAutoscaling": autoscaled,
    }
    if autoscaled:
        cluster["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": _IDLE_S,
            "resources": {"requests": {"cpu": "200m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
            "securityContext": CONTAINER_SECURITY,
            "volumeMounts": [AUTOSCALER_ACCOUNT_MOUNT],
        }
    if kubernetes.tls:
        # KubeRay mounts the certificates and sets the variables of deployments/connections/tls.py in all containers. A
        # Secret made beforehand would not do: Ray wants the address of each pod in its certificate.
        cluster["tlsOptions"] = {"enabled": True}
    if kubernetes.redis_address is not None:
        cluster["gcsFaultToleranceOptions"] = {
            "redisAddress": kubernetes.redis_address,
            "redisPassword": {"valueFrom": secret_reference(config, "redis", "password")},
        }
    cluster["headGroupSpec"] = {
        "rayStartParams": {
            "num-cpus": "0",
            "object-store-memory": str(OBJECT_STORE_BYTES),
            "dashboard-host": "0.0.0.0",  # the operator speaks with it; the NetworkPolicy keeps others away
        },
        "template": head_template(config, autoscaled=autoscaled),
    }
    cluster["workerGroupSpecs"] = [_worker_group(config, group) for group in groups]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name, "labels": {INSTANCE_LABEL: name}},
        "spec": {
            # A second cluster beside the first would need all GPUs twice. What serveConfigV2 says is rolled out in
            # place, replica by replica.
            "upgradeStrategy": {"type": "None"},
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": yaml_text(placed_serve_config(config)),
            "rayClusterConfig": cluster,
        },
    }


def placed_serve_config(config: ClusterConfig) -> dict[str, Any]:
    """Serve's configuration with each replica bound to its group."""
    folders = {model.name: model_folder(model.source, HOME) for model in config.models}
    meter = config.meter.model_copy(update={"database": pod_database(config)})
    described = serve_config(config.model_copy(update={"meter": meter}), HOME, folders)
    described["http_options"]["host"] = "0.0.0.0"
    gateway, *models = described["applications"]
    for deployment in gateway["deployments"]:
        if deployment["name"] == INGRESS:
            _place(deployment, GATEWAY_GROUP)
            deployment["ray_actor_options"]["num_cpus"] = ingress_cpus(config)
        else:
            _place(deployment, METER_GROUP)
    for application, model in zip(models, config.models, strict=True):
        for deployment in application["deployments"]:
            if deployment["name"] == ENGINE:
                _place(deployment, engine_group_name(model))
    return described


def _place(deployment: dict[str, Any], group: str) -> None:
    options = deployment["ray_actor_options"]
    # The group's pods are on nodes of that type. Ray's autoscaler knows none of a group that has no pod yet.
    if (accelerator := options.pop("accelerator_type", None)) is not None and "autoscaling_config" in deployment:
        del deployment["autoscaling_config"]["policy"]["policy_kwargs"]["needs"][f"accelerator_type:{accelerator}"]
    options["label_selector"] = {GROUP_LABEL: group}


def _worker_group(config: ClusterConfig, group: WorkerGroup) -> dict[str, Any]:
    return {
        "groupName": group.name,
        "replicas": group.min_pods,
        "minReplicas": group.min_pods,
        "maxReplicas": group.max_pods,
        "labels": {GROUP_LABEL: group.name},
        "rayStartParams": {
            "num-cpus": str(group.cpus),
            **({"num-gpus": str(group.gpus)} if group.gpus else {}),
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
        "template": worker_template(config, group),
    }
