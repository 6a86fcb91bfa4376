"""Health tells the truth: the process, and whether a request would be served."""

from __future__ import annotations

import pytest

from tests.conftest import RunningCluster

pytestmark = pytest.mark.cluster


async def test_health_and_readiness_need_no_key(simulated_cluster: RunningCluster) -> None:
    await simulated_cluster.until_in_rotation("sim-a", 3)
    async with simulated_cluster.client() as client:
        client.headers.pop("authorization")
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["meter"] is True
        assert ready.json()["models"]["sim-a"] is True
        for path in ("/v1/models", "/v1/models/sim-a", "/admin/v1/replicas"):
            assert (await client.get(path)).status_code == 401
        assert (await client.post("/v1/completions", json={"model": "sim-a", "prompt": "x"})).status_code == 401
