"""What a replica reports of the load it sees lately."""

from __future__ import annotations

import pytest

from deployments.engine.demand import RecentRate, ReplicaDemand


def read_every_second(rate: RecentRate, seconds: range, count_per_s: int) -> list[float]:
    readings = []
    for now in seconds:
        for _ in range(count_per_s):
            rate.count()
        readings.append(rate.read(float(now)))
    return readings


def test_a_rate_approaches_the_measured_rate() -> None:
    readings = read_every_second(RecentRate(0.0, 10.0), range(1, 61), count_per_s=5)
    assert readings == sorted(readings)
    assert readings[9] == pytest.approx(5 * (1 - 0.9**10))
    assert readings[-1] == pytest.approx(5, rel=0.01)


def test_a_rate_falls_when_nothing_comes_any_more() -> None:
    rate = RecentRate(0.0, 10.0)
    read_every_second(rate, range(1, 61), count_per_s=5)
    readings = read_every_second(rate, range(61, 121), count_per_s=0)
    assert readings == sorted(readings, reverse=True)
    assert readings[-1] < 0.02


def test_reading_a_rate_often_does_not_change_it() -> None:
    rate = RecentRate(0.0, 10.0)
    for _ in range(5):
        rate.count()
    assert [rate.read(now) for now in (0.1, 0.5, 0.99)] == [0.0] * 3
    assert rate.read(1.0) == pytest.approx(0.5)


def test_after_a_long_silence_a_rate_is_that_of_the_silence() -> None:
    rate = RecentRate(0.0, 10.0)
    for _ in range(30):
        rate.count()
    assert rate.read(15.0) == pytest.approx(2.0)


def test_a_rate_that_fades_away_becomes_zero() -> None:
    rate = RecentRate(0.0, 5.0)
    rate.count()
    assert rate.read(1.0) > 0
    assert [rate.read(float(now)) for now in range(2, 60)][-1] == 0.0


def test_arrivals_and_their_tokens_are_rates_of_seconds() -> None:
    demand = ReplicaDemand(0.0)
    for _ in range(10):
        demand.arrived(100)
    assert demand.arrivals_per_s(5.0) == pytest.approx(2.0)
    assert demand.prefill_tokens_per_s(5.0) == pytest.approx(200.0)


def test_tokens_that_the_prefix_cache_spares_do_not_count() -> None:
    demand = ReplicaDemand(0.0)
    for _ in range(200):
        demand.arrived(100)
        demand.prefilled(100, 75)
    assert demand.uncached_share == pytest.approx(0.25, abs=0.01)
    assert demand.prefill_tokens_per_s(5.0) == pytest.approx(200 * 100 / 5 * 0.25, rel=0.02)


def test_the_length_of_generations_follows_those_that_end() -> None:
    demand = ReplicaDemand(0.0)
    demand.ended(400)
    assert demand.generated_tokens == 400
    for _ in range(100):
        demand.ended(100)
    assert demand.generated_tokens == pytest.approx(100, abs=5)
    assert demand.ends_per_s(10.0) == pytest.approx(10.1)
