from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from deployments.contracts import Account, Settlement, UsageQuery, UsageRow
from deployments.meter.errors import LedgerBusy, MeterClosed
from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.ledger import Ledger
from deployments.meter.ledger.rows import RowChange, write_settlements
from deployments.meter.ledger.schema import REQUESTS, USAGE_HOURS
from deployments.meter.ledger.spool import Spool
from tests.deployments.accounts import account, settlement

HOUR_S = 3600


def numbered(number: int, **fields: Any) -> Settlement:
    return settlement(f"cmpl-{number}", **fields)


def engine_count(request_id: str, parts: dict[int, int], **fields: Any) -> Settlement:
    """What an engine replica tells of a request whose ingress is gone."""
    told: dict[str, Any] = {"status": "disconnected", "witness": "engine", "parts": parts, **fields}
    return settlement(request_id, completion_tokens=sum(parts.values()), **told)


@asynccontextmanager
async def opened(database_url: str, folder: Path, name: str = "Meter", **options: Any) -> AsyncIterator[Ledger]:
    ledger = Ledger(database_url, Spool(folder / "spool", name), **options)
    try:
        yield ledger
    finally:
        await ledger.close()


@pytest.fixture
async def ledger(database_url: str, tmp_path: Path) -> AsyncIterator[Ledger]:
    async with opened(database_url, tmp_path) as ledger:
        yield ledger


def stored(database_url: str, table: sa.Table = REQUESTS) -> list[dict[str, Any]]:
    engine = open_database(database_url)
    with engine.connect() as connection:
        rows = [
            {str(name): value for name, value in row.items()} for row in connection.execute(sa.select(table)).mappings()
        ]
    engine.dispose()
    return rows


async def count(ledger: Ledger) -> int:
    return sum(row.requests for row in await ledger.usage(UsageQuery(since=0.0)))


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
        if statement.startswith("INSERT INTO requests"):
            self.rows_per_transaction.append(len(rows) if many else 1)
            self.entered.set()
            assert self.opened.wait(10)


@asynccontextmanager
async def held_writer(ledger: Ledger) -> AsyncIterator[tuple[InsertGate, asyncio.Task[None]]]:
    """A writer that is busy with the settlement number 0 until the gate is opened."""
    gate = InsertGate()
    with listening("before_cursor_execute", gate):
        first = asyncio.create_task(ledger.record([numbered(0)]))
        try:
            assert await asyncio.to_thread(gate.entered.wait, 10)
            yield gate, first
        finally:
            gate.opened.set()


# --- rows ---------------------------------------------------------------------------------------------------------


async def test_a_settlement_becomes_one_row_with_all_its_fields(ledger: Ledger, database_url: str) -> None:
    whose = Account(
        request_id="cmpl-1",
        key_id="key-1",
        model="m",
        prompt_tokens=10,
        choices=2,
        team="red",
        dialect="D1",
        caller_request_id="grüße",
        started_at=1_750_000_000.25,
        admitted_at=1_750_000_000.5,
        reserved_tokens=42,
        prompt_price=0.1,
        completion_price=0.4,
    )
    told = Settlement(whose, "disconnected", 10, 4, 5, 1, 0.5, 1.5, queue_s=0.1, witness="engine", parts={1: 3, 0: 2})
    before = time.time()
    await ledger.record([told])
    [row] = stored(database_url)
    assert before <= row.pop("recorded_at") <= time.time()
    assert row.pop("cost") == pytest.approx((10 * 0.1 + 5 * 0.4) / 1e6)
    row["parts"] = msgspec.json.decode(row["parts"], type=dict[int, int])
    row["request_id"] = row.pop("id")
    assert msgspec.convert(row, Account) == whose
    assert msgspec.convert({**row, "account": whose}, Settlement) == told


def test_the_table_has_a_column_for_every_field_of_a_settlement() -> None:
    fields = {field.name for kind in (Settlement, Account) for field in msgspec.structs.fields(kind)}
    assert set(REQUESTS.columns.keys()) == fields - {"request_id", "account"} | {"id", "cost", "recorded_at"}


