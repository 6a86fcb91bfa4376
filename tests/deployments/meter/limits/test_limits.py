from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.contracts import Limits, RateLimits
from deployments.meter.ledger.periods import PeriodName, period_at
from deployments.meter.limits.limits import (
    CONCURRENCY_RETRY_S,
    NOTHING,
    LimitCharge,
    LimitDemand,
    LimitState,
    check,
    rate_limits,
)
from deployments.meter.limits.minute_window import MinuteWindow, WindowEntry

NOON = datetime(2024, 2, 28, 12, tzinfo=UTC).timestamp()
DAY_S = 86_400.0

# --- the window, against a model that looks at everything ------------------------------------------------------------


class Model:
    """What was admitted, as corrected, ever."""

    def __init__(self) -> None:
        self.admitted: list[tuple[float, int]] = []

    def used(self, now: float) -> int:
        return sum(amount for at, amount in self.admitted if at <= now < at + 60.0)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.floats(0.0, 40.0)),
        st.tuples(st.just("admit"), st.integers(0, 12)),
        st.tuples(st.just("correct"), st.floats(0.0, 1.0)),
        st.tuples(st.just("limit"), st.integers(1, 20)),
    ),
    max_size=60,
)


@given(operations, st.integers(1, 20), st.floats(0.0, 2e9))
def test_a_window_is_exact_at_all_times(steps: list[tuple[str, Any]], limit: int, now: float) -> None:
    window, model, entries = MinuteWindow(limit), Model(), list[WindowEntry]()
    for step, value in steps:
        if step == "pass":
            now += value
        elif step == "limit":
            limit = window.limit = value
        elif step == "correct" and entries:
            number = int(value * (len(entries) - 1))
            at, amount = model.admitted[number]
            model.admitted[number] = (at, int(value * amount))
            window.correct(entries[number], int(value * amount))
        elif step == "admit":
            used = model.used(now)
            wait_s = window.wait_s(now, value)
            assert window.used(now) == used
            assert window.room(now) == limit - used
            if used + value <= limit:
                assert wait_s == 0.0
                entries.append(window.add(now, value))
                model.admitted.append((now, value))
            elif value > limit:
                assert wait_s is None
            else:
                assert wait_s is not None
                assert model.used(now + wait_s) + value <= limit
                assert wait_s < 0.001 or model.used(now + wait_s - 0.001) + value > limit
        empty_s = window.empty_s(now)
        assert model.used(now + empty_s) == 0
        assert empty_s < 0.001 or model.used(now + empty_s - 0.001) > 0


@given(st.lists(st.tuples(st.integers(1, 10), st.floats(0.0, 30.0), st.floats(0.0, 1.0)), min_size=1, max_size=80))
def test_no_sixty_seconds_hold_more_than_the_limit_and_each_retry_is_admitted(
    requests: list[tuple[int, float, float]],
) -> None:
    window, model, now, limit = MinuteWindow(10), Model(), NOON, 10
    for amount, pause_s, used_share in requests:
        wait_s = window.wait_s(now, amount)
        assert wait_s is not None
        now += wait_s
        assert window.wait_s(now, amount) == 0.0
        window.correct(window.add(now, amount), int(amount * used_share))
        model.admitted.append((now, int(amount * used_share)))
        now += pause_s
    for at, _ in model.admitted:
        assert model.used(at) <= limit
        assert model.used(math.nextafter(at + 60.0, 0.0)) <= limit


def test_an_admission_counts_for_sixty_seconds_to_the_instant() -> None:
    window = MinuteWindow(5)
    window.add(NOON, 5)
    assert window.used(math.nextafter(NOON + 60.0, 0.0)) == 5
    assert window.used(NOON + 60.0) == 0


def test_a_settlement_makes_room_at_once_and_only_within_the_minute() -> None:
    window = MinuteWindow(10)
    entry = window.add(NOON, 10)
    window.correct(entry, 4)
    assert window.room(NOON) == 6
    assert window.used(NOON + 60.0) == 0
    window.correct(entry, 9)
    assert window.used(NOON + 60.0) == 0


def test_only_the_last_minute_is_kept() -> None:
    window = MinuteWindow(100)
    for second in range(1000):
        window.add(NOON + second, 1)
        window.used(NOON + second)
    assert len(window) == 60


def test_a_lowered_limit_counts_what_was_admitted_before() -> None:
    window = MinuteWindow(10)
    window.add(NOON, 4)
    window.add(NOON + 10.0, 4)
    window.limit = 5
    assert window.room(NOON + 10.0) == -3
    assert window.wait_s(NOON + 10.0, 1) == 50.0
    assert window.wait_s(NOON + 10.0, 5) == 60.0


