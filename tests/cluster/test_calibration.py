"""Measuring the engines of a running cluster from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.planning.model_pool import read_engine
from tests.conftest import RunningCluster

pytestmark = pytest.mark.cluster


async def test_the_parameters_of_a_simulated_engine_are_found(
    simulated_cluster: RunningCluster, tmp_path: Path
) -> None:
    """Its replicas make a step in 2 ms, however many sequences run, and prefill 20,000 tokens/s."""
    await simulated_cluster.until_in_rotation("sim-b", 3)
    file = tmp_path / "engine.yaml"
    result = simulated_cluster.millstream(
        "calibrate", "--model", "sim-b", "--max-sequences", "8", "--output", str(file)
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert file.read_text().startswith("# sim-b with 3 replicas, measured by millstream calibrate on ")
    engine = read_engine(file)
    assert engine.step_s == pytest.approx(0.002, rel=0.3)
    assert engine.step_s_per_sequence < 0.0002
    assert engine.prefill_tokens_per_s == pytest.approx(20_000, rel=0.3)
    assert (engine.max_model_len, engine.max_num_seqs) == (2048, 256)
    assert (engine.kv_blocks, engine.kv_block_tokens) == (8192, 16)
    assert 0 < engine.start_up_s < 60
