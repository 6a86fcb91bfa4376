"""Notices when vLLM changes the statistics interface that _vllm_stats.py uses. Imports vLLM, starts nothing."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace

import pytest

from deployments.engine.step_times import StepTimes
from tests.deployments.engine.engines_under_test import VLLM_MARKS

pytestmark = VLLM_MARKS


def config(blocks: int | None) -> SimpleNamespace:
    return SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=blocks, block_size=blocks and 128))


def test_the_logger_answers_all_that_vllm_demands_of_one() -> None:
    from vllm.v1.metrics.loggers import StatLoggerBase

    from deployments.engine._vllm_stats import EngineGauge, _Logger

    assert StatLoggerBase.__abstractmethods__ == {"__init__", "record", "log_engine_initialized"}
    theirs, ours = (inspect.signature(kind.record).parameters for kind in (StatLoggerBase, _Logger))
    assert list(ours) == list(theirs)
    logger = EngineGauge(StepTimes()).logger(config(100), 0)
    assert isinstance(logger, StatLoggerBase)
    logger.log_engine_initialized()


def test_the_gauge_follows_vllms_scheduler() -> None:
    from vllm.v1.metrics.stats import SchedulerStats

    from deployments.engine._vllm_stats import EngineGauge

    gauge = EngineGauge(StepTimes())
    assert (gauge.blocks_free, gauge.blocks_total) == (0, 0)
    logger = gauge.logger(config(100), 0)
    assert (gauge.blocks_free, gauge.blocks_total, gauge.block_tokens) == (100, 100, 128)
    logger.record(scheduler_stats=SchedulerStats(kv_cache_usage=0.25), iteration_stats=None, engine_idx=0)
    assert (gauge.blocks_free, gauge.blocks_total) == (75, 100)
    logger.record(scheduler_stats=None, iteration_stats=None)  # an output without news of the scheduler
    assert gauge.blocks_free == 75


def test_one_of_the_loggers_takes_the_place_of_the_one_that_vllm_would_add() -> None:
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger

    from deployments.engine._vllm_stats import EngineGauge, stat_loggers

    [_, published] = stat_loggers(EngineGauge(StepTimes()))
    assert issubclass(published, PrometheusStatLogger)
    assert issubclass(published, AggregateStatLoggerBase)


def test_the_configuration_names_the_kv_blocks() -> None:
    from vllm.config import CacheConfig

    assert {"num_gpu_blocks", "block_size"} <= {field.name for field in dataclasses.fields(CacheConfig)}


def test_an_unknown_number_of_kv_blocks_counts_as_none() -> None:
    from deployments.engine._vllm_stats import EngineGauge

    gauge = EngineGauge(StepTimes())
    gauge.logger(config(None), 0)
    assert (gauge.blocks_free, gauge.blocks_total, gauge.block_tokens) == (0, 0, 0)


def test_steps_with_and_without_prefill_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics.stats import IterationStats, PrefillStats

    from deployments.engine import _vllm_stats

    now = 100.0
    monkeypatch.setattr("deployments.engine._vllm_stats.time.perf_counter", lambda: now)
    times = StepTimes()
    gauge = _vllm_stats.EngineGauge(times)
    logger = gauge.logger(config(100), 0)
    for _ in range(50):
        gauge.work_begins()
        prefill = PrefillStats()
        prefill.num_prompt_tokens, prefill.num_computed_tokens = 1200, 1000
        first = IterationStats()
        first.num_generation_tokens = 1
        first.prompt_token_stats.update_from_output(prefill)
        now += 0.06
        logger.record(scheduler_stats=None, iteration_stats=None)  # the first part of the prefill gives no token
        now += 0.06
        logger.record(scheduler_stats=None, iteration_stats=first)
        for _ in range(5):
            decode = IterationStats()
            decode.num_generation_tokens = 1
            now += 0.01
            logger.record(scheduler_stats=None, iteration_stats=decode)
        now += 30.0  # idle
    assert sum(times.decode_s) == pytest.approx(0.01, rel=0.01)
    assert times.prefill_tokens_per_s == pytest.approx(1000 / 0.1, rel=0.01)
