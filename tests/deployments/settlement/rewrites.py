from __future__ import annotations

from deployments.settlement.record_rewrite import RecordRewrite

__all__ = ["written"]


def written(rewrite: RecordRewrite | None) -> None:
    """Returns once the thread of a rewrite that goes on has written what it was given."""
    if rewrite is not None:
        rewrite._writing.exception()
