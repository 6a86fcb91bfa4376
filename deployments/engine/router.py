"""Ray Serve's request router for engine replicas: the caller names the replica, and learns who is in the pool.

The ingress chooses a replica by the load on its step streams (deployments/ingress/routing/engine_pool.py), so this
router only carries the choice out: every call has the keyword `target`, a replica's unique id. Serve makes a router in
the calling process and tells it each change of the pool, which it passes on to replica_directory.py.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.engine import replica_directory

__all__ = ["TargetedRouter"]


class TargetedRouter(RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Routes each call to the replica named by its keyword `target`, or fails it with ReplicaGone."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._unavailable: set[str] = set()
        """Replicas that a call has just not reached. Serve would send it again and again, as fast as it can, until the
        controller notices the loss; here it fails after the first time, and its caller decides when to try again."""

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_unavailable(replica_id)
        self._unavailable.add(replica_id.unique_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        # Answers the call here instead of returning a ranking. Given one, Serve looks the call up by its internal
        # request id, which all calls made for one HTTP request share: of two at once it answers one and goes round for
        # the other for ever, in a tight loop that starves the calling process. So would an empty ranking. Serve would
        # also probe replicas whose queue length it does not know, at the cost of a round trip every few seconds.
        if pending_request is not None and not pending_request.future.done():
            target = pending_request.kwargs.get("target")
            for replica in candidate_replicas:
                if replica.replica_id.unique_id == target and target not in self._unavailable:
                    pending_request.future.set_result(replica)
                    break
            else:
                self._unavailable.discard(target)
                gone = replica_directory.ReplicaGone(f"replica {target} is not in the pool, or not reached")
                pending_request.future.set_exception(gone)
            self._remove_pending_request_from_indices(pending_request)  # as Serve does when it answers a call
        return [candidate_replicas[:1]]  # not looked at, since the call is answered

    def update_replicas(self, replicas: list[RunningReplica]) -> Any:
        result = super().update_replicas(replicas)
        replica_directory.replicas_changed(
            self.app_name, frozenset(replica.replica_id.unique_id for replica in replicas)
        )
        return result
