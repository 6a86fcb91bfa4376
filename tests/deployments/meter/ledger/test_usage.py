from __future__ import annotations

import random
from typing import Any

import pytest
import sqlalchemy as sa

from deployments.contracts import Settlement, UsageDimension, UsageQuery, UsageRow
from deployments.meter.ledger.rows import write_settlements
from deployments.meter.ledger.usage import read_usage, used_since
from tests.deployments.accounts import account, settlement

DAY = 1_750_032_000
"""The beginning of a day of UTC, Unix time in seconds."""
HOUR = 3600


def used(
    number: int,
    at: float,
    *,
    prompt: int = 10,
    cached: int = 0,
    completion: int = 1,
    status: Any = "finished",
    **of: Any,
) -> Settlement:
    return settlement(
        f"cmpl-{number}",
        completion_tokens=completion,
        prompt_tokens=prompt,
        cached_tokens=cached,
        status=status,
        account=account(f"cmpl-{number}", started_at=at, prompt_price=1.0, completion_price=2.0, **of),
    )


def usage(engine: sa.Engine, *by: UsageDimension, since: float = DAY, **options: Any) -> list[UsageRow]:
    with engine.connect() as connection:
        return read_usage(connection, UsageQuery(since=since, by=by, **options))


@pytest.fixture
def filled(engine: sa.Engine) -> sa.Engine:
    settlements = [
        used(1, DAY, team="red", model="a", key_id="k1"),
        used(2, DAY + 59.9, team="red", model="a", key_id="k2", cached=4),
        used(3, DAY + 60, model="b", key_id="k3", completion=5, dialect="D1"),
        used(4, DAY + HOUR, model="b", key_id="k3", status="cancelled"),
        used(5, DAY + 24 * HOUR, team="blue", model="B", key_id="k1", prompt=1_000_000),
    ]
    write_settlements(engine, settlements)
    return engine


def test_without_dimensions_everything_is_one_row(filled: sa.Engine) -> None:
    [row] = usage(filled)
    assert row == UsageRow(5, 1_000_040, 4, 9, row.cost)
    assert row.cost == pytest.approx(1.000058)


def test_a_ledger_without_rows_has_no_usage(engine: sa.Engine) -> None:
    assert usage(engine) == []
    assert usage(engine, "model", width_s=HOUR) == []
    assert usage(engine, "model", width_s=60, until=DAY + 1) == []


def test_each_dimension_has_its_name_and_texts_are_in_the_order_of_their_characters(filled: sa.Engine) -> None:
    assert [(row.model, row.requests) for row in usage(filled, "model")] == [("B", 1), ("a", 2), ("b", 2)]
    assert [(row.key, row.requests) for row in usage(filled, "key")] == [("k1", 2), ("k2", 1), ("k3", 2)]
    assert [(row.team, row.requests) for row in usage(filled, "team")] == [("", 2), ("blue", 1), ("red", 2)]
    assert [(row.dialect, row.requests) for row in usage(filled, "dialect")] == [("D1", 1), ("D3", 4)]
    assert [(row.status, row.requests) for row in usage(filled, "status")] == [("cancelled", 1), ("finished", 4)]


def test_buckets_come_before_groups_and_groups_in_the_order_asked_for(filled: sa.Engine) -> None:
    rows = usage(filled, "team", "model", width_s=24 * HOUR)
    assert [(row.begins_at, row.team, row.model, row.requests) for row in rows] == [
        (DAY, "", "b", 2),
        (DAY, "red", "a", 2),
        (DAY + 24 * HOUR, "blue", "B", 1),
    ]


