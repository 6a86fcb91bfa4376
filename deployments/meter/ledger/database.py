"""The meter's database: SQLite in a file, or PostgreSQL. What differs between the two stands here."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

__all__ = [
    "in_transaction",
    "is_race",
    "is_unstorable",
    "multiple_below",
    "open_database",
    "reason",
    "upsert",
    "writing",
]

T = TypeVar("T")

_POSTGRESQL_CONNECTION: Final = {
    # A host that drops packets must not hold the writer for the minutes that TCP would take.
    "connect_timeout": 5,
    "tcp_user_timeout": 5000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
_MAX_COLLISIONS: Final = 5
_VARIABLE: Final = "env://"
_SQLITE_BUSY_S: Final = 5
_POSTGRESQL_OPTIONS: Final = "-c statement_timeout=5000 -c lock_timeout=5000"


def open_database(database_url: str) -> sa.Engine:
    """An engine for `database_url`, or for the URL in the environment variable NAME where it is `env://NAME`; does not
    connect. psycopg is the driver of PostgreSQL, whatever the URL says. No statement takes longer than 5 s there,
    unless `options` in the URL say otherwise.

    Raises sqlalchemy.exc.ArgumentError for a malformed URL, ValueError for one of another database or of SQLite in
    memory, and for a variable that is not set.
    """
    if database_url.startswith(_VARIABLE):
        name = database_url.removeprefix(_VARIABLE)
        if not (database_url := os.environ.get(name, "")):
            raise ValueError(f"database_url: expected the environment variable {name} to hold a URL")
    url = sa.make_url(database_url)
    match url.get_backend_name():
        case "sqlite":
            if url.database in (None, "", ":memory:"):
                raise ValueError("database_url: SQLite in memory keeps nothing, expected sqlite:///<path of a file>")
            engine = sa.create_engine(url, hide_parameters=True)
            sa.event.listen(engine, "do_connect", partial(_make_private, Path(url.database)))
            sa.event.listen(engine, "connect", _set_up_sqlite)
            return engine
        case "postgresql":
            return sa.create_engine(
                url.set(drivername="postgresql+psycopg"),
                pool_pre_ping=True,
                hide_parameters=True,
                connect_args={
                    **_POSTGRESQL_CONNECTION,
                    "options": f"{_POSTGRESQL_OPTIONS} {url.query.get('options', '')}",
                },
            )
        case other:
            raise ValueError(f"database_url: {other} is not supported, expected sqlite or postgresql")


def _make_private(file: Path, *_connecting: object) -> None:
    """A new file is its owner's only: it has every caller's usage. SQLite gives those beside it the same mode, and
    tells what stands in the way of making one."""
    with suppress(OSError):
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """With WAL, NORMAL may lose commits when the power fails: https://www.sqlite.org/pragma.html#pragma_synchronous"""
    connection.execute(f"PRAGMA busy_timeout = {_SQLITE_BUSY_S * 1000}").close()
    _use_wal(connection)
    connection.execute("PRAGMA synchronous = FULL").close()


def _use_wal(connection: sqlite3.Connection) -> None:
    """Kept in the file once it is set. Where several processes open a new file, setting it fails at once in one that
    has to wait for another: SQLite heeds busy_timeout only where waiting cannot end in a deadlock."""
    deadline = time.monotonic() + _SQLITE_BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """One transaction that may read before it writes. In SQLite it has the write lock from the start: a transaction
    that only then asks for it fails at once when another has written meanwhile."""
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


def in_transaction(engine: sa.Engine, write: Callable[[sa.Connection], T]) -> T:
    """What `write` returns, once it is committed. Where its transaction collides with another's it is tried again, and
    can see then what that has written."""
    collisions = 0
    while True:
        try:
            with writing(engine) as connection:
                return write(connection)
        except sa.exc.DBAPIError as error:
            collisions += 1
            if collisions == _MAX_COLLISIONS or not is_race(error):
                raise


@cache
def upsert(dialect: str, table: sa.Table, added: tuple[str, ...]) -> sa.Insert:
    """Inserts rows into `table`; where its primary key is there already, the columns `added` are added up instead.
    Made once for each SQLAlchemy `dialect`, as in rows.py."""
    insert = (sqlite.insert if dialect == "sqlite" else postgresql.insert)(table)
    sums = {name: table.c[name] + insert.excluded[name] for name in added}
    return insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=sums)


def multiple_below(dialect: sa.Dialect, column: sa.ColumnElement[float], width: int) -> sa.ColumnElement[int]:
    """The greatest multiple of `width` that is <= `column`, which is not negative."""
    quotient = column / width
    # A cast cuts off in SQLite, which may have been built without floor(), and rounds in PostgreSQL.
    whole = quotient if dialect.name == "sqlite" else sa.func.floor(quotient)
    return sa.cast(whole, sa.BigInteger) * width


def reason(error: Exception) -> str:
    """What the driver said first, without the statement and its values."""
    cause: object = error.orig if isinstance(error, sa.exc.StatementError) else error
    said = str(cause).partition("\n")[0]
    return f"{type(cause).__name__}: {said}"


def is_unstorable(error: Exception) -> bool:
    """Whether it was the values that could not be written, and so never can be."""
    cause = error.orig if isinstance(error, sa.exc.StatementError) else error
    if isinstance(error, sa.exc.DataError | sa.exc.IntegrityError) or isinstance(cause, ValueError | OverflowError):
        return not is_race(error)
    # Class 54: too long for an index, among others. https://www.postgresql.org/docs/current/errcodes-appendix.html
    return _sqlstate(error).startswith("54")


def is_race(error: Exception) -> bool:
    """Whether the transaction collided with another, and may succeed when it is tried again."""
    return _sqlstate(error) in ("23505", "40001", "40P01")


def _sqlstate(error: Exception) -> str:
    """PostgreSQL's code of what went wrong, else an empty text."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""
