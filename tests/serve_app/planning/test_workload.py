"""When requests come, and what is refused as a description of that."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from serve_app.planning.workload import (
    PoissonWorkload,
    RateStage,
    TokenRange,
    TraceError,
    TraceWorkload,
    Workload,
    read_trace,
)


def rows(workload: Workload) -> list[tuple[float, int, int]]:
    return [row for chunk in workload.requests() for row in zip(*chunk, strict=True)]


def poisson(*stages: tuple[float, float], seed: int = 0) -> PoissonWorkload:
    return PoissonWorkload(
        stages=tuple(RateStage(*stage) for stage in stages),
        prompt_tokens=TokenRange(5, 9),
        max_tokens=TokenRange(3, 3),
        seed=seed,
    )


def test_each_stage_has_its_rate_and_its_time() -> None:
    workload = poisson((1000, 100), (0, 50), (100, 50))
    at_s = [at for at, _, _ in rows(workload)]
    assert workload.duration_s == 200
    assert all(one < next_one for one, next_one in pairwise(at_s))
    assert sum(at < 100 for at in at_s) == pytest.approx(100_000, rel=0.02)
    assert not [at for at in at_s if 100 <= at < 150]
    assert sum(150 <= at < 200 for at in at_s) == pytest.approx(5000, rel=0.06)
    assert at_s[-1] < 200


def test_lengths_are_within_their_ranges_and_reach_both_ends() -> None:
    requests = rows(poisson((100, 10)))
    assert {prompt for _, prompt, _ in requests} == {5, 6, 7, 8, 9}
    assert {most for _, _, most in requests} == {3}


def test_a_seed_gives_the_same_requests_again_and_another_others() -> None:
    assert rows(poisson((100, 10))) == rows(poisson((100, 10)))
    assert rows(poisson((100, 10))) != rows(poisson((100, 10), seed=1))


def test_stages_are_rates_with_seconds_and_the_last_may_leave_them_out() -> None:
    assert RateStage.parse_all("2000", seconds=3600) == ((2000, 3600),)
    assert RateStage.parse_all("2:60,0.5:120,7", seconds=10) == ((2, 60), (0.5, 120), (7, 10))


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "2:0", "2:", "2,60:10", "2:60,", "1:2:3"])
def test_stages_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="stages of rate:seconds"):
        RateStage.parse_all(text, seconds=10)


def test_a_range_of_tokens_is_a_number_or_two() -> None:
    assert TokenRange.parse("500") == (500, 500)
    assert TokenRange.parse("200-800") == (200, 800)


@pytest.mark.parametrize("text", ["", "0", "-5", "8-2", "a-b", "1.5", "1-2-3"])
def test_ranges_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="200-800"):
        TokenRange.parse(text)


def test_a_trace_is_read_in_any_order_of_columns_and_rows(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("max_tokens,at_s,prompt_tokens\n7,2.5,10\n8,1,20\n")
    workload = TraceWorkload(read_trace(file))
    assert rows(workload) == [(1.0, 20, 8), (2.5, 10, 7)]
    assert workload.duration_s == 2.5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("at_s,prompt_tokens\n1,2\n", "no column 'max_tokens'"),
        ("at_s,prompt_tokens,max_tokens\n1,2,x\n", "line 2"),
        ("at_s,prompt_tokens,max_tokens\n1,2,3\n-1,2,3\n", "line 3"),
        ("at_s,prompt_tokens,max_tokens\n1,0,3\n", "out of range"),
        ("at_s,prompt_tokens,max_tokens\n", "not a single arrival"),
    ],
)
def test_what_is_wrong_with_a_trace_is_told(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(TraceError, match=told):
        read_trace(file)
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.csv")
