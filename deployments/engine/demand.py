"""What is asked of one engine replica lately, as it sees it: how much comes, how long it stays, how fast it leaves."""

from __future__ import annotations

__all__ = ["RecentRate", "ReplicaDemand"]

_ARRIVALS_HORIZON_S = 3.0
_ENDS_HORIZON_S = 10.0
_MEMORY = 0.05
"""Weight of each new generation in the means: the last twenty count."""


class RecentRate:
    """Something per second, averaged exponentially over about `horizon_s`."""

    def __init__(self, now: float, horizon_s: float) -> None:
        self._horizon_s = horizon_s
        self._per_s = 0.0
        self._since = now
        self._count = 0

    def count(self, amount: int = 1) -> None:
        self._count += amount

    def read(self, now: float) -> float:
        elapsed_s = now - self._since
        if elapsed_s >= 1.0:
            weight = min(1.0, elapsed_s / self._horizon_s)
            self._per_s += weight * (self._count / elapsed_s - self._per_s)
            if self._per_s < 1e-3:
                self._per_s = 0.0  # one in a quarter of an hour is none
            self._since, self._count = now, 0
        return self._per_s


class ReplicaDemand:
    """Times in seconds of any steady clock."""

    def __init__(self, now: float) -> None:
        self._arrivals = RecentRate(now, _ARRIVALS_HORIZON_S)
        self._prompt_tokens = RecentRate(now, _ARRIVALS_HORIZON_S)
        self._ends = RecentRate(now, _ENDS_HORIZON_S)
        self.generated_tokens = 0.0
        """Of a generation that ended, the mean of late; 0 while none has."""
        self.uncached_share = 1.0
        """Of prompt tokens, what the prefix cache did not spare."""

    def arrived(self, prompt_tokens: int) -> None:
        self._arrivals.count()
        self._prompt_tokens.count(prompt_tokens)

    def prefilled(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A generation has its first token."""
        share = 1 - cached_tokens / prompt_tokens
        self.uncached_share += _MEMORY * (share - self.uncached_share)

    def ended(self, tokens: int) -> None:
        """A generation is over, with so many tokens."""
        self._ends.count()
        self.generated_tokens += (tokens - self.generated_tokens) * (_MEMORY if self.generated_tokens else 1.0)

    def arrivals_per_s(self, now: float) -> float:
        return self._arrivals.read(now)

    def prefill_tokens_per_s(self, now: float) -> float:
        """Prompt tokens that arrive per second, without those that the prefix cache will probably spare."""
        return self._prompt_tokens.read(now) * self.uncached_share

    def ends_per_s(self, now: float) -> float:
        """Generations that end per second: the drain rate of the queue."""
        return self._ends.read(now)
