"""The ledger: one row per request, durable before anyone is told so.

All writing goes through one thread, one transaction at a time (group commit): what arrives while a
transaction runs waits and becomes the next one. So a loaded ledger pays for few large transactions, an idle
one for a small one at once, and no timer is involved. Reading has a thread of its own, so that a slow commit
does not look like an outage.

The module knows nothing of keys, models or prices; it adds up what settlements say (contracts.Settlement).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from deployments.contracts import Settlement
from deployments.meter.errors import LedgerBusy, LedgerUnavailable, MeterClosed, MeterError
from deployments.meter.worker_threads import WorkerThreads

__all__ = ["REQUESTS", "Ledger", "LedgerTotals"]

T = TypeVar("T")

log = structlog.get_logger(__name__)

# Columns are named as the fields of contracts.Settlement, except `id` (request_id) and `recorded_at` (ours).
REQUESTS: Final = sa.Table(
    "requests",
    sa.MetaData(),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("key_id", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("choices", sa.BigInteger, nullable=False),
    sa.Column("resumes", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("first_token_s", sa.Double),
    sa.Column("total_s", sa.Double, nullable=False),
    sa.Column("recorded_at", sa.Double, nullable=False),
)
"""Times are Unix seconds (`_at`) and durations in seconds (`_s`)."""


class LedgerTotals(NamedTuple):
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class _Waiter(NamedTuple):
    settlements: list[Settlement]
    committed: asyncio.Future[None]


class Ledger:
    """Records settlements in a SQLite or PostgreSQL database. For use on one event loop.

    The table is made when it is first needed, so that a database that is down at the start is an error of the
    calls that need it and not of the meter.
    """

    def __init__(self, database_url: str, *, max_queued: int = 10_000) -> None:
        """`max_queued` bounds the settlements that wait or are being written.

        Raises sqlalchemy.exc.ArgumentError for a malformed URL, ValueError for one of another database or of
        SQLite in memory. Does not connect.
        """
        url = sa.make_url(database_url)
        self._insert = _insert_unless_known(url.get_backend_name())
        self._engine = _make_engine(url)
        self._has_table = False
        self._writes = WorkerThreads("ledger writer", threads=1, max_waiting=1)
        self._reads = WorkerThreads("ledger reader", threads=1, max_waiting=64)
        self._max_queued = max_queued
        self._queued = 0
        self._waiting: list[_Waiter] = []
        self._writer: asyncio.Task[None] | None = None
        self._closed = False

    # --- writing --------------------------------------------------------------------------------------------

    async def record(self, settlements: list[Settlement]) -> None:
        """Returns once all of them are committed and on disk; those whose request is known already change
        nothing.

        Raises LedgerBusy when they do not fit into the queue (a list larger than the whole queue is taken
        when it is empty), MeterClosed after `close`, LedgerUnavailable when the database failed. A caller
        that is cancelled cannot tell whether they were written: sending them again is always safe.
        """
        if self._closed:
            raise MeterClosed("the ledger is closed")
        if not settlements:
            return
        if self._queued and self._queued + len(settlements) > self._max_queued:
            raise LedgerBusy("settlements that wait for the ledger", self._max_queued)
        self._queued += len(settlements)
        waiter = _Waiter(settlements, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_groups(), name="ledger-writer")
        await waiter.committed

    async def _write_groups(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            await self._write_group(group)

    async def _write_group(self, group: list[_Waiter]) -> None:
        settlements = [settlement for waiter in group for settlement in waiter.settlements]
        try:
            await self._writes.run(partial(self._write, settlements))
        except Exception as error:
            log.error("ledger.write_failed", settlements=len(settlements), reason=_reason(error))
            self._fail(group, partial(LedgerUnavailable, _reason(error)), error)
        except asyncio.CancelledError as error:
            self._fail(group, partial(MeterClosed, "closed before the commit was confirmed"), error)
            raise
        else:
            self._queued -= len(settlements)
            for waiter in group:
                if not waiter.committed.cancelled():
                    waiter.committed.set_result(None)

    def _fail(self, waiters: list[_Waiter], failure: Callable[[], MeterError], cause: BaseException | None) -> None:
        """Gives each waiter an exception of its own: a shared one would gather all their tracebacks."""
        for waiter in waiters:
            self._queued -= len(waiter.settlements)
            if not waiter.committed.cancelled():
                exception = failure()
                exception.__cause__ = cause
                waiter.committed.set_exception(exception)

    def _write(self, settlements: list[Settlement]) -> None:
        self._ensure_table()
        recorded_at = time.time()
        with self._engine.begin() as connection:
            connection.execute(self._insert, [_row(settlement, recorded_at) for settlement in settlements])

    # --- reading --------------------------------------------------------------------------------------------

    async def totals(self, model: str | None = None) -> LedgerTotals:
        """What all committed requests used, or those of one model. Raises LedgerUnavailable."""
        columns = REQUESTS.c
        query = sa.select(
            sa.func.count(),
            *(
                sa.func.coalesce(sa.func.sum(column), 0)
                for column in (columns.prompt_tokens, columns.cached_tokens, columns.completion_tokens)
            ),
        ).select_from(REQUESTS)
        if model is not None:
            query = query.where(columns.model == model)
        return LedgerTotals(*map(int, await self._read(lambda connection: connection.execute(query).one())))

    async def check_reachable(self, timeout_s: float = 5.0) -> None:
        """Raises LedgerUnavailable unless the database answers a query within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._read(lambda connection: connection.execute(sa.select(REQUESTS.c.id).limit(1)).all())
        except TimeoutError as error:
            raise LedgerUnavailable(f"no answer within {timeout_s:g} s") from error

    async def _read(self, query: Callable[[sa.Connection], T]) -> T:
        if self._closed:
            raise MeterClosed("the ledger is closed")
        try:
            return await self._reads.run(partial(self._run_query, query))
        except sa.exc.SQLAlchemyError as error:
            raise LedgerUnavailable(_reason(error)) from error

    def _run_query(self, query: Callable[[sa.Connection], T]) -> T:
        self._ensure_table()
        with self._engine.connect() as connection:
            return query(connection)

    # --- both -----------------------------------------------------------------------------------------------

    def _ensure_table(self) -> None:
        if self._has_table:
            return
        with self._engine.begin() as connection:
            connection.execute(CreateTable(REQUESTS, if_not_exists=True))
        self._has_table = True

    @property
    def closed(self) -> bool:
        """True from the moment that `close` was called."""
        return self._closed

    async def close(self, timeout_s: float = 10.0) -> None:
        """Takes no more, writes what is queued, disconnects. Safe twice.

        What is not committed after `timeout_s` fails with MeterClosed.
        """
        self._closed = True
        if (writer := self._writer) is not None:
            _, unfinished = await asyncio.wait({writer}, timeout=timeout_s)
            if unfinished:
                log.error("ledger.close_timed_out", settlements=self._queued, timeout_s=timeout_s)
                writer.cancel()
                waiting, self._waiting = self._waiting, []
                self._fail(waiting, partial(MeterClosed, "closed before it was written"), None)
                await asyncio.wait({writer})
        self._writes.close()
        self._reads.close()
        await asyncio.to_thread(self._engine.dispose)


