"""How many replicas a model needs: a pure function of what its pool reports, and the hysteresis around it.

The signals are the engine's own: tokens and sequences, not requests, whose lengths differ. Free of Ray and of clocks,
so that `millstream plan` runs the same code in virtual time; autoscaling_policy.py wraps it for Ray Serve.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Decision", "PoolScaler", "PoolSignals", "ReplicaScaler", "ReplicaSignals", "ScalingTargets", "Wanted"]

_MAX_PREFILL_SHARE = 0.8
"""Share of a replica's time that prefills may take, at most: decode steps need the rest."""
_MAX_BATCH_SHARE = 0.9
"""Share of `max_num_seqs` that may run: above it new sequences begin to wait for old ones to end."""
_UP_TOLERANCE, _DOWN_MARGIN = 0.05, 0.1
"""Replicas are added when more than 5% too few are there, and taken away when 10% more load would still fit."""
_START_MEMORY = 0.3
"""Weight of each further start in their mean."""
_ANY_LOAD = 0.9
"""Replicas that any load wants, however small: one with all margins."""
_STEP_UP_AT_LEAST = 4
"""One decision doubles the replicas at most, or adds so many."""
_STEP_DOWN_SHARE = 0.25
"""One decision takes away so many at most, or one; the next comes a quarter of `scale_down_after_s` later."""
_OVERDUE_AFTER_S = 10.0
"""First tokens that are late although the count says enough add a replica, so often at most."""


@dataclass(frozen=True, kw_only=True)
class ScalingTargets:
    """From cluster.yaml: `replicas` of a model."""

    min: int
    max: int
    target_first_token_s: float
    target_kv_use: float
    scale_down_after_s: float
    idle_to_zero_after_s: float


class ReplicaSignals(NamedTuple):
    """What one engine replica reports of itself; names are those of the values that Serve carries."""

    running: float
    waiting: float
    waiting_prefill_tokens: float
    """Without those that the prefix cache will probably spare."""
    kv_blocks_used: float
    kv_blocks_total: float
    max_num_seqs: float
    arrivals_per_s: float
    """Sequences accepted lately."""
    arriving_prefill_tokens_per_s: float
    """Their prompt tokens, without those that the prefix cache will probably spare."""
    decode_s: float
    """From first token to end, of the sequences that ended lately; 0 while none has."""
    prefill_tokens_per_s: float
    """What it can do; 0 while it has prefilled nothing."""
    step_s: float
    """Of a decode step now."""
    start_up_s: float
    """How long it took to start."""
    idle_s: float = 0.0
    """Since it last had anything to do; 0 while it has."""


@dataclass(frozen=True, kw_only=True)
class PoolSignals:
    """One model's pool at one moment."""

    target: int
    """Replicas that were last decided on."""
    replicas: tuple[ReplicaSignals, ...]
    """Of those that run and report."""
    held: float = 0.0
    """Requests that wait in the ingress because no replica is up."""
    held_tokens: float = 0.0
    """Prompt tokens of them."""
    first_token_s: float = 0.0
    """From arrival to first token, as ingresses saw it lately; 0 while there was none."""


class Wanted(NamedTuple):
    replicas: float
    """What would just do, unrounded and without bounds."""
    reason: str


class Decision(NamedTuple):
    replicas: int
    reason: str


class _Capacity(NamedTuple):
    """Of one replica, the mean over those that report; 0 where unknown."""

    prefill_tokens_per_s: float = 0.0
    max_num_seqs: float = 0.0
    kv_blocks: float = 0.0
    decode_s: float = 0.0
    start_up_s: float = 0.0


def _mean(values: Iterable[float]) -> float:
    """Of those that are known, that is not 0; 0 without any."""
    known = [value for value in values if value > 0]
    return sum(known) / len(known) if known else 0.0


def _capacity(replicas: tuple[ReplicaSignals, ...], before: _Capacity) -> _Capacity:
    """`before` stands in for what no replica reports now: after all have left, their rates are the best guess."""
    now = _Capacity(
        _mean(each.prefill_tokens_per_s for each in replicas),
        _mean(each.max_num_seqs for each in replicas),
        _mean(each.kv_blocks_total for each in replicas),
        _mean(each.decode_s for each in replicas),
        _mean(each.start_up_s for each in replicas),
    )
    return _Capacity(*(new or old for new, old in zip(now, before, strict=True)))


