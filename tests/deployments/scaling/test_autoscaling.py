"""How many replicas a pool is given: what is wanted for a load, and how the number follows it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deployments.scaling.decision import Decision, PoolScaler, PoolSignals, ReplicaSignals, ScalingTargets
from tests.deployments.scaling.reported_signals import IDLE

TARGETS = ScalingTargets(
    min=1,
    max=20,
    target_first_token_s=1.0,
    target_kv_use=0.8,
    scale_down_after_s=60.0,
    idle_to_zero_after_s=30.0,
)
FROM_ZERO = replace(TARGETS, min=0)


class Pool:
    """A pool whose replicas all report the same, under a scaler whose time goes on by half a second a decision."""

    def __init__(self, targets: ScalingTargets = TARGETS, *, target: int = 1) -> None:
        self.scaler = PoolScaler(targets)
        self.target = target
        self.now = 1000.0
        self.reason = ""

    def decide(self, each: ReplicaSignals = IDLE, *, up: int | None = None, **ingress: Any) -> int:
        """`up` replicas report, all of the target unless said otherwise."""
        replicas = (each,) * (self.target if up is None else up)
        decision: Decision = self.scaler.decide(self.now, PoolSignals(target=self.target, replicas=replicas, **ingress))
        self.target, self.reason = decision
        self.now += 0.5
        return self.target

    def decide_for(self, seconds: float, each: ReplicaSignals = IDLE, **ingress: Any) -> list[int]:
        return [self.decide(each, **ingress) for _ in range(int(2 * seconds))]


def pool_of(load: ReplicaSignals, replicas: int) -> list[int]:
    """Decisions while one load is spread over whatever replicas there are."""
    pool = Pool(target=replicas)
    shared = {"running", "arrivals_per_s", "arriving_prefill_tokens_per_s", "kv_blocks_used", "waiting"}
    return [
        pool.decide(load._replace(**{name: getattr(load, name) / pool.target for name in shared})) for _ in range(400)
    ]


# --- what is wanted ---------------------------------------------------------------------------------------------------


def test_an_idle_pool_keeps_its_minimum() -> None:
    assert set(Pool().decide_for(200)) == {1}


@pytest.mark.parametrize(
    ("load", "expected", "reason"),
    [
        # 40,000 tokens/s at 10,000 a replica and at most 80% of its time
        ({"arrivals_per_s": 80, "arriving_prefill_tokens_per_s": 40_000}, 5, "prefill"),
        # 450 sequences at 100 a replica and at most 90% of the batch
        ({"running": 450}, 5, "batch"),
        # Little's law: 45 sequences/s of 10 s each, a thousand tokens of 10 ms
        ({"arrivals_per_s": 45, "generated_tokens": 1000}, 5, "batch"),
        # the same with steps that take longer the larger the batch is: 90 sequences fill a replica at 19 ms a step
        ({"arrivals_per_s": 45, "generated_tokens": 1000, "step_s_per_sequence": 0.0001}, 10, "batch"),
        # and with prefills that take two fifths of the time
        (
            {"arrivals_per_s": 45, "generated_tokens": 1000, "arriving_prefill_tokens_per_s": 20_000},
            7,
            "batch",
        ),
        # 3,200 blocks of 1,000 a replica, at most 80% of them
        ({"running": 32, "kv_blocks_used": 3200}, 4, "KV"),
    ],
)
def test_the_number_follows_the_load(load: dict[str, float], expected: int, reason: str) -> None:
    pool = Pool()
    pool.decide(IDLE._replace(**load))
    assert reason in pool.reason
    decisions = pool_of(IDLE._replace(**load), 1)
    assert decisions[-1] == max(decisions) == expected


def test_long_prompts_leave_more_room_for_the_wait() -> None:
    """With prompts of 2 s each, a replica that is busy for 80% of its time would have a queue of 4 s."""
    short = pool_of(IDLE._replace(arrivals_per_s=50, arriving_prefill_tokens_per_s=50_000), 1)[-1]
    long = pool_of(IDLE._replace(arrivals_per_s=2.5, arriving_prefill_tokens_per_s=50_000), 1)[-1]
    assert (short, long) == (7, 15)


def test_tokens_count_and_not_requests() -> None:
    """As many requests of ten times the tokens need ten times the replicas."""
    small = pool_of(IDLE._replace(arrivals_per_s=8, arriving_prefill_tokens_per_s=4_000), 1)[-1]
    large = pool_of(IDLE._replace(arrivals_per_s=8, arriving_prefill_tokens_per_s=40_000), 1)[-1]
    assert (small, large) == (1, 6)


def test_what_waits_is_worked_off_within_the_target_and_a_replicas_start() -> None:
    pool = Pool()
    # 100,000 tokens wait; a replica does 50,000 in the second of the target and the 4 s of a start
    assert pool.decide(IDLE._replace(running=10, waiting=20, waiting_prefill_tokens=100_000)) == 2


def test_a_wait_that_ends_in_time_needs_nobody() -> None:
    pool = Pool()
    assert pool.decide(IDLE._replace(running=10, waiting=20, waiting_prefill_tokens=9_000)) == 1


def test_late_first_tokens_add_one_replica_where_the_model_of_the_load_sees_no_need() -> None:
    pool = Pool()
    late = IDLE._replace(running=10, waiting=2)
    assert pool.decide(late, first_token_s=3.0) == 2
    assert "first tokens take 3.0 s" in pool.reason
    assert pool.decide(late, up=1, first_token_s=3.0) == 2  # it is coming
    assert set(pool.decide_for(9, late, first_token_s=3.0)) == {2}  # and gets time to help
    assert max(pool.decide_for(9, late, first_token_s=3.0)) == 3


def test_late_first_tokens_without_a_queue_add_none() -> None:
    """Prompts that take longer than the target by themselves do so on any number of replicas."""
    pool = Pool()
    assert set(pool.decide_for(60, IDLE._replace(running=10), first_token_s=3.0)) == {1}


def test_bounds_hold_and_are_told() -> None:
    pool = Pool(replace(TARGETS, min=2, max=3), target=2)
    assert pool.decide(IDLE) == 2
    assert pool.decide(IDLE._replace(running=450)) == 3
    assert pool.reason.endswith("10 would be needed, max is 3")


# --- how the number follows -------------------------------------------------------------------------------------------


def test_one_decision_doubles_the_replicas_at_most() -> None:
    pool = Pool()
    heavy = IDLE._replace(running=1800)
    assert pool.decide(heavy) == 5  # or adds four
    assert pool.decide(heavy._replace(running=360)) == 10


def test_fewer_replicas_come_only_after_a_while_and_step_by_step() -> None:
    pool = Pool(target=8)
    assert set(pool.decide_for(60, IDLE)) == {8}
    fall = pool.decide_for(200, IDLE)
    assert fall == sorted(fall, reverse=True)
    assert list(dict.fromkeys(fall)) == [6, 5, 4, 3, 2, 1]
    assert fall.count(6) == 30  # a quarter of `scale_down_after_s`


def test_the_worst_moment_of_the_window_is_kept() -> None:
    pool = Pool(target=5)
    busy = IDLE._replace(running=80)
    pool.decide_for(60, busy)
    for _ in range(10):  # a burst every 50 s
        assert set(pool.decide_for(49, IDLE)) == {5}
        pool.decide_for(1, busy)


def test_a_load_that_trembles_at_a_boundary_changes_the_number_once() -> None:
    """3.0 and 3.1 replicas' worth, at 90% of the batch."""
    pool = Pool(target=3)
    decisions = [pool.decide(IDLE._replace(running=270 / 3))]
    for number in range(1000):
        decisions.append(pool.decide(IDLE._replace(running=(270 if number % 7 else 279) / pool.target)))
    assert list(dict.fromkeys(decisions)) == [3, 4]
    assert decisions == sorted(decisions)


