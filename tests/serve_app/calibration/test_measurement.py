"""What is asked of the cluster, and when that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.calibration import measurement
from serve_app.calibration.calibration import Calibration
from serve_app.calibration.measurement import CalibrationError, Measurement
from serve_app.cluster_api import ClusterApiError
from tests.serve_app.calibration.synthetic_cluster import SyntheticCluster


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_BETWEEN_LOOKS_S", 0)


def measured(
    cluster: SyntheticCluster, *, max_sequences: int = 32, prompt_tokens: int = 64, told: list[str] | None = None
) -> Calibration:
    lines = [] if told is None else told
    return Measurement(cluster, "m", report=lines.append).run(max_sequences=max_sequences, prompt_tokens=prompt_tokens)


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_parameters_of_the_engine_are_found(replicas: int) -> None:
    engine = measured(SyntheticCluster(replicas)).engine()
    assert engine.prefill_tokens_per_s == pytest.approx(5000)
    assert engine.step_s == pytest.approx(0.02)
    assert engine.step_s_per_sequence == pytest.approx(0.003)
    assert (engine.max_model_len, engine.max_num_seqs) == (4096, 64)
    assert (engine.kv_blocks, engine.kv_block_tokens) == (300, 128)
    assert engine.start_up_s == pytest.approx(40 + (replicas - 1) / 2)


def test_a_batch_has_as_many_sequences_on_each_replica_and_prompts_reach_the_context() -> None:
    cluster, told = SyntheticCluster(3), list[str]()
    found = measured(cluster, max_sequences=20, told=told)
    assert list(found.decode.measured_s) == [1, 4, 16, 20]
    assert {prompts for prompts, tokens in cluster.batches if tokens > 1} == {3, 12, 48, 60}
    assert list(found.prefill.measured_s) == [511, 1023, 2047, 4095]
    assert told[0] == "m: 5 rounds, replicas in rotation: 3"
    assert told[1:3] == [
        "round 1: 20.00 ms a decode step, sequences: 1",
        "round 1: 29.00 ms a decode step, sequences: 4",
    ]
    assert len(told) == 1 + 5 * (4 + 4)


def test_no_two_prompts_begin_alike() -> None:
    cluster = SyntheticCluster()
    measured(cluster)
    measured(cluster)
    assert len({tuple(prompt[:16]) for prompt in cluster.prompts}) == len(cluster.prompts)


def test_a_batch_outlasts_the_prefill_of_its_prompts() -> None:
    cluster = SyntheticCluster()
    measured(cluster, max_sequences=16, prompt_tokens=1024)
    assert dict(cluster.batches[:4]) == {1: 65, 4: 68, 16: 80}


@pytest.mark.parametrize(
    ("card", "options", "most"),
    [
        ({"max_num_seqs": 10}, {}, 10),
        ({"kv_blocks_total": 33}, {"prompt_tokens": 200}, 11),
        ({}, {"prompt_tokens": 9000}, 17),  # half of the context at most
    ],
)
def test_batches_are_as_large_as_there_is_room(card: dict[str, Any], options: dict[str, int], most: int) -> None:
    cluster, told = SyntheticCluster(), list[str]()
    cluster.cards[0].update(card)
    assert max(measured(cluster, **options, told=told).decode.measured_s) == most
    assert f"no more than {most} sequences on each have room, of the 32 asked for" in told


def test_prompts_that_would_take_too_long_are_left_out() -> None:
    cluster = SyntheticCluster(max_model_len=32_768)
    cluster.prefill_tokens_per_s = 500
    found = measured(cluster)
    assert list(found.prefill.measured_s) == [4095, 8191]
    assert found.engine().prefill_tokens_per_s == pytest.approx(500)


def test_a_replica_out_of_rotation_and_those_of_other_models_do_not_count() -> None:
    cluster = SyntheticCluster(2, models=("m", "other"))
    cluster.cards[1].update(in_rotation=False, running=3)
    cluster.cards[2].update(running=3)
    cluster.cards[0].update(start_up_s=7.0)
    assert measured(cluster).facts.start_up_s == 7.0


def test_a_model_that_becomes_idle_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = SyntheticCluster()
    cluster.cards[0]["running"] = 1
    monkeypatch.setattr("serve_app.calibration.measurement.time.sleep", lambda _: cluster.cards[0].update(running=0))
    assert measured(cluster).facts.replicas == 1


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ({"running": 2, "waiting": 1}, "m is not idle: 2 running, 1 waiting"),
        ({"in_rotation": False}, "m has no replica in rotation: see millstream status"),
        ({"max_num_seqs": 0}, "start the cluster anew"),
        ({"max_num_seqs": 1}, "no room for two sequences on each of 1 replicas"),
    ],
)
def test_what_stands_in_the_way_is_told(card: dict[str, Any], told: str) -> None:
    cluster = SyntheticCluster()
    cluster.cards[0].update(card)
    with pytest.raises(CalibrationError, match=told):
        measured(cluster)
    assert cluster.batches == []


def test_replicas_that_come_meanwhile_are_noticed() -> None:
    class Scaled(SyntheticCluster):
        def replicas(self) -> list[dict[str, Any]]:
            return super().replicas() + ([{**self.cards[0], "id": "new"}] if self.replicas_asked > 2 else [])

    with pytest.raises(
        CalibrationError, match=r"changed meanwhile .1 in rotation before, 2 now.: give it replicas with"
    ):
        measured(Scaled())


def test_sequences_that_do_not_run_at_once_are_told() -> None:
    class Queueing(SyntheticCluster):
        def complete(self, model: str, prompts: list[list[int]], max_tokens: int) -> list[list[float]]:
            times = super().complete(model, prompts, max_tokens)
            return [[each + number for each in of_prompt] for number, of_prompt in enumerate(times)]

    with pytest.raises(CalibrationError, match=r"4 sequences on each of 1 replicas never .* --max-sequences"):
        measured(Queueing())


def test_what_the_cluster_refuses_is_passed_on() -> None:
    cluster = SyntheticCluster()
    cluster.refusal = "no"
    with pytest.raises(ClusterApiError, match="no"):
        measured(cluster)
