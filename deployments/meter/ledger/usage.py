"""Reading the ledger: what was used, by whom and when.

From the sums per hour, so that the time it takes does not grow with the number of requests; only buckets of a minute
come from the rows themselves, for at most a day.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from deployments.contracts import USAGE_SUMS, UsageDimension, UsageQuery, UsageRow
from deployments.meter.ledger.database import multiple_below
from deployments.meter.ledger.schema import REQUESTS, USAGE_HOURS

__all__ = ["Used", "read_usage", "used_since"]

_MINUTE_S: Final = 60
_HOUR_S: Final = 3600
_DAY_S: Final = 86_400


class Used(NamedTuple):
    tokens: int
    """Prompt and completion."""
    cost: float


def read_usage(connection: sa.Connection, query: UsageQuery) -> list[UsageRow]:
    """The sums that `query` asks for, by bucket and then by group, in the order of `query.by`.

    Raises ValueError, in words for the caller, for another width, and for minutes of more than a day.
    """
    source, begins_at = _per_minute(connection, query) if query.width_s == _MINUTE_S else _per_hour(query)
    columns: dict[UsageDimension, sa.ColumnElement[str]] = {
        "model": source.c.model,
        "key": source.c.key_id,
        "team": source.c.team,
        "dialect": source.c.dialect,
        "status": source.c.status,
    }
    groups: list[sa.ColumnElement[Any]] = [columns[dimension] for dimension in query.by]
    if begins_at is not None:
        groups.insert(0, begins_at)
    sums = [sa.func.sum(source.c[name]) for name in USAGE_SUMS]
    # A single group is there even of no rows at all.
    statement = sa.select(*groups, *sums).group_by(*groups).having(sa.func.sum(source.c.requests) > 0)
    for column, values in (
        (source.c.key_id, query.key_ids),
        (source.c.team, query.teams),
        (source.c.model, query.models),
    ):
        if values is not None:
            statement = statement.where(column.in_(values))
    usage = []
    # Sorted here: each database has an order of texts of its own.
    for *group, requests, prompt, cached, completion, cost in sorted(connection.execute(statement)):
        bucket = None if begins_at is None else int(group.pop(0))
        labels = dict(zip(query.by, group, strict=True))
        usage.append(UsageRow(int(requests), int(prompt), int(cached), int(completion), float(cost), bucket, **labels))
    return usage


def used_since(connection: sa.Connection, since: float, *, key_id: str | None = None, team: str | None = None) -> Used:
    """What a key or a team (the one that is given) has used in the hours from `since`, which begins one."""
    columns = USAGE_HOURS.c
    owner = columns.key_id == key_id if team is None else columns.team == team
    tokens, cost = connection.execute(
        sa.select(sa.func.sum(columns.prompt_tokens + columns.completion_tokens), sa.func.sum(columns.cost)).where(
            owner, columns.hour >= int(since)
        )
    ).one()
    return Used(int(tokens or 0), float(cost or 0.0))


def _per_hour(query: UsageQuery) -> tuple[sa.FromClause, sa.ColumnElement[int] | None]:
    """Where to read the sums of whole hours, and when the bucket of each row begins."""
    if query.width_s not in (None, _HOUR_S, _DAY_S):
        raise ValueError(f"width_s: expected {_MINUTE_S}, {_HOUR_S} or {_DAY_S}, got {query.width_s}")
    hour = USAGE_HOURS.c.hour
    chosen = sa.select(USAGE_HOURS).where(hour >= math.floor(query.since / _HOUR_S) * _HOUR_S)
    if query.until is not None:
        chosen = chosen.where(hour < math.ceil(query.until / _HOUR_S) * _HOUR_S)
    source = chosen.subquery()
    return source, None if query.width_s is None else source.c.hour - source.c.hour % query.width_s


def _per_minute(connection: sa.Connection, query: UsageQuery) -> tuple[sa.FromClause, sa.ColumnElement[int]]:
    """The same of whole minutes, as they stand in the rows."""
    until = time.time() if query.until is None else query.until
    if until - query.since > _DAY_S:
        raise ValueError("buckets of a minute are told for 24 hours at most: ask for less time, or for hours")
    columns = REQUESTS.c
    source = (
        sa.select(
            multiple_below(connection.dialect, columns.started_at, _MINUTE_S).label("minute"),
            columns.key_id,
            sa.func.coalesce(columns.team, "").label("team"),
            columns.model,
            columns.dialect,
            columns.status,
            sa.literal(1).label("requests"),
            *(columns[name] for name in USAGE_SUMS[1:]),
        )
        .where(columns.started_at >= query.since, columns.started_at < until)
        .subquery()
    )
    return source, source.c.minute
