"""An acknowledgement means that it is on disk: processes are killed right after one, again and again."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import pytest

from deployments.meter.ledger.ledger import Ledger
from deployments.meter.ledger.spool import Spool
from tests.deployments.meter.recording_process import record_until_killed

KILLS = int(os.environ.get("LEDGER_KILLS", "20"))
"""Of each kind of storage."""


def acknowledged_until_killed(database_url: str, spool_folder: Path, name: str, acknowledgements: int) -> list[str]:
    """Ids that a process has acknowledged, which was killed as soon as so many of them were seen."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.deployments.meter.recording_process"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=record_until_killed, args=(database_url, spool_folder, name, sender))
    ids: list[str] = []
    with receiver:
        with sender:
            process.start()
        while len(ids) < acknowledgements:
            ids.append(receiver.recv_bytes().decode())
        process.kill()
        process.join()
        try:
            while True:  # what it had sent before it died
                ids.append(receiver.recv_bytes().decode())
        except EOFError:
            pass
    process.close()
    return ids


@pytest.mark.parametrize("storage", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres), "spool"])
@pytest.mark.timeout(60 + 2 * KILLS)
async def test_sigkill_after_an_acknowledgement_loses_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, storage: str
) -> None:
    database = tmp_path / "database"
    database_url = f"sqlite:///{database}/ledger.db"
    match storage:
        case "sqlite":
            database.mkdir()
        case "postgresql":
            server: Any = request.getfixturevalue("postgres")
            database_url = server.new_database()
        case "spool":
            pass  # the folder is not mounted until the end
    chance = random.Random(0)
    acknowledged: list[str] = []
    for kill in range(KILLS):
        acknowledged += acknowledged_until_killed(database_url, tmp_path / "spool", str(kill), chance.randrange(1, 30))
    assert len(acknowledged) == len(set(acknowledged)) >= KILLS

    spool = Spool(tmp_path / "spool", "Meter")
    assert (spool.spooled >= len(acknowledged)) == (storage == "spool")
    database.mkdir(exist_ok=True)
    ledger = Ledger(database_url, spool)
    await ledger.start()
    await ledger.drained()
    lost = set(acknowledged) - await ledger.known(acknowledged)
    await ledger.close()
    assert not lost
