"""KV cache occupancy, step times and metrics of a running vLLM: all that touches vLLM's unstable statistics interface.

vLLM has no public way to ask for free KV blocks or for the time of its steps, but it takes custom stat loggers. Their
base class is documented as unstable, hence this module and tests/deployments/engine/test_vllm_stats.py, which notices
when it changes.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from deployments.engine.step_times import StepTimes

__all__ = ["EngineGauge", "stat_loggers"]


class EngineGauge:
    """Holds what vLLM's scheduler said last, and times its steps."""

    def __init__(self, step_times: StepTimes) -> None:
        self.blocks_total = 0
        self.blocks_free = 0
        self.block_tokens = 0
        self._step_times = step_times
        self._step_began: float | None = None
        self._steps = 0

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        self.blocks_total = self.blocks_free = vllm_config.cache_config.num_gpu_blocks or 0
        self.block_tokens = vllm_config.cache_config.block_size or 0
        return _Logger(self)

    def work_begins(self) -> None:
        """The engine was idle, and has a request now."""
        self._step_began, self._steps = time.perf_counter(), 0

    def scheduled(self, scheduler_stats: Any) -> None:
        self.blocks_free = self.blocks_total - round(self.blocks_total * scheduler_stats.kv_cache_usage)

    def stepped(self, iteration_stats: Any | None) -> None:
        """A step has ended; it has `iteration_stats` unless it gave no token, as in the middle of a long prefill."""
        self._steps += 1
        if iteration_stats is None or self._step_began is None:
            return
        now = time.perf_counter()
        self._step_times.observe(
            now - self._step_began,
            iteration_stats.num_generation_tokens,
            iteration_stats.prompt_token_stats.computed,
            steps=self._steps,
        )
        self._step_began, self._steps = now, 0


class _Logger(StatLoggerBase):  # type: ignore[misc]  # vLLM is not type-checked here
    def __init__(self, gauge: EngineGauge) -> None:
        self._gauge = gauge

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self._gauge.scheduled(scheduler_stats)
        self._gauge.stepped(iteration_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to announce: the replica logs its own start."""


def stat_loggers(gauge: EngineGauge) -> list[Any]:
    """For AsyncLLM's `stat_loggers`: `gauge`'s, and the one that gives all of vLLM's own metrics to Ray's node agent.
    Without that, vLLM adds one that keeps them in this process, where nobody can read them."""
    return [gauge.logger, RayPrometheusStatLogger]