def _row(settlement: Settlement, recorded_at: float) -> dict[str, Any]:
    row = msgspec.structs.asdict(settlement)
    row["id"] = row.pop("request_id")
    row["recorded_at"] = recorded_at
    return row


def _reason(error: Exception) -> str:
    """What the driver said, without the statement and its values."""
    cause: object = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    return f"{type(cause).__name__}: {cause}"


# --- the differences between the databases ------------------------------------------------------------------


def _insert_unless_known(dialect: str) -> sa.Insert:
    """An insert that leaves known request ids alone. Raises ValueError for a dialect without one."""
    if dialect == "sqlite":
        return sqlite.insert(REQUESTS).on_conflict_do_nothing(index_elements=[REQUESTS.c.id])
    if dialect == "postgresql":
        return postgresql.insert(REQUESTS).on_conflict_do_nothing(index_elements=[REQUESTS.c.id])
    raise ValueError(f"database_url: {dialect} is not supported, expected sqlite or postgresql")


def _make_engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        # 5 s: a host that drops packets must not hold the writer for the minutes that TCP would take.
        return sa.create_engine(url, pool_pre_ping=True, hide_parameters=True, connect_args={"connect_timeout": 5})
    if url.database in (None, "", ":memory:"):
        raise ValueError("database_url: SQLite in memory keeps nothing, expected sqlite:///<path of a file>")
    engine = sa.create_engine(url, hide_parameters=True)
    sa.event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: object) -> None:
    """With WAL, NORMAL may lose commits when the power fails: https://www.sqlite.org/pragma.html#pragma_synchronous"""
    for statement in ("PRAGMA busy_timeout = 5000", "PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL"):
        connection.execute(statement).close()
