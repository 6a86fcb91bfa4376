"""Accounts and settlements of requests that never ran, and an outbox that keeps what it is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deployments.contracts import Account, Settlement

__all__ = ["RecordedOutbox", "account", "settlement"]


class RecordedOutbox:
    """Of an engine replica."""

    def __init__(self) -> None:
        self.settled: list[tuple[str, Settlement]] = []
        """In their order, with the meter of each."""
        self.checkpoints: dict[str, Settlement] = {}
        """By request."""

    def __len__(self) -> int:
        return 0  # taken at once

    def put(self, meter: str, settlement: Settlement) -> None:
        self.checkpoints.pop(settlement.account.request_id, None)
        self.settled.append((meter, settlement))

    def checkpoint(self, _meter: str, settlement: Settlement) -> None:
        self.checkpoints[settlement.account.request_id] = settlement

    def withdraw(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.checkpoints.pop(request_id, None)


def account(request_id: str, **fields: Any) -> Account:
    """Of a request of one choice and two prompt tokens."""
    return Account(**{"key_id": "key", "model": "m", "prompt_tokens": 2, "choices": 1, **fields}, request_id=request_id)


def settlement(request_id: str, completion_tokens: int = 1, **fields: Any) -> Settlement:
    """Of a request that its ingress saw finish; `account` may be among the fields."""
    defaults: dict[str, Any] = {
        "account": account(request_id),
        "status": "finished",
        "prompt_tokens": 2,
        "cached_tokens": 0,
        "resumes": 0,
        "first_token_s": None,
        "total_s": 1.0,
    }
    return Settlement(**{**defaults, **fields}, completion_tokens=completion_tokens)
