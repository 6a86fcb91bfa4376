"""ClusterConfig -> Ray Serve applications, in the declarative form that Serve's REST API and KubeRay take.

`gateway` has Ingress and Meter; each model is an application of its own, so that adding, upgrading, scaling or
breaking one never touches the others. What may change without a restart (the catalog of models) travels as
`user_config`, everything else as arguments of the builders below, which Serve calls in the cluster.
"""

# No `from __future__ import annotations`: Serve looks at the annotation of a builder's argument at run time.
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from deployments.engine.deployment import EngineDeployment
from deployments.engine.model_source import source_kind
from deployments.engine.router import TargetedRouter
from deployments.engine.settings import ReplicaSettings, VllmSettings
from deployments.ingress.deployment import IngressDeployment
from deployments.meter.deployment import MeterDeployment
from deployments.meter.remote.shards import GATEWAY, meter_names
from deployments.scaling.engine_policy import PoolPolicy
from deployments.scaling.ingress_policy import IngressPolicy
from serve_app.config import (
    INGRESS_DRAIN_S,
    SHUTDOWN_MARGIN_S,
    ClusterConfig,
    ModelConfig,
    ModelResources,
    ReplicaRange,
)

__all__ = [
    "GATEWAY",
    "ROOT",
    "GatewayArguments",
    "ModelArguments",
    "application_name",
    "build_gateway",
    "build_model",
    "serve_config",
]

INGRESS, ENGINE, ROOT = "Ingress", "Engine", "Root"

_MAX_STREAMS = 4096
"""Requests under way per ingress replica; Serve answers 503 beyond."""
_UNLIMITED = 1_000_000
"""Calls to an engine replica or the meter are short or, as step streams, one per ingress; both bound their own work."""
_LOGGING = {"enable_access_log": False}
"""The ingress logs one line per request itself, with tokens and times."""
_RESUME_TIMEOUT_S = 180.0
_REPORT_PERIOD_S = 1.0
"""How often replicas tell Serve's controller of their load."""
_FEW_ARENAS = {"env_vars": {"MALLOC_ARENA_MAX": "2"}}
"""For processes whose threads each take bodies of megabytes apart: glibc keeps what was freed for the thread, up to
64 MB each, in eight arenas a CPU."""


class GatewayArguments(BaseModel, frozen=True, extra="forbid"):
    home: str
    database: str
    require_keys: bool
    meters: int
    lost_after_s: float
    record_refusals: bool
    request_body_limit_bytes: int
    keep_alive_s: float
    request_timeout_s: float | None
    admission_timeout_s: float
    upload_timeout_s: float
    write_timeout_s: float
    cors_origins: list[str]


class ModelArguments(BaseModel, frozen=True, extra="forbid"):
    home: str
    settings: dict[str, Any]
    """ReplicaSettings as JSON."""
    drain_timeout_s: float


def application_name(model: str) -> str:
    """Serve and the controller's board make file names of it, and it stands in URLs, so a slash becomes `~`, which no
    model's name has."""
    return f"model-{model.replace('/', '~')}"


def build_gateway(arguments: GatewayArguments) -> Application:
    """Serve's builder of the application `gateway`."""
    meters = [
        serve.deployment(
            name=name, max_ongoing_requests=_UNLIMITED, health_check_period_s=2, health_check_timeout_s=10
        )(MeterDeployment).bind(
            arguments.home,
            arguments.database,
            arguments.require_keys,
            shard=shard,
            shards=arguments.meters,
            lost_after_s=arguments.lost_after_s,
            record_refusals=arguments.record_refusals,
        )
        for shard, name in enumerate(meter_names(arguments.meters))
    ]
    return serve.deployment(
        name=INGRESS,
        max_ongoing_requests=_MAX_STREAMS,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=(arguments.request_timeout_s or INGRESS_DRAIN_S) + SHUTDOWN_MARGIN_S,
    )(IngressDeployment).bind(
        *meters,
        home=arguments.home,
        engine_deployment=ENGINE,
        request_body_limit_bytes=arguments.request_body_limit_bytes,
        keep_alive_s=arguments.keep_alive_s,
        request_timeout_s=arguments.request_timeout_s,
        admission_timeout_s=arguments.admission_timeout_s,
        upload_timeout_s=arguments.upload_timeout_s,
        write_timeout_s=arguments.write_timeout_s,
        cors_origins=arguments.cors_origins,
    )


