"""`millstream render …`: what a cluster.yaml means elsewhere, as text for other tools. Starts nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from deployments.engine.model_source import model_folder
from serve_app.cli.database import InputError, told_in_a_line
from serve_app.config import ClusterConfig, millstream_home
from serve_app.config_reading import ConfigError, load_cluster_config

__all__ = ["render"]

render = typer.Typer(help="Write the cluster of a cluster.yaml down for Kubernetes or Ray Serve.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="The cluster.yaml to render.")]


@render.command()
def kubernetes(
    file: File,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="A Kustomize folder instead of one stream.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Put what no model has a part in there, for several overlays to share."),
    ] = None,
) -> None:
    """Render a RayService for KubeRay and what belongs around it; docs/kubernetes.md says how to install it."""
    with told_in_a_line():
        if base is not None and output is None:
            raise InputError("--base: expected --output, too")
        # The modules below import Ray, which the other commands start without.
        from serve_app.kubernetes import RENDERED_FILES, as_stream, check_for_kubernetes, render_folder

        config = load_cluster_config(file)
        if problems := check_for_kubernetes(str(file), config):
            raise ConfigError(problems)
        if output is None:
            typer.echo(as_stream(config), nl=False)
            return
        relative = None if base is None else Path(os.path.relpath(base, output))
        rendered = render_folder(config, relative)
        _write(output, rendered.files, RENDERED_FILES)
        if base is not None:
            _write(base, rendered.base, RENDERED_FILES)


@render.command()
def serve(
    file: File,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="A file instead of standard output.")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="MILLSTREAM_HOME of the Ray cluster, if not that of here.")
    ] = None,
) -> None:
    """Render Ray Serve's own configuration, for `serve deploy` on any Ray cluster that has Millstream installed."""
    with told_in_a_line():
        from serve_app.applications import serve_config
        from serve_app.kubernetes.yaml_text import yaml_text

        config = load_cluster_config(file)
        there = millstream_home(os.environ) if home is None else home
        folders = {model.name: model_folder(model.source, there) for model in config.models}
        _check_context_lengths(config, folders)
        text = yaml_text(serve_config(config, there, folders))
        if output is None:
            typer.echo(text, nl=False)
        else:
            output.write_text(text, "utf-8")


def _check_context_lengths(config: ClusterConfig, folders: dict[str, Path]) -> None:
    for index, model in enumerate(config.models):
        if model.engine.max_model_len is None and not (folders[model.name] / "config.json").is_file():
            raise InputError(
                f"models[{index}].engine.max_model_len: got nothing, expected a number of tokens: the weights are not "
                f"in {folders[model.name]} to read it from"
            )


def _write(folder: Path, texts: dict[str, str], names: Iterable[str]) -> None:
    """Writes `texts` and removes what an earlier rendering had besides."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(names):
        if name in texts:
            (folder / name).write_text(texts[name], "utf-8")
        else:
            (folder / name).unlink(missing_ok=True)
