"""What a load test measures of tokens: distributions and a timeline that add up over processes, in bounded memory.

Free of locust. A distribution has buckets that are 2% wide, so a percentile is at most 1% off; a timeline has one entry
for each `interval_s`, which grows with the length of the run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Final

import msgspec

__all__ = ["Distribution", "Interval", "TokenMetrics"]

_GROWTH: Final = math.log(1.02)


class Distribution(msgspec.Struct):
    """Of positive values."""

    buckets: dict[int, int] = {}
    """How many by bucket; bucket b goes from 1.02^b to 1.02^(b + 1)."""
    count: int = 0
    total: float = 0.0

    def add(self, value: float) -> None:
        bucket = math.floor(math.log(max(value, 1e-9)) / _GROWTH)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        self.total += value

    def merge(self, other: Distribution) -> None:
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.count += other.count
        self.total += other.total

    def percentile(self, percent: float) -> float:
        """0 when there is nothing."""
        left = percent / 100 * self.count
        for bucket in sorted(self.buckets):
            left -= self.buckets[bucket]
            if left <= 1e-9:
                return math.exp((bucket + 0.5) * _GROWTH)
        return 0.0

    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


class Interval(msgspec.Struct):
    """What happened in one."""

    tokens: int = 0
    begun: int = 0
    ended: int = 0
    failed: int = 0
    """Among those that ended."""
    first_token_s: Distribution = msgspec.field(default_factory=Distribution)
    between_tokens_s: Distribution = msgspec.field(default_factory=Distribution)

    def merge(self, other: Interval) -> None:
        self.tokens += other.tokens
        self.begun += other.begun
        self.ended += other.ended
        self.failed += other.failed
        self.first_token_s.merge(other.first_token_s)
        self.between_tokens_s.merge(other.between_tokens_s)


class TokenMetrics(msgspec.Struct):
    """Of one process since its last report, or of all together."""

    interval_s: int = 1
    """The same in all processes of a run."""
    timeline: dict[int, Interval] = {}
    """By the Unix time at which an interval begins."""
    first_token_s: Distribution = msgspec.field(default_factory=Distribution)
    between_tokens_s: Distribution = msgspec.field(default_factory=Distribution)
    """Between two arrivals of text in a choice of a stream; several texts in one read are one arrival."""
    bunched: int = 0
    """Texts that came together with the one before."""
    end_to_end_s: Distribution = msgspec.field(default_factory=Distribution)
    stream_tokens_per_s: Distribution = msgspec.field(default_factory=Distribution)
    """Of each stream from its first token to its end."""
    late_s: Distribution = msgspec.field(default_factory=Distribution)
    """How long after its time an arrival of an open loop was sent: the load generator's own slowness."""
    errors: dict[str, int] = {}
    requests: int = 0
    """That ended, well or not."""
    abandoned: int = 0
    """Cut off because the run was over; no part of `requests`."""
    asked_prompt_tokens: int = 0
    prompt_tokens: int = 0
    """As the server counts those of the requests that ended well, and so the next."""
    completion_tokens: int = 0

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def failed_percent(self) -> float:
        return 100 * self.failed / self.requests if self.requests else 0.0

    @property
    def bunched_percent(self) -> float:
        """Of the texts after the first of their choice, those that came together with the one before."""
        texts = self.bunched + self.between_tokens_s.count
        return 100 * self.bunched / texts if texts else 0.0

    @property
    def duration_s(self) -> int:
        """From the first interval in which something happened to the last; at least one."""
        if not self.timeline:
            return self.interval_s
        return max(self.timeline) - min(self.timeline) + self.interval_s

    def at(self, now: float) -> Interval:
        """The interval of a Unix time."""
        return self.timeline.setdefault(int(now) // self.interval_s * self.interval_s, Interval())

    def first_token(self, now: float, seconds: float) -> None:
        self.first_token_s.add(seconds)
        self.at(now).first_token_s.add(seconds)

    def between_tokens(self, now: float, seconds: float) -> None:
        self.between_tokens_s.add(seconds)
        self.at(now).between_tokens_s.add(seconds)

    def fail(self, now: float, reason: str) -> None:
        """A request ended badly."""
        self.requests += 1
        self.errors[reason] = self.errors.get(reason, 0) + 1
        interval = self.at(now)
        interval.ended += 1
        interval.failed += 1

    def take(self) -> TokenMetrics:
        """All until now; what follows begins with nothing. In place: requests under way count into this object."""
        taken, nothing = copy.copy(self), TokenMetrics(self.interval_s)
        for name in self.__struct_fields__:
            setattr(self, name, getattr(nothing, name))
        return taken

    def merge(self, other: TokenMetrics) -> None:
        for name in ("first_token_s", "between_tokens_s", "end_to_end_s", "stream_tokens_per_s", "late_s"):
            getattr(self, name).merge(getattr(other, name))
        for at, interval in other.timeline.items():
            self.timeline.setdefault(at, Interval()).merge(interval)
        for reason, count in other.errors.items():
            self.errors[reason] = self.errors.get(reason, 0) + count
        self.bunched += other.bunched
        self.requests += other.requests
        self.abandoned += other.abandoned
        self.asked_prompt_tokens += other.asked_prompt_tokens
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens

    def summary(self) -> Mapping[str, float]:
        """Milliseconds and rates, by the names under which they are shown."""
        told: dict[str, float] = {
            "requests": self.requests,
            "failed": self.failed,
            "requests/s": self.requests / self.duration_s,
            "prompt tokens": self.prompt_tokens,
            "completion tokens": self.completion_tokens,
            "completion tokens/s": self.completion_tokens / self.duration_s,
            "tokens/s of a stream, median": self.stream_tokens_per_s.percentile(50),
        }
        for name, distribution in (
            ("first token", self.first_token_s),
            ("between tokens", self.between_tokens_s),
            ("end to end", self.end_to_end_s),
        ):
            for percent in (50, 95, 99):
                told[f"{name} p{percent}, ms"] = 1000 * distribution.percentile(percent)
        told["came together with the token before, %"] = self.bunched_percent
        if self.late_s.count:
            told["sent late p99, ms"] = 1000 * self.late_s.percentile(99)
        return told
