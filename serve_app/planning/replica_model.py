"""One replica of a pool in virtual time: what deployments/engine/simulator.py does, without going through every step.

In continuous batching all running sequences move in lock-step, a token a step. So a replica is moved on from event to
event (a step that prefills, an end, an admission), and however many plain decode steps lie between are one
multiplication. Times are those of the simulator, up to rounding, for prompts that share no prefix;
tests/serve_app/planning/test_replica_model.py runs both side by side.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import NamedTuple

from deployments.engine.demand import ReplicaDemand
from deployments.engine.simulator import SimulatorSettings
from deployments.scaling.decision import ReplicaSignals

__all__ = ["ReplicaModel", "Unfinished"]


class Unfinished(NamedTuple):
    """A generation that another replica takes over."""

    prompt_tokens: int
    """With what was generated already."""
    max_tokens: int
    key: int


class ReplicaModel:
    """Call `advance(now)` before anything else at `now`; times are in seconds and never go back."""

    __slots__ = (
        "_base_s",
        "_block_tokens",
        "_completing",
        "_demand",
        "_ended",
        "_ends",
        "_first_token",
        "_has_prefilled",
        "_head_prefilled",
        "_max_num_seqs",
        "_max_prefill",
        "_per_prefill_token_s",
        "_per_sequence_s",
        "_prefilling",
        "_run_steps",
        "_running",
        "_settings",
        "_start_up_s",
        "_step_s",
        "_steps",
        "_waiting",
        "at",
        "blocks_free",
        "next_at",
        "prefill_tokens",
        "sequences",
    )

    def __init__(
        self,
        settings: SimulatorSettings,
        now: float,
        *,
        first_token: Callable[[int, float], None],
        ended: Callable[[int, float], None],
        start_up_s: float = 0.0,
    ) -> None:
        """`first_token` and `ended` are told the key of a generation and when it happened."""
        self._settings = settings
        self._first_token = first_token
        self._ended = ended
        self._start_up_s = start_up_s
        self._base_s = settings.step_s - settings.step_s_per_sequence
        self._per_sequence_s = settings.step_s_per_sequence
        rate = settings.prefill_tokens_per_s
        self._per_prefill_token_s = 0.0 if rate is None else 1 / rate
        self._max_num_seqs = settings.max_num_seqs
        self._max_prefill = settings.max_prefill_tokens_per_step
        self._block_tokens = settings.kv_block_tokens
        self._demand = ReplicaDemand(now)
        self.at = now
        """When the steps under way began; of an idle replica, when it became so."""
        self.next_at = math.inf
        """When the next event is due."""
        self.sequences = 0
        """Running and waiting."""
        self.prefill_tokens = 0
        """Prompt tokens that no step has taken up yet."""
        self.blocks_free = settings.kv_blocks
        self._running = 0
        self._steps = 0
        """Made by `at`."""
        self._run_steps = 0
        """Under way, each of `_step_s`, all alike: many that only decode, or one."""
        self._step_s = 0.0
        self._has_prefilled = False
        self._waiting: deque[tuple[int, int, int]] = deque()
        """Prompt tokens, max_tokens and key."""
        self._prefilling: deque[tuple[int, int, int]] = deque()
        """Running without a first token, whose prefill the steps under way do not complete."""
        self._head_prefilled = 0
        """Tokens of the first of them that are done, or are being done."""
        self._completing: list[tuple[int, int, int]] = []
        """Those whose first token comes at the end of the step under way."""
        self._ends: list[tuple[int, int, int, int]] = []
        """A heap: the step after which a sequence ends, key, prompt and max_tokens together, max_tokens."""

    def submit(self, now: float, prompt_tokens: int, max_tokens: int, key: int) -> None:
        """A generation that fits into the KV blocks arrives."""
        self._demand.arrived(prompt_tokens)
        self.prefill_tokens += prompt_tokens
        self.sequences += 1
        self._waiting.append((prompt_tokens, max_tokens, key))
        if not self._running:
            # Not begun here, so that all that arrives now shares the step, as it does in the engine's event loop.
            if self.next_at > now:
                self.at = self.next_at = now
                self._run_steps = 0
        elif (
            self.next_at > now
            and not self._completing
            and not self._prefilling
            and len(self._waiting) == 1
            and self._running < self._max_num_seqs
            and -(-(prompt_tokens + max_tokens) // self._block_tokens) <= self.blocks_free
        ):
            # It would be admitted at the end of the decode step under way, so the steps after that one are not taken.
            self._run_steps = math.ceil((now - self.at) / self._step_s)
            self.next_at = self.at + self._run_steps * self._step_s

    def advance(self, now: float) -> None:
        """Everything that happens before `now`. What happens at `now` comes after what is submitted then."""
        while self.next_at < now:
            at = self.at = self.next_at
            self._steps += self._run_steps
            steps, ends = self._steps, self._ends
            if self._completing:
                for prompt_tokens, max_tokens, key in self._completing:
                    self._first_token(key, at)
                    heappush(ends, (steps + max_tokens - 1, key, prompt_tokens + max_tokens, max_tokens))
                self._completing.clear()
            while ends and ends[0][0] <= steps:
                _, key, tokens, generated = heappop(ends)
                self.blocks_free += -(-tokens // self._block_tokens)
                self._running -= 1
                self.sequences -= 1
                self._demand.ended(generated)
                self._ended(key, at)
            self._begin(at)

    def _begin(self, at: float) -> None:
        """The next steps, of which the first starts at `at`."""
        waiting, prefilling = self._waiting, self._prefilling
        while waiting and self._running < self._max_num_seqs:
            prompt_tokens, max_tokens, _ = waiting[0]
            blocks = -(-(prompt_tokens + max_tokens) // self._block_tokens)
            if blocks > self.blocks_free:
                break
            self.blocks_free -= blocks
            self._running += 1
            prefilling.append(waiting.popleft())
        if prefilling:
            budget = self._max_prefill
            while prefilling:
                left = prefilling[0][0] - self._head_prefilled
                if left > budget:
                    self._head_prefilled += budget
                    budget = 0
                    break
                budget -= left
                self._head_prefilled = 0
                self._completing.append(prefilling.popleft())
            prefilled = self._max_prefill - budget
            self.prefill_tokens -= prefilled
            self._has_prefilled = True
            self._run_steps = 1
            self._step_s = self._base_s + self._per_sequence_s * self._running + self._per_prefill_token_s * prefilled
            self.next_at = at + self._step_s
        elif self._running:
            self._run_steps = self._ends[0][0] - self._steps
            self._step_s = self._base_s + self._per_sequence_s * self._running
            self.next_at = at + self._run_steps * self._step_s
        else:
            self.next_at = math.inf

    def evict(self, now: float) -> list[Unfinished]:
        """Everything that is on it, at the end of its time; it is of no use afterwards."""
        done = self._steps
        if self._run_steps > 1 and now > self.at:
            done += min(int((now - self.at) / self._step_s), self._run_steps - 1)
        return [
            *(Unfinished(tokens - (end - done), end - done, key) for end, key, tokens, _ in self._ends),
            *(Unfinished(*each) for each in self._completing),
            *(Unfinished(*each) for each in self._prefilling),
            *(Unfinished(*each) for each in self._waiting),
        ]

    def signals(self, now: float) -> ReplicaSignals:
        """What the replica would report."""
        settings, demand, running = self._settings, self._demand, self._running
        return ReplicaSignals(
            running=running,
            waiting=self.sequences - running,
            waiting_prefill_tokens=self.prefill_tokens,
            kv_blocks_used=settings.kv_blocks - self.blocks_free,
            kv_blocks_total=settings.kv_blocks,
            max_num_seqs=settings.max_num_seqs,
            arrivals_per_s=demand.arrivals_per_s(now),
            arriving_prefill_tokens_per_s=demand.prefill_tokens_per_s(now),
            generated_tokens=demand.generated_tokens,
            prefill_tokens_per_s=self._prefill_rate() if self._has_prefilled else 0.0,
            step_s=self._base_s,
            step_s_per_sequence=self._per_sequence_s,
            start_up_s=self._start_up_s,
            idle_s=0.0 if self.sequences else now - self.at,
        )

    def _prefill_rate(self) -> float:
        if self._per_prefill_token_s:
            return 1 / self._per_prefill_token_s
        # Prefill costs nothing: what was reached is a whole step's share, however long that step took.
        return self._max_prefill / (self._base_s + self._per_sequence_s) if self._settings.step_s else 0.0
