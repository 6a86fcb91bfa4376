"""Ray Serve's request router for engine replicas: the caller names the replica, and learns who is in the pool.

The ingress chooses a replica by the load on its step streams (deployments/ingress/engine_pool.py), so this router
only carries the choice out: every call has the keyword `target`, a replica's unique id. Serve instantiates the class
in the calling process and tells it each change of the pool, which it passes on to `watch_replicas`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

__all__ = ["ReplicaGone", "ReplicaSetChanged", "TargetedRouter", "unwatch_replicas", "watch_replicas"]

ReplicaSetChanged = Callable[[frozenset[str]], None]
"""Gets the unique ids of all running replicas of the application; called on the watcher's event loop."""


class ReplicaGone(Exception):
    """The replica that a call named is no longer in the pool."""


_watchers: dict[str, tuple[asyncio.AbstractEventLoop, ReplicaSetChanged]] = {}
_known: dict[str, frozenset[str]] = {}


def watch_replicas(application: str, changed: ReplicaSetChanged) -> None:
    """Call `changed` now if the replicas of `application` are known, and on every change, in the running loop."""
    _watchers[application] = (asyncio.get_running_loop(), changed)
    if application in _known:
        changed(_known[application])


def unwatch_replicas(application: str) -> None:
    """Forget the application: should it come back, its replicas are others."""
    _watchers.pop(application, None)
    _known.pop(application, None)


class TargetedRouter(RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Routes each call to the replica named by its keyword `target`, or nowhere."""

    @property
    def supports_rejection_protocol(self) -> bool:
        return False  # an engine replica refuses work by its answer, so the extra round trip buys nothing

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        target = pending_request.kwargs.get("target") if pending_request is not None else None
        for replica in candidate_replicas:
            if replica.replica_id.unique_id == target:
                # Serve probes replicas whose queue length it does not know, which would cost a round trip every
                # few seconds; the length of the queue is the pool's business, not Serve's.
                self.replica_queue_len_cache.update(replica.replica_id, 0)
                return [[replica]]
        # Serve would ask again for ever, in a tight loop that starves the calling process. Failing the call and then
        # naming any replica ends the routing, and the call raises ReplicaGone.
        if pending_request is not None and not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGone(f"replica {target} is not in the pool"))
        return [candidate_replicas[:1]]

    def update_replicas(self, replicas: list[RunningReplica]) -> Any:
        result = super().update_replicas(replicas)
        application = self.app_name
        _known[application] = frozenset(replica.replica_id.unique_id for replica in replicas)
        if application in _watchers:
            loop, changed = _watchers[application]
            loop.call_soon_threadsafe(changed, _known[application])
        return result