async def test_rows_outlive_the_ledger(database_url: str, tmp_path: Path) -> None:
    async with opened(database_url, tmp_path) as ledger:
        await ledger.record([numbered(1)])
    async with opened(database_url, tmp_path) as ledger:
        await ledger.record([numbered(1), numbered(2)])
        assert await count(ledger) == 2


async def test_known_requests_are_those_with_a_row(ledger: Ledger) -> None:
    await ledger.record([numbered(number) for number in range(0, 1200, 2)])
    assert await ledger.known({f"cmpl-{number}" for number in range(1200)}) == {
        f"cmpl-{number}" for number in range(0, 1200, 2)
    }
    assert await ledger.known([]) == set()


# --- which settlement holds ---------------------------------------------------------------------------------------

LOST = settlement("cmpl-1", completion_tokens=0, status="lost", witness="none", prompt_tokens=0)
BY_ENGINE = engine_count("cmpl-1", {0: 5})
BY_INGRESS = settlement("cmpl-1", completion_tokens=7)


async def test_a_request_is_counted_once_and_its_first_settlement_stays(ledger: Ledger, database_url: str) -> None:
    await ledger.record([BY_INGRESS, settlement("cmpl-1", completion_tokens=99)])
    await asyncio.gather(*(ledger.record([settlement("cmpl-1", completion_tokens=77)]) for _ in range(20)))
    assert [row["completion_tokens"] for row in stored(database_url)] == [7]
    assert [row["completion_tokens"] for row in stored(database_url, USAGE_HOURS)] == [7]


@pytest.mark.parametrize("together", [True, False], ids=["in one transaction", "one after the other"])
@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([LOST, BY_ENGINE], ("engine", "disconnected", 5)),
        ([BY_ENGINE, LOST], ("engine", "disconnected", 5)),
        ([LOST, BY_INGRESS], ("ingress", "finished", 7)),
        ([BY_INGRESS, LOST], ("ingress", "finished", 7)),
        ([BY_ENGINE, BY_INGRESS], ("ingress", "finished", 7)),
        ([BY_INGRESS, BY_ENGINE], ("ingress", "finished", 7)),
        ([LOST, BY_ENGINE, BY_INGRESS, BY_ENGINE, LOST], ("ingress", "finished", 7)),
        ([LOST, LOST], ("none", "lost", 0)),
    ],
)
async def test_the_better_witness_holds(
    ledger: Ledger, database_url: str, told: list[Settlement], expected: tuple[str, str, int], together: bool
) -> None:
    for group in [told] if together else [[each] for each in told]:
        await ledger.record(group)
    [row] = stored(database_url)
    assert (row["witness"], row["status"], row["completion_tokens"]) == expected
    # Not a trace of the group that the row was in before.
    [hour] = stored(database_url, USAGE_HOURS)
    assert (hour["status"], hour["requests"], hour["completion_tokens"]) == (expected[1], 1, expected[2])


@pytest.mark.parametrize("together", [True, False], ids=["in one transaction", "one after the other"])
@pytest.mark.parametrize("backwards", [False, True])
async def test_what_engines_know_of_the_choices_is_merged_in_any_order(
    ledger: Ledger, database_url: str, together: bool, backwards: bool
) -> None:
    whose = account("cmpl-1", prompt_price=1.0, completion_price=10.0)
    told = [
        engine_count("cmpl-1", {0: 5, 1: 2}, account=whose, cached_tokens=1, first_token_s=0.4, total_s=2.0),
        engine_count("cmpl-1", {10: 1}, account=whose, resumes=1, first_token_s=None, total_s=3.0),
        engine_count("cmpl-1", {1: 9, 0: 4}, account=whose, first_token_s=0.3, queue_s=0.2, total_s=1.0),
    ]
    if backwards:
        told.reverse()
    for group in [told] if together else [[each] for each in told]:
        await ledger.record(group)
    [row] = stored(database_url)
    assert json.loads(row["parts"]) == {"0": 5, "1": 9, "10": 1}
    assert row["completion_tokens"] == 15
    assert row["cost"] == pytest.approx((2 + 150) / 1e6)
    assert (row["cached_tokens"], row["resumes"], row["total_s"]) == (1, 1, 3.0)
    assert (row["first_token_s"], row["queue_s"]) == (0.3, 0.2)
    [hour] = stored(database_url, USAGE_HOURS)
    assert (hour["requests"], hour["completion_tokens"], hour["cost"]) == (1, 15, pytest.approx(152e-6))


