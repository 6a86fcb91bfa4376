"""The replica in virtual time, side by side with the simulator that goes through every step."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.contracts import Sampling
from deployments.engine.simulator import Simulator, SimulatorSettings
from serve_app.planning.replica_model import ReplicaModel, Unfinished
from tests.conftest import THOROUGH

BLOCKS, BLOCK_TOKENS = 24, 4


class Asked(NamedTuple):
    at: float
    prompt_tokens: int
    max_tokens: int


class Times(NamedTuple):
    first_token: dict[int, float]
    end: dict[int, float]


def step_by_step(engine: SimulatorSettings, requests: list[Asked]) -> Times:
    """What the simulator does with them, its clock moved on by the duration of each step."""
    simulator, now, times = Simulator(engine), 0.0, Times({}, {})
    coming = deque(enumerate(requests))
    while coming or not simulator.idle:
        if simulator.idle:
            now = max(now, coming[0][1].at)
        while coming and coming[0][1].at <= now:
            number, asked = coming.popleft()
            prompt = [number, *range(asked.prompt_tokens - 1)]  # no two begin alike
            simulator.submit(str(number), prompt, Sampling(max_tokens=asked.max_tokens))
        step = simulator.step()
        now += step.duration_s
        for output in step.outputs:
            times.first_token.setdefault(int(output.key), now)
            if output.finish_reason is not None:
                times.end[int(output.key)] = now
    return times


def replica(engine: SimulatorSettings, times: Times | None = None) -> ReplicaModel:
    times = times or Times({}, {})
    return ReplicaModel(engine, 0.0, first_token=times.first_token.__setitem__, ended=times.end.__setitem__)


def event_by_event(engine: SimulatorSettings, requests: list[Asked], looks: list[float]) -> Times:
    """The same by the replica model, which is also looked at in between."""
    times = Times({}, {})
    model = replica(engine, times)
    events = sorted([*((asked.at, number) for number, asked in enumerate(requests)), *((at, -1) for at in looks)])
    for now, number in events:
        model.advance(now)
        if number >= 0:
            model.submit(now, requests[number].prompt_tokens, requests[number].max_tokens, number)
    model.advance(math.inf)
    assert (model.sequences, model.prefill_tokens, model.blocks_free) == (0, 0, engine.kv_blocks)
    return times


@settings(max_examples=300 if THOROUGH else 100)
@given(
    prefill_tokens_per_s=st.sampled_from([None, 300.0, 5000.0]),
    step_s=st.sampled_from([0.0, 0.002, 0.013]),
    step_s_per_sequence=st.sampled_from([0.0, 0.0007]),
    max_num_seqs=st.integers(1, 6),
    max_prefill_tokens_per_step=st.integers(1, 40),
    prefix_cache=st.booleans(),
    mean_gap_s=st.sampled_from([0.0, 0.003, 0.05, 0.5]),
    number=st.integers(1, 25),
    seed=st.integers(0, 1 << 32),
)
def test_first_tokens_and_ends_come_when_the_simulator_has_them(
    mean_gap_s: float, number: int, seed: int, **engine: Any
) -> None:
    source = random.Random(seed)
    shape = SimulatorSettings(vocabulary_tokens=100, kv_blocks=BLOCKS, kv_block_tokens=BLOCK_TOKENS, **engine)
    requests, now = [], 0.0
    for _ in range(number):
        if source.random() < 0.8:  # else together with the one before
            now += source.expovariate(1 / mean_gap_s) if mean_gap_s else 0.0
        prompt_tokens = source.randint(1, BLOCKS * BLOCK_TOKENS - 1)
        requests.append(Asked(now, prompt_tokens, source.randint(1, BLOCKS * BLOCK_TOKENS - prompt_tokens)))
    looks = [source.uniform(0, 2 * now + 1) for _ in range(5)]
    expected, got = step_by_step(shape, requests), event_by_event(shape, requests, looks)
    assert got.first_token == pytest.approx(expected.first_token, rel=1e-9, abs=1e-9)
    assert got.end == pytest.approx(expected.end, rel=1e-9, abs=1e-9)


def test_many_sequences_of_ordinary_length_are_exact_too() -> None:
    source = random.Random(1)
    engine = SimulatorSettings(
        vocabulary_tokens=100, prefill_tokens_per_s=8000.0, step_s=0.02, step_s_per_sequence=0.0003, max_num_seqs=16
    )
    requests, now = [], 0.0
    for _ in range(300):
        now += source.expovariate(8)
        requests.append(Asked(now, source.randint(50, 3000), source.randint(20, 200)))
    expected, got = step_by_step(engine, requests), event_by_event(engine, requests, [])
    assert max(each - asked.at for each, asked in zip(expected.first_token.values(), requests, strict=True)) > 1
    assert got.first_token == pytest.approx(expected.first_token, rel=1e-9)
    assert got.end == pytest.approx(expected.end, rel=1e-9)


ENGINE = SimulatorSettings(
    vocabulary_tokens=100,
    prefill_tokens_per_s=1000.0,
    step_s=0.1,
    max_num_seqs=2,
    kv_block_tokens=10,
    kv_blocks=100,
)


def test_signals_are_those_of_the_moment() -> None:
    model = replica(ENGINE)
    for key in range(3):
        model.submit(0.0, 100, 50, key)
    model.advance(2.0)
    signals = model.signals(2.0)
    assert (signals.running, signals.waiting, signals.waiting_prefill_tokens) == (2, 1, 100)
    assert (signals.kv_blocks_used, signals.kv_blocks_total, signals.max_num_seqs) == (30, 100, 2)
    assert (signals.prefill_tokens_per_s, signals.generated_tokens) == (1000.0, 0.0)
    assert signals.step_s + 2 * signals.step_s_per_sequence == pytest.approx(0.1)
    assert signals.arrivals_per_s > 0
    assert signals.arriving_prefill_tokens_per_s == pytest.approx(100 * signals.arrivals_per_s)
    model.advance(math.inf)
    assert model.signals(20.0).generated_tokens == pytest.approx(50)
    # Two steps with a prefill, and 49 without after each.
    assert signals.idle_s == 0
    assert model.signals(20.0).idle_s == pytest.approx(20.0 - (0.3 + 0.2 + 98 * 0.1))


def test_a_replica_that_has_prefilled_nothing_tells_no_rate() -> None:
    assert replica(ENGINE).signals(1.0).prefill_tokens_per_s == 0


def test_what_is_evicted_goes_on_after_the_tokens_that_it_has() -> None:
    model = replica(ENGINE)
    for key in range(3):
        model.submit(0.0, 100, 50, key)
    # A step of 0.3 s prefills two and gives each a token; ten more have ended by 1.35 s.
    model.advance(1.35)
    assert sorted(model.evict(1.35), key=lambda each: each.key) == [
        Unfinished(111, 39, 0),
        Unfinished(111, 39, 1),
        Unfinished(100, 50, 2),
    ]


def test_what_is_evicted_during_its_prefill_starts_again() -> None:
    model = replica(ENGINE)
    model.submit(0.0, 100, 50, 7)
    model.advance(0.1)
    assert model.evict(0.1) == [Unfinished(100, 50, 7)]
