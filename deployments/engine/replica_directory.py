"""Which replicas each model's pool has, as Ray Serve last told this process.

`TargetedRouter` writes it, the ingress reads it. The state is apart from the router because Serve pickles the router
class by value: globals of its module would be copies in the process that uses it, those of an imported module are not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["ReplicaGone", "ReplicaSetChanged", "forget_replicas", "replicas_changed", "replicas_of", "watch_replicas"]

ReplicaSetChanged = Callable[[frozenset[str]], None]
"""Gets the unique ids of all running replicas of the application; called on the watcher's event loop."""


class ReplicaGone(Exception):
    """The replica that a call named is no longer in the pool."""


_watchers: dict[str, tuple[asyncio.AbstractEventLoop, ReplicaSetChanged]] = {}
_known: dict[str, frozenset[str]] = {}


def watch_replicas(application: str, changed: ReplicaSetChanged) -> None:
    """Call `changed` now if the replicas of `application` are known, and on every change, in the running loop.

    Takes the place of whoever watched the application before.
    """
    _watchers[application] = (asyncio.get_running_loop(), changed)
    if application in _known:
        changed(_known[application])


def replicas_of(application: str) -> frozenset[str]:
    """Unique ids of its running replicas, empty while none are known."""
    return _known.get(application, frozenset())


def forget_replicas(application: str) -> None:
    """Of an application that nobody asks for any more."""
    _watchers.pop(application, None)
    _known.pop(application, None)


def replicas_changed(application: str, replica_ids: frozenset[str]) -> None:
    """Called by the router, on whatever thread Serve runs it."""
    _known[application] = replica_ids
    if application in _watchers:
        loop, changed = _watchers[application]
        loop.call_soon_threadsafe(changed, replica_ids)
