"""What the simulated engine has beyond the contract (test_engine_contract.py)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from deployments.contracts import FinishReason
from deployments.engine.engine import EngineUnhealthy
from deployments.engine.simulated_engine import SimulatedEngine, vocabulary_of
from deployments.engine.simulator import SimulatorSettings
from tests.deployments.engine.engines_under_test import Receiver, complete, greedy


def simulated(*, max_waiting: int = 4, step_s: float = 0.0, max_num_seqs: int = 8) -> SimulatedEngine:
    settings = SimulatorSettings(vocabulary_tokens=100, step_s=step_s, max_num_seqs=max_num_seqs)
    return SimulatedEngine(settings, max_waiting=max_waiting)


async def test_every_replica_answers_the_same_tokens() -> None:
    answers = []
    for _ in range(2):
        engine = simulated()
        await engine.start()
        answers.append((await complete(engine, "a", [1, 2, 3], greedy(20))).tokens)
        await engine.shutdown()
    assert answers[0] == answers[1]


async def test_a_step_is_delivered_when_its_time_has_passed() -> None:
    engine = simulated(step_s=0.01)
    await engine.start()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await complete(engine, "a", [1], greedy(10))
    assert loop.time() - begun >= 0.1 - 0.002
    await engine.shutdown()


async def test_an_engine_without_a_queue_still_fills_its_batch() -> None:
    engine = simulated(max_waiting=0)
    await engine.start()
    receivers = [Receiver() for _ in range(8)]
    for number, receiver in enumerate(receivers):
        engine.submit(str(number), [1], greedy(2), receiver)
    assert [await receiver.until_finished() for receiver in receivers] == ["length"] * 8
    await engine.shutdown()


async def test_an_engine_whose_loop_breaks_is_dead_and_says_so() -> None:
    def broken(token_ids: list[int], finish_reason: FinishReason | None, **_told: object) -> None:
        raise RuntimeError("told so by the test")

    engine = simulated()
    died = asyncio.Event()
    engine.on_death = died.set
    await engine.start()
    await engine.check_health()
    engine.submit("a", [1], greedy(2), broken)
    async with asyncio.timeout(10):
        await died.wait()
    with pytest.raises(EngineUnhealthy):
        await engine.check_health()
    await engine.shutdown()


async def test_an_orderly_shutdown_is_no_death() -> None:
    engine = simulated()
    died = asyncio.Event()
    engine.on_death = died.set
    await engine.start()
    await engine.shutdown()
    assert not died.is_set()


def test_only_ordinary_tokens_of_the_tokenizer_are_generated(tmp_path: Path) -> None:
    tokenizer = {
        "model": {"vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3}},
        "added_tokens": [{"id": 0, "special": True}, {"id": 1, "special": True}, {"id": 3, "special": False}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert vocabulary_of(tmp_path) == (2, 4)
