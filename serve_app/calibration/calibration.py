"""What was measured of a model, as an engine of cluster.yaml and as the text that tells how well it fits."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import yaml

from serve_app.calibration.engine_fit import Fit, fit_decode, fit_prefill
from serve_app.config import SimulatedEngineConfig

__all__ = ["Calibration", "EngineFacts"]

_DIGITS = 4


class EngineFacts(NamedTuple):
    """What the replicas of a model tell of themselves; of several, the least."""

    replicas: int
    max_model_len: int
    max_num_seqs: int
    kv_blocks: int
    kv_block_tokens: int
    start_up_s: float
    """The median."""


class Calibration:
    def __init__(
        self,
        model: str,
        facts: EngineFacts,
        *,
        prompt_tokens: int,
        step_s: dict[int, float],
        first_token_s: dict[int, float],
    ) -> None:
        """`step_s` by sequences on each replica, in contexts that begin with `prompt_tokens`; `first_token_s` by prompt
        tokens."""
        self.model, self.facts, self.prompt_tokens = model, facts, prompt_tokens
        self.decode = fit_decode(step_s)
        self.prefill = fit_prefill(first_token_s, self.decode.base_s)

    def engine(self) -> SimulatedEngineConfig:
        """Whether it has a prefix cache is not measured."""
        facts, per_token_s = self.facts, self.prefill.per_unit_s
        return SimulatedEngineConfig(
            kind="simulated",
            max_model_len=facts.max_model_len,
            prefill_tokens_per_s=_rounded(1 / per_token_s) if per_token_s else None,
            step_s=_rounded(self.decode.base_s),
            step_s_per_sequence=_rounded(self.decode.per_unit_s),
            max_num_seqs=facts.max_num_seqs,
            kv_block_tokens=facts.kv_block_tokens,
            kv_blocks=facts.kv_blocks,
            start_up_s=_rounded(facts.start_up_s),
        )

    def text(self, at: datetime) -> str:
        """YAML with the keys of a simulated engine, below comments that tell what was measured. `at` in UTC."""
        replicas = "1 replica" if self.facts.replicas == 1 else f"{self.facts.replicas} replicas"
        step, first = self.decode, self.prefill
        comments = [
            f"{self.model} with {replicas}, measured by millstream calibrate on {at:%Y-%m-%d %H:%M} UTC.",
            "Each time is the median that was measured, and in brackets what the parameters below make of it.",
            f"Decode step by sequences on a replica, with prompts of {self.prompt_tokens} tokens:",
            *_points(step, "sequence"),
            f"First token of a prompt on an idle replica, {first.base_s * 1000:.1f} ms of it for a decode step and the "
            "way through the cluster:",
            *_points(first, "token"),
            f"The worst residual is {step.worst_residual:.1%} of a decode step's time, {first.worst_residual:.1%} of a "
            "first token's.",
        ]
        if not first.per_unit_s:
            comments.append("Longer prompts took no longer, so prefill counts as taking no time.")
        values = self.engine().model_dump(exclude={"prefix_cache"})
        return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(values, sort_keys=False)


def _points(fit: Fit, unit: str) -> list[str]:
    return [
        f"  {number} {unit if number == 1 else f'{unit}s'}: {measured_s * 1000:.2f} ms "
        f"({fit.fitted_s[number] * 1000:.2f} ms)"
        for number, measured_s in sorted(fit.measured_s.items())
    ]


def _rounded(number: float) -> float:
    """To as many digits as such a measurement may claim."""
    return float(f"{number:.{_DIGITS}g}")
