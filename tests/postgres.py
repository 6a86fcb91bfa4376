"""A PostgreSQL server of the tests' own: started from the binaries of the machine, killed and started again at will."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import psycopg

__all__ = ["PostgresServer", "postgres_binaries", "postgres_server"]

_USER = "millstream"
_LIMIT_S = 30.0


def postgres_binaries() -> Path | None:
    """The folder of `initdb` and `postgres`, the newest where there are several; None where there are none."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in versions), key=lambda folder: int(folder.parent.name), default=None)


@contextmanager
def postgres_server(binaries: Path, host: str = "127.0.0.1") -> Iterator[PostgresServer]:
    """A running server at `host` with an empty folder, which is removed in the end."""
    # Not pytest's folder: the path of the socket must be short, and another user may have to enter it.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server = PostgresServer(binaries, folder, host)
    try:
        if os.getuid() == 0:
            shutil.chown(folder, "postgres")
        server.initialize()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


class PostgresServer:
    """Listens on a port of its own, for the user `millstream` without a password; commits are synced."""

    def __init__(self, binaries: Path, folder: Path, host: str) -> None:
        self._binaries = binaries
        self._folder = folder
        self._host = host
        self._data = folder / "data"
        self._log = folder / "log"
        self._port = _free_port()
        self._process: psutil.Popen | None = None

    # --- in the order in which they happen --------------------------------------------------------------------------

    def initialize(self) -> None:
        options = ["--username", _USER, "--auth", "trust", "--encoding", "UTF8", "--no-sync"]
        command = [str(self._binaries / "initdb"), "--pgdata", str(self._data), *options]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **_unprivileged())
        with (self._data / "pg_hba.conf").open("a") as access:
            access.write("host all all samenet trust\n")

    def start(self) -> None:
        """Returns once it answers; after `kill` it recovers first. Raises RuntimeError with its log if it does not."""
        settings = {"listen_addresses": self._host, "port": self._port, "unix_socket_directories": self._folder}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [str(self._binaries / "postgres"), "-D", str(self._data), *options]
        with self._log.open("ab") as log:
            self._process = psutil.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", **_unprivileged()
            )
        deadline = time.monotonic() + _LIMIT_S
        while True:
            try:
                psycopg.connect(self._url("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(self._log.read_text()) from None
                time.sleep(0.02)  # another process: there is no event to wait for

    def new_database(self) -> str:
        """URL of an empty database that nobody else uses."""
        name = f"test_{uuid4().hex}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self._url(name)

    def freeze(self) -> None:
        """It keeps its connections and answers nothing, until `thaw` or `kill`."""
        assert self._process is not None
        self._process.suspend()  # first, so that it makes no more children
        for child in self._process.children(recursive=True):
            child.suspend()

    def thaw(self) -> None:
        assert self._process is not None
        for process in (*self._process.children(recursive=True), self._process):
            process.resume()

    def kill(self) -> None:
        """SIGKILL for all of its processes, as if the machine had stopped; returns when they are gone."""
        assert self._process is not None
        self.freeze()
        processes = [*self._process.children(recursive=True), self._process]
        for process in processes:
            process.kill()
        _, alive = psutil.wait_procs(processes, timeout=_LIMIT_S)
        assert not alive, alive
        self._process = None

    def stop(self) -> None:
        """At once, since nobody will need its data. Safe twice, and after `freeze` and `kill`."""
        if self._process is not None:
            self.thaw()
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(_LIMIT_S)
            self._process = None

    def _url(self, database: str) -> str:
        return f"postgresql://{_USER}@{self._host}:{self._port}/{database}"


def _unprivileged() -> dict[str, Any]:
    """For subprocess: as `postgres` where this process is root, whom PostgreSQL refuses."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
