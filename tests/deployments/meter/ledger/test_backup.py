"""A back-up and a restoration of the ledger, with the commands of docs/operations.md."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from deployments.contracts import KeyDraft, Settlement
from deployments.meter.keys.key_store import KeyStore
from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.ledger import Ledger
from deployments.meter.ledger.migrations import migrate
from deployments.meter.ledger.schema import REQUESTS
from deployments.meter.ledger.spool import Spool
from serve_app.cli import app
from tests.deployments.meter.running_meter import settlement
from tests.postgres import postgres_binaries

DOCUMENTATION = Path(__file__).parents[4] / "docs" / "operations.md"
SETTLEMENTS = 50


@pytest.fixture
def empty_database(database_url: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of another database of the same kind, to be restored into."""
    if database_url.startswith("sqlite"):
        return f"sqlite:///{tmp_path}/restored.db"
    url: str = request.getfixturevalue("postgres").new_database()
    return url


def run_documented(beginning: str, **names: str) -> None:
    """The command of the documentation that begins so, with what stands there for files and URLs replaced."""
    [line] = [line.strip() for line in DOCUMENTATION.read_text().splitlines() if line.strip().startswith(beginning)]
    for name, value in names.items():
        assert name in line
        line = line.replace(name, value)
    subprocess.run(["bash", "-euc", line], check=True, capture_output=True, timeout=15)


def back_up(database_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if database_url.startswith("sqlite"):
        if shutil.which("sqlite3") is None:
            pytest.skip("no sqlite3 here: apt-get install sqlite3")
        monkeypatch.setenv("MILLSTREAM_HOME", str(folder))
        run_documented("sqlite3 ", **{"backup.db": f"{folder}/backup.db"})
    else:
        monkeypatch.setenv("PATH", f"{postgres_binaries()}:/usr/bin:/bin")
        run_documented("pg_dump ", **{'"$URL"': database_url, "ledger.dump": f"{folder}/ledger.dump"})


def restore(database_url: str, folder: Path) -> None:
    if database_url.startswith("sqlite"):
        shutil.copy(folder / "backup.db", database_url.removeprefix("sqlite:///"))
    else:
        run_documented("pg_restore ", **{'"$NEW_URL"': database_url, "ledger.dump": f"{folder}/ledger.dump"})


def home_of(database_url: str, folder: Path) -> dict[str, str]:
    """The environment of a command that is to speak of this database."""
    (folder / "home" / "run").mkdir(parents=True, exist_ok=True)
    (folder / "home" / "run" / "database").write_text(database_url)
    return {"MILLSTREAM_HOME": str(folder / "home")}


def usage(database_url: str, folder: Path) -> dict[str, Any]:
    """All that `millstream usage` finds there."""
    shown = CliRunner().invoke(app, ["usage", "--by", "", "--json"], env=home_of(database_url, folder))
    assert shown.exit_code == 0, shown.stderr
    [card] = json.loads(shown.stdout)
    return {name: card[name] for name in ("requests", "prompt_tokens", "completion_tokens")}


def rows(database_url: str) -> dict[str, Any]:
    """The same of the rows."""
    engine = open_database(database_url)
    sums = [sa.func.sum(REQUESTS.c[name]).label(name) for name in ("prompt_tokens", "completion_tokens")]
    with engine.connect() as connection:
        [row] = connection.execute(sa.select(sa.func.count().label("requests"), *sums)).mappings()
    engine.dispose()
    return {name: int(amount) for name, amount in row.items()}


@pytest.mark.timeout(60)
async def test_a_back_up_taken_while_rows_are_written_is_whole_and_what_it_lacks_can_be_sent_again(
    database_url: str, empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(database_url, Spool(tmp_path / "meter", "Meter"))
    acknowledged: asyncio.Queue[Settlement] = asyncio.Queue()
    sent: list[Settlement] = []

    async def record() -> None:
        for number in count():
            sent.append(settlement(f"cmpl-{number}"))
            await ledger.record(sent[-1:])
            acknowledged.put_nowait(sent[-1])

    recording = asyncio.create_task(record())
    for _ in range(SETTLEMENTS):
        await acknowledged.get()
    before = SETTLEMENTS + acknowledged.qsize()
    await asyncio.to_thread(back_up, database_url, tmp_path, monkeypatch)
    assert acknowledged.qsize() > 0  # the back-up held up nobody
    for _ in range(acknowledged.qsize() + SETTLEMENTS):
        await acknowledged.get()
    recording.cancel()
    with suppress(asyncio.CancelledError):
        await recording
    await ledger.close()

    await asyncio.to_thread(restore, empty_database, tmp_path)
    restored = usage(empty_database, tmp_path)
    assert before <= restored["requests"] < len(sent)
    assert restored == rows(empty_database)

    again = Ledger(empty_database, Spool(tmp_path / "meter of the restored", "Meter"))
    await again.record(sent)  # as spools and outboxes do with what they still have
    await again.close()
    assert usage(empty_database, tmp_path) == rows(empty_database) == usage(database_url, tmp_path)


def test_keys_are_as_they_were_at_the_back_up(
    database_url: str, empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, restored = open_database(database_url), open_database(empty_database)
    migrate(engine)
    store = KeyStore(engine)
    old, _ = store.create(KeyDraft("old"))
    back_up(database_url, tmp_path, monkeypatch)
    store.revoke(old.id)
    store.create(KeyDraft("new"))
    restore(empty_database, tmp_path)
    assert [key.name for key in store.list_keys()] == ["new"]
    assert [key.name for key in KeyStore(restored).list_keys()] == ["old"]
    engine.dispose()
    restored.dispose()
