"""What a request has used, counted by the engine's side: for when its ingress cannot tell."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from deployments.contracts import Account, Settlement

__all__ = ["RequestUsage"]


@dataclass
class RequestUsage:
    """What one request has used on some replicas."""

    account: Account
    meter: str
    tokens: dict[int, int] = field(default_factory=dict)
    """Completion tokens by choice, those of earlier replicas included."""
    cached_tokens: int = 0
    resumed: int = 0
    """Choices that came from another replica."""
    first_token_at: float | None = None
    """Unix time in seconds."""

    def count(self, choice: int, tokens: int, cached_tokens: int) -> None:
        self.tokens[choice] += tokens
        self.cached_tokens = min(self.cached_tokens + cached_tokens, self.account.prompt_tokens)
        if self.first_token_at is None:
            self.first_token_at = time.time()

    def settlement(self, now: float) -> Settlement:
        account = self.account
        return Settlement(
            account=account,
            status="disconnected",
            prompt_tokens=account.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=sum(self.tokens.values()),
            resumes=self.resumed,
            first_token_s=None if self.first_token_at is None else max(0.0, self.first_token_at - account.started_at),
            total_s=max(0.0, now - account.started_at),
            witness="engine",
            parts=self.tokens,
        )