async def test_what_an_engine_tells_again_changes_nothing(ledger: Ledger, database_url: str) -> None:
    await ledger.record([BY_ENGINE])
    before = stored(database_url)
    await ledger.record([BY_ENGINE, engine_count("cmpl-1", {0: 3})])
    assert stored(database_url) == before


def random_history(chance: random.Random) -> list[Settlement]:
    """Of 40 requests, each told several times by witnesses who may disagree even on whose it was."""

    def told() -> Settlement:
        request_id = f"cmpl-{chance.randrange(40)}"
        whose = account(
            request_id,
            key_id=chance.choice(["k1", "k2"]),
            team=chance.choice(["red", None]),
            model=chance.choice("ab"),
            dialect=chance.choice(["D1", "D3"]),
            started_at=chance.choice([1.5, 1.2, 2.0]) * HOUR_S,
            prompt_price=0.25,
            completion_price=1.5,
        )
        match chance.choice(["none", "engine", "engine", "ingress"]):
            case "engine":
                parts = {chance.randrange(4): chance.randrange(10) for _ in range(chance.randrange(4))}
                return engine_count(request_id, parts, account=whose)
            case "none":
                return settlement(request_id, 0, account=whose, witness="none", status="lost", prompt_tokens=0)
            case _:
                status = chance.choice(["finished", "cancelled"])
                return settlement(request_id, chance.randrange(100), account=whose, status=status, cached_tokens=1)

    return [told() for _ in range(300)]


