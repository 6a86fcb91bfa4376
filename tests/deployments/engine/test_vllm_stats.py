"""Notices when vLLM changes the statistics interface that _vllm_stats.py uses. Imports vLLM, starts nothing."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

from tests.deployments.engine.engines_under_test import VLLM_MARKS

pytestmark = VLLM_MARKS


def config(blocks: int | None) -> SimpleNamespace:
    return SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=blocks))


def test_the_logger_answers_all_that_vllm_demands_of_one() -> None:
    from vllm.v1.metrics.loggers import StatLoggerBase

    from deployments.engine._vllm_stats import KvCacheGauge, _Logger

    assert StatLoggerBase.__abstractmethods__ == {"__init__", "record", "log_engine_initialized"}
    theirs, ours = (inspect.signature(kind.record).parameters for kind in (StatLoggerBase, _Logger))
    assert list(ours) == list(theirs)
    logger = KvCacheGauge().logger(config(100), 0)
    assert isinstance(logger, StatLoggerBase)
    logger.log_engine_initialized()


def test_the_gauge_follows_vllms_scheduler() -> None:
    from vllm.v1.metrics.stats import SchedulerStats

    from deployments.engine._vllm_stats import KvCacheGauge

    gauge = KvCacheGauge()
    assert (gauge.blocks_free, gauge.blocks_total) == (0, 0)
    logger = gauge.logger(config(100), 0)
    assert (gauge.blocks_free, gauge.blocks_total) == (100, 100)
    logger.record(scheduler_stats=SchedulerStats(kv_cache_usage=0.25), iteration_stats=None, engine_idx=0)
    assert (gauge.blocks_free, gauge.blocks_total) == (75, 100)
    logger.record(scheduler_stats=None, iteration_stats=None)  # an output without news of the scheduler
    assert gauge.blocks_free == 75


def test_the_configuration_names_the_number_of_kv_blocks() -> None:
    from vllm.config import CacheConfig

    assert "num_gpu_blocks" in inspect.signature(CacheConfig).parameters or hasattr(CacheConfig, "num_gpu_blocks")


def test_an_unknown_number_of_kv_blocks_counts_as_none() -> None:
    from deployments.engine._vllm_stats import KvCacheGauge

    gauge = KvCacheGauge()
    gauge.logger(config(None), 0)
    assert (gauge.blocks_free, gauge.blocks_total) == (0, 0)
