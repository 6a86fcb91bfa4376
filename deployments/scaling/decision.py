"""How many replicas a model needs: a pure function of what its pool reports, and the hysteresis around it.

The signals are the engine's own: tokens and sequences, not requests, whose lengths differ. Free of Ray and of clocks,
so that `millstream plan` runs the same code in virtual time; engine_policy.py wraps it for Ray Serve.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Decision", "PoolScaler", "PoolSignals", "ReplicaScaler", "ReplicaSignals", "ScalingTargets", "Wanted"]

_MAX_PREFILL_SHARE = 0.8
"""Share of a replica's time that prefills may take, at most: decode steps need the rest."""
_MAX_BATCH_SHARE = 0.9
"""Share of `max_num_seqs` that may run: above it new sequences begin to wait for old ones to end."""
_NEGLIGIBLE = 0.02
"""Of a replica that is wanted: not worth another."""
_DOWN_MARGIN = 0.1
"""Replicas are taken away when so much more load would still fit."""
_BISECTIONS = 20
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
    generated_tokens: float
    """Of a sequence, the mean of those that ended lately; 0 while none has."""
    prefill_tokens_per_s: float
    """What it can do; 0 while it has prefilled nothing."""
    step_s: float
    """Of a decode step, whatever the batch."""
    step_s_per_sequence: float
    """Added for each sequence in it."""
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
    kv_blocks_total: float = 0.0
    generated_tokens: float = 0.0
    step_s: float = 0.0
    step_s_per_sequence: float = 0.0
    start_up_s: float = 0.0

    def learned(self, replicas: tuple[ReplicaSignals, ...]) -> _Capacity:
        """What they report now; what none of them knows stays: after all have left, it is the best guess."""
        known = {field: [value for each in replicas if (value := getattr(each, field)) > 0] for field in self._fields}
        return self._replace(**{field: sum(values) / len(values) for field, values in known.items() if values})


class _Load(NamedTuple):
    """Of the whole pool."""

    arrivals_per_s: float
    arriving_tokens_per_s: float
    """To be prefilled."""
    running: float
    backlog: float
    """Sequences that wait or are held."""
    backlog_tokens: float
    kv_blocks_per_sequence: float

    @classmethod
    def of(cls, signals: PoolSignals) -> _Load:
        replicas = signals.replicas
        running = sum(each.running for each in replicas)
        return cls(
            arrivals_per_s=sum(each.arrivals_per_s for each in replicas),
            arriving_tokens_per_s=sum(each.arriving_prefill_tokens_per_s for each in replicas),
            running=running,
            backlog=sum(each.waiting for each in replicas) + signals.held,
            backlog_tokens=sum(each.waiting_prefill_tokens for each in replicas) + signals.held_tokens,
            kv_blocks_per_sequence=sum(each.kv_blocks_used for each in replicas) / running if running else 0.0,
        )


def _wanted(signals: PoolSignals, targets: ScalingTargets, capacity: _Capacity, start_s: float) -> Wanted:
    """What keeps the expected first-token time and the KV use within the targets: the fewest replicas, as a real
    number, that can bear the load in each respect."""
    load = _Load.of(signals)
    if not (load.running or load.backlog or load.arrivals_per_s):
        return Wanted(0.0, "no load")
    # What waits now shall be over after the target and the time in which a replica comes.
    horizon_s = targets.target_first_token_s + start_s
    low, high, reason = 0.0, float(targets.max), ""
    while high < 1e6 and (short := _shortage(load, capacity, targets, horizon_s, high)):
        low, high, reason = high, 2 * high, short
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if short := _shortage(load, capacity, targets, horizon_s, middle):
            low, reason = middle, short
        else:
            high = middle
    if high < _ANY_LOAD:
        return Wanted(
            _ANY_LOAD,
            f"{load.running:.0f} sequences run, {load.backlog - signals.held:.0f} wait, {signals.held:.0f} are held",
        )
    return Wanted(high, reason)