def expected_counts(history: list[Settlement]) -> dict[str, tuple[str, int]]:
    """By the words of the rule, for whole requests: witness and completion tokens."""
    expected = {}
    for request_id in {told.account.request_id for told in history}:
        by: dict[str, list[Settlement]] = {"ingress": [], "engine": [], "none": []}
        for told in history:
            if told.account.request_id == request_id:
                by[told.witness].append(told)
        if by["ingress"]:
            expected[request_id] = ("ingress", by["ingress"][0].completion_tokens)
        elif by["engine"]:
            highest = [max((told.parts or {}).get(choice, 0) for told in by["engine"]) for choice in range(4)]
            expected[request_id] = ("engine", sum(highest))
        else:
            expected[request_id] = ("none", 0)
    return expected


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[Any]]:
    """What USAGE_HOURS should hold of these rows of REQUESTS."""
    sums: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        hour = int(row["started_at"] // HOUR_S) * HOUR_S
        group = (hour, row["key_id"], row["team"] or "", row["model"], row["dialect"], row["status"])
        counted = (1, row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"], row["cost"])
        sums[group] = [a + b for a, b in zip(sums.get(group, [0] * 5), counted, strict=True)]
    return sums


@pytest.mark.parametrize("seed", range(5))
async def test_after_any_history_the_rows_are_right_and_the_sums_are_theirs(
    database_url: str, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    history = random_history(chance)
    changes: list[RowChange] = []
    async with opened(database_url, tmp_path, on_committed=changes.extend) as ledger:
        left = list(history)
        while left:
            size = chance.randrange(1, 40)
            some, left = left[:size], left[size:]
            cut = chance.randrange(len(some) + 1)
            await asyncio.gather(ledger.record(some[:cut]), ledger.record(some[cut:]))
    rows = stored(database_url)
    assert {row["id"]: (row["witness"], row["completion_tokens"]) for row in rows} == expected_counts(history)
    hours = {tuple(row.values())[:6]: list(row.values())[6:] for row in stored(database_url, USAGE_HOURS)}
    assert {group: [*sums[:4], pytest.approx(sums[4])] for group, sums in grouped(rows).items()} == hours
    told: Counter[tuple[str, str, str, str]] = Counter()
    for change in changes:
        told[change[:4]] += change.completion_tokens
    held: Counter[tuple[str, str, str, str]] = Counter()
    for row in rows:
        held[row["key_id"], row["team"] or "", row["model"], row["status"]] += row["completion_tokens"]
    assert +told == +held


async def test_meters_that_record_the_same_requests_at_the_same_time_count_each_once(
    ledger: Ledger, database_url: str
) -> None:
    everything = [
        engine_count(f"cmpl-{number}", {choice: 5}) for number in range(300) for choice in (number % 3, number % 2)
    ]
    await ledger.check_reachable()  # migrates
    engine = open_database(database_url)
    for first in range(0, 200, 50):
        overlapping = (everything[first + meter : first + 200 + meter] for meter in range(4))
        await asyncio.gather(*(asyncio.to_thread(write_settlements, engine, some) for some in overlapping))
    write_settlements(engine, everything)
    engine.dispose()
    rows = stored(database_url)
    assert len(rows) == 300
    hours = {tuple(row.values())[:6]: list(row.values())[6:] for row in stored(database_url, USAGE_HOURS)}
    assert grouped(rows) == hours
    assert sum(row["completion_tokens"] for row in rows) == sum(
        5 * len({number % 3, number % 2}) for number in range(300)
    )


# --- what is told of commits --------------------------------------------------------------------------------------


async def test_changes_are_told_by_group_before_record_returns(database_url: str, tmp_path: Path) -> None:
    told: list[list[RowChange]] = []
    async with opened(database_url, tmp_path, on_committed=told.append) as ledger:
        red = account("cmpl-1", team="red", completion_price=0.5e6)
        await ledger.record([settlement("cmpl-1", 3, account=red), numbered(2, completion_tokens=4), numbered(3)])
        [changes] = told
        assert sorted(changes) == [
            RowChange("key", "", "m", "finished", 2, 4, 0, 5, 0.0),
            RowChange("key", "red", "m", "finished", 1, 2, 0, 3, 1.5),
        ]


async def test_a_correction_is_told_as_a_difference_and_a_repetition_not_at_all(
    database_url: str, tmp_path: Path
) -> None:
    told: list[list[RowChange]] = []
    async with opened(database_url, tmp_path, on_committed=told.append) as ledger:
        await ledger.record([BY_ENGINE])
        told.clear()
        await ledger.record([BY_INGRESS])
        await ledger.record([BY_INGRESS])
    [changes] = told
    assert sorted(changes) == [
        RowChange("key", "", "m", "disconnected", -1, -2, 0, -5, 0.0),
        RowChange("key", "", "m", "finished", 1, 2, 0, 7, 0.0),
    ]


# --- values that no row can hold ----------------------------------------------------------------------------------

POISON = {
    "an integer beyond 64 bits": numbered(666, completion_tokens=2**63),
    "half a character": settlement("cmpl-666", account=account("cmpl-666", caller_request_id="\ud800")),
    "no time at all": settlement("cmpl-666", account=account("cmpl-666", started_at=float("nan"))),
    "no end": settlement("cmpl-666", account=account("cmpl-666", started_at=float("inf"))),
}


def rejected(folder: Path) -> list[str]:
    lines = (folder / "spool" / "Meter.rejected").read_text().splitlines()
    return [json.loads(line)["settlement"]["account"]["request_id"] for line in lines]


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
async def test_what_cannot_be_stored_is_put_aside_and_the_others_are_recorded(
    ledger: Ledger, database_url: str, tmp_path: Path, poison: Settlement
) -> None:
    await ledger.record([numbered(1), numbered(2), poison, numbered(3)])
    assert {row["id"] for row in stored(database_url)} == {"cmpl-1", "cmpl-2", "cmpl-3"}
    assert rejected(tmp_path) == ["cmpl-666"]
    assert ledger.spooled == 0


async def test_what_only_postgresql_refuses_is_put_aside_there(postgres: Any, tmp_path: Path) -> None:
    nul = settlement("cmpl-1", account=account("cmpl-1", caller_request_id="a\x00b"))
    long = settlement("cmpl-2", account=account("cmpl-2", model=random.Random(0).randbytes(5_000).hex()))
    async with opened(postgres.new_database(), tmp_path) as ledger:
        await asyncio.gather(*(ledger.record([each]) for each in (nul, numbered(3), long, numbered(4))))
        assert await count(ledger) == 2
        assert sorted(rejected(tmp_path)) == ["cmpl-1", "cmpl-2"]
        assert ledger.spooled == 0


# --- group commit -------------------------------------------------------------------------------------------------


async def test_concurrent_records_share_transactions(ledger: Ledger) -> None:
    await ledger.check_reachable()
    commits: list[object] = []
    with listening("commit", commits.append):
        await asyncio.gather(*(ledger.record([numbered(number)]) for number in range(500)))
    assert len(commits) < 10
    assert await count(ledger) == 500


async def test_what_arrives_during_a_transaction_is_the_next_transaction(ledger: Ledger) -> None:
    async with held_writer(ledger) as (gate, first):
        others = [asyncio.create_task(ledger.record([numbered(number)])) for number in range(1, 101)]
        await asyncio.sleep(0)  # lets the others queue up
        gate.opened.set()
        await asyncio.gather(first, *others)
        assert gate.rows_per_transaction == [1, 100]


async def test_nothing_is_confirmed_before_it_is_committed(ledger: Ledger) -> None:
    async with held_writer(ledger) as (gate, first):
        assert await count(ledger) == 0
        assert not first.done()
        gate.opened.set()
        await first
        assert await count(ledger) == 1


async def test_every_connection_to_sqlite_syncs_each_commit_to_disk(tmp_path: Path) -> None:
    modes: list[tuple[object, object, object]] = []

    def look(connection: sa.Connection) -> None:
        names = ("journal_mode", "synchronous", "busy_timeout")
        journal, synchronous, timeout = (connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names)
        modes.append((journal, synchronous, timeout))

    with listening("commit", look):
        async with opened(f"sqlite:///{tmp_path}/ledger.db", tmp_path) as ledger:
            await asyncio.gather(ledger.record([numbered(1)]), ledger.check_reachable())
    assert modes
    assert set(modes) == {("wal", 2, 5000)}  # 2 is FULL


async def test_every_connection_to_postgresql_syncs_commits_and_bounds_statements(
    postgres: Any, tmp_path: Path
) -> None:
    modes: set[tuple[Any, ...]] = set()

    def look(connection: sa.Connection) -> None:
        names = ("fsync", "synchronous_commit", "statement_timeout", "lock_timeout", "work_mem")
        modes.add(tuple(connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names))

    url = f"{postgres.new_database()}?options=-c%20work_mem%3D5MB"
    async with opened(url, tmp_path) as ledger:
        await ledger.check_reachable()
        with listening("commit", look):
            await ledger.record([numbered(1)])
    assert modes == {("on", "on", "5s", "5s", "5MB")}


# --- bounds -------------------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_and_takes_again_once_drained(database_url: str, tmp_path: Path) -> None:
    async with opened(database_url, tmp_path, max_queued=3) as ledger:
        async with held_writer(ledger) as (gate, first):
            second = asyncio.create_task(ledger.record([numbered(1), numbered(2)]))
            await asyncio.sleep(0)
            with pytest.raises(LedgerBusy) as refusal:
                await ledger.record([numbered(3)])
            assert refusal.value.limit == 3
            gate.opened.set()
            await asyncio.gather(first, second)
        await ledger.record([numbered(3)])
        assert await count(ledger) == 4


async def test_a_list_longer_than_the_queue_is_taken_when_the_queue_is_empty(database_url: str, tmp_path: Path) -> None:
    async with opened(database_url, tmp_path, max_queued=3) as ledger:
        await ledger.record([numbered(number) for number in range(10)])
        assert await count(ledger) == 10


async def test_a_cancelled_caller_does_not_disturb_the_others(database_url: str, tmp_path: Path) -> None:
    async with opened(database_url, tmp_path, max_queued=3) as ledger:
        async with held_writer(ledger) as (gate, first):
            impatient = asyncio.create_task(ledger.record([numbered(1)]))
            patient = asyncio.create_task(ledger.record([numbered(2)]))
            await asyncio.sleep(0)
            impatient.cancel()
            gate.opened.set()
            await asyncio.gather(first, patient)
        assert impatient.cancelled()
        await ledger.record([numbered(number) for number in range(3)])  # the queue is empty again


# --- closing ------------------------------------------------------------------------------------------------------


async def test_closing_writes_what_is_queued_and_takes_no_more(database_url: str, tmp_path: Path) -> None:
    ledger = Ledger(database_url, Spool(tmp_path / "spool", "Meter"))
    async with held_writer(ledger) as (gate, first):
        second = asyncio.create_task(ledger.record([numbered(1)]))
        await asyncio.sleep(0)
        closing = asyncio.gather(ledger.close(), ledger.close())
        await asyncio.sleep(0)
        for call in (ledger.record([numbered(2)]), ledger.known(["cmpl-1"]), ledger.check_reachable()):
            with pytest.raises(MeterClosed):
                await call
        gate.opened.set()
        await asyncio.gather(first, second, closing)
    assert len(stored(database_url)) == 2


async def test_closing_is_bounded_and_fails_what_it_could_not_confirm(database_url: str, tmp_path: Path) -> None:
    ledger = Ledger(database_url, Spool(tmp_path / "spool", "Meter"))
    async with held_writer(ledger) as (gate, first):
        second = asyncio.create_task(ledger.record([numbered(1)]))
        await asyncio.sleep(0)
        await ledger.close(timeout_s=0.01)
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [MeterClosed, MeterClosed]
        gate.opened.set()
        for thread in threading.enumerate():
            if thread.name.startswith("ledger writer"):
                await asyncio.to_thread(thread.join)
    await ledger.close()
    async with opened(database_url, tmp_path) as successor:
        assert await count(successor) == 1  # committed late, never confirmed
        await successor.record([numbered(0), numbered(1)])
        assert await count(successor) == 2


async def test_closing_before_any_use_and_twice_is_fine(database_url: str, tmp_path: Path) -> None:
    ledger = Ledger(database_url, Spool(tmp_path, "Meter"))
    await ledger.close()
    await ledger.close()
    assert ledger.closed


@pytest.mark.parametrize("wrong", ["sqlite://", "sqlite:///:memory:", "mysql://host/database"])
def test_a_database_that_cannot_be_a_ledger_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="database_url"):
        open_database(wrong)


# --- reading ------------------------------------------------------------------------------------------------------


async def test_usage_is_that_of_the_committed_rows(ledger: Ledger) -> None:
    other = account("cmpl-2", model="n", key_id="other", team="red")
    await ledger.record([numbered(1), settlement("cmpl-2", 5, account=other)])
    assert await ledger.usage(UsageQuery(since=0.0, by=("model",))) == [
        UsageRow(1, 2, 0, 1, 0.0, model="m"),
        UsageRow(1, 2, 0, 5, 0.0, model="n"),
    ]
    assert await ledger.used_since(0.0, key_id="key") == (3, 0.0)
    assert await ledger.used_since(0.0, team="red") == (7, 0.0)


async def test_usage_that_cannot_be_told_is_the_callers_mistake(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="24 hours at most"):
        await ledger.usage(UsageQuery(since=0.0, width_s=60))