def build_model(arguments: ModelArguments) -> Application:
    """Serve's builder of one `model-<name>`."""
    settings = ReplicaSettings.model_validate(arguments.settings)
    engine = serve.deployment(
        name=ENGINE,
        max_ongoing_requests=_UNLIMITED,
        request_router_config=RequestRouterConfig(request_router_class=TargetedRouter),
        health_check_period_s=2,
        health_check_timeout_s=settings.stall_timeout_s + 5,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=arguments.drain_timeout_s + SHUTDOWN_MARGIN_S,
    )(EngineDeployment).bind(arguments.settings, arguments.home)
    return serve.deployment(
        name=ROOT,
        autoscaling_config={"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1},
        ray_actor_options={"num_cpus": 0},
    )(_Root).bind(engine)


class _Root:
    """The root of a model's application. Serve wants one, gives it an HTTP server of its own and lets it have no
    request router; engine replicas must have no open port and need their router. It has no replica: nobody calls it.
    """

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self._engine = engine


def serve_config(config: ClusterConfig, home: Path, folders: Mapping[str, Path]) -> dict[str, Any]:
    """The body of `PUT /api/serve/applications/`; `folders` has each model's prepared folder by name."""
    lengths = {model.name: context_length(model, folders[model.name]) for model in config.models}
    gateway = GatewayArguments(
        home=str(home),
        database=config.meter.database,
        require_keys=config.meter.require_keys,
        meters=config.meter.replicas,
        lost_after_s=config.meter.lost_after_s,
        record_refusals=config.meter.record_refusals,
        request_body_limit_bytes=int(config.ingress.request_body_limit),
        keep_alive_s=config.ingress.keep_alive_s,
        request_timeout_s=config.ingress.request_timeout_s,
        admission_timeout_s=config.ingress.admission_timeout_s,
        upload_timeout_s=config.ingress.upload_timeout_s,
        write_timeout_s=config.ingress.write_timeout_s,
        cors_origins=list(config.ingress.cors_origins),
    )
    catalog = [
        {
            "name": model.name,
            "aliases": list(model.aliases),
            "root": model.hub_id or (model.source if source_kind(model.source) == "hub" else ""),
            "application": application_name(model.name),
            "folder": str(folders[model.name]),
            "max_model_len": lengths[model.name],
            "fingerprint": fingerprint(model),
            "priority_scheduling": isinstance(model.engine, VllmSettings)
            and model.engine.scheduling_policy == "priority",
            "verifies_outputs": isinstance(model.engine, VllmSettings),
            "infilling": None if model.infilling is None else model.infilling.model_dump(),
            "limits": {
                "hold_timeout_s": model.hold_timeout_s,
                "resume_timeout_s": _RESUME_TIMEOUT_S,
                "drain_timeout_s": model.drain_timeout_s,
                "max_held": model.max_waiting,
                "max_held_tokens": model.max_held_tokens,
                "cold_start_timeout_s": model.cold_start_timeout_s if model.replicas.min == 0 else None,
            },
            "min_replicas": model.replicas.min,
            "max_replicas": model.replicas.max,
        }
        for model in config.models
    ]
    metered = [
        {
            "name": model.name,
            "aliases": list(model.aliases),
            "folder": str(folders[model.name]),
            "max_model_len": lengths[model.name],
            "prompt_price": model.price.prompt,
            "completion_price": model.price.completion,
        }
        for model in config.models
    ]
    ingress_replicas = config.ingress.replicas
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.cluster.http.host, "port": config.cluster.http.port},
        "applications": [
            {
                "name": GATEWAY,
                "route_prefix": "/",
                "logging_config": _LOGGING,
                "import_path": f"{__name__}:build_gateway",
                "args": gateway.model_dump(),
                "deployments": [
                    {
                        "name": INGRESS,
                        # Also of a fixed number: what ingress replicas report, the models' policies need.
                        "autoscaling_config": _autoscaling(
                            ingress_replicas,
                            IngressPolicy,
                            {"minimum": ingress_replicas.min, "maximum": ingress_replicas.max},
                        ),
                        "ray_actor_options": {"num_cpus": config.ingress.resources.cpus, "runtime_env": _FEW_ARENAS},
                        "user_config": {"models": catalog},
                    },
                    *(
                        {
                            "name": name,
                            "ray_actor_options": {"num_cpus": config.meter.resources.cpus, "runtime_env": _FEW_ARENAS},
                            "user_config": {"models": metered},
                        }
                        for name in meter_names(config.meter.replicas)
                    ),
                ],
            },
            *(_model_application(model, home) for model in config.models),
        ],
    }


