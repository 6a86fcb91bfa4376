"""Old rows of the ledger are removed; what quotas and late settlements need is not, and sums stay those of the rows."""

from __future__ import annotations

import math
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from deployments.contracts import Settlement
from deployments.meter.ledger import retention
from deployments.meter.ledger.periods import period_at
from deployments.meter.ledger.retention import Pruned, kept_from, prunable, prune
from deployments.meter.ledger.rows import write_settlements
from deployments.meter.ledger.schema import REQUESTS, USAGE_HOURS
from deployments.meter.ledger.usage import used_since
from tests.deployments.accounts import account, settlement

DAY_S = 86_400.0
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()
MONTH_AT = datetime(2026, 11, 1, tzinfo=UTC).timestamp()


def record(engine: sa.Engine, *settlements: Settlement, recorded_at: float | None = None) -> None:
    """Recorded when they arrived, unless it is told otherwise."""
    write_settlements(engine, settlements)
    with engine.begin() as connection:
        for each in settlements:
            at = each.account.started_at if recorded_at is None else recorded_at
            connection.execute(
                sa.update(REQUESTS).where(REQUESTS.c.id == each.account.request_id).values(recorded_at=at)
            )


def arrived(request_id: str, at: float, tokens: int = 5, **fields: Any) -> Settlement:
    return settlement(request_id, tokens, account=account(request_id, started_at=at), **fields)


def ids(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return sorted(connection.scalars(sa.select(REQUESTS.c.id)))


def assert_sums_are_those_of_the_rows(engine: sa.Engine) -> None:
    sums: dict[tuple[Any, ...], list[float]] = {}
    with engine.connect() as connection:
        for row in connection.execute(sa.select(REQUESTS)).mappings():
            hour = math.floor(row["started_at"] / 3600) * 3600
            group = (hour, row["key_id"], row["team"] or "", row["model"], row["dialect"], row["status"])
            total = sums.setdefault(group, [0, 0, 0, 0, 0.0])
            amounts = (1, row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"], row["cost"])
            total[:] = [value + more for value, more in zip(total, amounts, strict=True)]
        told = {tuple(row[:6]): list(row[6:]) for row in connection.execute(sa.select(USAGE_HOURS))}
    assert told.keys() == sums.keys()
    for group, total in sums.items():
        assert told[group] == pytest.approx(total)


def test_what_arrived_before_is_removed_with_its_sums_and_the_rest_stays(engine: sa.Engine) -> None:
    before = NOW - 400 * DAY_S
    record(engine, *(arrived(f"old-{number}", before - 1 - number * 600) for number in range(20)))
    record(engine, arrived("same-hour", before), arrived("new", NOW))
    prompt = settlement("x").prompt_tokens
    assert list(prunable(engine, before, NOW)) == [Pruned(20, 20 * (prompt + 5))]
    assert len(ids(engine)) == 22
    assert list(prune(engine, before, NOW)) == [Pruned(20, 20 * (prompt + 5))]
    assert ids(engine) == ["new", "same-hour"]
    assert_sums_are_those_of_the_rows(engine)
    assert list(prune(engine, before, NOW)) == []


def test_rows_go_in_transactions_of_bounded_size_among_them_many_of_one_moment(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_AT_ONCE", 7)
    record(engine, *(arrived(f"old-{number:02}", NOW - 100 * DAY_S) for number in range(30)))
    for portions in (prunable(engine, NOW, NOW), prune(engine, NOW, NOW)):
        assert [each.requests for each in portions] == [7, 7, 7, 7, 2]
    assert ids(engine) == []
    assert_sums_are_those_of_the_rows(engine)


@pytest.mark.parametrize(
    ("now", "first_kept"),
    [
        (NOW, MONTH_AT),
        (MONTH_AT + 3 * DAY_S, MONTH_AT - 4 * DAY_S),  # seven days
        (MONTH_AT + 60.0, datetime(2026, 10, 1, tzinfo=UTC).timestamp()),  # elsewhere it may be October still
    ],
)
def test_quotas_of_the_month_stay_as_they_are_whatever_is_asked_for(
    engine: sa.Engine, now: float, first_kept: float
) -> None:
    assert kept_from(now) == first_kept
    record(engine, arrived("kept", first_kept), arrived("removed", first_kept - 1), recorded_at=first_kept - 1)
    with engine.connect() as connection:
        since = period_at("month", now).begins_at
        used = used_since(connection, since, key_id="key")
    assert [each.requests for each in prune(engine, now, now)] == [1]
    assert ids(engine) == ["kept"]
    with engine.connect() as connection:
        assert used_since(connection, since, key_id="key") == used


def test_a_row_that_was_written_lately_stays_so_that_its_settlement_may_come_again(engine: sa.Engine) -> None:
    old = NOW - 100 * DAY_S
    late = [arrived("late", old, witness="engine", parts={0: 5}), arrived("settled", old)]
    record(engine, late[1])
    record(engine, late[0], recorded_at=NOW - 7 * DAY_S)
    assert [each.requests for each in prune(engine, NOW, NOW)] == [1]
    assert ids(engine) == ["late"]
    write_settlements(engine, [late[0], arrived("late", old, 6)])  # again, and by a better witness
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.sum(USAGE_HOURS.c.completion_tokens))) == 6
    assert_sums_are_those_of_the_rows(engine)


@pytest.mark.slow
def test_the_ledger_is_written_meanwhile(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_AT_ONCE", 10)
    record(engine, *(arrived(f"old-{number:03}", NOW - 100 * DAY_S + number) for number in range(300)))
    ended = threading.Event()
    written: list[str] = []

    def write() -> None:
        while not ended.is_set():
            name = f"new-{len(written)}"
            write_settlements(engine, [arrived(name, NOW), arrived("old-299", NOW - 100 * DAY_S + 299)])
            written.append(name)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        portions = []
        for portion in prune(engine, NOW, NOW):
            seen = len(written)
            portions.append((portion.requests, seen))
    finally:
        ended.set()
        writer.join()
    assert portions[-1][1] > portions[0][1]  # it did not wait until all was removed
    assert set(written) <= set(ids(engine))
    assert_sums_are_those_of_the_rows(engine)


def test_rows_that_another_is_changing_stay(engine: sa.Engine) -> None:
    if engine.dialect.name == "sqlite":
        pytest.skip("one writer at a time")
    record(engine, arrived("busy", NOW - 100 * DAY_S), arrived("old", NOW - 100 * DAY_S))
    with engine.begin() as connection:
        connection.execute(sa.select(REQUESTS).where(REQUESTS.c.id == "busy").with_for_update())
        assert [each.requests for each in prune(engine, NOW, NOW)] == [1]
    assert ids(engine) == ["busy"]
