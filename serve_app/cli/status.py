"""`millstream status`: what runs where, and how busy it is."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from datetime import timedelta
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from deployments.meter.keys.keys import ensure_admin_key
from deployments.scaling.scaling_board import ShownDecision
from serve_app.cli.database import InputError, told_in_a_line
from serve_app.cluster_api import ClusterApi, ClusterApiError
from serve_app.config import millstream_home
from serve_app.running_cluster import RunningCluster, find_cluster
from serve_app.serve_api import ServeApi, ServeApiError, unplaced

__all__ = ["status"]


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show applications, their replicas, where they run and their load. Ends with status 1 if no cluster runs."""
    from serve_app.applications import ROOT  # imports Ray, which the other commands start without

    home = millstream_home(os.environ)
    with told_in_a_line():
        cluster = find_cluster(home, os.environ)
        with closing(ServeApi(cluster.dashboard_url, cluster.token)) as api:
            try:
                applications = api.applications()
                resources = api.resources(applications)
            except ServeApiError as error:
                raise InputError(str(error)) from error
            decisions = _decisions(api)
        loads = _loads(cluster, ensure_admin_key(home))
    described = {
        "cluster": cluster.name,
        "url": f"{cluster.clients_url}/v1",
        "applications": [
            {
                "name": application.name,
                "status": application.status,
                "messages": [*application.reasons, *unplaced(application, resources)],
                "scaling": msgspec.to_builtins(decisions.get(application.name)),
                "deployments": [
                    {
                        "name": deployment,
                        "wanted": application.wanted[deployment],
                        "replicas": [
                            {
                                "id": replica.replica_id,
                                "state": replica.state,
                                "node": replica.node_ip,
                                "pid": replica.pid,
                                "load": loads.get(replica.replica_id),
                            }
                            for replica in replicas
                        ],
                    }
                    for deployment, replicas in application.deployments.items()
                    if deployment != ROOT
                ],
            }
            for application in applications
        ],
    }
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        _show(described)


def _decisions(api: ServeApi) -> dict[str, ShownDecision]:
    """By application; empty while they cannot be read."""
    try:
        return api.scaling_decisions()
    except ServeApiError as error:
        typer.echo(f"warning: no scaling decisions to show: {error}", err=True)
        return {}


def _loads(cluster: RunningCluster, key: str) -> dict[str, dict[str, Any]]:
    """Load of each engine replica as an ingress sees it; empty while none answers."""
    with closing(ClusterApi(cluster.http_url, key, timeout_s=5.0)) as api:
        try:
            return {replica["id"]: replica for replica in api.replicas()}
        except ClusterApiError as error:
            typer.echo(f"warning: no load to show: {error}", err=True)
            return {}


def _show(described: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"cluster {described['cluster']} at {described['url']}")
    for application in described["applications"]:
        console.print(f"\n{application['name']}  {application['status']}")
        for message in application["messages"]:
            console.print(f"  {message}", markup=False)
        table = Table(box=None, show_header=False, padding=(0, 1))
        for deployment in application["deployments"]:
            running = sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])
            summary = f"{running}/{deployment['wanted']} replicas"
            for number, replica in enumerate(deployment["replicas"] or [None]):
                name, count = ("", "") if number else (deployment["name"], summary)
                if replica is None:
                    table.add_row("", name, count)
                else:
                    load = replica["load"]
                    told = "" if load is None else _load(load)
                    table.add_row("", name, count, replica["id"], replica["state"], replica["node"], told)
        console.print(table)
        if (scaling := application["scaling"]) is not None:
            console.print(f"  {_scaling(scaling)}", markup=False)


def _scaling(scaling: dict[str, Any]) -> str:
    told = f"scaled to {scaling['replicas']}: {scaling['reason']}"
    if scaling["changed_at"] is None:
        return told
    ago = str(timedelta(seconds=int(time.time() - scaling["changed_at"])))
    return f"{told}\n  {ago} ago from {scaling['changed_from']}: {scaling['changed_for']}"


def _load(load: dict[str, Any]) -> str:
    if not load["in_rotation"]:
        return "out of rotation"
    used = load["kv_blocks_total"] - load["kv_blocks_free"]
    share = used / load["kv_blocks_total"] if load["kv_blocks_total"] else 0.0
    return f"{load['running']} running, {load['waiting']} waiting, KV {share:.0%}"