def _needs(resources: ModelResources) -> dict[str, float]:
    """What a replica reserves, by Ray's names."""
    accelerator = {} if resources.accelerator is None else {f"accelerator_type:{resources.accelerator}": 0.001}
    return {"CPU": resources.cpus, "GPU": resources.gpus, **accelerator}


def _autoscaling(replicas: ReplicaRange, policy: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Serve's `autoscaling_config` that leaves every decision to `policy`, made with `arguments`: no delay is added."""
    return {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "metrics_interval_s": _REPORT_PERIOD_S,
        "look_back_period_s": 2 * _REPORT_PERIOD_S,
        "policy": {"policy_function": f"{policy.__module__}:{policy.__qualname__}", "policy_kwargs": arguments},
    }


def fingerprint(model: ModelConfig) -> str:
    """Changes with whatever shapes the answers of a model: its weights, its engine and this program."""
    shaping = model.model_dump_json(include={"name", "source", "engine", "infilling"})
    return "fp_" + hashlib.sha256(f"{version('millstream')} {shaping}".encode()).hexdigest()[:12]


def context_length(model: ModelConfig, folder: Path) -> int:
    """Tokens of prompt and completion that the model takes: configured, or what its weights were trained for."""
    if model.engine.max_model_len is not None:
        return model.engine.max_model_len
    described = json.loads((folder / "config.json").read_bytes())
    return int(described.get("text_config", described)["max_position_embeddings"])


def _model_application(model: ModelConfig, home: Path) -> dict[str, Any]:
    resources = model.resources
    # All GPUs of a replica are on one node: vLLM's workers are children of the replica and share what it reserved.
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    if resources.accelerator is not None:
        options["accelerator_type"] = resources.accelerator
    deployment: dict[str, Any] = {"name": ENGINE, "ray_actor_options": options}
    if model.replicas.fixed:
        deployment["num_replicas"] = model.replicas.min
    else:
        deployment["autoscaling_config"] = _autoscaling(
            model.replicas,
            PoolPolicy,
            {"model": model.name, "targets": model.replicas.model_dump(), "needs": _needs(model.resources)},
        )
    arguments = ModelArguments(
        home=str(home),
        # What may change without touching the replicas that run is no part of it.
        settings=model.model_dump(mode="json", include=set(ReplicaSettings.model_fields)),
        drain_timeout_s=model.drain_timeout_s,
    )
    return {
        "name": application_name(model.name),
        "route_prefix": None,
        "logging_config": _LOGGING,
        "import_path": f"{__name__}:build_model",
        "args": arguments.model_dump(),
        "deployments": [deployment],
    }
