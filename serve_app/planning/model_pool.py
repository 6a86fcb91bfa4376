"""From a model's section of cluster.yaml to what the simulation of its pool needs."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from deployments.engine.settings import SimulatedEngineSettings
from deployments.engine.simulator import SimulatorSettings
from deployments.scaling.decision import ScalingTargets
from serve_app.config import ModelConfig
from serve_app.planning.pool_simulation import PoolSettings

__all__ = ["PLATFORM_START_UP_S", "EngineFileError", "pool_settings", "read_engine", "scaling_targets"]

PLATFORM_START_UP_S = 2.0
"""What Ray adds to a replica's own start: a process, its imports, its way into rotation. Measured on a machine of two
cores: 1.1 to 2.6 s for one replica, three times as much while a whole cluster starts."""


class EngineFileError(Exception):
    """What is wrong with a file of engine parameters, for the person who made it."""


def read_engine(file: Path) -> SimulatedEngineSettings:
    """YAML with the keys of a simulated `engine` in cluster.yaml, as `--engine` names it. Raises EngineFileError."""
    try:
        fields = yaml.safe_load(file.read_text("utf-8"))
    except OSError as error:
        raise EngineFileError(f"{file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EngineFileError(f"{file}: {error}") from error
    if not isinstance(fields, dict):
        raise EngineFileError(f"{file}: expected keys such as prefill_tokens_per_s and step_s")
    try:
        return SimulatedEngineSettings.model_validate({"kind": "simulated", **fields})
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False))
        raise EngineFileError(f"{file}: {'; '.join(wrong)}") from error


def scaling_targets(model: ModelConfig) -> ScalingTargets:
    return ScalingTargets(**model.replicas.model_dump())


def pool_settings(
    model: ModelConfig,
    engine: SimulatedEngineSettings,
    *,
    start_up_s: float | None = None,
    platform_start_up_s: float = PLATFORM_START_UP_S,
    replicas_at_start: int | None = None,
) -> PoolSettings:
    """`engine` instead of what `model` names; None takes its own `start_up_s`, and `replicas.min` replicas."""
    return PoolSettings(
        engine=SimulatorSettings(
            vocabulary_tokens=1,  # tokens are counted, not made up
            prefill_tokens_per_s=engine.prefill_tokens_per_s,
            step_s=engine.step_s,
            step_s_per_sequence=engine.step_s_per_sequence,
            max_num_seqs=engine.max_num_seqs,
            kv_block_tokens=engine.kv_block_tokens,
            kv_blocks=engine.kv_blocks,
        ),
        max_model_len=engine.max_model_len,
        max_waiting=model.max_waiting,
        max_held=model.max_waiting,
        max_held_tokens=model.max_held_tokens,
        hold_timeout_s=model.hold_timeout_s if model.replicas.min else model.cold_start_timeout_s,
        drain_timeout_s=model.drain_timeout_s,
        platform_start_up_s=platform_start_up_s,
        start_up_s=engine.start_up_s if start_up_s is None else start_up_s,
        replicas_at_start=model.replicas.min if replicas_at_start is None else replicas_at_start,
    )
