"""`millstream down`: ends everything that `up` started, and nothing else."""

from __future__ import annotations

import os

import typer

from serve_app.config import millstream_home
from serve_app.ray_node import RayNode

__all__ = ["down"]


def down() -> None:
    """Stop the cluster that `up` started under MILLSTREAM_HOME, with every process of it."""
    home = millstream_home(os.environ)
    node = RayNode.running(home)
    if node is None:
        typer.echo(f"No cluster runs under {home}.")
        return
    typer.echo(f"Stopping cluster {node.name} …")
    ended = node.stop(home)
    typer.echo(f"Stopped: {ended} processes ended.")
