"""The ingress stays small and starts quickly: its process has neither torch nor vLLM."""

from __future__ import annotations

import re
from datetime import datetime

import psutil
import pytest

from serve_app.ray_node import RayNode
from tests.conftest import RunningCluster

pytestmark = pytest.mark.cluster

RSS_LIMIT_BYTES = 350 * 2**20
START_LIMIT_S = 10.0


def test_an_ingress_replica_is_small(simulated_cluster: RunningCluster) -> None:
    for replica in simulated_cluster.replicas("gateway", "Ingress"):
        assert psutil.Process(replica["pid"]).memory_info().rss < RSS_LIMIT_BYTES


def test_an_ingress_replica_starts_quickly(simulated_cluster: RunningCluster) -> None:
    """From the start of its process to its HTTP server, by Serve's log."""
    node = RayNode.running(simulated_cluster.home)
    assert node is not None
    for replica in simulated_cluster.replicas("gateway", "Ingress"):
        logs = f"{node.folder}/session_latest/logs/serve/replica_gateway_Ingress_{replica['id']}.log"
        with open(logs) as log:
            serving = next(line for line in log if "Started HTTP server" in line)
        stamp = re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", serving)
        assert stamp is not None
        up_at = datetime.strptime(stamp[0], "%Y-%m-%d %H:%M:%S,%f").timestamp()
        assert up_at - psutil.Process(replica["pid"]).create_time() < START_LIMIT_S
