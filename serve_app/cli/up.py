"""`millstream up FILE`: from a cluster.yaml to a cluster that answers, with progress and reasons."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from deployments.engine.model_source import ModelSourceError, prepare_model
from deployments.meter.errors import AdminKeyError
from deployments.meter.keys.keys import ensure_admin_key
from serve_app.cli.database import told_in_a_line
from serve_app.config import ClusterConfig, millstream_home
from serve_app.config_reading import ConfigError, load_cluster_config
from serve_app.haproxy_configuration import refusals
from serve_app.ray_node import RayNode, RayNodeError, processes_of, write_secret
from serve_app.running_cluster import check_not_in_a_pod
from serve_app.serve_api import Application, ServeApi, ServeApiError, unplaced

__all__ = ["up"]

_API_LIMIT_S = 60.0
_POLL_S = 0.5
_SILENCE_S = 15.0
"""A line of progress at least so often."""


class StartError(Exception):
    """The cluster did not come up; the text says which part failed and why."""


def up(
    file: Annotated[Path, typer.Argument(help="The cluster.yaml to run.")] = Path("cluster.yaml"),
    detach: Annotated[bool, typer.Option("--detach", help="Return once the cluster answers.")] = False,
    port: Annotated[int | None, typer.Option(help="Listen here instead of cluster.http.port.")] = None,
    timeout: Annotated[float, typer.Option(help="Give up when the cluster is not up after so many seconds.")] = 900.0,
) -> None:
    """Start the cluster that FILE describes, or change the running one to it.

    Stays in the foreground, and stops the cluster on Ctrl-C, unless --detach is given or the cluster was running.
    """
    from serve_app.applications import serve_config  # imports Ray, which the other commands start without

    with told_in_a_line():
        check_not_in_a_pod(os.environ)
    try:
        config = load_cluster_config(file)
        if port is not None:
            config = _with_port(config, port)
    except ConfigError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    home = millstream_home(os.environ)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Ctrl-C ends the waiting below rather than this process somewhere, so that what was started is stopped in order.
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    node: RayNode | None = None
    started = False
    heads: dict[str, psutil.Process] = {}
    try:
        key = ensure_admin_key(home)
        folders = {model.name: prepare_model(model.source, home, report=_say) for model in config.models}
        with _alone(home):
            write_secret(home / "run" / "database", config.meter.database)  # for the commands that read or change it
            node = RayNode.running(home)
            if node is None:
                _say("starting Ray …")
                started = True
                node = RayNode.start(config, home)
            else:
                _say(f"changing the running cluster {node.name} …")
                _check_unchanged(node, config)
            api = ServeApi(node.dashboard_url, node.token)
            api.wait_until_up(_API_LIMIT_S)
            described = serve_config(config, home, folders)
            described["http_options"]["host"] = node.serve_host
            _apply(api, node, described)
            _await_running(api, node, config, stopping, timeout)
            _await_ready(node, stopping, time.monotonic() + _API_LIMIT_S)
            if not stopping.is_set():
                heads = node.head_processes()
    except (AdminKeyError, ModelSourceError, RayNodeError, ServeApiError, StartError) as error:
        typer.echo(f"The cluster did not start: {error}", err=True)
        if node is not None:
            typer.echo(f"The replicas' logs: {node.folder}/session_latest/logs/serve", err=True)
            if started:
                node.stop(home, keep_logs=True)
        raise typer.Exit(1) from None
    if stopping.is_set():
        if started:
            _stop(node, home)
        raise typer.Exit(130)
    _greet(node, config, key)
    if detach or not started:
        return
    _say("running in the foreground; Ctrl-C stops the cluster")
    lost = _await_end(node, home, heads, stopping)
    if stopping.is_set():
        _stop(node, home)
    elif lost is None:
        typer.echo("The cluster was stopped.", err=True)
    else:
        typer.echo(
            f"Ray's {lost} (process {heads[lost].pid}) has ended, and without it nothing is checked or replaced any "
            f"more. Stopping the rest. Why it ended may stand in {node.folder}/session_latest/logs/{lost}.err, or, if "
            "the machine had no memory left, in the kernel's log.",
            err=True,
        )
        ended = node.stop(home, keep_logs=True, headless=True)
        _say(f"stopped: {ended} processes ended")
        raise typer.Exit(1)


def _await_end(node: RayNode, home: Path, heads: dict[str, psutil.Process], stopping: threading.Event) -> str | None:
    """Until Ctrl-C, until the cluster has been stopped elsewhere, or until one of `heads` has ended: its name."""
    while not stopping.wait(1.0):
        ended = [name for name, process in heads.items() if not process.is_running()]
        if ended and not node.is_stopping(home):
            # `down` takes its note away when all have ended.
            return ended[0] if processes_of(node.cluster_id) else None
    return None


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Holds off a second `up` under the same home. Raises StartError when there is one."""
    (home / "run").mkdir(exist_ok=True)
    with (home / "run" / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"another `millstream up` is at work under {home}; wait for it or end it") from None
        yield