def _wanted(signals: PoolSignals, targets: ScalingTargets, capacity: _Capacity, start_s: float) -> Wanted:
    """What keeps the expected first-token time and the KV use within the targets.

    Each of prefill, batch and KV gives a count: for the load that arrives, at a share that keeps queues short; and for
    that load and what waits already, at all that replicas can do, so that the wait is over `horizon_s` from now: the
    target, and `start_s` that a replica takes to come.
    """
    replicas = signals.replicas
    arrivals = sum(each.arrivals_per_s for each in replicas)
    arriving = sum(each.arriving_prefill_tokens_per_s for each in replicas)
    running = sum(each.running for each in replicas)
    kv_used = sum(each.kv_blocks_used for each in replicas)
    backlog = sum(each.waiting for each in replicas) + signals.held
    backlog_tokens = sum(each.waiting_prefill_tokens for each in replicas) + signals.held_tokens
    horizon_s = targets.target_first_token_s + start_s
    counts = [Wanted(0.0, "no load")]
    if signals.held:
        counts.append(Wanted(_ANY_LOAD, f"{signals.held:.0f} requests are held for a first replica"))
    if running:
        counts.append(Wanted(_ANY_LOAD, f"{running:.0f} sequences run"))
    if rate := capacity.prefill_tokens_per_s:
        # Queueing for one server with even service times (M/D/1) takes half of the target at this share.
        prefill_s = arriving / arrivals / rate if arrivals else 0.0
        share = min(_MAX_PREFILL_SHARE, targets.target_first_token_s / (targets.target_first_token_s + prefill_s))
        counts.append(
            Wanted(
                max(arriving / share, arriving + backlog_tokens / horizon_s) / rate,
                f"prefill: {arriving:.0f} tokens/s arrive and {backlog_tokens:.0f} wait, a replica does {rate:.0f}/s",
            )
        )
    # Little's law: what runs once the arrivals of now have filled the batch.
    sequences = max(running, arrivals * capacity.decode_s)
    # To end the wait in time, sequences must end faster, so more must run; never more than wait.
    extra = backlog * min(1.0, capacity.decode_s / horizon_s) if capacity.decode_s else backlog
    if capacity.max_num_seqs:
        counts.append(
            Wanted(
                max(sequences / _MAX_BATCH_SHARE, sequences + extra) / capacity.max_num_seqs,
                f"batch: {sequences:.0f} sequences and {backlog:.0f} waiting, {capacity.max_num_seqs:.0f} a replica",
            )
        )
    if capacity.kv_blocks and running:
        blocks = kv_used / running
        counts.append(
            Wanted(
                max(sequences / targets.target_kv_use, sequences + extra) * blocks / capacity.kv_blocks,
                f"KV: {sequences:.0f} sequences and {backlog:.0f} waiting of {blocks:.0f} blocks each, a replica has "
                f"{capacity.kv_blocks:.0f}",
            )
        )
    return max(counts, key=lambda count: count.replicas)


