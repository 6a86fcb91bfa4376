"""vLLM's own OpenAI server on the same model, as the reference for what the cluster should say."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from loadtests.comparison.vllm_server import vllm_server_start

__all__ = ["vllm_server"]


@contextmanager
def vllm_server(model: Path, port: int, log: Path, limit_s: float = 480.0) -> Iterator[str]:
    """Its base URL; with the engine settings of tests/clusters/vllm.yaml."""
    command, environment = vllm_server_start(model, port)
    command = [
        *command,
        "--structured-outputs-config",
        '{"backend": "guidance"}',
    ]  # as deployments/engine/vllm_engine.py
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with the engine, which outlives a server that is killed
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_up(server, url, log, limit_s)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(60)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait_until_up(server: subprocess.Popen[bytes], url: str, log: Path, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise AssertionError(f"vLLM's server ended:\n{log.read_text()[-3000:]}")
        try:
            if httpx.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"vLLM's server was not up after {limit_s} s:\n{log.read_text()[-3000:]}")
