"""KV cache occupancy of a running vLLM: the one place that touches vLLM's unstable statistics interface.

vLLM has no public way to ask for free KV blocks, but it takes custom stat loggers. Their base class is documented as
unstable, hence this module and tests/deployments/engine/test_vllm_stats.py, which notices when it changes.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

__all__ = ["KvCacheGauge"]


class KvCacheGauge:
    """Holds what vLLM's scheduler said last. Pass `logger` in AsyncLLM's `stat_loggers`."""

    def __init__(self) -> None:
        self.blocks_total = 0
        self.blocks_free = 0

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        self.blocks_total = self.blocks_free = vllm_config.cache_config.num_gpu_blocks or 0
        return _Logger(self)


class _Logger(StatLoggerBase):  # type: ignore[misc]  # vLLM is not type-checked here
    def __init__(self, gauge: KvCacheGauge) -> None:
        self._gauge = gauge

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            used = round(self._gauge.blocks_total * scheduler_stats.kv_cache_usage)
            self._gauge.blocks_free = self._gauge.blocks_total - used

    def log_engine_initialized(self) -> None:
        """Nothing to announce: the replica logs its own start."""
