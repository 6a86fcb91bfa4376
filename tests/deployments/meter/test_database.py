"""A database's URL may be kept out of every file: in the environment of the process that opens it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.meter.database import open_database


def test_a_url_is_taken_from_the_variable_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER_URL", f"sqlite:///{tmp_path}/ledger.db")
    engine = open_database("env://LEDGER_URL")
    assert engine.url.database == f"{tmp_path}/ledger.db"
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
