"""What was measured of a model, as an engine of cluster.yaml and as the text that tells how well it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import NamedTuple

import yaml

from deployments.engine.settings import SimulatedEngineSettings
from serve_app.calibration.engine_fit import Fit, fit_decode, fit_prefill

__all__ = ["Calibration", "EngineFacts"]

_DIGITS = 4
_POOR_FIT = 0.25
"""Share of a time that was measured, by which the fit may miss it."""


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
        step_s: Mapping[int, Sequence[float]],
        first_token_s: Mapping[int, Sequence[float]],
    ) -> None:
        """What each run gave: `step_s` by sequences on each replica, in contexts that begin with `prompt_tokens`, and
        `first_token_s` by prompt tokens."""
        self.model, self.facts, self.prompt_tokens = model, facts, prompt_tokens
        self._step_s, self._first_token_s = step_s, first_token_s
        self.decode = fit_decode(_medians(step_s))
        self.prefill = fit_prefill(_medians(first_token_s), self.decode.base_s)

    def engine(self) -> SimulatedEngineSettings:
        """Whether it has a prefix cache is not measured."""
        facts, per_token_s = self.facts, self.prefill.per_unit_s
        return SimulatedEngineSettings(
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

    def warnings(self) -> list[str]:
        """Why the parameters may be of little use."""
        told = []
        if max(self.decode.worst_residual, self.prefill.worst_residual) > _POOR_FIT:
            told.append(
                "A poor fit: something else used the machine, or the engine's times are no straight lines. Measure "
                "again when it is quiet."
            )
        if not self.prefill.per_unit_s:
            told.append("Longer prompts took no longer, so prefill counts as taking no time.")
        return told

    def text(self, at: datetime) -> str:
        """YAML with the keys of a simulated engine, below comments that tell what was measured. `at` in UTC."""
        replicas = "1 replica" if self.facts.replicas == 1 else f"{self.facts.replicas} replicas"
        step, first = self.decode, self.prefill
        comments = [
            f"{self.model} with {replicas}, measured by millstream calibrate on {at:%Y-%m-%d %H:%M} UTC.",
            "Medians, in brackets the least and the most of the runs, and what the parameters below make of it.",
            f"Decode step by sequences on a replica, with prompts of {self.prompt_tokens} tokens:",
            *_points(self._step_s, step, "sequence"),
            "First token of one prompt at a time:",
            *_points(self._first_token_s, first, "token"),
            f"The worst residual is {step.worst_residual:.1%} of a decode step's time, {first.worst_residual:.1%} of a "
            "first token's.",
        ]
        if first.base_s > 0:
            comments.append(
                f"Of a first token's time, {first.base_s * 1000:.1f} ms are no prefill: a decode step and the way "
                "through the cluster."
            )
        comments += self.warnings()
        values = self.engine().model_dump(exclude={"prefix_cache"})
        return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(values, sort_keys=False)


def _medians(runs: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {number: median(times_s) for number, times_s in runs.items()}


def _points(runs: Mapping[int, Sequence[float]], fit: Fit, unit: str) -> list[str]:
    return [
        f"  {number} {unit if number == 1 else f'{unit}s'}: {fit.measured_s[number] * 1000:.2f} ms "
        f"({min(times_s) * 1000:.2f} to {max(times_s) * 1000:.2f}), fitted {fit.fitted_s[number] * 1000:.2f}"
        for number, times_s in runs.items()
    ]


def _rounded(number: float) -> float:
    """To as many digits as such a measurement may claim."""
    return float(f"{number:.{_DIGITS}g}")
