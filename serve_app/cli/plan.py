"""`millstream plan`: how many replicas a load needs, and what it would see, by simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.engine.settings import SimulatedEngineSettings
from serve_app.cli.database import InputError, told_in_a_line
from serve_app.config import ClusterConfig, ModelConfig
from serve_app.config_reading import load_cluster_config

if TYPE_CHECKING:
    from serve_app.planning.outcome import Outcome
    from serve_app.planning.workload import Workload

__all__ = ["plan"]

_STAGE_S = 3600.0
"""Of a rate that is given without seconds."""


def plan(
    file: Annotated[Path, typer.Argument(help="The cluster.yaml.")],
    trace: Annotated[
        Path | None, typer.Option(help="CSV with at_s, prompt_tokens and max_tokens of each request.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Requests per second, for an hour; or stages of rate:seconds, as in 2:60,60:120."),
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help="With --rate: a number, or 200-800 for any between.")] = "500",
    max_tokens: Annotated[str, typer.Option(help="The same for generated tokens.")] = "100",
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
    model: Annotated[str | None, typer.Option(help="Which one, where the file has several.")] = None,
    engine: Annotated[
        Path | None,
        typer.Option(
            help="YAML with the keys of a simulated engine, which stands in for that of the model: what a "
            "vllm engine was measured to do."
        ),
    ] = None,
    start_up_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds in which a replica readies its engine, if not the engine's."),
    ] = None,
    platform_start_up_s: Annotated[
        float | None, typer.Option(min=0, help="Seconds that pass before: for a process, or a new node; 2 by default.")
    ] = None,
    replicas_at_start: Annotated[
        int | None, typer.Option(min=0, help="Replicas that are up already, if not the model's min.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write a page with plots to this .html file.")] = None,
) -> None:
    """Simulate a model's pool under a load, with its scaling, in virtual time: an hour takes seconds.

    Every generation is as long as its max_tokens, and no two prompts begin alike.
    """
    with told_in_a_line():
        config = _model(load_cluster_config(file), model)
        load, load_text = _workload(trace, rate, prompt_tokens, max_tokens, seed)
        if replicas_at_start is not None and replicas_at_start > config.replicas.max:
            raise InputError(f"--replicas-at-start: got {replicas_at_start}, replicas.max is {config.replicas.max}")
        outcome = _simulate(config, engine, load, start_up_s, platform_start_up_s, replicas_at_start, seed)
        target_s = config.replicas.target_first_token_s
        if report is not None:
            _write_report(report, outcome, config, load_text)
    if as_json:
        typer.echo(json.dumps(outcome.figures(target_s), indent=2))
    else:
        for name, value in outcome.readable(target_s):
            typer.echo(f"{name:<28}{value}")


def _model(config: ClusterConfig, name: str | None) -> ModelConfig:
    names = ", ".join(model.name for model in config.models)
    if name is None and len(config.models) > 1:
        raise InputError(f"--model: expected one of {names}")
    found = next((model for model in config.models if name in (None, model.name)), None)
    if found is None:
        raise InputError(f"--model: got {name!r}, expected one of {names}")
    return found


def _workload(
    trace: Path | None, rate: str | None, prompt_tokens: str, max_tokens: str, seed: int
) -> tuple[Workload, str]:
    """And what it is, in words."""
    from serve_app.planning.workload import (
        PoissonWorkload,
        RateStage,
        TokenRange,
        TraceError,
        TraceWorkload,
        read_trace,
    )

    if (trace is None) == (rate is None):
        raise InputError("expected one of --trace and --rate")
    if trace is not None:
        try:
            return TraceWorkload(read_trace(trace)), f"the trace {trace.name}"
        except TraceError as error:
            raise InputError(str(error)) from None
    assert rate is not None
    parsed = []
    for option, text in (("--prompt-tokens", prompt_tokens), ("--max-tokens", max_tokens)):
        try:
            parsed.append(TokenRange.parse(text))
        except ValueError as error:
            raise InputError(f"{option}: got {text!r}, {error}") from None
    try:
        stages = RateStage.parse_all(rate, seconds=_STAGE_S)
    except ValueError as error:
        raise InputError(f"--rate: got {rate!r}, {error}") from None
    load = PoissonWorkload(stages=stages, prompt_tokens=parsed[0], max_tokens=parsed[1], seed=seed)
    shape = ", then ".join(f"{stage.rate_per_s:g} requests/s for {stage.seconds:g} s" for stage in stages)
    return load, f"{shape}; prompts of {prompt_tokens} tokens, {max_tokens} generated; seed {seed}"


def _simulate(
    model: ModelConfig,
    engine_file: Path | None,
    load: Workload,
    start_up_s: float | None,
    platform_start_up_s: float | None,
    replicas_at_start: int | None,
    seed: int,
) -> Outcome:
    from deployments.scaling.decision import PoolScaler
    from serve_app.planning.model_pool import (
        PLATFORM_START_UP_S,
        EngineFileError,
        pool_settings,
        read_engine,
        scaling_targets,
    )
    from serve_app.planning.pool_simulation import PoolSimulation

    try:
        engine = model.engine if engine_file is None else read_engine(engine_file)
    except EngineFileError as error:
        raise InputError(str(error)) from None
    if not isinstance(engine, SimulatedEngineSettings):
        raise InputError(f"{model.name} has a {engine.kind} engine: --engine FILE must tell what it can do")
    settings = pool_settings(
        model,
        engine,
        start_up_s=start_up_s,
        platform_start_up_s=PLATFORM_START_UP_S if platform_start_up_s is None else platform_start_up_s,
        replicas_at_start=replicas_at_start,
    )
    return PoolSimulation(settings, PoolScaler(scaling_targets(model)).decide, seed=seed).run(load)


def _write_report(file: Path, outcome: Outcome, model: ModelConfig, load_text: str) -> None:
    try:
        from serve_app.planning.report import html
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise InputError("--report needs matplotlib: pip install 'millstream[load]'") from None
    replicas = model.replicas
    text = html(
        outcome,
        title=f"{model.name}: simulated pool of {replicas.min} to {replicas.max} replicas",
        description=f"Under {load_text}.",
        target_first_token_s=replicas.target_first_token_s,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
