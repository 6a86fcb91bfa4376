"""What a load test measures of tokens: distributions and a timeline that add up over processes, in bounded memory.

Free of locust. A distribution has buckets that are 2% wide, so a percentile is at most 1% off; a timeline has one entry
a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

__all__ = ["Distribution", "Second", "TokenMetrics"]

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


class Second(msgspec.Struct):
    """What happened in one."""

    tokens: int = 0
    begun: int = 0
    ended: int = 0
    failed: int = 0
    """Among those that ended."""


class TokenMetrics(msgspec.Struct):
    """Of one process since its last report, or of all together."""

    first_token_s: Distribution = msgspec.field(default_factory=Distribution)
    between_tokens_s: Distribution = msgspec.field(default_factory=Distribution)
    """Between two arrivals of text in a stream."""
    end_to_end_s: Distribution = msgspec.field(default_factory=Distribution)
    stream_tokens_per_s: Distribution = msgspec.field(default_factory=Distribution)
    """Of each stream from its first token to its end."""
    seconds: dict[int, Second] = {}
    """By Unix time."""
    errors: dict[str, int] = {}
    requests: int = 0
    """That ended, well or not."""
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

    def second(self, now: float) -> Second:
        return self.seconds.setdefault(int(now), Second())

    def fail(self, now: float, reason: str) -> None:
        """A request ended badly."""
        self.requests += 1
        self.errors[reason] = self.errors.get(reason, 0) + 1
        second = self.second(now)
        second.ended += 1
        second.failed += 1

    def merge(self, other: TokenMetrics) -> None:
        for name in ("first_token_s", "between_tokens_s", "end_to_end_s", "stream_tokens_per_s"):
            getattr(self, name).merge(getattr(other, name))
        for at, second in other.seconds.items():
            mine = self.seconds.setdefault(at, Second())
            mine.tokens += second.tokens
            mine.begun += second.begun
            mine.ended += second.ended
            mine.failed += second.failed
        for reason, count in other.errors.items():
            self.errors[reason] = self.errors.get(reason, 0) + count
        self.requests += other.requests
        self.asked_prompt_tokens += other.asked_prompt_tokens
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens

    def summary(self) -> Mapping[str, float]:
        """Milliseconds and rates, by the names under which they are shown."""
        seconds = max(1, len(self.seconds))
        told: dict[str, float] = {
            "requests": self.requests,
            "failed": self.failed,
            "requests/s": self.requests / seconds,
            "prompt tokens": self.prompt_tokens,
            "completion tokens": self.completion_tokens,
            "completion tokens/s": self.completion_tokens / seconds,
            "tokens/s of a stream, median": self.stream_tokens_per_s.percentile(50),
        }
        for name, distribution in (
            ("first token", self.first_token_s),
            ("between tokens", self.between_tokens_s),
            ("end to end", self.end_to_end_s),
        ):
            for percent in (50, 95, 99):
                told[f"{name} p{percent}, ms"] = 1000 * distribution.percentile(percent)
        return told
