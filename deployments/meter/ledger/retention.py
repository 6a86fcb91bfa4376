"""Removing rows of the ledger that are old enough, and with them what they are in the sums of their hours.

What must stay: the quotas of a month are read from the sums since it began, and a settlement that comes again, or the
word of a better witness, is known for that by the row of its request (deployments/meter/ledger/rows.py). An outbox
sends what it has until it is acknowledged, so late words come after an outage; a row that was written lately stays,
however old its request is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from deployments.contracts import USAGE_SUMS
from deployments.meter.ledger.database import in_transaction
from deployments.meter.ledger.periods import period_at
from deployments.meter.ledger.rows import delete_rows
from deployments.meter.ledger.schema import REQUESTS

__all__ = ["SETTLED_AFTER_S", "Pruned", "kept_from", "prunable", "prune"]

_DAY_S: Final = 86_400.0
SETTLED_AFTER_S: Final = 7 * _DAY_S
"""Since a row was last written, after which nothing more is expected of its request: longer than an outage of the
database or of a node may last whose spool or outbox is sent when it is over."""
_AT_ONCE: Final = 500
"""Rows of one transaction: on SQLite others wait for it to write."""

_COLUMNS: Final = (
    *("id", "started_at", "key_id", "team", "model", "dialect", "status"),
    *USAGE_SUMS[1:],
)


class Pruned(NamedTuple):
    requests: int
    tokens: int


class _Place(NamedTuple):
    """Of a row, in the order in which they are gone through."""

    started_at: float
    id: str


def kept_from(now: float) -> float:
    """When those requests begin whose rows all stay: with the month, or SETTLED_AFTER_S ago. On the first of a month
    the one before counts as well: another clock may not have come so far."""
    return min(period_at("month", now - _DAY_S).begins_at, now - SETTLED_AFTER_S)


def prunable(engine: sa.Engine, before: float, now: float) -> Iterator[Pruned]:
    """What `prune` would remove, counted in portions."""
    place = _Place(0.0, "")
    while True:
        with engine.connect() as connection:
            rows = _rows(connection, _oldest(place, before, now))
        if not rows:
            return
        place = _place(rows[-1])
        yield _sum(rows)


def prune(engine: sa.Engine, before: float, now: float) -> Iterator[Pruned]:
    """Removes the rows of requests that arrived before `before` and before `kept_from`, in transactions of bounded
    size, and tells of each. Rows that another changes just now stay. Between transactions it leaves as much time to
    others as one took."""
    place = _Place(0.0, "")
    while True:
        began_s = time.monotonic()
        rows = in_transaction(engine, partial(_remove_oldest, place=place, before=before, now=now))
        if not rows:
            return
        place = _place(rows[-1])
        took_s = time.monotonic() - began_s
        yield _sum(rows)
        time.sleep(took_s)


def _remove_oldest(connection: sa.Connection, *, place: _Place, before: float, now: float) -> list[Mapping[str, Any]]:
    rows = _rows(connection, _oldest(place, before, now).with_for_update(skip_locked=True))
    if rows:
        delete_rows(connection, rows)
    return rows


def _oldest(after: _Place, before: float, now: float) -> sa.Select[Any]:
    columns = REQUESTS.c
    return (
        sa.select(*(columns[name] for name in _COLUMNS))
        .where(
            columns.started_at >= after.started_at,  # for the index
            sa.tuple_(columns.started_at, columns.id) > sa.tuple_(*after),
            columns.started_at < min(before, kept_from(now)),
            columns.recorded_at < now - SETTLED_AFTER_S,
        )
        .order_by(columns.started_at, columns.id)
        .limit(_AT_ONCE)
    )


def _rows(connection: sa.Connection, statement: sa.Select[Any]) -> list[Mapping[str, Any]]:
    return [dict(row) for row in connection.execute(statement).mappings()]


def _place(row: Mapping[str, Any]) -> _Place:
    return _Place(row["started_at"], row["id"])


def _sum(rows: list[Mapping[str, Any]]) -> Pruned:
    return Pruned(len(rows), sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows))
