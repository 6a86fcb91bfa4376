"""What a cluster.yaml may say and Kubernetes cannot do: told before anything is rendered, all of it at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from deployments.engine.model_source import source_kind
from serve_app.config import ClusterConfig, ModelConfig, millstream_home
from serve_app.config_reading import Problem
from serve_app.kubernetes.groups import engine_group_name, worker_groups
from serve_app.kubernetes.pods import HOME, PORTS, secret_name

__all__ = ["check_for_kubernetes"]

_NAME_LENGTH: Final = 47
"""KubeRay's limit for the name of a RayService: it makes longer names of it."""

_LABEL_LENGTH: Final = 63
"""Kubernetes' limit for the value of a label."""

_SERVE_PORTS: Final = (8404, 8500, 9101, 9500)
"""Of HAProxy's statistics and metrics, and of the proxies that Serve falls back to."""
_PORT_RANGES: Final = (range(10_001, 20_000), range(30_000, 31_001))
"""From which Ray gives its workers, and Serve its ingress replicas, one each."""


def check_for_kubernetes(file: str, config: ClusterConfig) -> list[Problem]:
    """Why `config`, valid otherwise, cannot run on Kubernetes; `file` is its name, for the messages."""
    return [Problem(file, 0, key, value, expected) for key, value, expected in _problems(config)]


def _problems(config: ClusterConfig) -> Iterator[tuple[str, str, str]]:
    """Key, what stands there, what was expected."""
    name, port, kubernetes = config.cluster.name, config.cluster.http.port, config.kubernetes
    if len(name) > _NAME_LENGTH or not re.match(r"[a-z]", name):
        yield "cluster.name", name, f"a name that begins with a letter, of at most {_NAME_LENGTH} characters"
    taken = (*PORTS.values(), *_SERVE_PORTS)
    if port < 1024 or port in taken or any(port in ports for ports in _PORT_RANGES):
        ranges = (f"{ports[0]} to {ports[-1]}" for ports in _PORT_RANGES)
        yield (
            "cluster.http.port",
            str(port),
            f"a port from 1024 on that Ray does not use: {_listing(sorted(taken))}, {_listing(ranges)}",
        )
    secret = secret_name(config, "database")
    scheme, _, rest = config.meter.database.partition("://")
    if scheme == "sqlite" and Path(rest.removeprefix("/")).parent != millstream_home(os.environ):
        yield (
            "meter.database",
            config.meter.database,
            "sqlite:///${MILLSTREAM_HOME}/ledger.db, which is a file on the meter's volume, or "
            f"env://MILLSTREAM_DATABASE, a PostgreSQL database whose URL is in the Secret {secret}",
        )
    elif scheme not in ("sqlite", "env"):
        yield (
            "meter.database",
            f"{scheme}://…",
            f"env://MILLSTREAM_DATABASE, and this URL in the Secret {secret}: a manifest is no place for its password",
        )
    if kubernetes.gateway_cpus < 2 * config.ingress.resources.cpus:
        yield (
            "kubernetes.gateway_cpus",
            str(kubernetes.gateway_cpus),
            f"at least {2 * config.ingress.resources.cpus:g}, twice ingress.resources.cpus: a new replica starts while "
            "an old one finishes its streams",
        )
    crowds = [group.name for group in worker_groups(config) if group.max_pods > 1]
    if kubernetes.redis_address is None and crowds:
        yield (
            "kubernetes.redis_address",
            "nothing",
            f"host:port of a Redis, since there may be several pods of {_listing(crowds)}: without it they all end "
            "with Ray's head",
        )
    for index, model in enumerate(config.models):
        if len(group := engine_group_name(model)) > _LABEL_LENGTH:
            yield (
                f"models[{index}].resources.accelerator",
                model.resources.accelerator or "nothing",
                f"a name of at most {_LABEL_LENGTH - len(group) + len(model.resources.accelerator or '')} characters: "
                f"the group of its pods, {group}, is the value of a label",
            )
        for key, value, expected in _model_problems(config, model):
            yield f"models[{index}].{key}", value, expected


def _model_problems(config: ClusterConfig, model: ModelConfig) -> Iterator[tuple[str, str, str]]:
    resources, kubernetes = model.resources, config.kubernetes
    if model.engine.max_model_len is None:
        yield "engine.max_model_len", "nothing", "a number of tokens: the weights are not here to read it from"
    if source_kind(model.source) == "folder" and not Path(model.source).is_relative_to(HOME / "models"):
        yield (
            "source",
            model.source,
            f"a hub id, or a folder below {HOME}/models, where the volume of models is mounted",
        )
    if resources.gpus == 0 and model.engine.kind == "vllm" and not model.engine.enforce_eager:
        yield (
            "engine.enforce_eager",
            "false",
            "true for a replica without GPUs: to compile a model, vLLM needs a compiler, which the CPU image lacks",
        )
    if resources.gpus > kubernetes.gpus_per_node:
        yield (
            "resources.gpus",
            f"{resources.gpus:g}",
            f"at most {kubernetes.gpus_per_node}, which is kubernetes.gpus_per_node: all GPUs of a replica are on one "
            "node. Lower tensor_parallel_size times pipeline_parallel_size",
        )
    if resources.accelerator is None:
        return
    if resources.gpus == 0:
        yield "resources.accelerator", resources.accelerator, "null for a replica without GPUs"
    elif not kubernetes.accelerators.get(resources.accelerator):
        yield (
            "resources.accelerator",
            resources.accelerator,
            f"node labels for it in kubernetes.accelerators, which has {_listing(kubernetes.accelerators) or 'none'}",
        )


def _listing(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
