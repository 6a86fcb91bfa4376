"""Which meter decides on whom: names of the meter's deployments, and the one that each owner belongs to.

The meter is split into deployments of one replica each, so that each has a name that outlives its process, and nobody
else decides on its owners while it is being replaced: limits stay exact. Rendezvous hashing moves only the owners it
must when their number changes.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Final

__all__ = ["GATEWAY", "meter_names", "shard_of"]

GATEWAY: Final = "gateway"
"""The Serve application of ingress and meters."""


def meter_names(shards: int) -> tuple[str, ...]:
    """Serve's names of the deployments of `shards` >= 1 meters; the first is always there."""
    return ("Meter", *(f"Meter-{shard}" for shard in range(1, shards)))


@lru_cache(maxsize=10_000)
def shard_of(owner: str, shards: int) -> int:
    """The number of the meter that `owner` (contracts.owner_of) belongs to."""
    return max(range(shards), key=lambda shard: blake2b(f"{shard} {owner}".encode(), digest_size=8).digest())
