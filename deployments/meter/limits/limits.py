"""Limits of one key or team: decides whether a request fits, and if not, when it will. Pure: no clock, no I/O.

`now` is Unix time in seconds and never goes back between calls. A request is admitted when every limit of its key and
of its team has room (`check`), and then counts in all of them (`LimitState.take`); nothing may happen in between.

A request counts with what it reserves, its prompt and `max_tokens`, and once it is settled with what it used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

from deployments.contracts import Limits, RateLimits
from deployments.meter.limits.minute_window import MinuteWindow, WindowEntry
from deployments.meter.limits.quotas import Quota

__all__ = [
    "CONCURRENCY_RETRY_S",
    "NOTHING",
    "LimitCharge",
    "LimitDemand",
    "LimitState",
    "Refusal",
    "check",
    "rate_limits",
]

CONCURRENCY_RETRY_S: Final = 1.0
"""Advice where only the end of another request makes room, whose time nobody knows."""
_MONEY_TOLERANCE: Final = 1e-9
"""As a share of a quota: its sums are rounded."""


class LimitDemand(NamedTuple):
    """What one request can use at most, or has used."""

    tokens: int
    cost: float


NOTHING: Final = LimitDemand(0, 0.0)

RefusalCode = Literal["rate_limit_exceeded", "insufficient_quota"]


class Refusal(NamedTuple):
    code: RefusalCode
    message: str
    """For the caller."""
    retry_after_s: float | None
    """None if the request is larger than the limit."""


class LimitCharge:
    """How one admitted request counts in one LimitState."""

    __slots__ = ("_request", "_reserved", "_state", "_tokens")

    def __init__(self, state: LimitState, request: WindowEntry, tokens: WindowEntry, reserved: LimitDemand) -> None:
        self._state = state
        self._request = request
        self._tokens = tokens
        self._reserved = reserved

    def close(self, used: LimitDemand, started_at: float, *, admitted: bool = True) -> None:
        """It has ended. Once only. Of what was not `admitted` after all, nothing counts."""
        self._state.release(self._reserved)
        for quota in (self._state.day, self._state.month):
            quota.add(started_at, used.tokens, used.cost)
        self.correct(used.tokens, admitted=admitted)

    def correct(self, tokens: int, *, admitted: bool = True) -> None:
        """A better witness tells what it has used within the minute."""
        self._state.tokens.correct(self._tokens, tokens)
        self._state.requests.correct(self._request, int(admitted))


class LimitState:
    """Everything that counts for one key or team. `limits` may be replaced at any time: what was admitted stays known.

    Quotas must be loaded (`unloaded`) before `check` is asked.
    """

    def __init__(self, whose: str, limits: Limits) -> None:
        """`whose` names it in refusals, such as "this key"."""
        self._whose = whose
        self._running = 0
        self._reserved_tokens = 0
        self._reserved_cost = 0.0
        self.requests = MinuteWindow()
        self.tokens = MinuteWindow()
        self.day, self.month = Quota("day"), Quota("month")
        self.limits = limits

    @property
    def limits(self) -> Limits:
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        self.requests.limit, self.tokens.limit = limits.requests_per_minute, limits.tokens_per_minute
        self._quotas = (
            (self.day, limits.tokens_per_day, limits.money_per_day),
            (self.month, limits.tokens_per_month, limits.money_per_month),
        )

    def unloaded(self, now: float) -> list[Quota]:
        """Those that are limited and do not know what was used."""
        return [
            quota
            for quota, tokens_limit, money_limit in self._quotas
            if (tokens_limit is not None or money_limit is not None) and not quota.is_loaded(now)
        ]

    def is_crowded(self, now: float) -> bool:
        """No request whatever is admitted, however few its tokens."""
        room, concurrency = self.requests.room(now), self._limits.concurrency
        return (room is not None and room < 1) or (concurrency is not None and self._running >= concurrency)

    def is_idle(self, now: float) -> bool:
        """Holds nothing but what the ledger knows of days and months that are over."""
        counting = self._running or self.requests.used(now) or self.tokens.used(now)
        return not counting and not self.day.is_loaded(now) and not self.month.is_loaded(now)

    def refusals(self, now: float, demand: LimitDemand) -> Iterator[Refusal]:
        """One for each limit without room."""
        for what, window, amount in (("requests", self.requests, 1), ("tokens", self.tokens, demand.tokens)):
            if window.limit is not None and (wait_s := window.wait_s(now, amount)) != 0.0:
                yield self._full(f"{what} per minute", window.limit, window.used(now), amount, wait_s)
        if (most := self._limits.concurrency) is not None and self._running >= most:
            yield self._full("requests at a time", most, self._running, 1, CONCURRENCY_RETRY_S)
        for quota, tokens_limit, money_limit in self._quotas:
            if tokens_limit is not None:
                used = quota.tokens + self._reserved_tokens
                if used + demand.tokens > tokens_limit:
                    wait_s = None if demand.tokens > tokens_limit else quota.wait_s(now)
                    yield self._full(f"tokens per {quota.name}", tokens_limit, used, demand.tokens, wait_s, quota)
            if money_limit is not None:
                spent, bound = quota.cost + self._reserved_cost, money_limit * (1 + _MONEY_TOLERANCE)
                if spent + demand.cost > bound:
                    wait_s = None if demand.cost > bound else quota.wait_s(now)
                    yield self._full(f"money per {quota.name}", money_limit, spent, demand.cost, wait_s, quota)

    def _full(
        self,
        what: str,
        limit: float,
        used: float,
        requested: float,
        wait_s: float | None,
        quota: Quota | None = None,
    ) -> Refusal:
        numbers = f"limit {limit:.12g}, used {used:.12g}, requested {requested:.12g}"
        if wait_s is None:
            advice = "The request is larger than the limit: reduce the prompt, max_tokens or n."
        elif quota is not None:
            advice = f"Requests under way count with their max_tokens. The next {quota.name} begins at 00:00 UTC."
        else:
            advice = f"Retry after {math.ceil(wait_s * 1000) / 1000:g} s."
        code: RefusalCode = "rate_limit_exceeded" if quota is None else "insufficient_quota"
        return Refusal(code, f"Limit of {what} reached for {self._whose}: {numbers}. {advice}", wait_s)

    def take(self, now: float, demand: LimitDemand) -> LimitCharge:
        """Counts a request that `check` has let pass, or one that is known to have been admitted at `now`."""
        self._running += 1
        self._reserved_tokens += demand.tokens
        self._reserved_cost += demand.cost
        return LimitCharge(self, self.requests.add(now, 1), self.tokens.add(now, demand.tokens), demand)

    def release(self, demand: LimitDemand) -> None:
        """One that was taken has ended."""
        self._running -= 1
        self._reserved_tokens -= demand.tokens
        self._reserved_cost = self._reserved_cost - demand.cost if self._running else 0.0

    def recount(self) -> None:
        """The ledger has changed in a way that is not known here: its quotas are to be loaded again."""
        self.day, self.month = Quota("day"), Quota("month")
        self.limits = self._limits


def check(states: Sequence[LimitState], now: float, demand: LimitDemand) -> Refusal | None:
    """None if the request fits everywhere, else why it does not. Of several refusals the one that lasts longest."""
    refusals = [refusal for state in states for refusal in state.refusals(now, demand)]
    return max(refusals, key=_lasting_s, default=None)


def _lasting_s(refusal: Refusal) -> float:
    return math.inf if refusal.retry_after_s is None else refusal.retry_after_s


def rate_limits(states: Sequence[LimitState], now: float) -> RateLimits | None:
    """The narrowest windows of `states`, those with the smallest share left; None where none has a limit."""
    requests = _narrowest([state.requests for state in states], now)
    tokens = _narrowest([state.tokens for state in states], now)
    if requests is None and tokens is None:
        return None
    return RateLimits(
        limit_requests=None if requests is None else requests.limit,
        remaining_requests=None if requests is None else max(0, requests.room(now) or 0),
        reset_requests_s=None if requests is None else requests.empty_s(now),
        limit_tokens=None if tokens is None else tokens.limit,
        remaining_tokens=None if tokens is None else max(0, tokens.room(now) or 0),
        reset_tokens_s=None if tokens is None else tokens.empty_s(now),
    )


def _narrowest(windows: Sequence[MinuteWindow], now: float) -> MinuteWindow | None:
    limited = [(window.used(now) / window.limit, window) for window in windows if window.limit is not None]
    return max(limited, key=lambda each: each[0])[1] if limited else None
