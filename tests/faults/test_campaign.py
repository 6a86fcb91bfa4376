"""The short form of the fault campaign (campaign.py); `make faults` runs the long one."""

from __future__ import annotations

import pytest

from tests.conftest import MeteredCluster
from tests.faults.campaign import Campaign

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


async def test_no_token_is_lost_or_counted_twice_whatever_is_killed(metered_cluster: MeteredCluster) -> None:
    campaign = Campaign(
        metered_cluster.cluster,
        database_url=metered_cluster.database_url,
        model="sim-a",
        targets=("ingress", "meter", "engine", "database"),
        seed=11,
        clients=24,
        max_tokens=200,
        server=metered_cluster.server,
    )
    report = await campaign.run(seconds=40.0, every_s=5.0)
    assert report.violations == [], str(report)
    assert report.kills.total() >= 6, str(report)
    assert sum(attempt.outcome == "finished" for attempt in report.attempts) > 100, str(report)