def _with_port(config: ClusterConfig, port: int) -> ClusterConfig:
    http = config.cluster.http.model_copy(update={"port": port})
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"http": http})})


def _check_unchanged(node: RayNode, config: ClusterConfig) -> None:
    http = config.cluster.http
    if (node.http_host, node.http_port, node.proxy) != (http.host, http.port, config.cluster.proxy):
        raise StartError(
            f"the running cluster listens on {node.http_host}:{node.http_port} with proxy {node.proxy}, which "
            "cannot change while it runs: `millstream down` first"
        )


def _apply(api: ServeApi, node: RayNode, described: dict[str, Any]) -> None:
    """Raises ServeApiError, or StartError where HAProxy is why: Serve starts it first, and would tell at length."""
    try:
        api.apply(described)
    except ServeApiError:
        _check_proxy(node)
        raise


def _await_running(
    api: ServeApi, node: RayNode, config: ClusterConfig, stopping: threading.Event, limit_s: float
) -> None:
    """Until every application runs. Raises StartError with the reason of the first that failed, HAProxy's too."""
    begun = said = answered = time.monotonic()
    last = ""
    applications: list[Application] = []
    while not stopping.wait(_POLL_S):
        _check_proxy(node)
        try:
            applications = api.applications()
            progress = _progress(api, applications)
        except ServeApiError as error:  # on a busy machine it may be late, and says nothing of the replicas then
            if time.monotonic() > answered + _API_LIMIT_S:
                raise
            progress = f"unknown: {error}"
        else:
            answered = time.monotonic()
        for application in applications:
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise StartError(_reason(application))
        now = time.monotonic()
        if progress and (progress != last or now - said > _SILENCE_S):
            _say(f"[{now - begun:3.0f} s] replicas up: {progress}")
            last, said = progress, now
        if len(applications) == len(config.models) + 1 and all(
            application.status == "RUNNING" for application in applications
        ):
            return
        if now > begun + limit_s:
            waiting = "\n".join(_reason(a) for a in applications if a.status != "RUNNING")
            raise StartError(f"not up within {limit_s:g} s, which --timeout SECONDS raises\n{progress}\n{waiting}")


def _check_proxy(node: RayNode) -> None:
    """Raises StartError when HAProxy was not started because of its configuration."""
    if refused := refusals(Path(node.folder)):
        raise StartError(refused[0])


def _progress(api: ServeApi, applications: list[Application]) -> str:
    """How many replicas of each application are up, and why others are not placed."""
    progress = ", ".join(_replicas_up(application) for application in applications)
    if any(application.status == "DEPLOYING" for application in applications):
        resources = api.resources(applications)
        progress = "\n  ".join([progress, *(why for each in applications for why in unplaced(each, resources))])
    return progress


def _replicas_up(application: Application) -> str:
    from serve_app.applications import ROOT

    parts = [
        f"{sum(replica.state == 'RUNNING' for replica in replicas)}/{application.wanted[name]}"
        for name, replicas in application.deployments.items()
        if name != ROOT
    ]
    return f"{application.name} {'+'.join(parts) or '…'}"


def _reason(application: Application) -> str:
    return f"{application.name} is {application.status}: " + ("\n".join(application.reasons) or "no reason given")


def _await_ready(node: RayNode, stopping: threading.Event, deadline: float) -> None:
    """Until the cluster says so itself, through its own front door, for every model."""
    url = f"{node.http_url}/readyz"
    answer = "no answer"
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while not stopping.wait(0.1):
            _check_proxy(node)
            try:
                response = client.get(url)
                answer = response.text
                if response.status_code == 200 and all(response.json()["models"].values()):
                    return
            except httpx.HTTPError as error:
                answer = repr(error)
            if time.monotonic() > deadline:
                raise StartError(f"{url} does not say ready: {answer}")


def _greet(node: RayNode, config: ClusterConfig, key: str) -> None:
    url = node.http_url
    models = ", ".join(model.name for model in config.models)
    authorization = f" \\\n  -H 'Authorization: Bearer {key}'" if config.meter.require_keys else ""
    typer.echo(
        f"\nMillstream serves {models} at {url}/v1. Try:\n\n"
        f"curl {url}/v1/completions{authorization} \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "{config.models[0].name}", "prompt": "The capital of France is", '
        f'"max_tokens": 16, "temperature": 0}}\'\n'
    )


def _stop(node: RayNode, home: Path) -> None:
    _say("stopping the cluster …")
    ended = node.stop(home)
    _say(f"stopped: {ended} processes ended")


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()
