"""What an ingress replica reports for scaling decisions: its own lag, and per model what engine replicas cannot see.

Serve carries numbers by name; the names are made and read here, so that both ends stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

__all__ = ["LAG", "ModelDemand", "demand_values", "model_demands"]

LAG = "loop_lag_s"


class ModelDemand(NamedTuple):
    """Of one model, as one ingress sees it."""

    held: float = 0.0
    """Requests that wait because no replica is up."""
    held_tokens: float = 0.0
    """Their prompt tokens."""
    first_token_s: float = 0.0
    """From arrival to first token, the mean of the last seconds; 0 while there was none."""


def demand_values(models: Mapping[str, ModelDemand], lag_s: float) -> dict[str, float]:
    """For Serve's `record_autoscaling_stats`."""
    values = {LAG: lag_s}
    for model, demand in models.items():
        values |= {f"{name} {model}": value for name, value in demand._asdict().items()}
    return values


def model_demands(replicas: Iterable[Mapping[str, float]]) -> dict[str, ModelDemand]:
    """By model, over all ingress replicas: what is held is added up, the slowest first tokens count."""
    demands: dict[str, ModelDemand] = {}
    for values in replicas:
        for model in {key.partition(" ")[2] for key in values} - {""}:
            told = ModelDemand(*(values.get(f"{name} {model}", 0.0) for name in ModelDemand._fields))
            known = demands.get(model, ModelDemand())
            demands[model] = ModelDemand(
                known.held + told.held,
                known.held_tokens + told.held_tokens,
                max(known.first_token_s, told.first_token_s),
            )
    return demands
