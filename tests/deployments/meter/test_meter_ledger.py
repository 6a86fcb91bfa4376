from __future__ import annotations

import asyncio
import multiprocessing
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from deployments.contracts import Settlement
from deployments.meter.errors import LedgerBusy, LedgerUnavailable, MeterClosed
from deployments.meter.ledger import REQUESTS, Ledger, LedgerTotals


def settlement(number: int, *, completion_tokens: int = 5, model: str = "sim-a") -> Settlement:
    return Settlement(
        request_id=f"cmpl-{number}",
        key_id="admin",
        model=model,
        status="finished",
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=completion_tokens,
        choices=1,
        resumes=0,
        started_at=1_750_000_000.25,
        first_token_s=None,
        total_s=1.5,
    )


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/ledger.db"


@asynccontextmanager
async def opened(folder: Path, *, max_queued: int = 10_000) -> AsyncIterator[Ledger]:
    ledger = Ledger(url(folder), max_queued=max_queued)
    try:
        yield ledger
    finally:
        await ledger.close()


@contextmanager
def listening(event: str, listener: Any) -> Iterator[None]:
    sa.event.listen(sa.Engine, event, listener)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, event, listener)


class InsertGate:
    """Holds the writer thread inside its transaction, and counts the transactions that insert."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.rows_per_transaction: list[int] = []

    def __call__(
        self, _connection: object, _cursor: object, statement: str, rows: Any, _context: object, many: bool
    ) -> None:
        if statement.startswith("INSERT"):
            self.rows_per_transaction.append(len(rows) if many else 1)
            self.entered.set()
            assert self.opened.wait(10)


@asynccontextmanager
async def held_writer(ledger: Ledger) -> AsyncIterator[tuple[InsertGate, asyncio.Task[None]]]:
    """A writer that is busy with the settlement number 0 until the gate is opened."""
    gate = InsertGate()
    with listening("before_cursor_execute", gate):
        first = asyncio.create_task(ledger.record([settlement(0)]))
        try:
            assert await asyncio.to_thread(gate.entered.wait, 10)
            yield gate, first
        finally:
            gate.opened.set()


async def test_a_settlement_becomes_one_row_with_all_its_fields(tmp_path: Path) -> None:
    before = time.time()
    async with opened(tmp_path) as ledger:
        await ledger.record([settlement(1)])
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.row_factory = sqlite3.Row
        row = dict(connection.execute("SELECT * FROM requests").fetchone())
    connection.close()
    recorded_at = row.pop("recorded_at")
    assert before <= recorded_at <= time.time()
    row["request_id"] = row.pop("id")
    assert msgspec.convert(row, Settlement) == settlement(1)


def test_the_table_has_a_column_for_every_field_of_a_settlement() -> None:
    fields = {field.name for field in msgspec.structs.fields(Settlement)}
    assert set(REQUESTS.columns.keys()) == fields - {"request_id"} | {"id", "recorded_at"}


async def test_concurrent_records_share_transactions(tmp_path: Path) -> None:
    commits: list[object] = []
    async with opened(tmp_path) as ledger:
        with listening("commit", commits.append):
            await asyncio.gather(*(ledger.record([settlement(number)]) for number in range(500)))
        assert len(commits) < 10
        assert (await ledger.totals()).requests == 500


async def test_what_arrives_during_a_transaction_is_the_next_transaction(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger, held_writer(ledger) as (gate, first):
        others = [asyncio.create_task(ledger.record([settlement(number)])) for number in range(1, 101)]
        await asyncio.sleep(0)  # lets the others queue up
        gate.opened.set()
        await asyncio.gather(first, *others)
        assert gate.rows_per_transaction == [1, 100]


async def test_nothing_is_confirmed_before_it_is_committed(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger, held_writer(ledger) as (gate, first):
        assert (await ledger.totals()).requests == 0
        assert not first.done()
        gate.opened.set()
        await first
        assert (await ledger.totals()).requests == 1


async def test_a_request_is_counted_once_and_its_first_settlement_stays(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await ledger.record([settlement(1), settlement(1, completion_tokens=99)])
        await asyncio.gather(*(ledger.record([settlement(1, completion_tokens=77)]) for _ in range(20)))
        assert await ledger.totals() == LedgerTotals(1, 10, 4, 5)


async def test_totals_are_those_of_one_model_if_asked(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await ledger.record([settlement(1), settlement(2, model="sim-b"), settlement(3, model="sim-b")])
        assert await ledger.totals("sim-b") == LedgerTotals(2, 20, 8, 10)
        assert await ledger.totals("unknown") == LedgerTotals(0, 0, 0, 0)


async def test_rows_outlive_the_ledger(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await ledger.record([settlement(1)])
    async with opened(tmp_path) as ledger:
        await ledger.record([settlement(1), settlement(2)])
        assert (await ledger.totals()).requests == 2


def _record_and_die(folder: Path) -> None:
    async def record() -> None:
        await Ledger(url(folder)).record([settlement(number) for number in range(50)])
        os._exit(9)

    asyncio.run(record())


async def test_a_confirmed_settlement_survives_the_death_of_the_process(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_record_and_die, args=(tmp_path,))
    process.start()
    await asyncio.to_thread(process.join)
    assert process.exitcode == 9
    async with opened(tmp_path) as ledger:
        assert (await ledger.totals()).requests == 50


async def test_every_connection_syncs_each_commit_to_disk(tmp_path: Path) -> None:
    modes: list[tuple[object, object, object]] = []

    def look(connection: sa.Connection) -> None:
        names = ("journal_mode", "synchronous", "busy_timeout")
        journal, synchronous, timeout = (connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names)
        modes.append((journal, synchronous, timeout))

    with listening("commit", look):
        async with opened(tmp_path) as ledger:
            await asyncio.gather(ledger.record([settlement(1)]), ledger.check_reachable())
    assert modes
    assert set(modes) == {("wal", 2, 5000)}  # 2 is FULL


async def test_a_database_error_reaches_every_waiter_and_the_writer_recovers(tmp_path: Path) -> None:
    folder = tmp_path / "not-mounted-yet"
    async with opened(folder) as ledger:
        outcomes = await asyncio.gather(
            *(ledger.record([settlement(number)]) for number in range(10)), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [LedgerUnavailable] * 10
        assert len(set(map(id, outcomes))) == 10
        assert "unable to open database file" in str(outcomes[0])
        with pytest.raises(LedgerUnavailable):
            await ledger.check_reachable()
        with pytest.raises(LedgerUnavailable):
            await ledger.totals()

        folder.mkdir()
        await asyncio.gather(*(ledger.record([settlement(number)]) for number in range(10)))
        await ledger.check_reachable()
        assert (await ledger.totals()).requests == 10


async def test_an_error_in_the_middle_of_a_group_leaves_none_of_it(tmp_path: Path) -> None:
    impossible = msgspec.structs.replace(settlement(2), prompt_tokens=2**63)
    async with opened(tmp_path) as ledger:
        with pytest.raises(LedgerUnavailable, match="too large"):
            await ledger.record([settlement(1), impossible])
        assert (await ledger.totals()).requests == 0
        await ledger.record([settlement(1)])
        assert (await ledger.totals()).requests == 1


async def test_a_full_queue_refuses_and_takes_again_once_drained(tmp_path: Path) -> None:
    async with opened(tmp_path, max_queued=3) as ledger:
        async with held_writer(ledger) as (gate, first):
            second = asyncio.create_task(ledger.record([settlement(1), settlement(2)]))
            await asyncio.sleep(0)
            with pytest.raises(LedgerBusy) as refusal:
                await ledger.record([settlement(3)])
            assert refusal.value.limit == 3
            gate.opened.set()
            await asyncio.gather(first, second)
        await ledger.record([settlement(3)])
        assert (await ledger.totals()).requests == 4


async def test_a_list_longer_than_the_queue_is_taken_when_the_queue_is_empty(tmp_path: Path) -> None:
    async with opened(tmp_path, max_queued=3) as ledger:
        await ledger.record([settlement(number) for number in range(10)])
        assert (await ledger.totals()).requests == 10


async def test_a_cancelled_caller_does_not_disturb_the_others(tmp_path: Path) -> None:
    async with opened(tmp_path, max_queued=3) as ledger:
        async with held_writer(ledger) as (gate, first):
            impatient = asyncio.create_task(ledger.record([settlement(1)]))
            patient = asyncio.create_task(ledger.record([settlement(2)]))
            await asyncio.sleep(0)
            impatient.cancel()
            gate.opened.set()
            await asyncio.gather(first, patient)
        assert impatient.cancelled()
        await ledger.record([settlement(number) for number in range(3)])  # the queue is empty again


async def test_closing_writes_what_is_queued_and_takes_no_more(tmp_path: Path) -> None:
    ledger = Ledger(url(tmp_path))
    async with held_writer(ledger) as (gate, first):
        second = asyncio.create_task(ledger.record([settlement(1)]))
        await asyncio.sleep(0)
        closing = asyncio.gather(ledger.close(), ledger.close())
        await asyncio.sleep(0)
        for call in (ledger.record([settlement(2)]), ledger.totals(), ledger.check_reachable()):
            with pytest.raises(MeterClosed):
                await call
        gate.opened.set()
        await asyncio.gather(first, second, closing)
    async with opened(tmp_path) as ledger:
        assert (await ledger.totals()).requests == 2


async def test_closing_is_bounded_and_fails_what_it_could_not_confirm(tmp_path: Path) -> None:
    ledger = Ledger(url(tmp_path))
    async with held_writer(ledger) as (gate, first):
        second = asyncio.create_task(ledger.record([settlement(1)]))
        await asyncio.sleep(0)
        await ledger.close(timeout_s=0.01)
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [MeterClosed, MeterClosed]
        gate.opened.set()
        for thread in threading.enumerate():
            if thread.name.startswith("ledger writer"):
                await asyncio.to_thread(thread.join)
    async with opened(tmp_path) as successor:
        assert (await successor.totals()).requests == 1  # committed late, never confirmed
        await successor.record([settlement(0), settlement(1)])
        assert (await successor.totals()).requests == 2


async def test_closing_before_any_use_and_twice_is_fine(tmp_path: Path) -> None:
    ledger = Ledger(url(tmp_path))
    await ledger.close()
    await ledger.close()
    assert ledger.closed


@pytest.mark.parametrize("wrong", ["sqlite://", "sqlite:///:memory:", "mysql://host/database"])
def test_a_database_that_cannot_be_a_ledger_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="database_url"):
        Ledger(wrong)
