"""Ray Serve's request router for engine replicas: the caller names the replica, and learns who is in the pool.

The ingress chooses a replica by the load on its step streams (deployments/ingress/engine_pool.py), so this router
only carries the choice out: every call has the keyword `target`, a replica's unique id. Serve makes a router in the
calling process and tells it each change of the pool, which it passes on to replica_directory.py.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.engine import replica_directory

__all__ = ["TargetedRouter"]


class TargetedRouter(RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Routes each call to the replica named by its keyword `target`, or fails it with ReplicaGone."""

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
        # naming any replica ends the routing.
        if pending_request is not None and not pending_request.future.done():
            pending_request.future.set_exception(replica_directory.ReplicaGone(f"replica {target} is not in the pool"))
        return [candidate_replicas[:1]]

    def update_replicas(self, replicas: list[RunningReplica]) -> Any:
        result = super().update_replicas(replicas)
        replica_directory.replicas_changed(
            self.app_name, frozenset(replica.replica_id.unique_id for replica in replicas)
        )
        return result
