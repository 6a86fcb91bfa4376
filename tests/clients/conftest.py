"""The clients' packages, and the servers they talk to: Millstream, and vLLM's own server on the same weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import RunningCluster

__all__ = ["MODEL", "PACKAGES", "Server"]

MODEL = "smollm2-135m"
PACKAGES = Path(sys.prefix) / "clients"
"""Where requirements/install.sh puts requirements/clients.lock, apart from what the cluster runs with."""


class Server(NamedTuple):
    """What a user of a client configures."""

    base_url: str
    """Up to and with /v1."""
    key: str


@pytest.fixture(scope="package")
def client_packages() -> Iterator[None]:
    """They can be imported in this process, but not in those of the cluster."""
    assert PACKAGES.is_dir(), "`make setup` installs requirements/clients.lock there"
    sys.path.append(str(PACKAGES))
    yield
    sys.path.remove(str(PACKAGES))


@pytest.fixture(scope="package")
def millstream(vllm_cluster: RunningCluster) -> Server:
    return Server(f"{vllm_cluster.url}/v1", vllm_cluster.key)


@pytest.fixture(scope="package")
def reference(vllm_reference: str) -> Server:
    """vLLM's own server, which asks for no key."""
    return Server(f"{vllm_reference}/v1", "no key")
