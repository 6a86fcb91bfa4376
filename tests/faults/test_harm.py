"""The short form of harm.py; `python -m tests.faults.harm --seconds 1800` is the long one, and so is
MILLSTREAM_FUZZ_SECONDS=1800 here, with MILLSTREAM_FUZZ_SEED for other requests."""

from __future__ import annotations

import os

import pytest

from tests.conftest import THOROUGH, RunningCluster
from tests.faults.harm import Harm

BY_THE_CLOCK = THOROUGH or "MILLSTREAM_FUZZ_SECONDS" in os.environ
"""Whether delays count: on machines that do other work as well they are not the product's. In each run they are tested
by CPU time: test_harmful_turns.py, test_meter_turns.py."""
SECONDS = float(os.environ.get("MILLSTREAM_FUZZ_SECONDS", "20" if THOROUGH else "10"))
SEED = int(os.environ.get("MILLSTREAM_FUZZ_SEED", "1"))

pytestmark = pytest.mark.timeout(SECONDS + 300)


@pytest.mark.cluster
async def test_no_request_harms_the_streams_of_others(simulated_cluster: RunningCluster) -> None:
    await simulated_cluster.until_in_rotation("sim-a", 3)
    harm = Harm(simulated_cluster, model="sim-a", max_tokens=1000, seed=SEED)
    await _assert_harmless(harm, quiet_s=3.0, per_s=1 / 2)


@pytest.mark.vllm
async def test_no_request_harms_the_streams_of_others_on_vllm(vllm_cluster: RunningCluster) -> None:
    await vllm_cluster.until_in_rotation("smollm2-135m", 2)
    harm = Harm(vllm_cluster, model="smollm2-135m", max_tokens=60, seed=SEED)
    await _assert_harmless(harm, quiet_s=5.0, per_s=1 / 4)


async def _assert_harmless(harm: Harm, *, quiet_s: float, per_s: float) -> None:
    """`per_s`: of harmful requests, more than so many."""
    report = await harm.run(SECONDS, quiet_s)
    print(report)
    assert report.violations == [], str(report)
    if BY_THE_CLOCK:
        assert report.delays == [], str(report)
    assert len(report.answers) > SECONDS * per_s, str(report)
