"""What vLLM does on the replica's event loop for one request of many choices leaves others their turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deployments.contracts import Sampling
from tests.deployments.engine.engines_under_test import PROMPT, vllm_engine

pytest.importorskip("vllm.inputs")  # takes seconds, not in the middle of a test


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
