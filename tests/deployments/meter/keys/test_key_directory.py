"""The keys that a meter knows: new ones at once, revoked ones within a second, and without the database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from deployments.contracts import KeyChanges, KeyDraft, KeyInfo, Limits
from deployments.meter.errors import LedgerUnavailable, MeterBusy, MeterClosed
from deployments.meter.keys import key_directory
from deployments.meter.keys.key_directory import KeyDirectory
from deployments.meter.keys.key_store import KeyStore
from deployments.meter.keys.keys import key_digest
from deployments.meter.ledger.database import open_database
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet
from tests.sqlite import new_database

T = TypeVar("T")
ADMIN = "sk-ms-admin"


class Database:
    """Reads on the event loop itself, and can be away or slow."""

    def __init__(self, store: KeyStore) -> None:
        self.store = store
        self.now_at = 1000.0
        self.reads = 0
        self.away = False
        self.answering = asyncio.Event()
        self.answering.set()

    async def __call__(self, call: Callable[[], T]) -> T:
        self.reads += 1
        await self.answering.wait()
        if self.away:
            raise LedgerUnavailable("gone")
        return call()

    @asynccontextmanager
    async def directory(self, *, require_keys: bool = True) -> AsyncIterator[KeyDirectory]:
        directory = KeyDirectory(
            self.store,
            self,
            admin_digest=key_digest(ADMIN),
            require_keys=require_keys,
            clock=lambda: self.now_at,
        )
        await directory.start()
        try:
            yield directory
        finally:
            await directory.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = open_database(new_database(tmp_path / "ledger.db"))
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: sa.Engine) -> KeyStore:
    return KeyStore(engine, clock=lambda: 1000.0)


def now_s() -> float:
    return asyncio.get_running_loop().time()


@in_virtual_time
async def test_a_key_is_known_with_its_team_and_models(store: KeyStore) -> None:
    record, secret = store.create(KeyDraft("k", team="t", models=("m",), limits=Limits(concurrency=1)))
    store.set_team("t", Limits(tokens_per_day=5))
    async with Database(store).directory() as directory:
        info = await directory.authenticate(key_digest(secret))
        assert info == KeyInfo(record.id, "k", admin=False, team="t", models=("m",))
        assert await directory.find(record.id) == (record, Limits(tokens_per_day=5))
        assert directory.wrong_keys == 0


@in_virtual_time
async def test_a_key_made_a_moment_ago_works_at_once(store: KeyStore) -> None:
    async with Database(store).directory() as directory:
        record, secret = store.create(KeyDraft("k"))
        begun_s = now_s()
        assert await directory.authenticate(key_digest(secret)) is not None
        assert now_s() - begun_s < 0.1
        other, _ = store.create(KeyDraft("another meter has seen it"))
        assert await directory.find(other.id) == (other, None)
        assert await directory.find(record.id) == (record, None)


@in_virtual_time
async def test_changes_act_within_a_second(store: KeyStore) -> None:
    record, old = store.create(KeyDraft("k", team="t"))
    rotated, _ = store.create(KeyDraft("r"))
    store.set_team("t", Limits(concurrency=1))
    async with Database(store).directory() as directory:
        store.update(record.id, KeyChanges(limits={"concurrency": 2}))
        _, new = store.rotate(rotated.id)
        store.remove_team("t")
        await asyncio.sleep(1.01)
        assert await directory.find(record.id) == (store.get(record.id), None)
        assert await directory.authenticate(key_digest(new)) is not None
        store.revoke(record.id)
        await asyncio.sleep(1.01)
        assert await directory.find(record.id) is None
        assert await directory.authenticate(key_digest(old)) is None


@in_virtual_time
async def test_the_old_secret_of_a_rotated_key_is_refused(store: KeyStore) -> None:
    record, old = store.create(KeyDraft("k"))
    async with Database(store).directory() as directory:
        assert await directory.authenticate(key_digest(old)) is not None
        store.rotate(record.id)
        await asyncio.sleep(1.01)
        assert await directory.authenticate(key_digest(old)) is None
        assert await directory.find(record.id) is not None


@in_virtual_time
async def test_a_key_ends_when_it_expires(store: KeyStore) -> None:
    record, secret = store.create(KeyDraft("k", expires_at=1010.0))
    database = Database(store)
    async with database.directory() as directory:
        database.now_at = 1009.9
        assert await directory.authenticate(key_digest(secret)) is not None
        database.now_at = 1010.0
        assert await directory.authenticate(key_digest(secret)) is None
        assert await directory.find(record.id) is None
        store.update(record.id, KeyChanges(expires_at=None))
        assert await directory.authenticate(key_digest(secret)) is not None


@in_virtual_time
async def test_a_restored_backup_replaces_what_is_known(store: KeyStore, tmp_path: Path) -> None:
    backup = open_database(new_database(tmp_path / "backup.db"))
    _, old = KeyStore(backup).create(KeyDraft("old"))
    for _ in range(3):
        _, secret = store.create(KeyDraft("k"))
    database = Database(store)
    async with database.directory() as directory:
        directory._store = KeyStore(backup)
        await asyncio.sleep(1.01)
        assert await directory.authenticate(key_digest(secret)) is None
        assert await directory.authenticate(key_digest(old)) is not None
    backup.dispose()


# --- wrong keys ------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_wrong_key_is_answered_slowly_and_counted(store: KeyStore) -> None:
    async with Database(store).directory() as directory:
        begun_s = now_s()
        assert await directory.authenticate(key_digest("sk-ms-guess")) is None
        assert 0.25 <= now_s() - begun_s < 0.5
        assert directory.wrong_keys == 1


@in_virtual_time
async def test_no_key_at_all_is_no_wrong_key(store: KeyStore) -> None:
    database = Database(store)
    async with database.directory() as directory:
        reads, begun_s = database.reads, now_s()
        assert await directory.authenticate(key_digest("")) is None
        assert (directory.wrong_keys, database.reads, now_s()) == (0, reads, begun_s)


@in_virtual_time
async def test_a_flood_of_wrong_keys_reaches_neither_database_nor_memory(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_directory, "_MAX_DELAYED", 100)
    database = Database(store)
    _, secret = store.create(KeyDraft("k"))
    async with database.directory() as directory:
        begun_s, reads = now_s(), database.reads
        answered: list[float] = []

        async def guess(number: int) -> None:
            await asyncio.sleep(number / 1000)
            assert await directory.authenticate(key_digest(f"guess {number}")) is None
            answered.append(now_s() - begun_s - number / 1000)

        async with asyncio.TaskGroup() as group:
            for number in range(2000):
                group.create_task(guess(number))
            group.create_task(directory.authenticate(key_digest(secret)))
        seconds = now_s() - begun_s
        assert database.reads - reads <= 20 * seconds + 2
        assert directory.wrong_keys == 2000
        delayed = sum(waited >= 0.25 for waited in answered)
        assert 100 <= delayed <= 100 * (seconds / 0.25 + 1)
        assert len(answered) - delayed > 1000


@in_virtual_time
async def test_unknown_keys_do_not_pile_up_behind_a_slow_database(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_directory, "_MAX_LOOKED_FOR", 3)
    _, secret = store.create(KeyDraft("k"))
    database = Database(store)
    async with database.directory() as directory:
        database.answering.clear()
        looking = [asyncio.create_task(directory.authenticate(key_digest(f"sk-{number}"))) for number in range(3)]
        await quiet()
        with pytest.raises(MeterBusy):
            await directory.authenticate(key_digest("sk-wrong"))
        assert await directory.authenticate(key_digest(secret)) is not None
        database.answering.set()
        assert await asyncio.gather(*looking) == [None] * 3
        assert await directory.authenticate(key_digest("sk-wrong")) is None


@in_virtual_time
async def test_those_who_ask_while_a_read_is_under_way_share_the_next(store: KeyStore) -> None:
    database = Database(store)
    async with database.directory() as directory:
        await asyncio.sleep(0.5)
        reads = database.reads
        database.answering.clear()
        first = asyncio.create_task(directory.refresh())
        await quiet()
        _, secret = store.create(KeyDraft("k"))
        others = [asyncio.create_task(directory.authenticate(key_digest(secret))) for _ in range(50)]
        await quiet()
        database.answering.set()
        assert all(await asyncio.gather(*others))
        await first
        assert database.reads == reads + 2


# --- a database that is away -----------------------------------------------------------------------------------------


@in_virtual_time
async def test_known_keys_stay_valid_while_the_database_is_away(store: KeyStore) -> None:
    record, secret = store.create(KeyDraft("k"))
    database = Database(store)
    async with database.directory() as directory:
        database.away = True
        with capture_logs() as logs:
            await asyncio.sleep(10)
        assert [log["log_level"] for log in logs] == ["warning"]
        assert await directory.authenticate(key_digest(secret)) is not None
        assert await directory.find(record.id) is not None
        for unknown in (directory.authenticate(key_digest("new")), directory.find("key-new")):
            with pytest.raises(LedgerUnavailable, match="gone"):
                await unknown
        assert directory.wrong_keys == 0
        database.away = False
        with capture_logs() as logs:
            await asyncio.sleep(2)
        assert [log["event"] for log in logs] == ["keys refreshed again"]


@in_virtual_time
async def test_a_database_that_does_not_answer_is_away(store: KeyStore) -> None:
    database = Database(store)
    async with database.directory() as directory:
        database.answering.clear()
        with pytest.raises(LedgerUnavailable, match="no answer within 5 s"):
            await directory.authenticate(key_digest("new"))
        database.answering.set()


@in_virtual_time
async def test_a_meter_starts_without_its_database(store: KeyStore) -> None:
    _, secret = store.create(KeyDraft("k"))
    database = Database(store)
    database.away = True
    async with database.directory() as directory:
        with pytest.raises(LedgerUnavailable):
            await directory.authenticate(key_digest(secret))
        info = await directory.authenticate(key_digest(ADMIN))
        assert info == KeyInfo("admin", "admin", admin=True)
        database.away = False
        await asyncio.sleep(1.01)
        assert await directory.authenticate(key_digest(secret)) is not None


# --- admin, anonymous, the end ---------------------------------------------------------------------------------------


@in_virtual_time
async def test_the_admin_key_needs_no_database_and_has_no_limits(store: KeyStore) -> None:
    database = Database(store)
    async with database.directory() as directory:
        reads = database.reads
        assert await directory.authenticate(key_digest(ADMIN)) == KeyInfo("admin", "admin", admin=True)
        state = await directory.find("admin")
        assert state is not None
        assert (state.record.limits, state.record.models, state.team_limits) == (Limits(), None, None)
        assert database.reads == reads


@in_virtual_time
async def test_without_keys_everyone_but_the_administrator_is_anonymous(store: KeyStore) -> None:
    _, secret = store.create(KeyDraft("k"))
    database = Database(store)
    database.away = True
    async with database.directory(require_keys=False) as directory:
        assert await directory.authenticate(key_digest(ADMIN)) == KeyInfo("admin", "admin", admin=True)
        for key in (secret, "", "anything"):
            info = await directory.authenticate(key_digest(key))
            assert info == KeyInfo("anonymous", "anonymous", admin=False)
        assert await directory.find("anonymous") is not None
        await asyncio.sleep(5)
        assert database.reads == 0


@in_virtual_time
async def test_closing_ends_those_who_wait(store: KeyStore) -> None:
    database = Database(store)
    async with database.directory() as directory:
        database.answering.clear()
        waiting = [asyncio.create_task(directory.authenticate(key_digest(str(number)))) for number in range(3)]
        await asyncio.sleep(0.1)
        waiting.append(asyncio.create_task(directory.authenticate(key_digest("late"))))
        await quiet()
        await directory.close()
        for task in waiting:
            with pytest.raises(MeterClosed):
                await task
        await directory.close()
        with pytest.raises(MeterClosed):
            await directory.authenticate(key_digest("after"))
