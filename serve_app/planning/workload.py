"""When requests come and how long they are: from a trace, or by a Poisson process whose rate changes in stages.

Requests come in chunks of plain lists: at millions of them an object each would cost more than their simulation.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

__all__ = [
    "PoissonWorkload",
    "RateStage",
    "Requests",
    "TokenRange",
    "TraceError",
    "TraceRow",
    "TraceWorkload",
    "Workload",
    "read_trace",
]

_CHUNK = 1 << 16


class Requests(NamedTuple):
    """Parallel lists, by time."""

    at_s: Sequence[float]
    prompt_tokens: Sequence[int]
    max_tokens: Sequence[int]


class Workload(Protocol):
    @property
    def duration_s(self) -> float:
        """How long it is watched at least: replicas count until then although nothing comes."""

    def requests(self) -> Iterator[Requests]:
        """All, by time; the same each time."""


class TokenRange(NamedTuple):
    """Evenly distributed between both ends, which belong to it."""

    min: int
    max: int

    @classmethod
    def parse(cls, text: str) -> TokenRange:
        """`500` or `200-800`. Raises ValueError."""
        low, _, high = text.partition("-")
        try:
            parsed = cls(int(low), int(high or low))
        except ValueError:
            parsed = cls(0, 0)
        if not 1 <= parsed.min <= parsed.max:
            raise ValueError("expected a number of tokens from 1, or two as in 200-800")
        return parsed


class RateStage(NamedTuple):
    rate_per_s: float
    seconds: float

    @classmethod
    def parse_all(cls, text: str, *, seconds: float) -> tuple[RateStage, ...]:
        """`2:60,60:120`: rate and seconds of each stage; the last may leave its seconds out. Raises ValueError."""
        stages: list[RateStage] = []
        parts = text.split(",")
        for number, part in enumerate(parts, 1):
            rate, colon, length = part.partition(":")
            try:
                stage = cls(float(rate), float(length) if colon else seconds)
            except ValueError:
                stage = cls(math.nan, math.nan)
            left_out = not colon and number < len(parts)
            if left_out or not (0 <= stage.rate_per_s < math.inf and 0 < stage.seconds < math.inf):
                raise ValueError("expected requests per second, or stages of rate:seconds as in 2:60,60:120")
            stages.append(stage)
        return tuple(stages)


@dataclass(frozen=True, kw_only=True)
class PoissonWorkload:
    stages: tuple[RateStage, ...]
    prompt_tokens: TokenRange
    max_tokens: TokenRange
    seed: int = 0

    @property
    def duration_s(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def requests(self) -> Iterator[Requests]:
        source = np.random.default_rng(self.seed)
        begins = 0.0
        for rate, seconds in self.stages:
            at, ends = begins, begins + seconds
            while rate and at < ends:
                times = at + np.cumsum(source.exponential(1 / rate, _CHUNK))
                at = float(times[-1])
                times = times[: np.searchsorted(times, ends)]
                prompt, most = (
                    source.integers(lengths.min, lengths.max, len(times), endpoint=True)
                    for lengths in (self.prompt_tokens, self.max_tokens)
                )
                yield Requests(times.tolist(), prompt.tolist(), most.tolist())
            begins = ends


class TraceError(Exception):
    """What is wrong with a trace, for the person who made it."""


class TraceRow(NamedTuple):
    at_s: float
    prompt_tokens: int
    max_tokens: int


def read_trace(file: Path) -> tuple[TraceRow, ...]:
    """A CSV file with the columns at_s, prompt_tokens and max_tokens, in any order: at least one row, by time.

    Raises TraceError.
    """
    advice = "A trace is a CSV file with the columns at_s, prompt_tokens and max_tokens, none below 0, 1 and 1."
    rows: list[TraceRow] = []
    try:
        with file.open(newline="") as lines:
            reader = csv.DictReader(lines)
            for fields in reader:
                row = TraceRow(float(fields["at_s"]), int(fields["prompt_tokens"]), int(fields["max_tokens"]))
                if not (0 <= row.at_s < math.inf and row.prompt_tokens >= 1 and row.max_tokens >= 1):
                    told = ",".join(str(each) for each in row)
                    raise TraceError(f"{file}, line {reader.line_num}: {told} is out of range. {advice}")
                rows.append(row)
    except KeyError as error:
        raise TraceError(f"{file}: there is no column {error}. {advice}") from error
    except (ValueError, TypeError) as error:
        raise TraceError(f"{file}, line {reader.line_num}: {error}. {advice}") from error
    except OSError as error:
        raise TraceError(f"{file}: {error.strerror}. {advice}") from error
    if not rows:
        raise TraceError(f"{file}: there is not a single arrival. {advice}")
    return tuple(sorted(rows))


@dataclass(frozen=True)
class TraceWorkload:
    rows: tuple[TraceRow, ...]
    """By time, at least one."""

    @property
    def duration_s(self) -> float:
        return self.rows[-1].at_s

    def requests(self) -> Iterator[Requests]:
        yield Requests(*(list(column) for column in zip(*self.rows, strict=True)))
