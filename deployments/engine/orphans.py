"""What an engine replica knows of the requests of its ingresses, so that it can settle them when an ingress is gone.

While an ingress lives, it is the witness of what its requests use, and tells the replica to forget each once it is
settled. When its step stream ends it may still live, if only the connection broke: then it opens another within
`GRACE_S`. If it does not, the replica settles what it knows, by its own count. Until then it is a checkpoint in the
outbox, which counts if the replica dies as well. Should the ingress live all the same, its word replaces the replica's
in the ledger. Free of Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Final, Protocol

import structlog

from deployments.contracts import Settlement, Submission
from deployments.settlement.request_usage import RequestUsage

__all__ = ["GRACE_S", "OrphanedRequests", "Outbox", "RequestUsages"]

log = structlog.get_logger()

GRACE_S: Final = 2.0


class RequestUsages:
    """Those of one step stream, by request. Bounded by what its ingress submits before it settles."""

    def __init__(self) -> None:
        self._usages: dict[str, RequestUsage] = {}

    def __len__(self) -> int:
        return len(self._usages)

    def open(self, submission: Submission, choice: int) -> RequestUsage:
        """The request of `submission`, of which the engine is about to take on `choice`."""
        account = submission.account
        usage = self._usages.setdefault(account.request_id, RequestUsage(account, submission.meter))
        usage.tokens[choice] = submission.resumed_tokens
        usage.resumed += submission.resumed
        return usage

    def refuse(self, submission: Submission, choice: int) -> None:
        """The engine has not taken it on after all."""
        account = submission.account
        usage = self._usages[account.request_id]
        del usage.tokens[choice]
        if not usage.tokens:
            del self._usages[account.request_id]

    def release(self, request_ids: list[str]) -> None:
        """They are settled."""
        for request_id in request_ids:
            self._usages.pop(request_id, None)

    def requests(self) -> list[str]:
        return list(self._usages)

    def settlements(self) -> list[tuple[str, Settlement]]:
        """With the meter that each is for."""
        now = time.time()
        return [(usage.meter, usage.settlement(now)) for usage in self._usages.values()]


class Outbox(Protocol):
    """What a replica needs of deployments/settlement/outbox.py."""

    def __len__(self) -> int: ...

    def put(self, meter: str, settlement: Settlement) -> None: ...

    def checkpoint(self, meter: str, settlement: Settlement) -> None: ...

    def withdraw(self, request_ids: Iterable[str]) -> None: ...


class OrphanedRequests:
    """The usages of streams that have ended, until their ingress is back or given up. For use on one event loop."""

    def __init__(self, outbox: Outbox, *, grace_s: float = GRACE_S) -> None:
        self._outbox = outbox
        self._grace_s = grace_s
        self._left: dict[str, tuple[RequestUsages, asyncio.TimerHandle]] = {}

    @property
    def unsettled(self) -> int:
        """Settlements of requests without an ingress that no meter has acknowledged yet."""
        return len(self._outbox)

    def take(self, ingress: str, usages: RequestUsages) -> None:
        """The stream of `ingress` with `usages` has ended."""
        if len(usages):
            self.returned(ingress)  # at most one stream of an ingress is open
            for meter, settlement in usages.settlements():
                self._outbox.checkpoint(meter, settlement)
            timer = asyncio.get_running_loop().call_later(self._grace_s, self._give_up, ingress)
            self._left[ingress] = (usages, timer)

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
        usages, _ = self._left.pop(ingress)
        log.info("ingress gone, its requests are settled here", ingress=ingress, requests=len(usages))
        for meter, settlement in usages.settlements():
            log.info("orphan", request=settlement.account.request_id, parts=settlement.parts)
            self._outbox.put(meter, settlement)
