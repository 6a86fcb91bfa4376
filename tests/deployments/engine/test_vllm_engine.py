"""What becomes of what VllmEngine asks of vLLM and hears from it, with something simple in vLLM's place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.contracts import PositionLogprobs, Sampling
from tests.deployments.engine.engines_under_test import PROMPT, Receiver, vllm_engine

pytest.importorskip("vllm.inputs")  # takes seconds, not in the middle of a test
from vllm.logprobs import append_logprobs_for_next_position, create_prompt_logprobs


class Turns:
    """Stands for AsyncLLM: in which turn of the event loop each generation is asked for, which takes time there."""

    errored = False

    def __init__(self) -> None:
        self.turn = 0
        self.asked: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._next()

    def _next(self) -> None:
        self.turn += 1
        self._timer = self._loop.call_soon(self._next)

    def end(self) -> None:
        self._timer.cancel()

    async def generate(self, *_arguments: Any, **_options: Any) -> AsyncIterator[Any]:
        self.asked.append(self.turn)
        return
        yield


@pytest.mark.parametrize(
    ("fields", "apart"),
    [
        ({"bad_words": ("a", "b")}, True),
        ({"allowed_token_ids": tuple(range(1000))}, True),
        ({"allowed_token_ids": (1, 2)}, False),
        ({}, False),
    ],
    ids=["words", "many token ids", "few", "plain"],
)
async def test_choices_that_take_vllm_long_to_begin_begin_in_turns_of_their_own(
    tmp_path: Path, fields: dict[str, Any], apart: bool
) -> None:
    engine = vllm_engine(tmp_path, stall_timeout_s=1.0)
    engine._engine = turns = Turns()
    try:
        for number in range(4):
            engine.submit(f"g{number}", PROMPT, Sampling(max_tokens=1, **fields), lambda *_, **__: None)
        async with asyncio.timeout(30):
            while len(turns.asked) < 4:  # noqa: ASYNC110  # each look is a turn
                await asyncio.sleep(0)
    finally:
        turns.end()
        engine._engine = None
    assert len(set(turns.asked)) == (4 if apart else 1)


class Outputs:
    """Stands for AsyncLLM: what it yields for one generation."""

    errored = False

    def __init__(self, outputs: list[Any]) -> None:
        self._outputs = outputs

    async def generate(self, *_arguments: Any, **_options: Any) -> AsyncIterator[Any]:
        for output in self._outputs:
            yield output


async def test_log_probabilities_of_a_prompt_are_delivered_once(tmp_path: Path) -> None:
    """vLLM gives an empty list with each output behind the first."""
    told = create_prompt_logprobs(True)
    append_logprobs_for_next_position(told, [7, 5], [-3.0, -0.5], [None] * 2, 9, 1)
    outputs = [
        SimpleNamespace(
            finished=number == 2,
            num_cached_tokens=0,
            prompt_logprobs=told if number == 0 else [],
            outputs=[
                SimpleNamespace(
                    token_ids=[number],
                    finish_reason="length" if number == 2 else None,
                    stop_reason=None,
                    logprobs=None,
                )
            ],
        )
        for number in range(3)
    ]
    engine = vllm_engine(tmp_path, stall_timeout_s=1.0)
    engine._engine = Outputs(outputs)
    receiver = Receiver()
    engine.submit("g", [1, 7], Sampling(max_tokens=3, prompt_logprobs=1), receiver)
    await receiver.until_finished()
    engine._engine = None
    assert receiver.prompt_logprobs == [None, PositionLogprobs((7, 5), (-3.0, -0.5), (9, 1))]
    assert receiver.tokens == [0, 1, 2]
