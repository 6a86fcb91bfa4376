"""One system under one load, as figures."""

from __future__ import annotations

import math
from array import array
from typing import Final, NamedTuple

from loadtests.comparison.load import Endpoint, load
from loadtests.comparison.stack import Stack

__all__ = ["ONE_CLIENT", "SHORT_REQUESTS", "Figures", "Level", "measure", "percentile"]


class Level(NamedTuple):
    """How much load."""

    name: str
    streams: int
    max_tokens: int
    requests: int | None = None
    """In all; without, requests are begun for some seconds."""


ONE_CLIENT: Final = Level("1 short", 1, 4, requests=60)
"""For the first token: enough of them for a median."""
SHORT_REQUESTS: Final = Level("100 short", 100, 4, requests=400)
"""What a crowd of one-line answers is like."""


class Figures(NamedTuple):
    """Of one system at one level in one round."""

    tokens_per_s: float
    first_token_ms: float
    """Median."""
    first_token_p99_ms: float
    inter_token_ms: float
    """Median of the gaps between arrivals in a stream: of tokens that come together only the first makes one."""
    inter_token_p99_ms: float
    bunched_percent: float
    """Tokens that arrive together with another of their stream, at most."""
    cpu_s_per_100k_tokens: float
    memory_mib: float
    requests: int
    errors: dict[str, int]


async def measure(endpoint: Endpoint, mark: str, level: Level, seconds: float) -> Figures:
    """Raises ValueError when not a single token arrived."""
    stack = Stack(mark)
    outcome = await load(
        endpoint,
        streams=level.streams,
        max_tokens=level.max_tokens,
        seconds=None if level.requests else seconds,
        requests=level.requests,
    )
    if not outcome.tokens:
        raise ValueError(f"{endpoint.url}: {dict(outcome.errors)}")
    return Figures(
        tokens_per_s=outcome.tokens / outcome.elapsed_s,
        first_token_ms=1000 * percentile(outcome.first_token_s, 50),
        first_token_p99_ms=1000 * percentile(outcome.first_token_s, 99),
        inter_token_ms=1000 * percentile(outcome.gaps_s, 50),
        inter_token_p99_ms=1000 * percentile(outcome.gaps_s, 99),
        bunched_percent=100 * outcome.bunched_tokens / outcome.tokens,
        cpu_s_per_100k_tokens=100_000 * stack.cpu_s() / outcome.tokens,
        memory_mib=stack.memory_bytes() / 2**20,
        requests=outcome.requests,
        errors=dict(outcome.errors),
    )


def percentile(values: array[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed (nearest rank); 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
