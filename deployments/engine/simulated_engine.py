"""The simulated engine: the simulator in real time, behind the same contract as vLLM.

A part of the product for load tests and tests of scale: costs no compute and answers the same tokens for the same
prompt and seed on every replica. Parameters that shape probabilities or force a format have no effect on what it makes
up; those that end a generation or ask for log probabilities do.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import structlog

from deployments.contracts import EngineLoad, Sampling
from deployments.engine.engine import Deliver, EngineQueueFull, EngineUnhealthy
from deployments.engine.simulator import Simulator, SimulatorSettings
from deployments.engine.step_times import StepTimes

__all__ = ["SimulatedEngine", "vocabulary_of"]

log = structlog.get_logger()


def vocabulary_of(folder: Path) -> tuple[int, int]:
    """First ordinary token id and vocabulary size of the model in `folder`, from its tokenizer.json."""
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    special = {token["id"] for token in tokenizer.get("added_tokens", ()) if token["special"]}
    first = 0
    while first in special:
        first += 1
    return first, len(tokenizer["model"]["vocab"])


class SimulatedEngine:
    """Runs a `Simulator` step by step; each step's tokens are delivered when the step's time has passed."""

    def __init__(self, settings: SimulatorSettings, *, max_waiting: int, start_up_s: float = 0.0) -> None:
        self.max_num_seqs = settings.max_num_seqs
        self.step_times = StepTimes()
        self.on_death: Callable[[], None] = lambda: None
        self._max_generations = settings.max_num_seqs + max_waiting
        self._start_up_s = start_up_s
        self._simulator = Simulator(settings)
        self._deliver: dict[str, Deliver] = {}
        self._work = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await asyncio.sleep(self._start_up_s)
        self._loop_task = asyncio.create_task(self._run(), name="simulated-engine")
        self._loop_task.add_done_callback(self._loop_ended)

    def submit(
        self, key: str, token_ids: list[int], sampling: Sampling, deliver: Deliver, *, resumed: bool = False
    ) -> None:
        if len(self._deliver) >= self._max_generations and not resumed:
            raise EngineQueueFull(f"{self._simulator.waiting} generations wait already")
        if not self._simulator.fits(len(token_ids), sampling.max_tokens):
            deliver([], "refused", message="The prompt and max_tokens need more KV blocks than the engine has.")
            return
        self._deliver[key] = deliver
        self._simulator.submit(key, token_ids, sampling)
        self._work.set()

    def abort(self, key: str) -> None:
        if self._deliver.pop(key, None) is not None:
            self._simulator.abort(key)

    def load(self) -> EngineLoad:
        return self._simulator.load()

    async def check_health(self) -> None:
        if self._loop_task is not None and self._loop_task.done():
            raise EngineUnhealthy("the simulated engine's loop has ended")

    async def shutdown(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.wait([self._loop_task])

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.error("simulated engine died", exc_info=task.exception())
            self.on_death()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        step_ends = now = loop.time()
        while True:
            if self._simulator.idle:
                self._work.clear()
                await self._work.wait()
                step_ends = now = loop.time()
            began, step = now, self._simulator.step()
            # Timers are coarse, so the wait aims at the end of the step rather than at its length; a step that is
            # late already is not made up for, as hardware would not either.
            step_ends = max(step_ends + step.duration_s, loop.time())
            await asyncio.sleep(max(0.0, step_ends - loop.time()))
            now = loop.time()
            self.step_times.observe(now - began, step.sequences, step.prefilled_tokens)
            for output in step.outputs:
                deliver = self._deliver.get(output.key)
                if deliver is None:
                    continue  # aborted during the step
                if output.finish_reason is not None:
                    del self._deliver[output.key]
                deliver(
                    [output.token_id],
                    output.finish_reason,
                    cached_tokens=output.cached_tokens,
                    logprobs=None if output.logprobs is None else [output.logprobs],
                    prompt_logprobs=output.prompt_logprobs,
                )
