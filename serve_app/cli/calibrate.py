"""`millstream calibrate`: what the engine of a running model does, for `millstream plan --engine`."""

from __future__ import annotations

import os
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from deployments.meter.keys.keys import ensure_admin_key
from serve_app.cli.database import InputError, told_in_a_line
from serve_app.cluster_api import ClusterApi, ClusterApiError
from serve_app.config import millstream_home
from serve_app.running_cluster import find_cluster

__all__ = ["calibrate"]


def calibrate(
    model: Annotated[str | None, typer.Option(help="Which one, where the cluster has several.")] = None,
    max_sequences: Annotated[
        int, typer.Option(min=2, help="Most sequences that each replica decodes at once; take what your load has.")
    ] = 32,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt of each of them: the longer the context, the longer a step may take.")
    ] = 64,
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
) -> None:
    """Measure the engine of a running model, which should be idle, and print it as a simulated engine in YAML.

    It sends requests of its own, for up to a few minutes.
    """
    from serve_app.calibration.measurement import CalibrationError, Measurement

    with told_in_a_line():
        home = millstream_home(os.environ)
        cluster = find_cluster(home, os.environ)
        with closing(ClusterApi(cluster.http_url, ensure_admin_key(home))) as api:
            try:
                measurement = Measurement(api, _model(api, model), report=lambda line: typer.echo(line, err=True))
                measured = measurement.run(max_sequences=max_sequences, prompt_tokens=prompt_tokens)
            except (CalibrationError, ClusterApiError) as error:
                raise InputError(str(error)) from error
        for warning in measured.warnings():
            typer.echo(f"warning: {warning}", err=True)
        text = measured.text(datetime.now(UTC))
        if output is None:
            typer.echo(text, nl=False)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, "utf-8")


def _model(api: ClusterApi, name: str | None) -> str:
    names = sorted(api.context_lengths())
    if not names:
        raise InputError("the cluster serves no model yet: see millstream status")
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        got = "" if name is None else f"got {name!r}, "
        raise InputError(f"--model: {got}expected one of {', '.join(names)}")
    return name
