"""`millstream usage`: sums of the ledger for people and for programs."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from deployments.contracts import KeyDraft
from deployments.meter.keys.key_store import KeyStore
from deployments.meter.ledger.database import open_database
from serve_app.cli import app
from tests.deployments.ingress.memory_administration import record_hour
from tests.sqlite import new_database

DAY_S, HOUR_S = 86_400, 3600
DAY = 20_000 * DAY_S
"""2024-10-04, UTC."""
THEN = ("--since", "2024-10-04", "--until", "2024-10-06")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sa.Engine]:
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))
    engine = open_database(new_database(tmp_path / "ledger.db"))
    yield engine
    engine.dispose()


def usage(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["usage", *arguments])


def cards(*arguments: str) -> list[dict[str, Any]]:
    result = usage(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    answer: list[dict[str, Any]] = json.loads(result.stdout)
    return answer


def test_usage_is_by_model_of_the_last_thirty_days_unless_asked_otherwise(engine: sa.Engine) -> None:
    now = int(time.time()) // HOUR_S * HOUR_S
    record_hour(engine, now, model="a", requests=1)
    record_hour(engine, now - 29 * DAY_S, model="b", requests=2)
    record_hour(engine, now - 31 * DAY_S, model="a", requests=4)
    assert [(card["model"], card["requests"]) for card in cards()] == [("a", 1), ("b", 2)]
    assert [card["requests"] for card in cards("--since", "7d")] == [1]


def test_groups_and_buckets_are_as_asked_for(engine: sa.Engine) -> None:
    record_hour(engine, DAY, team="x", key_id="key-1")
    record_hour(engine, DAY + HOUR_S, key_id="key-2", status="failed")
    record_hour(engine, DAY + DAY_S, team="x", key_id="key-1")
    by_day = cards("--by", "team,day", *THEN)
    assert [(card["begins_at"], card["team"]) for card in by_day] == [(DAY, None), (DAY, "x"), (DAY + DAY_S, "x")]
    assert [card["begins_at"] for card in cards("--by", "hour", *THEN)] == [DAY, DAY + HOUR_S, DAY + DAY_S]
    by_status = cards("--by", "status,key,dialect", *THEN)
    assert [(card["status"], card["key"], card["dialect"], card["requests"]) for card in by_status] == [
        ("failed", "key-2", "D3", 1),
        ("finished", "key-1", "D3", 2),
    ]
    assert cards("--by", "", *THEN) == [
        {
            "object": "usage",
            "requests": 3,
            "prompt_tokens": 30,
            "cached_tokens": 12,
            "completion_tokens": 15,
            "total_tokens": 45,
            "cost": 1.5,
        }
    ]


def test_usage_of_some_keys_models_and_teams(engine: sa.Engine) -> None:
    record, _ = KeyStore(engine).create(KeyDraft("chat"))
    for key_id in (record.id, "admin", "key-other"):
        for model in ("a", "b"):
            record_hour(engine, DAY, key_id=key_id, model=model, team="x" if key_id == "admin" else "")
    assert cards("--by", "key", "--key", "chat", *THEN)[0]["requests"] == 2
    both = cards("--by", "key", "--key", record.id, "--key", "admin", "--model", "a", *THEN)
    assert {card["key"]: card["requests"] for card in both} == {record.id: 1, "admin": 1}
    assert [card["requests"] for card in cards("--by", "team", "--team", "x", *THEN)] == [2]


def test_the_table_has_names_dates_and_a_total(engine: sa.Engine) -> None:
    record, _ = KeyStore(engine).create(KeyDraft("chat"))
    record_hour(engine, DAY, key_id=record.id, requests=1000)
    record_hour(engine, DAY, key_id="admin", requests=1)
    result = usage("--by", "key,day", *THEN)
    assert result.exit_code == 0
    head, *rows, total = (line.split() for line in result.stdout.splitlines())
    assert head == ["DAY", "KEY", "REQUESTS", "PROMPT", "CACHED", "COMPLETION", "TOKENS", "COST"]
    assert [
        "2024-10-04",
        "00:00",
        record.id,
        "(chat)",
        "1,000",
        "10,000",
        "4,000",
        "5,000",
        "15,000",
        "500.0000",
    ] in rows
    assert ["2024-10-04", "00:00", "admin", "1", "10", "4", "5", "15", "0.5000"] in rows
    assert total == ["total", "1,001", "10,010", "4,004", "5,005", "15,015", "500.5000"]


def test_csv_is_for_spreadsheets(engine: sa.Engine) -> None:
    record_hour(engine, DAY, model='m,"1"', requests=2)
    result = usage("--by", "model,day", "--csv", *THEN)
    assert list(csv.reader(result.stdout.splitlines())) == [
        [
            "begins_at",
            "model",
            *("requests", "prompt_tokens", "cached_tokens", "completion_tokens"),
            "total_tokens",
            "cost",
        ],
        ["2024-10-04 00:00", 'm,"1"', "2", "20", "8", "10", "30", "1.0"],
    ]


def test_no_usage_is_an_empty_table(engine: sa.Engine) -> None:
    assert cards() == []
    assert usage("--csv").stdout.count("\n") == 1
    assert usage().exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--by", "week"], ["--by", "'week'", "day, hour, model"]),
        (["--by", "day,hour"], ["--by", "not both"]),
        (["--since", "then"], ["--since", "'then'", "2027-01-31"]),
        (["--until", "x"], ["--until", "'x'"]),
        (["--since", "2024-10-04", "--until", "2024-10-04"], ["--since", "before --until"]),
        (["--key", "nobody"], ["'nobody'"]),
        (["--csv", "--json"], ["--csv and --json"]),
    ],
)
def test_wrong_options_are_told_in_a_line(engine: sa.Engine, arguments: list[str], words: list[str]) -> None:
    result = usage(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    for word in words:
        assert word in result.stderr
