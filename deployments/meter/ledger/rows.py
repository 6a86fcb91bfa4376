"""The rows of the ledger: which settlement of a request holds, and the one transaction that writes rows and sums.

Each request has one row. A settlement of a better witness takes the place of a worse one's. Of the same witness the
first stays, but for engine replicas: each may know some of the choices, so theirs are merged. What a row changes from
and to is applied to the sums per hour in the same transaction, so that these are the sums of the rows at any time.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
import sqlalchemy as sa

from deployments.contracts import USAGE_SUMS, WITNESS_RANKS, Settlement
from deployments.meter.ledger.database import in_transaction, upsert
from deployments.meter.ledger.schema import REQUESTS, USAGE_HOURS

__all__ = ["RowChange", "delete_rows", "known_ids", "write_settlements"]

Row: TypeAlias = dict[str, Any]
"""By the names of the columns of REQUESTS."""

_IDS_PER_QUERY: Final = 500


class RowChange(NamedTuple):
    """What a transaction added to the ledger, or took from it when a row was corrected."""

    key_id: str
    team: str
    """Empty for keys without one."""
    model: str
    status: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: float


class _Group(NamedTuple):
    """The primary key of USAGE_HOURS."""

    hour: int
    key_id: str
    team: str
    model: str
    dialect: str
    status: str


_Differences: TypeAlias = dict[_Group, list[Any]]
"""In the order of USAGE_SUMS."""


def write_settlements(engine: sa.Engine, settlements: Collection[Settlement]) -> list[RowChange]:
    """Makes all of them part of the ledger in one transaction, and tells what that changed, summed per group.

    Raises what the database raises, and OverflowError or ValueError for numbers and texts that no row can hold; then
    nothing is written.
    """
    return _changes(in_transaction(engine, lambda connection: _write(connection, settlements)))


def delete_rows(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Takes them out of the ledger and of its sums. `rows` have what the sums are made of, and are locked."""
    for some in _portions([row["id"] for row in rows]):
        connection.execute(_DELETE, {"ids": some})
    _write_sums(connection, _differences(before=rows, after=()))


def known_ids(connection: sa.Connection, ids: Collection[str]) -> set[str]:
    """Those of `ids` that have a row."""
    return {found for some in _portions(ids) for found in connection.scalars(_KNOWN, {"ids": some})}


# --- which settlement holds -------------------------------------------------------------------------------------------


def _row(settlement: Settlement, recorded_at: float) -> Row:
    account = settlement.account
    return {
        "id": account.request_id,
        "key_id": account.key_id,
        "team": account.team,
        "model": account.model,
        "dialect": account.dialect,
        "caller_request_id": account.caller_request_id,
        "status": settlement.status,
        "witness": settlement.witness,
        "prompt_tokens": settlement.prompt_tokens,
        "cached_tokens": settlement.cached_tokens,
        "completion_tokens": settlement.completion_tokens,
        "parts": None if settlement.parts is None else _packed(settlement.parts),
        "choices": account.choices,
        "resumes": settlement.resumes,
        "reserved_tokens": account.reserved_tokens,
        "prompt_price": account.prompt_price,
        "completion_price": account.completion_price,
        "cost": (
            settlement.prompt_tokens * account.prompt_price + settlement.completion_tokens * account.completion_price
        )
        / 1e6,
        "started_at": account.started_at,
        "admitted_at": account.admitted_at,
        "queue_s": settlement.queue_s,
        "first_token_s": settlement.first_token_s,
        "total_s": settlement.total_s,
        "recorded_at": recorded_at,
    }


def _holding(current: Row, new: Row) -> Row:
    """What becomes of a request's row when a settlement arrives: `current` itself when nothing does."""
    rank, new_rank = WITNESS_RANKS[current["witness"]], WITNESS_RANKS[new["witness"]]
    if new_rank != rank:
        return new if new_rank > rank else current
    if new["witness"] == "engine" and current["parts"] is not None and new["parts"] is not None:
        return _merged(current, new)
    return current


def _merged(current: Row, new: Row) -> Row:
    """What two engine replicas know of one request, in whichever order they told it."""
    parts, others = _unpacked(current["parts"]), _unpacked(new["parts"])
    parts = {choice: max(parts.get(choice, 0), others.get(choice, 0)) for choice in sorted(parts | others)}
    completion_tokens = sum(parts.values())
    merged = current | {
        "parts": _packed(parts),
        "completion_tokens": completion_tokens,
        "cost": (current["prompt_tokens"] * current["prompt_price"] + completion_tokens * current["completion_price"])
        / 1e6,
        "cached_tokens": max(current["cached_tokens"], new["cached_tokens"]),
        "resumes": max(current["resumes"], new["resumes"]),
        "queue_s": max(_known(current["queue_s"], new["queue_s"]), default=None),
        "first_token_s": min(_known(current["first_token_s"], new["first_token_s"]), default=None),
        "total_s": max(current["total_s"], new["total_s"]),
    }
    return current if merged == current else merged | {"recorded_at": new["recorded_at"]}


