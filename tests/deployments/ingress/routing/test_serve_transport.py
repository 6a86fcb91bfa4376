"""Which applications there are, asked of a Serve that answers slowly."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deployments.engine import replica_directory
from deployments.ingress.routing import serve_pools as serve_transport
from deployments.ingress.routing.serve_pools import ServePools
from tests.deployments.ingress.virtual_time import in_virtual_time


class SlowHandle:
    """Of an application that exists, whose probe takes all of its time."""

    def __init__(self) -> None:
        self.closed = False
        self.load = self

    async def remote(self, *, target: str) -> None:
        await asyncio.sleep(60)

    async def shutdown_async(self) -> None:
        self.closed = True


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> dict[str, SlowHandle]:
    names = [f"model-{number}" for number in range(16)]
    monkeypatch.setattr(replica_directory, "_known", dict.fromkeys(names, frozenset({"r"})))
    return {name: SlowHandle() for name in names}


def pools_of(handles: dict[str, Any]) -> ServePools:
    pools = ServePools("Engine")
    pools._handles = dict(handles)
    return pools


@in_virtual_time
async def test_many_models_are_looked_for_in_the_time_of_one(handles: dict[str, SlowHandle]) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert await pools_of(handles).existing(handles) == handles.keys()
    assert loop.time() - begun == pytest.approx(serve_transport._PROBE_LIMIT_S)


@in_virtual_time
async def test_handles_of_models_that_are_gone_are_closed(handles: dict[str, SlowHandle]) -> None:
    pools = pools_of(handles)
    await pools.forget_others(frozenset({"model-3", "model-4"}))
    assert {name for name, handle in handles.items() if not handle.closed} == {"model-3", "model-4"}
    assert pools._handles.keys() == replica_directory._known.keys() == {"model-3", "model-4"}