# --- all limits of a key and a team ----------------------------------------------------------------------------------


def made(whose: str = "this key", **limits: Any) -> LimitState:
    """With quotas that are loaded, of which nothing was used before."""
    state = LimitState(whose, Limits(**limits))
    for quota in state.unloaded(NOON):
        quota.load(period_at(quota.name, NOON), 0, 0.0)
    return state


ONE = LimitDemand(10, 0.5)


@pytest.mark.parametrize(
    ("limits", "code", "wait_s", "words"),
    [
        ({"requests_per_minute": 1}, "rate_limit_exceeded", 60.0, "requests per minute reached for this key: limit 1"),
        ({"tokens_per_minute": 19}, "rate_limit_exceeded", 60.0, "limit 19, used 10, requested 10"),
        ({"concurrency": 1}, "rate_limit_exceeded", CONCURRENCY_RETRY_S, "requests at a time"),
        ({"tokens_per_day": 19}, "insufficient_quota", DAY_S / 2, "tokens per day reached for this key: limit 19"),
        ({"money_per_day": 0.99}, "insufficient_quota", DAY_S / 2, "limit 0.99, used 0.5, requested 0.5"),
        ({"tokens_per_month": 19}, "insufficient_quota", 1.5 * DAY_S, "tokens per month"),
        ({"money_per_month": 0.99}, "insufficient_quota", 1.5 * DAY_S, "money per month"),
    ],
)  # fmt: skip
def test_each_limit_refuses_in_words_and_tells_when_there_is_room(
    limits: dict[str, Any], code: str, wait_s: float, words: str
) -> None:
    state = made(**limits)
    assert check([state], NOON, ONE) is None
    state.take(NOON, ONE)
    refusal = check([state], NOON, ONE)
    assert refusal is not None
    assert (refusal.code, refusal.retry_after_s) == (code, wait_s)
    assert words in refusal.message


@pytest.mark.parametrize("name", ["tokens_per_minute", "tokens_per_day", "tokens_per_month"])
def test_a_request_larger_than_a_limit_is_never_admitted(name: str) -> None:
    refusal = check([made("this key", **{name: 9})], NOON, ONE)
    assert refusal is not None
    assert refusal.retry_after_s is None
    assert "larger than the limit" in refusal.message


def test_of_several_limits_the_one_that_lasts_longest_is_told() -> None:
    key, team = made(requests_per_minute=1, concurrency=1), made("the team mill", tokens_per_day=15)
    for state in (key, team):
        state.take(NOON, ONE)
    refusal = check([key, team], NOON, ONE)
    assert refusal is not None
    assert refusal.retry_after_s == DAY_S / 2
    assert "the team mill" in refusal.message


def test_a_hold_that_is_closed_frees_all_but_what_was_used() -> None:
    state = made(requests_per_minute=2, tokens_per_minute=20, concurrency=1, tokens_per_day=20, money_per_day=1.0)
    state.take(NOON, LimitDemand(20, 1.0)).close(LimitDemand(3, 0.1), NOON)
    assert check([state], NOON, LimitDemand(17, 0.9)) is None
    assert [refusal.code for refusal in state.refusals(NOON, LimitDemand(18, 0.91))] == [
        "rate_limit_exceeded",
        "insufficient_quota",
        "insufficient_quota",
    ]


def test_what_was_not_admitted_after_all_does_not_count_as_a_request() -> None:
    state = made(requests_per_minute=1)
    state.take(NOON, ONE).close(NOTHING, NOON, admitted=False)
    assert check([state], NOON, ONE) is None
    state.take(NOON, ONE).close(NOTHING, NOON)
    assert check([state], NOON, ONE) is not None


def test_usage_counts_in_the_day_in_which_the_request_arrived() -> None:
    state = made(tokens_per_day=10)
    state.take(NOON, ONE).close(ONE, NOON - DAY_S)
    assert check([state], NOON, ONE) is None
    state.take(NOON, ONE).close(ONE, NOON)
    assert check([state], NOON, ONE) is not None


def test_quotas_are_unknown_until_loaded_and_again_when_their_time_is_over() -> None:
    state = LimitState("this key", Limits(tokens_per_day=10, money_per_month=1.0))
    assert [quota.name for quota in state.unloaded(NOON)] == ["day", "month"]
    for quota in state.unloaded(NOON):
        quota.load(period_at(quota.name, NOON), 0, 0.0)
    assert state.unloaded(NOON) == []
    assert [quota.name for quota in state.unloaded(NOON + DAY_S / 2)] == ["day"]
    assert [quota.name for quota in state.unloaded(NOON + 1.5 * DAY_S)] == ["day", "month"]
    state.recount()
    assert [quota.name for quota in state.unloaded(NOON)] == ["day", "month"]


