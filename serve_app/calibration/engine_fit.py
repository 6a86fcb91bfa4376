"""From times of tokens to the parameters of an engine: no clock, no cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deployments.engine.simulator import SimulatorSettings

__all__ = ["Fit", "fit_decode", "fit_prefill", "steady_steps_s"]

_WINDOW_TOKENS = 16
"""A step's time is taken over so many, since tokens may arrive early, late or a few at a time."""
_PREFILL_TOKENS_PER_STEP = SimulatorSettings.max_prefill_tokens_per_step
"""Planning simulates longer prompts in several steps."""


class Fit(NamedTuple):
    """A straight line through measured times."""

    base_s: float
    per_unit_s: float
    """Never negative."""
    measured_s: dict[int, float]
    """By sequences or tokens."""
    fitted_s: dict[int, float]

    @property
    def worst_residual(self) -> float:
        """As a share of what was measured."""
        return max(abs(self.fitted_s[each] / measured - 1) for each, measured in self.measured_s.items())


def steady_steps_s(token_times: Sequence[Sequence[float]]) -> list[float]:
    """Times of decode steps of a batch, while all of its sequences ran: by when the tokens of each arrived.

    Empty when too few tokens lie between the last sequence's first token and the first one's last.
    """
    begin, end = max(times[0] for times in token_times), min(times[-1] for times in token_times)
    return [
        (last - first) / _WINDOW_TOKENS
        for times in token_times
        for first, last in zip(times, times[_WINDOW_TOKENS:], strict=False)
        if begin <= first and last <= end
    ]


def fit_decode(step_s: Mapping[int, float]) -> Fit:
    """Of the step times by sequences in the batch: a step of one, and what each further one adds."""
    return _fit(step_s, {sequences: sequences - 1 for sequences in step_s}, dict.fromkeys(step_s, 0.0))


def fit_prefill(first_token_s: Mapping[int, float], step_s: float) -> Fit:
    """Of the first-token times by prompt tokens: what each token takes, beside a constant and, in prompts that take
    several steps, `step_s` for each further step."""
    steps_s = {tokens: step_s * (-(-tokens // _PREFILL_TOKENS_PER_STEP) - 1) for tokens in first_token_s}
    return _fit(first_token_s, {tokens: tokens for tokens in first_token_s}, steps_s)


def _fit(measured_s: Mapping[int, float], units: Mapping[int, int], known_s: Mapping[int, float]) -> Fit:
    x = np.array([units[each] for each in measured_s], dtype=float)
    y = np.array([measured_s[each] - known_s[each] for each in measured_s])
    slope_s, base_s = np.polyfit(x, y, 1).tolist()
    if slope_s < 0:
        slope_s, base_s = 0.0, float(y.mean())
    fitted_s = {each: base_s + slope_s * units[each] + known_s[each] for each in measured_s}
    return Fit(base_s, slope_s, dict(measured_s), fitted_s)