def _shortage(
    load: _Load, capacity: _Capacity, targets: ScalingTargets, horizon_s: float, replicas: float
) -> str | None:
    """In which respect so many replicas are too few; None if they do. The more there are, the less is short.

    In continuous batching decode steps and prefills share a replica's time, so sequences stay the longer the more
    prompts come, and the larger the batch is. Each respect is looked at twice: for the load that arrives, at a share
    that keeps queues short; and for that load and the backlog, with all that replicas can do.
    """
    prefill_share = catching_up = 0.0
    if rate := capacity.prefill_tokens_per_s:
        prefill_s = load.arriving_tokens_per_s / load.arrivals_per_s / rate if load.arrivals_per_s else 0.0
        # Queueing for one server with even service times (M/D/1) takes half of the target at this share.
        most = min(_MAX_PREFILL_SHARE, targets.target_first_token_s / (targets.target_first_token_s + prefill_s))
        prefill_share = load.arriving_tokens_per_s / rate / replicas
        catching_up = (load.arriving_tokens_per_s + load.backlog_tokens / horizon_s) / rate / replicas
        if prefill_share > most or catching_up >= 1:
            return (
                f"prefill: {load.arriving_tokens_per_s:.0f} tokens/s arrive and {load.backlog_tokens:.0f} wait, "
                f"{rate:.0f}/s a replica"
            )
    slots = capacity.max_num_seqs or math.inf
    if load.kv_blocks_per_sequence:
        slots = min(slots, capacity.kv_blocks_total / load.kv_blocks_per_sequence)
    tokens = capacity.generated_tokens
    batch = max(load.running / replicas, _batch(load.arrivals_per_s * tokens / replicas, prefill_share, capacity))
    overdue = False
    if load.backlog and math.isfinite(slots):
        if tokens and capacity.step_s:
            step_s = capacity.step_s + capacity.step_s_per_sequence * slots
            rate = slots * (1 - catching_up) / (tokens * step_s)
            overdue = (load.arrivals_per_s + load.backlog / horizon_s) / replicas > rate
        else:
            overdue = (load.running + load.backlog) / replicas > slots
    told = f"{replicas * batch:.0f} sequences and {load.backlog:.0f} waiting"
    if capacity.max_num_seqs and (batch > _MAX_BATCH_SHARE * capacity.max_num_seqs):
        return f"batch: {told}, {capacity.max_num_seqs:.0f} a replica"
    if batch * load.kv_blocks_per_sequence > targets.target_kv_use * capacity.kv_blocks_total > 0:
        return f"KV: {told} of {load.kv_blocks_per_sequence:.0f} blocks each, {capacity.kv_blocks_total:.0f} a replica"
    if overdue:
        return f"queue: {told}, {slots:.0f} a replica"
    return None


def _batch(tokens_per_s: float, prefill_share: float, capacity: _Capacity) -> float:
    """Sequences that run on a replica which has so many tokens to generate per second, by Little's law: a token takes a
    step, and a step the longer the more sequences there are; infinite where no batch would do."""
    if not tokens_per_s or not capacity.step_s:
        return 0.0
    busy = tokens_per_s / (1 - prefill_share)
    left = 1 - busy * capacity.step_s_per_sequence
    return busy * capacity.step_s / left if left > 0 else math.inf


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
        needed = math.ceil(wanted.replicas - _NEGLIGIBLE)
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
        self._capacity = self._capacity.learned(signals.replicas)
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
        """One more than there are, when first tokens are late and sequences wait on all replicas, which are all up."""
        target_s = self._targets.target_first_token_s
        if (
            signals.first_token_s > target_s
            and len(signals.replicas) == signals.target > 0
            and all(each.waiting for each in signals.replicas)
            and now - self._last_change >= _OVERDUE_AFTER_S
        ):
            reason = f"first tokens take {signals.first_token_s:.1f} s, the target is {target_s:g} s"
            return Wanted(signals.target + 1, reason)
        return None
