"""`millstream check FILE`: tells whether a cluster.yaml would start, without starting anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from deployments.engine.model_source import check_model_source
from serve_app.config import ClusterConfig
from serve_app.config_reading import ConfigError, load_cluster_config

__all__ = ["check"]


class ReservedResources(NamedTuple):
    """CPUs that a pool of replicas reserves."""

    pool: str
    cpus: float


def check(file: Annotated[Path, typer.Argument(help="The cluster.yaml to check.")]) -> None:
    """Check a cluster.yaml: keys and values, model sources, and whether the smallest replica counts fit.

    Prints every problem to standard error and ends with status 1, or a summary and 0.
    """
    try:
        config = load_cluster_config(file)
    except ConfigError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    problems = [
        f"{file}: models[{index}].source: {problem}"
        for index, model in enumerate(config.models)
        if (problem := check_model_source(model.source)) is not None
    ]
    reserved = _least_cpus(config)
    cpus = config.cluster.cpus
    if cpus is not None and _total(reserved) > cpus:
        problems.append(f"{file}: cluster.cpus: got {cpus}, expected at least {_sum(reserved)}")
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    for warning in _machine_warnings(config):
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(_summary(file, config))


def _least_cpus(config: ClusterConfig) -> list[ReservedResources]:
    """What the pools reserve while each is at its minimum."""
    ingress, meter = config.ingress, config.meter
    return [
        ReservedResources("ingress", ingress.replicas.min * ingress.resources.cpus),
        ReservedResources("meter", meter.replicas * meter.resources.cpus),
        *(ReservedResources(model.name, model.replicas.min * model.resources.cpus) for model in config.models),
    ]


def _total(reserved: list[ReservedResources]) -> float:
    return round(sum(each.cpus for each in reserved), 6)  # so that ten times 0.1 is 1


def _sum(reserved: list[ReservedResources]) -> str:
    """Such as `1.5 (ingress 0.25, meter 0.25, smollm2-135m 1)`."""
    return f"{_total(reserved):g} ({', '.join(f'{each.pool} {each.cpus:g}' for each in reserved)})"


def _machine_warnings(config: ClusterConfig) -> list[str]:
    """Where this machine is too small, which means nothing for a cluster that runs on others."""
    warnings = []
    cpus, reserved = os.cpu_count() or 1, _least_cpus(config)
    if config.cluster.cpus is None and _total(reserved) > cpus:
        warnings.append(
            f"this machine has {cpus} CPUs, the smallest replica counts reserve {_sum(reserved)}; "
            "to start here, set cluster.cpus or reserve less"
        )
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    reserved_gpus = sum(model.replicas.min * model.resources.gpus for model in config.models)
    if reserved_gpus > gpus:
        warnings.append(f"this machine has {gpus} GPUs, the smallest replica counts reserve {reserved_gpus:g}")
    return warnings


def _summary(file: Path, config: ClusterConfig) -> str:
    pools = ", ".join(
        f"{model.name} ({model.replicas.min}-{model.replicas.max} replicas)"
        if model.replicas.max > model.replicas.min
        else f"{model.name} ({model.replicas.min} {'replica' if model.replicas.min == 1 else 'replicas'})"
        for model in config.models
    )
    http = config.cluster.http
    return f"{file} is fine: {pools} at http://{http.host}:{http.port}"
