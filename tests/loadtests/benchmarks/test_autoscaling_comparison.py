"""Ray Serve's default policy in virtual time, and the comparison with it."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from ray.serve.autoscaling_policy import _apply_autoscaling_config, default_autoscaling_policy

from deployments.scaling.decision import PoolSignals, ReplicaSignals
from loadtests.benchmarks.autoscaling_comparison import Row, ServeDefaultPolicy, best_of, bursts


def signals(target: int, replicas: int, ongoing: float, held: float = 0.0) -> PoolSignals:
    empty = ReplicaSignals(*[0.0] * len(ReplicaSignals._fields))
    each = empty._replace(running=ongoing / max(replicas, 1))
    return PoolSignals(target=target, replicas=(each,) * replicas, held=held)


def test_decisions_are_those_of_serve_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own wrapper reads the clock, which is set here; the average over time is left out."""
    source = random.Random(7)
    policy = ServeDefaultPolicy(0, 30, 4, delay_scale=0.05)
    policy._look_back_s = 0.0
    serve_own = _apply_autoscaling_config(default_autoscaling_policy)
    now, target, up, ongoing = 1000.0, 2, 2, 0.0
    state: dict[str, Any] = {}
    decided = set()
    for _ in range(2000):
        now += 0.5
        if source.random() < 0.03:
            ongoing = source.choice([0.0, 4.0, 30.0, 60.0])
        told = signals(target, up, ongoing if up else 0.0, held=0.0 if up else ongoing)
        monkeypatch.setattr(time, "time", lambda now=now: now)
        expected, state = serve_own(policy.context(now, told, ongoing, state))
        assert policy.decide(now, told).replicas == min(max(expected, 0), 30)
        if expected != target:
            decided.add((target, expected))
        up, target = target, min(max(expected, 0), 30)
    assert decided >= {(0, 1), (1, 0), (2, 1), (1, 8), (8, 15), (15, 8)}


def test_a_rise_must_last_before_replicas_are_added() -> None:
    policy = ServeDefaultPolicy(1, 10, 4, delay_scale=0.1)
    counts = {tick / 2: policy.decide(tick / 2, signals(1, 1, 12)).replicas for tick in range(10)}
    assert counts[0.0] == counts[2.5] == 1
    assert counts[3.0] == 3


def test_the_load_is_averaged_over_the_look_back_period() -> None:
    policy = ServeDefaultPolicy(1, 10, 4, delay_scale=1.0)
    for tick in range(61):
        decision = policy.decide(tick / 2, signals(1, 1, 0 if tick < 30 else 8))
    assert decision.reason == f"{8 * 31 / 61:.1f} ongoing requests"


def test_bounds_hold() -> None:
    policy = ServeDefaultPolicy(2, 5, 1, delay_scale=1e-9)
    assert policy.decide(1.0, signals(2, 2, 500)).replicas == 5
    assert policy.decide(2.0, signals(5, 5, 0)).replicas == 2


def test_the_best_is_the_cheapest_that_is_good_enough() -> None:
    good, better, bad = Row("", 1, 0.96, 100, 1), Row("", 1, 0.99, 200, 1), Row("", 1, 0.5, 10, 1)
    assert best_of([better, good, bad]) is good
    assert best_of([bad, bad._replace(share_within=0.6)]).share_within == 0.6


def test_bursts_are_the_same_for_a_seed() -> None:
    one, other = (next(iter(bursts(seed).requests())) for seed in (1, 1))
    assert one == other != next(iter(bursts(2).requests()))
