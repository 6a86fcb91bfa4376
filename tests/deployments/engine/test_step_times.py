"""The time of an engine's steps, learned from those it makes."""

from __future__ import annotations

import random

import pytest

from deployments.engine.step_times import StepTimes


def observed(seconds: int, prefills: bool, base_s: float = 0.002) -> StepTimes:
    source = random.Random(1)
    times = StepTimes()
    for _ in range(seconds):
        sequences = source.randint(1, 40)
        prefilled = source.randint(10, 2000) if prefills and source.random() < 0.2 else 0
        times.observe(base_s + 0.0001 * sequences + prefilled / 20_000, sequences, prefilled)
    return times


def test_nothing_is_known_before_a_step() -> None:
    times = StepTimes()
    assert (times.prefill_tokens_per_s, times.decode_s) == (0.0, (0.0, 0.0))


def test_decode_and_prefill_are_told_apart() -> None:
    times = observed(500, prefills=True)
    assert times.prefill_tokens_per_s == pytest.approx(20_000, rel=0.01)
    assert times.decode_s == pytest.approx((0.002, 0.0001), rel=0.02)


def test_without_a_prefill_its_rate_is_unknown() -> None:
    times = observed(500, prefills=False)
    assert times.prefill_tokens_per_s == 0.0
    assert times.decode_s == pytest.approx((0.002, 0.0001), rel=0.02)


def test_prompts_of_one_length_alone_give_at_least_the_rate_that_was_reached() -> None:
    times = StepTimes()
    for _ in range(20):
        times.observe(0.1, 1, 1000)
    assert times.prefill_tokens_per_s >= 10_000 * (1 - 1e-6)


def test_an_engine_that_becomes_slower_is_followed() -> None:
    times = observed(3000, prefills=True)
    for number in range(8000):
        times.observe(0.01 + 0.001 * (number % 16), number % 16, 0)
    assert times.decode_s == pytest.approx((0.01, 0.001), rel=0.05)


def test_steps_that_are_told_together_count_each() -> None:
    single, several = StepTimes(), StepTimes()
    for sequences in (1, 2, 3, 4) * 50:
        for _ in range(4):
            single.observe(0.001 * sequences + 0.005, sequences, 0)
        several.observe(4 * (0.001 * sequences + 0.005), sequences, 0, steps=4)
    assert several.decode_s == pytest.approx(single.decode_s, rel=1e-2)


def test_batches_of_one_size_tell_nothing_of_larger_ones() -> None:
    times = StepTimes()
    for _ in range(100):
        times.observe(0.02, 3, 0)
    assert times.decode_s == pytest.approx((0.02, 0.0), abs=1e-4)
