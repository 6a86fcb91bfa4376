"""The pool in virtual time: placement, holding, start-up, drain, and what is counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from deployments.engine.simulator import SimulatorSettings
from deployments.scaling.decision import Decision, PoolScaler, PoolSignals, ScalingTargets
from serve_app.planning.outcome import Outcome
from serve_app.planning.pool_simulation import Policy, PoolSettings, PoolSimulation
from serve_app.planning.workload import PoissonWorkload, RateStage, TokenRange, TraceRow, TraceWorkload

ENGINE = SimulatorSettings(
    vocabulary_tokens=1, prefill_tokens_per_s=10_000.0, step_s=0.01, max_num_seqs=8, kv_blocks=1000
)


def pool(**changed: Any) -> PoolSettings:
    settings: dict[str, Any] = {
        "engine": ENGINE,
        "max_model_len": 8000,
        "max_waiting": 4,
        "max_held": 3,
        "max_held_tokens": 10_000,
        "hold_timeout_s": 30.0,
        "drain_timeout_s": 60.0,
        "platform_start_up_s": 1.0,
        "start_up_s": 1.0,
        "replicas_at_start": 1,
    }
    return PoolSettings(**settings | changed)


def always(replicas: int) -> Policy:
    return lambda _now, _signals: Decision(replicas, "told to")


def script(first: int, *turns: tuple[float, int]) -> Policy:
    """So many replicas from each time on."""
    return lambda now, _signals: Decision([first, *(count for at, count in turns if now >= at)][-1], "told to")


def run(policy: Policy, *rows: tuple[float, int, int], until_s: float | None = None, **changed: Any) -> Outcome:
    """`until_s` is the time of a last short request."""
    last = [] if until_s is None else [(until_s, 1, 1)]
    trace = TraceWorkload(tuple(TraceRow(*row) for row in [*rows, *last]))
    return PoolSimulation(pool(**changed), policy).run(trace)


def first_tokens(outcome: Outcome) -> list[float]:
    return [round(each, 4) for each in (outcome.first_token_at - outcome.arrived_at).tolist()]


# --- requests -----------------------------------------------------------------------------------------------------


def test_a_request_waits_for_its_prefill_and_a_step() -> None:
    outcome = run(always(1), (1.0, 1000, 100))
    assert first_tokens(outcome) == [0.11]
    assert outcome.duration_s == pytest.approx(1.11 + 99 * 0.01)
    assert outcome.refused == {}


def test_requests_go_where_the_fewest_are() -> None:
    rows = [(1.0 + number / 1000, 1000, 100) for number in range(4)]
    assert first_tokens(run(always(4), *rows, replicas_at_start=4)) == [0.11] * 4
    assert max(first_tokens(run(always(1), *rows))) > 0.3


def test_what_a_full_pool_cannot_take_is_refused() -> None:
    rows = [(1.0, 100, 500)] * 30
    outcome = run(always(2), *rows, replicas_at_start=2)
    assert outcome.refused == {"no free capacity": 30 - 2 * (8 + 4)}
    assert np.isnan(outcome.first_token_at).sum() == 6
    assert outcome.share_within(1000.0) == pytest.approx(24 / 30)


def test_a_request_beyond_the_context_length_is_refused() -> None:
    assert run(always(1), (1.0, 7999, 2), (1.0, 7999, 1)).refused == {"too long": 1}


def test_candidates_are_distinct_and_all_as_likely() -> None:
    rows = PoolSimulation(pool(), always(1))._draw(10)
    assert all(len(set(row)) == 8 for row in rows)
    taken = Counter(index for row in rows for index in row)
    first = Counter(row[0] for row in rows)
    assert all(count == pytest.approx(0.8 * len(rows), rel=0.08) for count in taken.values())
    assert all(count == pytest.approx(0.1 * len(rows), rel=0.4) for count in first.values())
    assert set(taken) == set(first) == set(range(10))


def test_load_is_even_over_many_replicas() -> None:
    workload = PoissonWorkload(
        stages=(RateStage(500, 20),), prompt_tokens=TokenRange(100, 100), max_tokens=TokenRange(50, 50)
    )
    reports: list[PoolSignals] = []

    def watch(_now: float, signals: PoolSignals) -> Decision:
        reports.append(signals)
        return Decision(100, "")

    outcome = PoolSimulation(pool(replicas_at_start=100), watch).run(workload)
    running = [replica.running + replica.waiting for replica in reports[-20].replicas]
    assert outcome.refused == {}
    assert sum(running) / 100 == pytest.approx(500 * 0.51 / 100, rel=0.25)
    assert max(running) <= 6


def test_a_seed_gives_the_same_outcome_again() -> None:
    workload = PoissonWorkload(
        stages=(RateStage(200, 5),), prompt_tokens=TokenRange(1, 900), max_tokens=TokenRange(1, 90)
    )

    def outcome(seed: int) -> list[float]:
        return list(PoolSimulation(pool(replicas_at_start=20), always(20), seed=seed).run(workload).first_token_at)

    assert outcome(1) == outcome(1) != outcome(2)


# --- held requests ------------------------------------------------------------------------------------------------


def test_requests_are_held_until_a_first_replica_is_up() -> None:
    outcome = run(script(0, (2.0, 1)), (0.7, 1000, 10), (3.3, 10, 10), replicas_at_start=0)
    # Decided on at 2.0 s, up at 4.0 s; both share the first step.
    assert first_tokens(outcome) == [round(4 + 0.01 + 0.101 - 0.7, 4), round(4 + 0.01 + 0.101 - 3.3, 4)]


def test_held_requests_and_their_tokens_are_reported_and_bounded() -> None:
    seen: list[tuple[float, float]] = []

    def watch(_now: float, signals: PoolSignals) -> Decision:
        seen.append((signals.held, signals.held_tokens))
        return Decision(0 if len(seen) < 4 else 1, "")

    rows = [(0.1, 4000, 1), (0.1, 4000, 1), (0.1, 4000, 1), (0.1, 10, 1), (0.1, 10, 1)]
    outcome = run(watch, *rows, replicas_at_start=0)
    assert max(seen) == (3, 8010)
    assert outcome.refused == {"no replica": 2}


def test_a_held_request_is_refused_after_its_time() -> None:
    outcome = run(always(0), (0.1, 10, 1), replicas_at_start=0, hold_timeout_s=3.0)
    assert outcome.refused == {"no replica": 1}
    assert outcome.replica_seconds == 0


# --- replicas -----------------------------------------------------------------------------------------------------


def test_a_replica_counts_from_the_decision_until_it_is_gone() -> None:
    outcome = run(script(1, (1.0, 3), (5.0, 1)), until_s=10.0)
    assert outcome.replica_seconds == pytest.approx(outcome.duration_s + 2 * 4.0)
    assert outcome.peak_replicas == 3
    assert [(change.at_s, change.before, change.after) for change in outcome.changes] == [(1.0, 1, 3), (5.0, 3, 1)]
    assert [(each.wanted, each.up, each.counted) for each in outcome.moments if each.at_s in (2.5, 3.5, 6.0)] == [
        (3, 1, 3),
        (3, 3, 3),
        (1, 1, 1),
    ]


def test_replicas_that_still_start_are_the_first_to_go() -> None:
    outcome = run(script(1, (1.0, 3), (2.0, 1)), until_s=10.0)
    assert outcome.replica_seconds == pytest.approx(outcome.duration_s + 2 * 1.0)
    assert max(moment.up for moment in outcome.moments) == 1


def test_a_replica_that_is_scaled_down_finishes_what_it_has_and_takes_nothing_new() -> None:
    # Both take one of the first two; the one that leaves at 1.0 s is done at 10.2 s, the other gets the next.
    rows = [(0.2, 1, 1000), (0.2, 1, 1000), (1.2, 1, 1000)]
    outcome = run(script(2, (1.0, 1)), *rows, replicas_at_start=2)
    assert first_tokens(outcome)[2] == pytest.approx(0.01, abs=0.011)
    assert outcome.replica_seconds == pytest.approx(outcome.duration_s + 10.2, abs=0.01)


def test_what_a_replica_cannot_finish_in_time_goes_on_elsewhere() -> None:
    rows = [(0.2, 1, 1000), (0.2, 1, 1000)]
    outcome = run(script(2, (1.0, 1)), *rows, replicas_at_start=2, drain_timeout_s=3.0)
    assert outcome.replica_seconds == pytest.approx(outcome.duration_s + 4.0)
    assert first_tokens(outcome) == [0.0101, 0.0101]
    # One step for a prompt of 380 tokens, 38 ms longer, stands between.
    assert outcome.duration_s == pytest.approx(0.2 + 10.0 + 0.038, abs=0.02)


def test_signals_come_every_second_and_decisions_twice_as_often() -> None:
    seen: list[tuple[float, float]] = []

    def watch(now: float, signals: PoolSignals) -> Decision:
        seen.append((now, sum(replica.running for replica in signals.replicas)))
        return Decision(1, "")

    run(watch, (0.2, 1, 1000), until_s=3.0)
    # At 0.5 s the replica has not reported yet.
    assert seen[:5] == [(1.0, 1), (1.5, 1), (2.0, 1), (2.5, 1), (3.0, 1)]


def test_the_pool_follows_a_load_that_rises_and_falls() -> None:
    targets = ScalingTargets(
        min=1, max=20, target_first_token_s=1.0, target_kv_use=0.9, scale_down_after_s=20.0, idle_to_zero_after_s=60.0
    )
    workload = PoissonWorkload(
        stages=(RateStage(2, 30), RateStage(60, 120), RateStage(0.5, 200)),
        prompt_tokens=TokenRange(100, 900),
        max_tokens=TokenRange(20, 80),
    )
    outcome = PoolSimulation(pool(max_waiting=512), PoolScaler(targets).decide).run(workload)
    at_peak = [moment.up for moment in outcome.moments if 100 < moment.at_s < 150]
    assert outcome.refused == {}
    assert 3 <= min(at_peak) <= max(at_peak) <= 20
    assert outcome.moments[-1].up == 1
    assert outcome.peak_replicas <= 20
