"""Scenarios of load: small YAML files that say when requests come and what they ask for.

Closed loop: so many users, each with one request after another. Open loop: requests come when they come, whatever
became of those before; Poisson arrivals, or a trace. Free of locust.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from serve_app.planning.workload import TraceError, TraceRow, read_trace

__all__ = ["Arrival", "Kind", "Scenario", "ScenarioError", "arrivals", "load_scenario", "scenario_files"]

_FOLDER = Path(__file__).parents[1] / "scenarios"


class ScenarioError(Exception):
    """What is wrong with a scenario, for the person who wrote it."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Model):
    """Tokens, evenly distributed between both ends, which belong to it."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def draw(self, source: random.Random) -> int:
        return source.randint(self.min, self.max)


class Kind(_Model):
    """What a request, or a conversation of several, asks for."""

    weight: PositiveFloat = 1.0
    prompt_tokens: Range
    """New ones in each turn."""
    max_tokens: Range
    stream: bool = True
    n: PositiveInt = 1
    shared_prefix_tokens: Annotated[int, Field(ge=0)] = 0
    """Before each first turn: a system prompt, say."""
    prefixes: PositiveInt = 1
    """How many different ones there are."""
    turns: PositiveInt = 1
    """Each repeats what was said before it."""


class UserStage(_Model):
    users: Annotated[int, Field(ge=0)]
    seconds: PositiveFloat


class Closed(_Model):
    stages: Annotated[list[UserStage], Field(min_length=1)]
    think_s: Annotated[float, Field(ge=0)] = 0.0
    """Between a user's requests."""


class RateStage(_Model):
    rate_per_s: PositiveFloat
    seconds: PositiveFloat


class Open(_Model):
    stages: Annotated[list[RateStage], Field(min_length=1)]
    max_open: PositiveInt = 2000
    """Requests under way in one process; what comes beyond is not sent, and counts as failed."""


class Trace(_Model):
    file: Path
    """CSV with the columns at_s, prompt_tokens, max_tokens, in any order; beside the scenario if it is relative."""
    speed: PositiveFloat = 1.0
    max_open: PositiveInt = 2000


class Scenario(_Model):
    name: str
    description: str
    closed: Closed | None = None
    open: Open | None = None
    trace: Trace | None = None
    requests: list[Kind] = []
    exact_tokens: bool = True
    """Ask for `max_tokens` whatever the model says (`ignore_eos`), and count anything else as a failure."""
    allowed_failures_percent: Annotated[float, Field(ge=0, le=100)] = 0.0

    @model_validator(mode="after")
    def _one_way(self) -> Scenario:
        given = [name for name in ("closed", "open", "trace") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of closed, open and trace is needed, not {' and '.join(given) or 'none'}")
        if (self.trace is None) != bool(self.requests):
            raise ValueError("requests belong to closed and open; a trace brings its own")
        return self

    @property
    def seconds(self) -> float:
        """From the first request that may come to the last."""
        if self.trace is not None:
            return _rows(self.trace.file)[-1].at_s / self.trace.speed
        section = self.closed or self.open
        assert section is not None
        return sum(stage.seconds for stage in section.stages)

    @property
    def max_open(self) -> int:
        """Of an open loop, in one process."""
        section = self.open or self.trace
        assert section is not None
        return section.max_open

    def scaled(self, seconds: float) -> Scenario:
        """The same shape within `seconds`; as it is for 0."""
        if not seconds or not self.seconds:
            return self
        factor = seconds / self.seconds
        if self.trace is not None:
            return self.model_copy(update={"trace": self.trace.model_copy(update={"speed": self.trace.speed / factor})})
        way = "closed" if self.closed is not None else "open"
        section = getattr(self, way)
        stages = [stage.model_copy(update={"seconds": stage.seconds * factor}) for stage in section.stages]
        return self.model_copy(update={way: section.model_copy(update={"stages": stages})})

    @property
    def interval_s(self) -> int:
        """Of the timeline: some 600 points, however long it takes."""
        return max(1, math.ceil(self.seconds / 600))

    def kind(self, source: random.Random) -> Kind:
        """One of `requests`, by weight."""
        return source.choices(self.requests, [kind.weight for kind in self.requests])[0]


class Arrival(NamedTuple):
    at_s: float
    """After the start."""
    kind: Kind


def arrivals(scenario: Scenario, seed: int) -> Iterator[Arrival]:
    """Of an open loop, in the order in which they come; the same for the same seed."""
    if scenario.trace is not None:
        yield from _trace(scenario.trace)
    elif scenario.open is not None:
        source = random.Random(seed)
        begins_s = 0.0
        for stage in scenario.open.stages:
            at_s = begins_s
            while (at_s := at_s + source.expovariate(stage.rate_per_s)) < begins_s + stage.seconds:
                yield Arrival(at_s, scenario.kind(source))
            begins_s += stage.seconds


def _trace(trace: Trace) -> Iterator[Arrival]:
    for row in _rows(trace.file):
        prompt, most = (Range(min=tokens, max=tokens) for tokens in (row.prompt_tokens, row.max_tokens))
        yield Arrival(row.at_s / trace.speed, Kind(prompt_tokens=prompt, max_tokens=most))


@lru_cache(maxsize=1)
def _rows(file: Path) -> tuple[TraceRow, ...]:
    """At least one, by time. Raises ScenarioError."""
    try:
        return read_trace(file)
    except TraceError as error:
        raise ScenarioError(str(error)) from error


def scenario_files() -> list[Path]:
    """Those that come with Millstream."""
    return sorted(_FOLDER.glob("*.yaml"))


def load_scenario(name: str) -> Scenario:
    """By the name of one that comes with Millstream, or from a file. Raises ScenarioError."""
    file = Path(name) if name.endswith(".yaml") else _FOLDER / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(each.stem for each in scenario_files())
        raise ScenarioError(f"There is no scenario '{name}'. There are {known}; or name a .yaml file of your own.")
    try:
        fields = yaml.safe_load(file.read_text())
        if not isinstance(fields, dict):
            raise ScenarioError(f"{file}: expected keys such as description, closed and requests")
        scenario = Scenario.model_validate({"name": file.stem, **fields})
    except yaml.YAMLError as error:
        raise ScenarioError(f"{file}: {error}") from error
    except ValidationError as error:
        wrong = [f"  {'.'.join(map(str, each['loc'])) or 'scenario'}: {each['msg']}" for each in error.errors()]
        raise ScenarioError("\n".join([f"{file}:", *wrong])) from error
    if scenario.trace is not None and not scenario.trace.file.is_absolute():
        trace = scenario.trace.model_copy(update={"file": file.parent / scenario.trace.file})
        scenario = scenario.model_copy(update={"trace": trace})
    if scenario.trace is not None:
        _rows(scenario.trace.file)  # wrong here rather than in the middle of a run
    return scenario
