"""Continuous batching as a pure state machine: no clock, no event loop, no I/O.

Time passes only by the duration that `step` returns. It runs in real time behind the simulated engine; for planning in
virtual time, serve_app/planning/replica_model.py takes many steps at once and is tested against it. It has what makes
serving hard: a batch limit, chunked prefill that shares steps with decoding, KV blocks that run out, and a prefix
cache.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from deployments.contracts import EngineLoad, FinishReason, PositionLogprobs, Sampling

__all__ = ["SimulatedOutput", "Simulator", "SimulatorSettings", "Step"]

_MASK = (1 << 64) - 1


def _mix(state: int, value: int) -> int:
    """One step of a 64-bit hash chain (the multiplier and finalizer of SplitMix64)."""
    state = (state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & _MASK
    return state ^ (state >> 31)


@dataclass(frozen=True, kw_only=True)
class SimulatorSettings:
    """The simulated hardware and model."""

    vocabulary_tokens: int
    """Ids from `first_token` up to here are generated."""
    first_token: int = 0
    """Below it lie special tokens, which are never generated."""
    prefill_tokens_per_s: float | None = 20_000.0
    """None prefills in no time."""
    step_s: float = 0.002
    """Duration of a decode step of one sequence."""
    step_s_per_sequence: float = 0.0
    """Added for each further sequence in the batch."""
    max_num_seqs: int = 256
    max_prefill_tokens_per_step: int = 2048
    kv_block_tokens: int = 16
    kv_blocks: int = 8192
    prefix_cache: bool = True


class SimulatedOutput(NamedTuple):
    key: str
    token_id: int
    finish_reason: FinishReason | None
    cached_tokens: int
    """Told with the first token, else 0."""
    logprobs: PositionLogprobs | None
    prompt_logprobs: list[PositionLogprobs | None] | None
    """Told with the first token."""


class Step(NamedTuple):
    duration_s: float
    outputs: list[SimulatedOutput]
    sequences: int
    """In the batch."""
    prefilled_tokens: int


@dataclass(slots=True)
class _Sequence:
    key: str
    token_ids: list[int]
    sampling: Sampling
    state: int
    """Hash of all tokens so far: the next token depends on the whole context and the seed, and on nothing else, so a
    generation resumed elsewhere from prompt + tokens continues identically."""
    prefill_left: int = 0
    cached_tokens: int = 0
    generated: int = 0
    private_blocks: int = 0
    shared_blocks: list[int] = field(default_factory=list)


class Simulator:
    """A batch of sequences that moves on by `step`."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self._settings = settings
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[str, _Sequence] = {}
        self._blocks_free = settings.kv_blocks
        self._users_of_block: dict[int, int] = {}
        self._unused_cached_blocks: OrderedDict[int, None] = OrderedDict()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether such a generation can ever run."""
        return self._blocks(prompt_tokens + max_tokens) <= self._settings.kv_blocks

    def submit(self, key: str, token_ids: list[int], sampling: Sampling) -> None:
        state = sampling.seed or 0
        for token in token_ids:
            state = _mix(state, token)
        self._waiting.append(_Sequence(key, token_ids, sampling, state))

    def abort(self, key: str) -> bool:
        """Forget a sequence; False when there is none of that key."""
        sequence = self._running.pop(key, None)
        if sequence is not None:
            self._release(sequence)
            return True
        before = len(self._waiting)
        self._waiting = deque(waiting for waiting in self._waiting if waiting.key != key)
        return len(self._waiting) < before

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_prefill_tokens=sum(len(s.token_ids) for s in self._waiting)
            + sum(s.prefill_left for s in self._running.values()),
            kv_blocks_free=self._blocks_free + len(self._unused_cached_blocks),
            kv_blocks_total=self._settings.kv_blocks,
            kv_block_tokens=self._settings.kv_block_tokens,
        )

    def step(self) -> Step:
        """Move every sequence of the batch on, by one token or one chunk of prefill."""
        self._admit()
        settings = self._settings
        budget = settings.max_prefill_tokens_per_step
        prefilled = 0
        outputs: list[SimulatedOutput] = []
        finished: list[_Sequence] = []
        for sequence in self._running.values():
            if sequence.prefill_left:
                chunk = min(sequence.prefill_left, budget - prefilled)
                sequence.prefill_left -= chunk
                prefilled += chunk
                if sequence.prefill_left:
                    continue
            output = self._decode(sequence)
            outputs.append(output)
            if output.finish_reason is not None:
                finished.append(sequence)
        duration_s = settings.step_s + settings.step_s_per_sequence * max(0, len(self._running) - 1)
        if settings.prefill_tokens_per_s is not None:
            duration_s += prefilled / settings.prefill_tokens_per_s
        sequences = len(self._running)
        for sequence in finished:
            del self._running[sequence.key]
            self._release(sequence)
        return Step(duration_s, outputs, sequences, prefilled)

    def _decode(self, sequence: _Sequence) -> SimulatedOutput:
        token = self._likeliest(sequence.state)
        state, sequence.state = sequence.state, _mix(sequence.state, token)
        sequence.generated += 1
        finish_reason: FinishReason | None = None
        if token in sequence.sampling.stop_token_ids and sequence.generated > sequence.sampling.min_tokens:
            finish_reason = "stop_token"
        elif sequence.generated >= sequence.sampling.max_tokens:
            finish_reason = "length"
        first = sequence.generated == 1
        sampling = sequence.sampling
        told = 0 if sampling.logprob_token_ids is not None else sampling.logprobs
        return SimulatedOutput(
            sequence.key,
            token,
            finish_reason,
            sequence.cached_tokens if first else 0,
            None if told is None else self._logprobs(state, token, told, sampling.logprob_token_ids or ()),
            self._prompt_logprobs(sequence.token_ids, sampling) if first else None,
        )

    # --- log probabilities, made up like the tokens: the same for the same context, likelier ones first --------------

    def _likeliest(self, state: int, rank: int = 1) -> int:
        """The token that comes after a context; ranks beyond the first are what might have come instead."""
        settings = self._settings
        return settings.first_token + (state + rank - 1) % (settings.vocabulary_tokens - settings.first_token)

    def _logprobs(self, state: int, token: int, likeliest: int, others: Sequence[int] = ()) -> PositionLogprobs:
        settings = self._settings
        vocabulary = settings.vocabulary_tokens - settings.first_token
        tokens = dict.fromkeys([token, *(self._likeliest(state, rank) for rank in range(1, likeliest + 1)), *others])
        ranks = [(each - settings.first_token - state) % vocabulary + 1 for each in tokens]
        return PositionLogprobs(tuple(tokens), tuple([-0.5 * math.sqrt(rank) for rank in ranks]), tuple(ranks))

    def _prompt_logprobs(self, token_ids: list[int], sampling: Sampling) -> list[PositionLogprobs | None] | None:
        if sampling.prompt_logprobs is None:
            return None
        state = _mix(sampling.seed or 0, token_ids[0])
        told: list[PositionLogprobs | None] = [None]
        for token in token_ids[1:]:
            told.append(self._logprobs(state, token, sampling.prompt_logprobs))
            state = _mix(state, token)
        return told

    # --- KV blocks: a sequence holds what it may need until it ends, so none is ever preempted ----------------------

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._settings.kv_block_tokens)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._settings.max_num_seqs:
            sequence = self._waiting[0]
            needed = self._blocks(len(sequence.token_ids) + sequence.sampling.max_tokens)
            prefix = self._prefix_blocks(sequence.token_ids) if self._settings.prefix_cache else []
            hits = 0
            while hits < len(prefix) and prefix[hits] in self._users_of_block:
                hits += 1
            revived = sum(1 for block in prefix[:hits] if block in self._unused_cached_blocks)
            if needed - hits > self._blocks_free + len(self._unused_cached_blocks) - revived:
                return
            self._waiting.popleft()
            for block in prefix[:hits]:
                self._users_of_block[block] += 1
                self._unused_cached_blocks.pop(block, None)
            for _ in range(needed - hits):
                self._take_block()
            for block in prefix[hits:]:
                self._users_of_block[block] = 1
            sequence.shared_blocks = prefix
            sequence.private_blocks = needed - len(prefix)
            # The last prompt token is always computed: its output is the first token. All are, if their probabilities
            # are asked for.
            if sequence.sampling.prompt_logprobs is None:
                sequence.cached_tokens = min(hits * self._settings.kv_block_tokens, len(sequence.token_ids) - 1)
            sequence.prefill_left = len(sequence.token_ids) - sequence.cached_tokens
            self._running[sequence.key] = sequence

    def _prefix_blocks(self, token_ids: list[int]) -> list[int]:
        """Names of the prompt's full blocks; each name depends on everything before it."""
        size = self._settings.kv_block_tokens
        names: list[int] = []
        name = 0
        for start in range(0, len(token_ids) - size + 1, size):
            name = hash((name, *token_ids[start : start + size]))
            names.append(name)
        return names

    def _take_block(self) -> None:
        if self._blocks_free:
            self._blocks_free -= 1
        else:
            evicted, _ = self._unused_cached_blocks.popitem(last=False)
            del self._users_of_block[evicted]

    def _release(self, sequence: _Sequence) -> None:
        self._blocks_free += sequence.private_blocks
        # Backwards, so that a block is evicted before the blocks it depends on and hits are always a prefix.
        for block in reversed(sequence.shared_blocks):
            self._users_of_block[block] -= 1
            if not self._users_of_block[block]:
                self._unused_cached_blocks[block] = None
