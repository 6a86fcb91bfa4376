"""A model's pool in virtual time: placement, held requests, start-up, drain, and the scaling policy over them.

The rules are those of deployments/ingress/routing/engine_pool.py (placement, holding, refusing), of
deployments/scaling/engine_policy.py (how often signals come and decisions are made) and of Ray Serve (which
replicas leave first). Replicas are moved on lazily, when they are looked at, so that the cost is per request, however
many replicas there are.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from deployments.engine.simulator import SimulatorSettings
from deployments.scaling.decision import Decision, PoolSignals, ReplicaSignals
from serve_app.planning.outcome import Moment, Outcome, ScaleChange
from serve_app.planning.replica_model import ReplicaModel
from serve_app.planning.workload import Workload

__all__ = ["Policy", "PoolSettings", "PoolSimulation"]

Policy = Callable[[float, PoolSignals], Decision]
"""From the time in seconds and what the pool reports to a number of replicas, as `PoolScaler.decide`."""

_DECIDE_EVERY_S = 0.5
_TICKS_PER_REPORT = 2
"""Replicas and ingresses report every second: half as often as decisions are made."""
_CANDIDATES = 8
_FIRST_TOKENS, _FIRST_TOKENS_S = 256, 5.0
"""These three as in deployments/ingress/routing/engine_pool.py."""
_DRAWS = 1024


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    engine: SimulatorSettings
    max_model_len: int
    max_waiting: int
    """Generations that a replica holds beyond those running."""
    max_held: int
    """Requests that are held while no replica is up."""
    max_held_tokens: int
    """Their prompt tokens."""
    hold_timeout_s: float
    drain_timeout_s: float
    platform_start_up_s: float
    """From the decision on a replica until its process begins to make the engine ready."""
    start_up_s: float
    """From then on until it takes requests."""
    replicas_at_start: int
    """Up at time 0."""


class PoolSimulation:
    """Made for one run."""

    def __init__(self, pool: PoolSettings, policy: Policy, *, seed: int = 0) -> None:
        """`seed`: of the draw of replicas for placement."""
        self._pool = pool
        self._policy = policy
        self._source = np.random.default_rng(seed)
        self._max_sequences = pool.engine.max_num_seqs + pool.max_waiting
        self._target = pool.replicas_at_start
        self._starting: deque[float] = deque()
        """When each will be up."""
        self._ready: list[ReplicaModel] = [self._replica(0.0) for _ in range(self._target)]
        """Oldest first."""
        self._draining: list[tuple[float, ReplicaModel]] = []
        """With when each is given up."""
        self._draws: list[list[int]] = []
        """Indexes into `_ready` for placements to come."""
        self._held: deque[tuple[float, int, int, int]] = deque()
        """Since when, prompt tokens, max_tokens, key."""
        self._held_tokens = 0
        self._next_tick = self._next_event = _DECIDE_EVERY_S
        self._ticks = 0
        self._reports: tuple[ReplicaSignals, ...] = ()
        self._held_reported = (0, 0)
        self._first_token_reported = 0.0
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=_FIRST_TOKENS)
        """When the last ones came, and how long after their requests."""
        self._arrived_at = array("d")
        self._first_token_at = array("d")
        self._last_end = 0.0
        self._refused: Counter[str] = Counter()
        self._alive = self._target
        self._replica_seconds = 0.0
        """Of those gone, minus the times at which the others began."""
        self._moments: list[Moment] = []
        self._changes: list[ScaleChange] = []
        self._peak = self._target

    def run(self, workload: Workload) -> Outcome:
        """Until `workload` is over and everything has ended."""
        max_model_len = self._pool.max_model_len
        place = self._place
        key = 0
        for at_s, prompt_tokens, max_tokens in workload.requests():
            self._arrived_at.extend(at_s)
            self._first_token_at.extend(repeat(math.nan, len(at_s)))
            for now, prompt, most in zip(at_s, prompt_tokens, max_tokens, strict=True):
                if self._next_event <= now:
                    self._run_events(now)
                if prompt + most > max_model_len:
                    self._refused["too long"] += 1
                else:
                    place(now, prompt, most, key)
                key += 1
        while not self._over(workload.duration_s):
            self._run_events(self._next_event)
        ends = max(workload.duration_s, self._last_end)
        return Outcome(
            duration_s=ends,
            arrived_at=np.frombuffer(self._arrived_at) if key else np.empty(0),
            first_token_at=np.frombuffer(self._first_token_at) if key else np.empty(0),
            refused=dict(self._refused),
            replica_seconds=self._replica_seconds + self._alive * ends,
            peak_replicas=self._peak,
            moments=tuple(self._moments),
            changes=tuple(self._changes),
        )

    def _over(self, duration_s: float) -> bool:
        """Whether the end comes before the next event."""
        if self._next_event <= duration_s or self._held:
            return False
        replicas = [*self._ready, *(replica for _, replica in self._draining)]
        for replica in replicas:
            replica.advance(self._next_event)
        if any(replica.sequences for replica in replicas):
            return False
        self._remove_drained(self._next_event)
        return True

    # --- requests ----------------------------------------------------------------------------------------------------

    def _place(self, now: float, prompt_tokens: int, max_tokens: int, key: int, *, resumed: bool = False) -> None:
        ready = self._ready
        if len(ready) > _CANDIDATES:
            if not self._draws:
                self._draws = self._draw(len(ready))
            candidates = [ready[index] for index in self._draws.pop()]
        elif ready:
            candidates = ready
        else:
            self._hold(now, prompt_tokens, max_tokens, key, resumed=resumed)
            return
        best = _least_loaded(candidates, now)
        if best.sequences >= self._max_sequences and not resumed:
            best = _least_loaded(ready, now)  # full ones are passed over until none is left
            if best.sequences >= self._max_sequences:
                self._refused["no free capacity"] += 1
                return
        best.submit(now, prompt_tokens, max_tokens, key)

    def _draw(self, replicas: int) -> list[list[int]]:
        """Rows of distinct indexes below `replicas`, each subset and order as likely as any other (Floyd's way)."""
        rows = np.empty((_DRAWS, _CANDIDATES), dtype=np.int64)
        for column in range(_CANDIDATES):
            highest = replicas - _CANDIDATES + column
            drawn = self._source.integers(0, highest, _DRAWS, endpoint=True)
            taken = (rows[:, :column] == drawn[:, None]).any(axis=1)
            rows[:, column] = np.where(taken, highest, drawn)
        chosen: list[list[int]] = self._source.permuted(rows, axis=1).tolist()
        return chosen

    def _hold(self, now: float, prompt_tokens: int, max_tokens: int, key: int, *, resumed: bool) -> None:
        pool = self._pool
        full = len(self._held) >= pool.max_held or self._held_tokens + prompt_tokens > pool.max_held_tokens
        if full and not resumed:
            self._refused["no replica"] += 1
        else:
            self._held.append((now, prompt_tokens, max_tokens, key))
            self._held_tokens += prompt_tokens

    def _expire_held(self, now: float) -> None:
        while self._held and self._held[0][0] + self._pool.hold_timeout_s <= now:
            self._held_tokens -= self._held.popleft()[1]
            self._refused["no replica"] += 1

    def _note_first_token(self, key: int, at: float) -> None:
        if math.isnan(self._first_token_at[key]):  # else it was moved here from another replica
            self._first_token_at[key] = at
            self._first_tokens.append((at, at - self._arrived_at[key]))

    def _note_end(self, _key: int, at: float) -> None:
        if at > self._last_end:
            self._last_end = at

    # --- replicas ----------------------------------------------------------------------------------------------------

    def _run_events(self, now: float) -> None:
        """Start-ups and ticks up to `now`."""
        while self._next_event <= now:
            if self._starting and self._starting[0] <= self._next_tick:
                self._bring_up(self._starting.popleft())
            else:
                self._tick(self._next_tick)
            self._next_event = min(self._next_tick, self._starting[0] if self._starting else math.inf)

    def _replica(self, now: float) -> ReplicaModel:
        return ReplicaModel(
            self._pool.engine,
            now,
            first_token=self._note_first_token,
            ended=self._note_end,
            start_up_s=self._pool.start_up_s,
        )

    def _bring_up(self, now: float) -> None:
        self._ready.append(self._replica(now))
        self._draws.clear()
        self._expire_held(now)
        held, self._held, self._held_tokens = self._held, deque(), 0
        for _, prompt_tokens, max_tokens, key in held:
            self._place(now, prompt_tokens, max_tokens, key, resumed=True)

    def _tick(self, now: float) -> None:
        self._ticks += 1
        self._next_tick = (self._ticks + 1) * _DECIDE_EVERY_S
        for replica in self._ready:
            replica.advance(now)
        for _, replica in self._draining:
            replica.advance(now)
        self._remove_drained(now)
        self._expire_held(now)
        if self._ticks % _TICKS_PER_REPORT == 0:
            self._report(now)
        if self._reports or not self._ready:  # else they have not reported yet, so nothing is decided
            self._decide(now)
        self._moments.append(Moment(now, self._target, len(self._ready), self._alive))

    def _decide(self, now: float) -> None:
        (held, held_tokens), first_token_s = self._held_reported, self._first_token_reported
        signals = PoolSignals(
            target=self._target, replicas=self._reports, held=held, held_tokens=held_tokens, first_token_s=first_token_s
        )
        decision = self._policy(now, signals)
        if decision.replicas != self._target:
            self._changes.append(ScaleChange(now, self._target, decision.replicas, decision.reason))
            self._scale(now, decision.replicas)

    def _report(self, now: float) -> None:
        self._reports = tuple([replica.signals(now) for replica in self._ready])
        self._held_reported = len(self._held), self._held_tokens
        late = [wait_s for at, wait_s in self._first_tokens if at >= now - _FIRST_TOKENS_S]
        self._first_token_reported = sum(late) / len(late) if late else 0.0

    def _scale(self, now: float, target: int) -> None:
        """Replicas that still start are the first to go, then the newest, as with Ray Serve."""
        for _ in range(target - self._target):
            self._starting.append(now + self._pool.platform_start_up_s + self._pool.start_up_s)
            self._alive += 1
            self._replica_seconds -= now
        self._peak = max(self._peak, self._alive)
        for _ in range(self._target - target):
            if self._starting:
                self._starting.pop()
                self._gone(now)
            else:
                self._draining.append((now + self._pool.drain_timeout_s, self._ready.pop()))
                self._draws.clear()
        self._target = target
        self._remove_drained(now)

    def _remove_drained(self, now: float) -> None:
        """Those that are empty; what is left on those whose time is over goes on elsewhere."""
        left: list[tuple[float, ReplicaModel]] = []
        for deadline, replica in self._draining:
            if not replica.sequences:
                # It has been idle since `at`, which may be long before it was told to leave.
                self._gone(max(replica.at, deadline - self._pool.drain_timeout_s))
            elif deadline <= now:
                self._gone(deadline)
                for prompt_tokens, max_tokens, key in replica.evict(now):
                    self._place(now, prompt_tokens, max_tokens, key, resumed=True)
            else:
                left.append((deadline, replica))
        self._draining = left

    def _gone(self, now: float) -> None:
        self._alive -= 1
        self._replica_seconds += now


def _least_loaded(replicas: list[ReplicaModel], now: float) -> ReplicaModel:
    """By the order of `least_loaded` in deployments/ingress/routing/engine_pool.py; moves them on to `now`."""
    best = replicas[0]
    fewest = math.inf
    for replica in replicas:
        if replica.next_at < now:
            replica.advance(now)
        sequences = replica.sequences
        if sequences < fewest:
            best, fewest = replica, sequences
        elif sequences == fewest and (
            replica.prefill_tokens < best.prefill_tokens
            or (replica.prefill_tokens == best.prefill_tokens and replica.blocks_free > best.blocks_free)
        ):
            best = replica
    return best
