"""The database fails or is away: settlements are acknowledged all the same, and recorded once it is back."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from deployments.contracts import UsageQuery
from deployments.meter.errors import LedgerUnavailable
from deployments.meter.ledger.ledger import Ledger
from deployments.meter.ledger.spool import Spool
from tests.deployments.accounts import settlement
from tests.postgres import PostgresServer, postgres_binaries, postgres_server


@asynccontextmanager
async def opened(database_url: str, folder: Path, *, max_spooled: int = 1000, **options: Any) -> AsyncIterator[Ledger]:
    ledger = Ledger(database_url, Spool(folder / "spool", "Meter", max_records=max_spooled), **options)
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.close()


async def record(ledger: Ledger, *numbers: int) -> None:
    await asyncio.gather(*(ledger.record([settlement(f"cmpl-{number}")]) for number in numbers))


async def count_rows(ledger: Ledger) -> int:
    return sum(row.requests for row in await ledger.usage(UsageQuery(since=0.0)))


@pytest.fixture
def unmounted(tmp_path: Path) -> str:
    """A database in a folder that is not there."""
    return f"sqlite:///{tmp_path}/mount/ledger.db"


def mount(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()


@pytest.fixture
def fragile() -> Iterator[PostgresServer]:
    """A server that nobody else depends on."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    with postgres_server(binaries) as server:
        yield server


# --- away and back ------------------------------------------------------------------------------------------------


async def test_what_is_recorded_while_the_database_is_away_is_there_when_it_is_back(
    unmounted: str, tmp_path: Path
) -> None:
    async with opened(unmounted, tmp_path) as ledger:
        await record(ledger, *range(10))
        await record(ledger, *range(10, 20))
        assert ledger.spooled == 20
        with pytest.raises(LedgerUnavailable, match="unable to open database file"):
            await ledger.check_reachable()
        mount(tmp_path)
        await ledger.drained()
        assert ledger.spooled == 0
        assert await count_rows(ledger) == 20
        await record(ledger, 20)
        assert ledger.spooled == 0
        assert await count_rows(ledger) == 21


async def test_a_locked_sqlite_database_is_away_until_it_is_unlocked(tmp_path: Path) -> None:
    def wait_less(connection: Any, _record: object, _proxy: object) -> None:
        connection.execute("PRAGMA busy_timeout = 10").close()

    sa.event.listen(sa.Pool, "checkout", wait_less)
    try:
        async with opened(f"sqlite:///{tmp_path}/ledger.db", tmp_path) as ledger:
            await record(ledger, 0)
            with closing(sqlite3.connect(tmp_path / "ledger.db")) as other:
                other.execute("BEGIN EXCLUSIVE")
                await record(ledger, 1, 2)
                assert ledger.spooled == 2
                other.rollback()
            await ledger.drained()
            assert await count_rows(ledger) == 3
    finally:
        sa.event.remove(sa.Pool, "checkout", wait_less)


@pytest.mark.postgres
async def test_postgresql_killed_and_started_again_under_load_has_every_acknowledged_row_once(
    fragile: PostgresServer, tmp_path: Path
) -> None:
    acknowledged: list[int] = []
    changes: list[int] = []
    numbers, running = count(), True
    reached: dict[int, asyncio.Event] = {}

    async def load(ledger: Ledger) -> None:
        while running:
            number = next(numbers)
            await record(ledger, number)
            acknowledged.append(number)
            if event := reached.get(len(acknowledged)):
                event.set()

    async def until_acknowledged(more: int) -> None:
        event = reached[len(acknowledged) + more] = asyncio.Event()
        await event.wait()

    async with opened(
        fragile.new_database(),
        tmp_path,
        max_spooled=200_000,
        on_committed=lambda changed: changes.extend(change.requests for change in changed),
    ) as ledger:
        async with asyncio.TaskGroup() as callers:
            for _ in range(4):
                callers.create_task(load(ledger))
            for _ in range(2):
                await until_acknowledged(100)
                await asyncio.to_thread(fragile.kill)
                await until_acknowledged(100)
                assert ledger.spooled > 0
                await asyncio.to_thread(fragile.start)
                await ledger.drained()
            await until_acknowledged(100)
            running = False
        await ledger.drained()
        assert await ledger.known([f"cmpl-{number}" for number in acknowledged]) == {
            f"cmpl-{number}" for number in acknowledged
        }
        assert await count_rows(ledger) == len(acknowledged)
        # A commit whose answer was lost with the server is counted by nobody here.
        assert sum(changes) <= len(acknowledged)