def test_a_scaler_that_has_just_begun_takes_nobody_away() -> None:
    """As after the controller's restart: what was needed a minute ago is not known."""
    assert set(Pool(target=7).decide_for(59, IDLE)) == {7}


# --- zero and back ----------------------------------------------------------------------------------------------------


def test_the_last_replica_leaves_when_nothing_came_for_a_while() -> None:
    pool = Pool(FROM_ZERO)
    assert set(pool.decide_for(10, IDLE._replace(running=1))) == {1}
    for idle_s in range(30):
        assert pool.decide(IDLE._replace(idle_s=idle_s)) == 1
    assert pool.decide(IDLE._replace(idle_s=30.0)) == 1  # half a second each: the scaler's own clock counts as well
    pool.now += 15.0
    assert pool.decide(IDLE._replace(idle_s=45.0)) == 0
    assert pool.reason.startswith("idle for")


def test_a_request_between_two_looks_counts() -> None:
    """It came and went: the engine's own word on how long it has been idle tells."""
    pool = Pool(FROM_ZERO)
    assert set(pool.decide_for(120, IDLE._replace(idle_s=5.0))) == {1}


def test_nothing_starts_at_zero_without_a_request() -> None:
    pool = Pool(FROM_ZERO, target=0)
    assert set(pool.decide_for(600)) == {0}


def test_a_held_request_starts_the_first_replica() -> None:
    pool = Pool(FROM_ZERO, target=0)
    assert pool.decide(held=1, held_tokens=10) == 1
    assert "1 are held" in pool.reason
    assert {pool.decide(up=0, held=1, held_tokens=10) for _ in range(40)} == {1}


def test_a_burst_at_zero_starts_as_many_as_it_needs_once_their_speed_is_known() -> None:
    pool = Pool(FROM_ZERO)
    pool.decide_for(5, IDLE._replace(running=1, generated_tokens=500))
    pool.now += 100.0
    assert pool.decide(IDLE._replace(idle_s=100.0)) == 0
    assert pool.decide(held=100, held_tokens=150_000) == 4


def test_a_pool_with_a_minimum_never_goes_to_zero() -> None:
    assert min(Pool(target=3).decide_for(600, IDLE._replace(idle_s=1e6))) == 1


# --- the time of a start ----------------------------------------------------------------------------------------------


def test_starts_that_take_long_are_reckoned_with() -> None:
    """The longer a replica takes to come, the fewer are worth ordering for what waits now."""

    def wanted_after_a_start_of(seconds: float) -> int:
        pool = Pool()
        pool.decide(IDLE._replace(running=130))
        assert pool.target == 2
        for _ in range(int(2 * seconds)):
            pool.decide(IDLE._replace(running=130), up=1)
        pool.decide(IDLE._replace(running=65))
        return pool.decide(IDLE._replace(waiting=20, waiting_prefill_tokens=250_000))

    assert wanted_after_a_start_of(2.0) > wanted_after_a_start_of(20.0) >= 2