class ReplicaScaler:
    """Up at once, down slowly: what was wanted at the worst moment of the last `down_after_s` is kept."""

    def __init__(self, minimum: int, maximum: int, down_after_s: float) -> None:
        self._minimum = minimum
        self._maximum = maximum
        self._down_after_s = down_after_s
        self._since: float | None = None
        self._peaks: deque[tuple[float, int]] = deque()
        """When something was wanted, and how much with margin: falling counts, of which the first is the peak."""
        self._last_down = -math.inf

    def decide(self, now: float, target: int, wanted: Wanted) -> Decision:
        """`now` in seconds of any steady clock; `target`: what was last decided."""
        if self._since is None:
            self._since = now
        kept = math.ceil(wanted.replicas * (1 + _DOWN_MARGIN))
        while self._peaks and self._peaks[-1][1] <= kept:
            self._peaks.pop()
        self._peaks.append((now, kept))
        while self._peaks[0][0] < now - self._down_after_s:
            self._peaks.popleft()
        peak = self._peaks[0][1]
        needed = math.ceil(wanted.replicas * (1 - _UP_TOLERANCE))
        replicas = target
        if needed > target:
            replicas = min(needed, max(2 * target, target + _STEP_UP_AT_LEAST))
        elif peak < target and self._may_go_down(now):
            replicas = max(peak, target - max(1, int(target * _STEP_DOWN_SHARE)), 1)
        replicas = min(max(replicas, self._minimum), self._maximum)
        if replicas < target:
            self._last_down = now
        reason = wanted.reason
        if needed > self._maximum:
            reason += f"; {needed} would be needed, max is {self._maximum}"
        return Decision(replicas, reason)

    def _may_go_down(self, now: float) -> bool:
        # Without a whole window of its own, this process (a controller that was restarted) does not know the peak.
        watched = self._since is not None and now - self._since >= self._down_after_s
        return watched and now - self._last_down >= self._down_after_s / 4


class _StartTimes:
    """How long replicas take from the decision to their first report: placement, process, weights and all."""

    def __init__(self) -> None:
        self.mean_s = 0.0
        """Of the last few; 0 while none has come."""
        self._ordered_at: deque[float] = deque()
        """Of each replica that has not come yet, oldest first."""
        self._up = 0

    def follow(self, now: float, up: int, target: int) -> None:
        """`up` report; `target` is what was decided now."""
        for _ in range(min(up - self._up, len(self._ordered_at))):
            took_s = now - self._ordered_at.popleft()
            self.mean_s += (took_s - self.mean_s) * (_START_MEMORY if self.mean_s else 1.0)
        self._up = up
        missing = max(0, target - up)
        while len(self._ordered_at) > missing:
            self._ordered_at.pop()
        while len(self._ordered_at) < missing:
            self._ordered_at.append(now)


class PoolScaler:
    """Decides on one model's pool; call it about twice a second."""

    def __init__(self, targets: ScalingTargets) -> None:
        self._targets = targets
        self._scaler = ReplicaScaler(max(targets.min, 1), targets.max, targets.scale_down_after_s)
        self._capacity = _Capacity()
        self._starts = _StartTimes()
        self._last_busy: float | None = None
        self._last_change = -math.inf

    def decide(self, now: float, signals: PoolSignals) -> Decision:
        """`now` in seconds of any steady clock."""
        self._capacity = _capacity(signals.replicas, self._capacity)
        start_s = self._starts.mean_s or self._capacity.start_up_s
        wanted = _wanted(signals, self._targets, self._capacity, start_s)
        idle_s = 0.0 if signals.held else min((each.idle_s for each in signals.replicas), default=math.inf)
        self._last_busy = max(now if self._last_busy is None else self._last_busy, now - idle_s)
        decision = self._scaler.decide(now, signals.target, self._overdue(now, signals) or wanted)
        if self._targets.min == 0:
            if signals.target == 0 and not signals.held:
                decision = Decision(0, "idle")
            elif signals.target == 1 and now - self._last_busy >= self._targets.idle_to_zero_after_s:
                decision = Decision(0, f"idle for {now - self._last_busy:.0f} s")
        self._starts.follow(now, len(signals.replicas), decision.replicas)
        if decision.replicas != signals.target:
            self._last_change = now
        return decision

    def _overdue(self, now: float, signals: PoolSignals) -> Wanted | None:
        """One more than there are, when first tokens are late and sequences wait although all replicas are up."""
        target_s = self._targets.target_first_token_s
        waiting = sum(each.waiting for each in signals.replicas)
        if (
            signals.first_token_s > target_s
            and waiting >= len(signals.replicas) == signals.target > 0
            and now - self._last_change >= _OVERDUE_AFTER_S
        ):
            reason = f"first tokens take {signals.first_token_s:.1f} s, the target is {target_s:g} s"
            return Wanted((signals.target + 1) / (1 - _UP_TOLERANCE), reason)
        return None
