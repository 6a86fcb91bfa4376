"""A database's URL may be kept out of every file: in the environment of the process that opens it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deployments.meter.ledger.database import open_database


def test_a_url_is_taken_from_the_variable_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER_URL", f"sqlite:///{tmp_path}/ledger.db")
    engine = open_database("env://LEDGER_URL")
    assert engine.url.database == f"{tmp_path}/ledger.db"
    engine.dispose()


def test_a_new_file_and_those_beside_it_are_their_owners_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        engine = open_database(f"sqlite:///{tmp_path}/ledger.db")
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE t (x)")
            modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
        engine.dispose()
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("ledger.db", "ledger.db-wal", "ledger.db-shm"), 0o600)


def test_the_mode_of_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").touch(0o640)
    engine = open_database(f"sqlite:///{tmp_path}/ledger.db")
    with engine.connect():
        assert (tmp_path / "ledger.db").stat().st_mode & 0o777 == 0o640
    engine.dispose()


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_without_a_url_is_told(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEDGER_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("LEDGER_URL", value)
    with pytest.raises(ValueError, match="expected the environment variable LEDGER_URL to hold a URL"):
        open_database("env://LEDGER_URL")


def test_a_variable_does_not_name_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER_URL", "env://OTHER_URL")
    with pytest.raises(ValueError, match="env is not supported, expected sqlite or postgresql"):
        open_database("env://LEDGER_URL")
