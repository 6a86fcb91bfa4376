"""`millstream down`: ends everything that `up` started, and nothing else."""

from __future__ import annotations

import os

import typer

from serve_app.cli.database import told_in_a_line
from serve_app.config import millstream_home
from serve_app.ray_node import RayNode
from serve_app.running_cluster import check_not_in_a_pod

__all__ = ["down"]


def down() -> None:
    """Stop the cluster that `up` started under MILLSTREAM_HOME, with every process of it."""
    with told_in_a_line():
        check_not_in_a_pod(os.environ)
    home = millstream_home(os.environ)
    node = RayNode.running(home)
    if node is None:
        typer.echo(f"No cluster runs under {home}.")
        return
    typer.echo(f"Stopping cluster {node.name} …")
    ended = node.stop(home)
    typer.echo(f"Stopped: {ended} processes ended.")