def test_three_times_a_tenth_fits_into_three_tenths() -> None:
    state, tenth = made(money_per_day=0.3), LimitDemand(1, 0.1)
    for _ in range(3):
        assert check([state], NOON, tenth) is None
        state.take(NOON, tenth)
    assert check([state], NOON, tenth) is not None


def test_changed_limits_know_what_was_admitted_before() -> None:
    state = made()
    state.take(NOON, ONE)
    state.limits = Limits(requests_per_minute=1)
    assert check([state], NOON + 59.0, ONE) is not None
    state.limits = Limits(concurrency=1)
    assert check([state], NOON + 59.0, ONE) is not None
    state.limits = Limits(tokens_per_minute=20)
    assert check([state], NOON + 59.0, ONE) is None


def test_a_state_is_idle_when_nothing_would_be_forgotten_with_it() -> None:
    state = made(tokens_per_day=100)
    hold = state.take(NOON, ONE)
    assert not state.is_idle(NOON + 100.0)
    hold.close(ONE, NOON)
    assert not state.is_idle(NOON + 100.0)  # the ledger was asked
    assert state.is_idle(NOON + DAY_S)


everything = st.builds(
    Limits,
    requests_per_minute=st.none() | st.integers(1, 5),
    tokens_per_minute=st.none() | st.integers(5, 40),
    concurrency=st.none() | st.integers(1, 4),
    tokens_per_day=st.none() | st.integers(5, 60),
    money_per_month=st.none() | st.floats(0.5, 6.0),
)


@given(
    everything,
    everything,
    st.lists(st.tuples(st.integers(1, 15), st.floats(0.0, 30.0), st.floats(0.0, 1.0), st.booleans()), max_size=40),
)
def test_a_retry_after_the_wait_is_admitted_and_one_before_is_not(
    of_key: Limits, of_team: Limits, requests: list[tuple[int, float, float, bool]]
) -> None:
    states, now = [LimitState("this key", of_key), LimitState("the team mill", of_team)], NOON
    running: list[list[LimitCharge]] = []

    def refusal(at: float) -> Any:
        for quota in [quota for state in states for quota in state.unloaded(at)]:
            quota.load(period_at(quota.name, at), 0, 0.0)
        return check(states, at, demand)

    for tokens, pause_s, share, ends in requests:
        now += pause_s
        demand = LimitDemand(tokens, tokens / 10)
        if running and ends:
            for hold in running.pop(0):
                hold.close(LimitDemand(int(share * 5), 0.0), NOON)
        refused = refusal(now)
        if refused is None:
            running.append([state.take(now, demand) for state in states])
        elif refused.retry_after_s is None or "requests at a time" in refused.message:
            continue
        elif refused.code == "rate_limit_exceeded":  # of quotas what is reserved may stand in the way of the next day
            again = refusal(now + refused.retry_after_s - 0.001) if refused.retry_after_s > 0.001 else refused
            assert again is not None
            now += refused.retry_after_s
            later = refusal(now)
            assert later is None or "requests at a time" in later.message


# --- the headers -----------------------------------------------------------------------------------------------------


def test_the_headers_tell_the_narrowest_windows() -> None:
    key, team = made(requests_per_minute=10, tokens_per_minute=100), made(requests_per_minute=2, tokens_per_minute=1000)
    for state in (key, team):
        state.take(NOON, ONE)
    assert rate_limits([key, team], NOON + 15.0) == RateLimits(2, 1, 45.0, 100, 90, 45.0)


def test_without_limits_per_minute_there_are_no_headers() -> None:
    assert rate_limits([made(concurrency=1, tokens_per_day=5)], NOON) is None
    told = rate_limits([made(tokens_per_minute=5)], NOON)
    assert told == RateLimits(None, None, None, 5, 5, 0.0)


# --- days and months -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("day", (2024, 2, 29), (2024, 3, 1)),
        ("month", (2024, 2, 1), (2024, 3, 1)),
        ("month", (2024, 12, 1), (2025, 1, 1)),
    ],
)
def test_periods_are_those_of_utc(name: PeriodName, begin: tuple[int, int, int], end: tuple[int, int, int]) -> None:
    begins_at, ends_at = (datetime(*date, tzinfo=UTC).timestamp() for date in (begin, end))
    for at in (begins_at, (begins_at + ends_at) / 2, ends_at - 0.001):
        assert period_at(name, at) == (begins_at, ends_at)
    assert period_at(name, ends_at).begins_at == ends_at