def _packed(parts: dict[int, int]) -> str:
    return msgspec.json.encode(dict(sorted(parts.items()))).decode()


def _unpacked(parts: str) -> dict[int, int]:
    return msgspec.json.decode(parts, type=dict[int, int])


def _known(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]


# --- the transaction --------------------------------------------------------------------------------------------------


def _write(connection: sa.Connection, settlements: Collection[Settlement]) -> _Differences:
    recorded_at = time.time()
    stored = _stored(connection, {settlement.account.request_id for settlement in settlements})
    rows: dict[str, Row] = {}
    for settlement in settlements:
        row = _row(settlement, recorded_at)
        current = rows.get(row["id"]) or stored.get(row["id"])
        holding = row if current is None else _holding(current, row)
        if holding is not current:
            rows[row["id"]] = holding
    # In one order everywhere, so that two meters wait for each other and not both for both.
    changed = sorted(rows.values(), key=lambda row: row["id"])
    if added := [row for row in changed if row["id"] not in stored]:
        connection.execute(_INSERT, added)
    if corrected := [row for row in changed if row["id"] in stored]:
        connection.execute(_UPDATE, [row | {"row_id": row["id"]} for row in corrected])
    differences = _differences(before=[stored[row["id"]] for row in corrected], after=changed)
    _write_sums(connection, differences)
    return differences


# Made once: making statements and hashing them took two thirds of the CPU time of a transaction of one row (SQLite:
# 760 µs before, 250 µs after).
_IS_ONE_OF: Final = REQUESTS.c.id.in_(sa.bindparam("ids", expanding=True))
_KNOWN: Final = sa.select(REQUESTS.c.id).where(_IS_ONE_OF)
_STORED: Final = sa.select(REQUESTS).where(_IS_ONE_OF).with_for_update()
_INSERT: Final = sa.insert(REQUESTS)
_UPDATE: Final = sa.update(REQUESTS).where(REQUESTS.c.id == sa.bindparam("row_id"))
_DELETE: Final = sa.delete(REQUESTS).where(_IS_ONE_OF)
_DELETE_EMPTY: Final = sa.delete(USAGE_HOURS).where(
    *(USAGE_HOURS.c[name] == sa.bindparam(f"of_{name}") for name in _Group._fields), USAGE_HOURS.c.requests == 0
)


def _stored(connection: sa.Connection, ids: Collection[str]) -> dict[str, Row]:
    """The rows of these requests, which nobody else changes until the transaction ends."""
    return {
        row["id"]: dict(row) for some in _portions(ids) for row in connection.execute(_STORED, {"ids": some}).mappings()
    }


def _portions(ids: Collection[str]) -> Iterator[list[str]]:
    ordered = sorted(ids)
    for begin in range(0, len(ordered), _IDS_PER_QUERY):
        yield ordered[begin : begin + _IDS_PER_QUERY]


def _differences(*, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> _Differences:
    differences: _Differences = defaultdict(lambda: [0, 0, 0, 0, 0.0])
    for rows, sign in ((before, -1), (after, 1)):
        for row in rows:
            hour = math.floor(row["started_at"] / 3600) * 3600
            group = _Group(hour, row["key_id"], row["team"] or "", row["model"], row["dialect"], row["status"])
            sums = differences[group]
            sums[0] += sign
            for place, name in enumerate(USAGE_SUMS[1:], 1):
                sums[place] += sign * row[name]
    return {group: sums for group, sums in sorted(differences.items()) if any(sums)}


def _write_sums(connection: sa.Connection, differences: _Differences) -> None:
    if not differences:
        return
    rows = [{**group._asdict(), **dict(zip(USAGE_SUMS, sums, strict=True))} for group, sums in differences.items()]
    connection.execute(upsert(connection.dialect.name, USAGE_HOURS, USAGE_SUMS), rows)
    if left := [group for group, sums in differences.items() if sums[0] < 0]:
        connection.execute(
            _DELETE_EMPTY, [{f"of_{name}": value for name, value in group._asdict().items()} for group in left]
        )


def _changes(differences: _Differences) -> list[RowChange]:
    """Without hours and dialects."""
    totals: dict[tuple[str, str, str, str], list[Any]] = defaultdict(lambda: [0, 0, 0, 0, 0.0])
    for group, sums in differences.items():
        total = totals[group.key_id, group.team, group.model, group.status]
        total[:] = [value + more for value, more in zip(total, sums, strict=True)]
    return [RowChange(*labels, *sums) for labels, sums in totals.items() if any(sums)]
