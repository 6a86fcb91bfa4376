"""The contract that every engine fulfils: token ids in, token ids out.

vLLM (`vllm_engine.py`) and the simulated engine (`simulated_engine.py`) are siblings behind it, and one contract suite
(tests/deployments/engine/test_engine_contract.py) runs over both. An engine knows neither text nor ingress replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from deployments.contracts import EngineLoad, FinishReason, PositionLogprobs, Sampling
from deployments.engine.step_times import StepTimes

__all__ = ["Deliver", "Engine", "EngineError", "EngineQueueFull", "EngineUnhealthy"]


class EngineError(Exception):
    """Base of what an engine raises."""


class EngineQueueFull(EngineError):
    """The engine already holds as many waiting generations as it may."""


class EngineUnhealthy(EngineError):
    """The engine is dead or has stopped answering; the replica must be replaced."""


class Deliver(Protocol):
    """Receives what one generation gained in a step; arguments as in contracts.TokenDelta. Called on the event loop,
    never blocks."""

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
    ) -> None: ...


class Engine(Protocol):
    """A continuous-batching engine. All methods are called on one event loop."""

    max_num_seqs: int
    """Sequences in the batch at most."""

    step_times: StepTimes
    """What its steps have taken."""

    on_death: Callable[[], None]
    """Set by the owner; called once when the engine notices that it has died and delivers nothing any more."""

    async def start(self) -> None:
        """Load what is needed; returns when generations can be submitted."""

    def submit(
        self, key: str, token_ids: list[int], sampling: Sampling, deliver: Deliver, *, resumed: bool = False
    ) -> None:
        """Queue one generation under `key`, unique among those alive.

        `deliver` gets every token exactly once, in order, and exactly one call with a finish reason, unless the
        generation is aborted: then nothing comes any more. Raises EngineQueueFull, but not for a resumed generation:
        that one was accepted before and cannot be refused any more.
        """

    def abort(self, key: str) -> None:
        """Stop a generation and free what it holds before the next step. Unknown keys are ignored."""

    def load(self) -> EngineLoad:
        """How busy the engine is now. Cheap: read for every step message."""

    async def check_health(self) -> None:
        """Raise EngineUnhealthy when the engine is dead or hung; return quickly when it is merely busy."""

    async def shutdown(self) -> None:
        """Release everything. Safe twice and before `start`."""
