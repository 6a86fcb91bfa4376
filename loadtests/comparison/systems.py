"""What is compared, how each is started and ended, and which of its processes count.

Engines without cost emit one token per request every 2 ms, so that what is measured is the serving layer. Each system
runs alone: all of it has ended before the next is started.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import httpx
import psutil

from loadtests.comparison.load import Endpoint
from loadtests.comparison.vllm_server import vllm_server_start
from serve_app.ray_node import RayNode, processes_of

__all__ = ["MILLSTREAM", "Running", "System", "costless_systems", "relaying_millstream", "vllm_systems"]

MILLSTREAM = "Millstream"
_ROOT = Path(__file__).parents[2]
_PEERS = Path(__file__).parent / "peers"
_START_LIMIT_S, _END_LIMIT_S = 240.0, 60.0
_FASTEST = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
_MASTER_KEY = "sk-master"
_MILLSTREAM_PORT, _RAY_PORT, _LITELLM_PORT, _UPSTREAM_PORT = 8700, 8000, 8701, 8702


class Running(NamedTuple):
    endpoint: Endpoint
    mark: str
    """In the environment of all processes that count (serve_app/ray_node.py)."""


class System(Protocol):
    @property
    def name(self) -> str: ...

    @contextmanager
    def running(self, home: Path) -> Iterator[Running]:
        """Started and answering, with its files below `home`; every process of it is ended at the end, and no other.
        Raises SystemExit, with the end of what it wrote, when it does not come up."""


@dataclass(frozen=True)
class _Millstream:
    config: str
    model: str
    name: str = MILLSTREAM
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def running(self, home: Path) -> Iterator[Running]:
        """With a key of its own, which is metered like any other."""
        config = _ROOT / "loadtests" / "clusters" / self.config
        try:
            self._run(home, "up", str(config), "--detach", "--port", str(_MILLSTREAM_PORT))
            node = RayNode.running(home)
            assert node is not None
            key = json.loads(self._run(home, "keys", "create", "comparison", "--json"))["key"]
            endpoint = Endpoint(f"{node.http_url}/v1/completions", self.model, key)
            try:
                _wait_until_answered(endpoint)
            except TimeoutError as error:
                raise SystemExit(f"{self.name} does not answer: {error}") from None
            yield Running(endpoint, node.cluster_id)
        finally:
            self._run(home, "down")

    def _run(self, home: Path, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "serve_app.cli", *arguments],
            env={**os.environ, **self.environment, "MILLSTREAM_HOME": str(home)},
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"millstream {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
        return done.stdout


class _Part(NamedTuple):
    """One process that a peer is started with; its children belong to it."""

    command: list[str]
    environment: dict[str, str]
    counts: bool = True


@dataclass(frozen=True)
class _Peer:
    name: str
    parts: list[_Part]
    port: int
    model: str
    key: str = "none"

    @contextmanager
    def running(self, home: Path) -> Iterator[Running]:
        mark, uncounted = secrets.token_hex(8), secrets.token_hex(8)
        endpoint = Endpoint(f"http://127.0.0.1:{self.port}/v1/completions", self.model, self.key)
        log = home / "peer.log"
        started: list[subprocess.Popen[bytes]] = []
        try:
            with log.open("wb") as output:
                for part in self.parts:
                    environment = {
                        **os.environ,
                        "MILLSTREAM_CLUSTER_ID": mark if part.counts else uncounted,
                        "SPT_NOENV": "1",  # else Ray's new titles for its processes overwrite the mark
                        **part.environment,
                    }
                    started.append(
                        subprocess.Popen(
                            part.command,
                            env=environment,
                            cwd=home,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            try:
                _wait_until_answered(endpoint, started)
            except TimeoutError as error:
                wrote = log.read_text(errors="replace")[-3000:]
                raise SystemExit(f"{self.name} does not answer ({error}). It wrote:\n{wrote}") from None
            yield Running(endpoint, mark)
        finally:
            for process in started:
                process.terminate()
            psutil.wait_procs([psutil.Process(process.pid) for process in started], timeout=_END_LIMIT_S)
            for each in (mark, uncounted):
                while left := processes_of(each):
                    for process_left in left:
                        process_left.kill()
                    psutil.wait_procs(left, timeout=10.0)
            for process in started:
                process.wait()


def relaying_millstream(name: str, environment: Mapping[str, str]) -> System:
    """Millstream before an engine without cost, started with these variables besides."""
    return _Millstream("relay.yaml", "relay", name, environment)


def costless_systems(model: Path, packages: list[Path], home: Path) -> list[System]:
    """`model`: a folder with a tokenizer. `packages`: folders of what only the peers need. `home`: for their files."""
    python_path = {"PYTHONPATH": os.pathsep.join(map(str, (*packages, _PEERS)))}
    ray_llm = [sys.executable, str(_PEERS / "ray_serve_llm.py"), str(model)]
    environment = {**python_path, "RAYLLM_VLLM_ENGINE_CLS": "costless_engine.CostlessEngine"}
    fastest = {**environment, **_FASTEST}
    upstream = _Part([sys.executable, str(_PEERS / "costless_server.py"), str(_UPSTREAM_PORT)], {}, counts=False)
    return [
        _Millstream("relay.yaml", "relay"),
        _Peer("ray.serve.llm, fastest", [_Part(ray_llm, fastest)], _RAY_PORT, "relay"),
        _Peer("ray.serve.llm, unbatched", [_Part([*ray_llm, "0"], fastest)], _RAY_PORT, "relay"),
        _Peer("ray.serve.llm, default", [_Part(ray_llm, environment)], _RAY_PORT, "relay"),
        _litellm("LiteLLM proxy", "relay", home, python_path, upstream),
    ]


def vllm_systems(model: Path, packages: list[Path], home: Path) -> list[System]:
    """All on vLLM with the settings of loadtests/clusters/vllm.yaml."""
    name = "smollm2-135m"
    server = _Part(*vllm_server_start(model, _UPSTREAM_PORT))
    python_path = {"PYTHONPATH": os.pathsep.join(map(str, packages))}
    return [
        _Millstream("vllm.yaml", name),
        _Peer("vLLM's own server", [server], _UPSTREAM_PORT, name),
        _litellm("LiteLLM proxy", name, home, python_path, server),
    ]


def _litellm(name: str, model: str, home: Path, python_path: dict[str, str], upstream: _Part) -> _Peer:
    """Without its database: what it needs for that is downloaded at start-up. So it neither knows keys but the master
    key nor records what they spend."""
    config = home / f"litellm-{model}.json"  # JSON is YAML
    deployment = {
        "model": f"text-completion-openai/{model}",
        "api_base": f"http://127.0.0.1:{_UPSTREAM_PORT}/v1",
        "api_key": "none",
    }
    config.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": model, "litellm_params": deployment}],
                "general_settings": {"master_key": _MASTER_KEY},
            }
        )
    )
    command = [
        *(sys.executable, "-m", "litellm.proxy.proxy_cli", "--config", str(config)),
        *("--host", "127.0.0.1", "--port", str(_LITELLM_PORT), "--telemetry", "False"),
    ]
    environment = {**python_path, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return _Peer(name, [upstream, _Part(command, environment)], _LITELLM_PORT, model, _MASTER_KEY)


def _wait_until_answered(endpoint: Endpoint, processes: list[subprocess.Popen[bytes]] | None = None) -> None:
    """Raises TimeoutError, also when one of the processes ends."""
    deadline = time.monotonic() + _START_LIMIT_S
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": 1}
    headers = {"authorization": f"Bearer {endpoint.key}"}
    said = "no connection"
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes or ()):
            raise TimeoutError("it has ended")
        try:
            # Streamed, because the costless engines know nothing else.
            answer = httpx.post(
                endpoint.url, json={**body, "stream": True}, headers=headers, timeout=10.0, trust_env=False
            )
            if answer.status_code == 200:
                return
            said = f"{answer.status_code} {answer.text[:200]}"
        except httpx.HTTPError as error:
            said = repr(error)
        time.sleep(0.5)
    raise TimeoutError(said)
