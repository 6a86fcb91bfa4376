"""From token times to parameters."""

from __future__ import annotations

import random

import pytest

from serve_app.calibration.engine_fit import fit_decode, fit_prefill, steady_steps_s


def stream(first_s: float, step_s: float, tokens: int = 64) -> list[float]:
    return [first_s + number * step_s for number in range(tokens)]


def test_steps_are_timed_while_all_sequences_run() -> None:
    """The first runs alone until the second has its first token, and faster than with it."""
    alone = stream(0.0, 0.01, 20)
    together = stream(0.5, 0.03, 40)
    assert steady_steps_s([alone + together, together]) == pytest.approx([0.03] * 48)


def test_tokens_that_arrive_late_or_together_do_not_mislead() -> None:
    source = random.Random(1)
    late = [time_s + source.uniform(0, 0.008) for time_s in stream(0.1, 0.01)]
    pairs = [times[number // 2 * 2] for times in [stream(0.1, 0.01)] for number in range(64)]
    assert sorted(steady_steps_s([late]))[24] == pytest.approx(0.01, rel=0.02)
    assert sorted(steady_steps_s([pairs]))[24] == pytest.approx(0.01, rel=0.001)


def test_sequences_that_never_all_ran_give_no_steps() -> None:
    assert steady_steps_s([stream(0.0, 0.01), stream(0.7, 0.01)]) == []
    assert steady_steps_s([stream(0.0, 0.01), stream(0.5, 0.01)]) == []  # 14 tokens together


def test_the_decode_fit_begins_at_one_sequence() -> None:
    fit = fit_decode({1: 0.020, 4: 0.029, 32: 0.113})
    assert fit.base_s == pytest.approx(0.020)
    assert fit.per_unit_s == pytest.approx(0.003)
    assert fit.worst_residual == pytest.approx(0, abs=1e-9)


def test_a_fit_is_the_least_squares_line_and_tells_its_worst_residual() -> None:
    fit = fit_decode({1: 1.0, 2: 2.0, 3: 2.0})
    assert fit.base_s == pytest.approx(1 + 1 / 6)
    assert fit.per_unit_s == pytest.approx(0.5)
    assert fit.fitted_s == pytest.approx({1: 7 / 6, 2: 5 / 3, 3: 13 / 6})
    assert fit.worst_residual == pytest.approx(1 / 6)


def test_more_sequences_never_count_as_faster() -> None:
    fit = fit_decode({1: 0.0021, 8: 0.0019})
    assert [fit.base_s, fit.per_unit_s] == pytest.approx([0.002, 0.0])


def test_the_prefill_fit_sets_aside_the_constant_and_the_further_steps_of_long_prompts() -> None:
    measured = {tokens: 0.05 + tokens / 1000 + steps * 0.2 for tokens, steps in ((512, 0), (2048, 0), (8192, 3))}
    fit = fit_prefill(measured, 0.2)
    assert fit.base_s == pytest.approx(0.05)
    assert fit.per_unit_s == pytest.approx(1 / 1000)
    assert fit.fitted_s == pytest.approx(measured)
