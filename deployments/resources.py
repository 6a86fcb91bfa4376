"""The JSON of keys, teams and usage, the same over HTTP and from the command line, which need no FastAPI for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple, get_args

import msgspec

from deployments.contracts import KeyRecord, Limits, TeamRecord, UsageDimension, UsageRow

__all__ = ["BUCKETS_S", "Grouping", "key_card", "parse_grouping", "team_card", "usage_card"]

BUCKETS_S: Final = {"day": 86_400, "hour": 3600}


class Grouping(NamedTuple):
    by: tuple[UsageDimension, ...]
    width_s: int | None
    """Of a bucket, see UsageQuery."""


def parse_grouping(names: Iterable[str], allowed: Iterable[str] = (*BUCKETS_S, *get_args(UsageDimension))) -> Grouping:
    """What to sum usage by; names that come twice count once. Raises ValueError that says what was expected."""
    by: list[UsageDimension] = []
    width_s: int | None = None
    for name in dict.fromkeys(names):
        if name not in allowed:
            raise ValueError(f"got {name[:100]!r}, expected some of {', '.join(allowed)}")
        if name not in BUCKETS_S:
            by.append(msgspec.convert(name, UsageDimension))
        elif width_s is not None:
            raise ValueError("expected day or hour, not both")
        else:
            width_s = BUCKETS_S[name]
    return Grouping(tuple(by), width_s)


def key_card(record: KeyRecord, secret: str | None = None) -> dict[str, Any]:
    """`secret` is the key itself, where it has just been made."""
    card = {
        "object": "key",
        "id": record.id,
        "name": record.name,
        "prefix": record.prefix,
        "owner": record.owner,
        "team": record.team,
        "labels": record.labels,
        "models": record.models,
        "limits": _limits(record.limits),
        "created_at": int(record.created_at),
        "expires_at": None if record.expires_at is None else int(record.expires_at),
        "revoked_at": None if record.revoked_at is None else int(record.revoked_at),
    }
    return card if secret is None else card | {"key": secret}


def team_card(record: TeamRecord) -> dict[str, Any]:
    return {
        "object": "team",
        "name": record.name,
        "limits": _limits(record.limits),
        "created_at": int(record.created_at),
    }


def usage_card(row: UsageRow, grouping: Grouping) -> dict[str, Any]:
    """What it is grouped by comes first; keys without a team have null as theirs."""
    card: dict[str, Any] = {"object": "usage"}
    if grouping.width_s is not None:
        card["begins_at"] = row.begins_at
    for dimension in grouping.by:
        card[dimension] = getattr(row, dimension) or None
    return card | {
        "requests": row.requests,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
        "total_tokens": row.prompt_tokens + row.completion_tokens,
        "cost": row.cost,
    }


def _limits(limits: Limits) -> dict[str, Any]:
    return msgspec.structs.asdict(limits)