@pytest.mark.postgres
async def test_a_database_that_answers_nothing_holds_up_only_the_first(fragile: PostgresServer, tmp_path: Path) -> None:
    changes: list[int] = []
    async with opened(
        fragile.new_database(),
        tmp_path,
        attempt_limit_s=1.0,
        on_committed=lambda changed: changes.extend(change.requests for change in changed),
    ) as ledger:
        await record(ledger, 0)
        fragile.freeze()
        await record(ledger, 1)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for number in range(2, 12):
            await record(ledger, number)
        assert loop.time() - begun < 1.0
        assert ledger.spooled == 11
        fragile.thaw()
        await ledger.drained()
        assert await count_rows(ledger) == 12
        # Also what was committed so late that nobody waited for it any more.
        assert sum(changes) == 12


# --- the bounds of the spool --------------------------------------------------------------------------------------


async def test_a_full_spool_is_told_and_takes_again_once_drained(unmounted: str, tmp_path: Path) -> None:
    async with opened(unmounted, tmp_path, max_spooled=3) as ledger:
        await record(ledger, 0, 1)
        assert not ledger.full
        await record(ledger, 2)
        assert ledger.full
        outcomes = await asyncio.gather(
            *(ledger.record([settlement(f"cmpl-{number}")]) for number in (3, 4)), return_exceptions=True
        )
        assert [str(outcome) for outcome in outcomes] == ["ledger unavailable: the spool is full at 3 settlements"] * 2
        assert len(set(map(id, outcomes))) == 2
        mount(tmp_path)
        await ledger.drained()
        assert not ledger.full
        await record(ledger, 3, 4)
        assert await count_rows(ledger) == 5


async def test_a_database_that_comes_back_is_found_even_if_nothing_could_be_spooled(
    unmounted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with opened(unmounted, tmp_path) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse)
            with pytest.raises(LedgerUnavailable, match="No space left"):
                await record(ledger, 0)
            mount(tmp_path)
            await ledger.drained()
            await record(ledger, 0)
        assert await count_rows(ledger) == 1


# --- successors ---------------------------------------------------------------------------------------------------


async def test_closing_leaves_what_is_spooled_to_a_successor(unmounted: str, tmp_path: Path) -> None:
    async with opened(unmounted, tmp_path) as ledger:
        await record(ledger, 0, 1)
    mount(tmp_path)
    async with opened(unmounted, tmp_path) as ledger:
        await ledger.drained()
        assert await count_rows(ledger) == 2


async def test_what_was_used_is_not_told_while_some_of_it_is_spooled(unmounted: str, tmp_path: Path) -> None:
    async with opened(unmounted, tmp_path) as ledger:
        await record(ledger, 0)
        with pytest.raises(LedgerUnavailable, match="1 settlements are not in the database yet"):
            await ledger.used_since(0.0, key_id="key")
        mount(tmp_path)
        await ledger.drained()
        assert await ledger.used_since(0.0, key_id="key") == (3, 0.0)


async def test_a_crash_between_commit_and_forgetting_changes_nothing(tmp_path: Path) -> None:
    with closing(Spool(tmp_path / "spool", "Meter")) as spool:
        spool.append([settlement("cmpl-0"), settlement("cmpl-1")])
    left = (tmp_path / "spool" / "Meter.spool").read_bytes()
    for _ in range(2):
        (tmp_path / "spool" / "Meter.spool").write_bytes(left)
        async with opened(f"sqlite:///{tmp_path}/ledger.db", tmp_path) as ledger:
            await ledger.drained()
            assert ledger.spooled == 0
            assert await count_rows(ledger) == 2


async def test_what_is_spooled_and_cannot_be_stored_does_not_hold_up_the_others(unmounted: str, tmp_path: Path) -> None:
    async with opened(unmounted, tmp_path) as ledger:
        await ledger.record([settlement("cmpl-0", completion_tokens=2**63), settlement("cmpl-1")])
        assert ledger.spooled == 2
        mount(tmp_path)
        await ledger.drained()
        assert await count_rows(ledger) == 1
    assert len((tmp_path / "spool" / "Meter.rejected").read_text().splitlines()) == 1
