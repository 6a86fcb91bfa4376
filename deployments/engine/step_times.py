"""How long an engine's steps take, learned from the steps that it makes: the capacity on which scaling decisions rest.

A step of continuous batching moves every running sequence on by a token and prefills some prompt tokens beside. Its
time is modelled as `base + per_sequence * sequences + per_prefill_token * prefill tokens`, fitted by least squares
whose weights fade, so that it follows an engine whose contexts grow. Both engines feed it.
"""

from __future__ import annotations

import numpy as np

__all__ = ["StepTimes"]

_FADE = 0.999
"""Weight of an observation relative to the next one: the last thousand steps or so count."""
_PREFILL_FADE_TOKENS = 200_000.0
"""Prefills are remembered for so many prompt tokens, however many decode steps lie between."""
_RIDGE = np.array([0.0, 1e-3, 1e-6])
"""Share of the mean square of each regressor that is added to it. Of the first none: while the batch has always been of
one size, its time is the step's and not the sequences', or larger batches would be thought slow."""


class StepTimes:
    def __init__(self) -> None:
        # Sums over products of steps (s), sequences (n), prefilled tokens (p) and time (t); plain floats, since a
        # step may take as little as a millisecond and numpy would take a tenth of it.
        self._ss = self._sn = self._sp = self._nn = self._np = self._pp = 0.0
        self._st = self._nt = self._pt = 0.0
        self._prefilled_tokens = self._prefill_s = 0.0

    def observe(self, duration_s: float, sequences: float, prefilled_tokens: int, *, steps: int = 1) -> None:
        """`steps` successive steps that took `duration_s` together, with so many running sequences each."""
        n, p = steps * sequences, prefilled_tokens
        self._ss = _FADE * self._ss + steps * steps
        self._sn = _FADE * self._sn + steps * n
        self._nn = _FADE * self._nn + n * n
        self._sp = _FADE * self._sp + steps * p
        self._np = _FADE * self._np + n * p
        self._pp = _FADE * self._pp + p * p
        self._st = _FADE * self._st + steps * duration_s
        self._nt = _FADE * self._nt + n * duration_s
        self._pt = _FADE * self._pt + p * duration_s
        if prefilled_tokens and duration_s > 0:
            fade = max(0.0, 1 - prefilled_tokens / _PREFILL_FADE_TOKENS)
            self._prefilled_tokens = fade * self._prefilled_tokens + prefilled_tokens
            self._prefill_s = fade * self._prefill_s + duration_s

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second of a step's time that goes to them; 0 while none was seen.

        Never less than what steps with a prefill reached as a whole.
        """
        if not self._prefilled_tokens:
            return 0.0
        reached = self._prefilled_tokens / self._prefill_s
        per_token_s = self._fit()[2]
        return max(reached, 1 / per_token_s) if per_token_s > 0 else reached

    @property
    def decode_s(self) -> tuple[float, float]:
        """Seconds of a decode step: without a sequence, and for each; 0 while nothing was seen."""
        base, per_sequence, _ = self._fit()
        return base, per_sequence

    def _fit(self) -> tuple[float, float, float]:
        """Seconds per step, per sequence of it, and per prefilled token."""
        normal = np.array(
            [[self._ss, self._sn, self._sp], [self._sn, self._nn, self._np], [self._sp, self._np, self._pp]]
        )
        damped = normal + np.diag(_RIDGE * np.diag(normal) + 1e-15)
        solved = np.linalg.solve(damped, [self._st, self._nt, self._pt])
        base, per_sequence, per_prefill_token = np.maximum(solved, 0.0).tolist()
        return base, per_sequence, per_prefill_token