@pytest.mark.parametrize(
    ("width_s", "expected"),
    [
        (60, [(DAY, 2), (DAY + 60, 1), (DAY + HOUR, 1)]),
        (HOUR, [(DAY, 3), (DAY + HOUR, 1)]),
        (24 * HOUR, [(DAY, 4)]),
        (None, [(None, 4)]),
    ],
)
def test_buckets_begin_at_multiples_of_their_width(
    filled: sa.Engine, width_s: int | None, expected: list[tuple[int | None, int]]
) -> None:
    rows = usage(filled, width_s=width_s, until=DAY + 24 * HOUR)
    assert [(row.begins_at, row.requests) for row in rows] == expected


def test_hours_are_told_whole(filled: sa.Engine) -> None:
    assert [row.begins_at for row in usage(filled, since=DAY + HOUR - 1, until=DAY + HOUR + 1, width_s=HOUR)] == [
        DAY,
        DAY + HOUR,
    ]
    assert [row.begins_at for row in usage(filled, since=DAY, until=DAY + HOUR, width_s=HOUR)] == [DAY]


def test_minutes_are_told_to_the_moment(filled: sa.Engine) -> None:
    assert [row.requests for row in usage(filled, since=DAY + 0.1, until=DAY + 60, width_s=60)] == [1]


def test_filters_are_met_all_at_once(filled: sa.Engine) -> None:
    [row] = usage(filled, key_ids=("k1", "k2"), teams=("red", ""), models=("a", "b"))
    assert row.requests == 2
    assert usage(filled, teams=("red",), models=("b",)) == []
    assert [row.requests for row in usage(filled, teams=("",), width_s=60, until=DAY + HOUR + 1)] == [1, 1]
    assert usage(filled, key_ids=()) == []


def test_minutes_of_more_than_a_day_are_refused_in_words(engine: sa.Engine) -> None:
    with pytest.raises(ValueError, match="24 hours at most"):
        usage(engine, until=DAY + 24 * HOUR + 1, width_s=60)
    with pytest.raises(ValueError, match="24 hours at most"):
        usage(engine, width_s=60)


def test_another_width_is_refused(engine: sa.Engine) -> None:
    with pytest.raises(ValueError, match="expected 60, 3600 or 86400, got 61"):
        usage(engine, width_s=61)


@pytest.mark.parametrize("seed", range(3))
def test_minutes_and_hours_add_up_to_the_same(engine: sa.Engine, seed: int) -> None:
    chance = random.Random(seed)
    write_settlements(
        engine,
        [
            used(
                number,
                # Often at the very edge of a minute.
                DAY + chance.randrange(12 * 60) * 60 + chance.choice([-2.4e-7, 0, chance.random() * 60]),
                model=chance.choice("ab"),
                team=chance.choice(["red", None]),
                completion=chance.randrange(100),
            )
            for number in range(1, 500)
        ],
    )
    since = DAY - HOUR
    whole, minutes, hours = (
        usage(engine, "model", "team", since=since, until=since + 24 * HOUR, width_s=width)
        for width in (None, 60, HOUR)
    )
    for parts in (minutes, hours):
        for row in whole:
            same = [part for part in parts if (part.model, part.team) == (row.model, row.team)]
            for name in ("requests", "prompt_tokens", "completion_tokens"):
                assert sum(getattr(part, name) for part in same) == getattr(row, name)
            assert sum(part.cost for part in same) == pytest.approx(row.cost)
    assert {part.begins_at // HOUR * HOUR for part in minutes if part.begins_at is not None} == {
        part.begins_at for part in hours
    }


def test_what_an_owner_has_used_since_a_day_began(filled: sa.Engine) -> None:
    expected = [
        (DAY, {"team": "red"}, 22, 24e-6),
        (DAY, {"key_id": "k1"}, 1_000_012, 1.000014),
        (DAY + 24 * HOUR, {"key_id": "k1"}, 1_000_001, 1.000002),
        (DAY, {"key_id": "nobody"}, 0, 0.0),
    ]
    with filled.connect() as connection:
        for since, owner, tokens, cost in expected:
            found = used_since(connection, since, **owner)
            assert found.tokens == tokens
            assert found.cost == pytest.approx(cost)
