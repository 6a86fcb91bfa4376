"""What the tests of the engines share: a receiver, a way to wait without a clock, and vLLM on SmolLM2."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.contracts import FinishReason, PositionLogprobs, Sampling
from deployments.engine.engine import Engine
from deployments.engine.settings import VllmSettings
from deployments.engine.vllm_engine import VllmEngine

__all__ = [
    "MAX_MODEL_LEN",
    "MAX_NUM_BATCHED_TOKENS",
    "MAX_NUM_SEQS",
    "MAX_WAITING",
    "PROMPT",
    "VLLM_MARKS",
    "Receiver",
    "complete",
    "greedy",
    "until",
    "vllm_engine",
]

MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_WAITING = 512, 8, 4

MAX_NUM_BATCHED_TOKENS = 64
"""As in the cluster.yaml that is shipped: longer prompts are read in several steps."""

PROMPT = [504, 3575, 282, 4649, 314]
"""`The capital of France is` in SmolLM2's tokens."""


def greedy(max_tokens: int, **changed: Any) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **changed)


class Receiver:
    """Keeps what an engine delivers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finishes: list[FinishReason] = []
        self.cached_tokens: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.prompt_logprobs: list[PositionLogprobs | None] = []
        self.message = ""
        self.param: str | None = None
        self._news = asyncio.Event()

    def __call__(
        self,
        token_ids: list[int],
        finish_reason: FinishReason | None,
        *,
        cached_tokens: int = 0,
        message: str = "",
        param: str | None = None,
        logprobs: list[PositionLogprobs] | None = None,
        prompt_logprobs: list[PositionLogprobs | None] | None = None,
    ) -> None:
        self.tokens += token_ids
        self.logprobs += logprobs or []
        assert prompt_logprobs is None or (prompt_logprobs and not self.prompt_logprobs)  # with the first delta only
        self.prompt_logprobs += prompt_logprobs or []
        self.message, self.param = message, param
        self.cached_tokens.append(cached_tokens)
        if finish_reason is not None:
            self.finishes.append(finish_reason)
        self._news.set()

    async def until_tokens(self, count: int) -> None:
        while len(self.tokens) < count:
            assert not self.finishes, f"ended with {self.finishes} after {len(self.tokens)} tokens"
            await self._next()

    async def until_finished(self) -> FinishReason:
        while not self.finishes:
            await self._next()
        (finish_reason,) = self.finishes
        return finish_reason

    async def _next(self) -> None:
        self._news.clear()
        await self._news.wait()


VLLM_MARKS = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # vLLM's own
]


async def complete(engine: Engine, key: str, token_ids: list[int], sampling: Sampling) -> Receiver:
    receiver = Receiver()
    engine.submit(key, token_ids, sampling, receiver)
    await receiver.until_finished()
    return receiver


async def until(condition: Callable[[], bool], engine: Engine) -> None:
    """Each look at the condition is a round trip to the engine's process after the one before."""
    async with asyncio.timeout(20):
        while not condition():
            await engine.check_health()
            await asyncio.sleep(0)


def vllm_engine(model: Path, *, stall_timeout_s: float) -> VllmEngine:
    settings = VllmSettings(
        kind="vllm",
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        enforce_eager=True,
        scheduling_policy="priority",
    )
    return VllmEngine(
        settings, model, served_model_name="smollm2", max_waiting=MAX_WAITING, stall_timeout_s=stall_timeout_s
    )
