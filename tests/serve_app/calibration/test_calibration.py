"""The text that comes of what was measured, which `millstream plan --engine` reads."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import yaml

from serve_app.calibration.calibration import Calibration, EngineFacts
from serve_app.planning.model_pool import read_engine

FACTS = EngineFacts(
    replicas=2, max_model_len=4096, max_num_seqs=64, kv_blocks=300, kv_block_tokens=128, start_up_s=41.23456
)
AT = datetime(2027, 1, 31, 12, 5, tzinfo=UTC)


def calibration(
    facts: EngineFacts = FACTS, first_token_s: dict[int, float] | None = None, *, step_s: float = 0.02
) -> Calibration:
    """Of three runs each, whose median is what is given."""
    steps_s = {1: step_s, 4: step_s + 0.012, 16: step_s + 0.036}
    first_tokens_s = first_token_s or {500: 0.127, 1000: 0.227, 2000: 0.427}
    return Calibration(
        "m",
        facts,
        prompt_tokens=64,
        step_s={sequences: [4 * time_s, time_s / 2, time_s] for sequences, time_s in steps_s.items()},
        first_token_s={tokens: [time_s, 2 * time_s, time_s / 2] for tokens, time_s in first_tokens_s.items()},
    )


def comments(measured: Calibration) -> list[str]:
    return [line for line in measured.text(AT).splitlines() if line.startswith("#")]


def test_the_text_tells_what_was_measured_and_how_well_it_fits() -> None:
    assert comments(calibration()) == [
        "# m with 2 replicas, measured by millstream calibrate on 2027-01-31 12:05 UTC.",
        "# Medians, in brackets the least and the most of the runs, and what the parameters below make of it.",
        "# Decode step by sequences on a replica, with prompts of 64 tokens:",
        "#   1 sequence: 20.00 ms (10.00 to 80.00), fitted 22.29",
        "#   4 sequences: 32.00 ms (16.00 to 128.00), fitted 29.14",
        "#   16 sequences: 56.00 ms (28.00 to 224.00), fitted 56.57",
        "# First token of one prompt at a time:",
        "#   500 tokens: 127.00 ms (63.50 to 254.00), fitted 127.00",
        "#   1000 tokens: 227.00 ms (113.50 to 454.00), fitted 227.00",
        "#   2000 tokens: 427.00 ms (213.50 to 854.00), fitted 427.00",
        "# The worst residual is 11.4% of a decode step's time, 0.0% of a first token's.",
        "# Of a first token's time, 27.0 ms are no prefill: a decode step and the way through the cluster.",
    ]
    assert comments(calibration(FACTS._replace(replicas=1)))[0].startswith("# m with 1 replica,")


def test_a_poor_fit_is_told() -> None:
    measured = calibration(first_token_s={500: 0.1, 1000: 0.2, 2000: 2.0})
    assert measured.prefill.base_s < 0
    assert measured.warnings() == [
        "A poor fit: something else used the machine, or the engine's times are no straight lines. Measure again when "
        "it is quiet."
    ]
    assert comments(measured)[-2].startswith("# The worst residual is 11.4% of a decode step's time, ")
    assert comments(measured)[-1].startswith("# A poor fit")


def test_the_parameters_are_those_of_a_simulated_engine_as_plan_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(calibration().text(AT))
    assert read_engine(file) == calibration().engine()
    assert yaml.safe_load(file.read_text()) == {
        "kind": "simulated",
        "max_model_len": 4096,
        "prefill_tokens_per_s": 5000.0,
        "step_s": 0.02229,
        "step_s_per_sequence": 0.002286,
        "max_num_seqs": 64,
        "kv_block_tokens": 128,
        "kv_blocks": 300,
        "start_up_s": 41.23,
    }


def test_tiny_numbers_are_read_again_as_numbers(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(calibration(step_s=3e-6).text(AT))
    assert read_engine(file) == calibration(step_s=3e-6).engine()


def test_a_prefill_without_cost_is_told_as_such() -> None:
    measured = calibration(first_token_s={500: 0.0101, 1000: 0.0100, 2000: 0.0099})
    assert measured.engine().prefill_tokens_per_s is None
    assert comments(measured)[-1] == "# Longer prompts took no longer, so prefill counts as taking no time."
