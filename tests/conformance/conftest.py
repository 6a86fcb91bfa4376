"""Clients of the conformance suite. Every error body that a test sees is searched for leaks (leaks.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest

from tests.conformance.leaks import watch_clients
from tests.conftest import RunningCluster

pytest.register_assert_rewrite("tests.conformance.faces", "tests.conformance.raw_http")

from tests.conformance.raw_http import STALLS, RawAnswer, connected, head_of, read_answer  # noqa: E402  # rewritten


@pytest.fixture(autouse=True)
def no_error_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_clients(monkeypatch)


@pytest.fixture(scope="session")
def official(simulated_cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    """The `openai` client on the simulated cluster."""
    base_url = f"{simulated_cluster.url}/v1"
    with openai.OpenAI(base_url=base_url, api_key=simulated_cluster.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
async def http(simulated_cluster: RunningCluster) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP to the simulated cluster, with its key."""
    async with simulated_cluster.client() as client:
        yield client


@pytest.fixture(scope="session")
async def http_without_key(simulated_cluster: RunningCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=simulated_cluster.url, timeout=60.0, trust_env=False, verify=False) as client:
        yield client


@pytest.fixture(scope="session")
async def stalled_uploads(simulated_cluster: RunningCluster) -> AsyncIterator[dict[str, asyncio.Task[RawAnswer]]]:
    """Uploads that stop on their way: their answers, which take 30 s to come. Files that need time ask for it early."""

    async def stall(field: str, begin: bytes) -> RawAnswer:
        async with connected(simulated_cluster) as (reader, writer):
            writer.write(head_of(simulated_cluster, field) + begin)
            return await read_answer(reader)

    uploads = {name: asyncio.create_task(stall(*how), name=name) for name, how in STALLS.items()}
    yield uploads
    for upload in uploads.values():
        upload.cancel()
    await asyncio.wait(uploads.values())
