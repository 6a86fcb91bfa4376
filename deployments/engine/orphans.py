"""What an engine replica knows of the requests of its ingresses, so that it can settle them when an ingress is gone.

While an ingress lives, it is the witness of what its requests use, and tells the replica to forget each once it is
settled. When its step stream ends it may still live, if only the connection broke: then it opens another within
`GRACE_S`. If it does not, the replica settles what it knows, by its own count. Until then it is a note in the outbox,
which counts if the replica dies as well. Should the ingress live all the same, its word replaces the replica's in the
ledger. Free of Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from deployments.contracts import Account, Settlement, Submission

__all__ = ["GRACE_S", "OrphanedRequests", "Outbox", "Tab", "Tabs"]

log = structlog.get_logger()

GRACE_S: Final = 2.0


@dataclass
class Tab:
    """What one request has used here."""

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


class Tabs:
    """Those of one step stream, by request. Bounded by what its ingress submits before it settles."""

    def __init__(self) -> None:
        self._tabs: dict[str, Tab] = {}

    def __len__(self) -> int:
        return len(self._tabs)

    def open(self, submission: Submission, choice: int) -> Tab:
        """The request of `submission`, of which the engine is about to take on `choice`."""
        account = submission.account
        tab = self._tabs.setdefault(account.request_id, Tab(account, submission.meter))
        tab.tokens[choice] = submission.resumed_tokens
        tab.resumed += submission.resumed
        return tab

    def refuse(self, submission: Submission, choice: int) -> None:
        """The engine has not taken it on after all."""
        account = submission.account
        tab = self._tabs[account.request_id]
        del tab.tokens[choice]
        if not tab.tokens:
            del self._tabs[account.request_id]

    def release(self, request_ids: list[str]) -> None:
        """They are settled."""
        for request_id in request_ids:
            self._tabs.pop(request_id, None)

    def requests(self) -> list[str]:
        return list(self._tabs)

    def settlements(self) -> list[tuple[str, Settlement]]:
        """With the meter that each is for."""
        now = time.time()
        return [(tab.meter, tab.settlement(now)) for tab in self._tabs.values()]


class Outbox(Protocol):
    """What a replica needs of deployments/settlement/outbox.py."""

    def __len__(self) -> int: ...

    def put(self, meter: str, settlement: Settlement) -> None: ...

    def note(self, meter: str, settlement: Settlement) -> None: ...

    def withdraw(self, request_ids: Iterable[str]) -> None: ...


class OrphanedRequests:
    """The tabs of streams that have ended, until their ingress is back or given up. For use on one event loop."""

    def __init__(self, outbox: Outbox, *, grace_s: float = GRACE_S) -> None:
        self._outbox = outbox
        self._grace_s = grace_s
        self._left: dict[str, tuple[Tabs, asyncio.TimerHandle]] = {}

    @property
    def unsettled(self) -> int:
        """Settlements of requests without an ingress that no meter has acknowledged yet."""
        return len(self._outbox)

    def take(self, ingress: str, tabs: Tabs) -> None:
        """The stream of `ingress` with `tabs` has ended."""
        if len(tabs):
            self.returned(ingress)  # at most one stream of an ingress is open
            for meter, settlement in tabs.settlements():
                self._outbox.note(meter, settlement)
            timer = asyncio.get_running_loop().call_later(self._grace_s, self._give_up, ingress)
            self._left[ingress] = (tabs, timer)

    def returned(self, ingress: str) -> None:
        """It lives, and has moved its generations elsewhere: it settles them itself."""
        if (left := self._left.pop(ingress, None)) is not None:
            left[1].cancel()
            self._outbox.withdraw(left[0].requests())

    def close(self) -> None:
        """Waits for nobody any more."""
        for ingress in list(self._left):
            self._left[ingress][1].cancel()
            self._give_up(ingress)

    def _give_up(self, ingress: str) -> None:
        tabs, _ = self._left.pop(ingress)
        log.info("ingress gone, its requests are settled here", ingress=ingress, requests=len(tabs))
        for meter, settlement in tabs.settlements():
            log.info("orphan", request=settlement.account.request_id, parts=settlement.parts)
            self._outbox.put(meter, settlement)
