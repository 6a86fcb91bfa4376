"""How fast the ledger is: settlements per second through Ledger.record, and reading a ledger of many rows.

    python -m loadtests.benchmarks.ledger_cost [--database URL] [--rows 1000000]

Every commit is synced to disk. Without a database, a SQLite file in a temporary folder is used; one that is given must
be empty, and is left as it is. The rows are of 31 days, 20 keys and 4 models.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from deployments.contracts import Account, Settlement, UsageQuery
from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.ledger import Ledger
from deployments.meter.ledger.migrations import migrate
from deployments.meter.ledger.rows import write_settlements
from deployments.meter.ledger.spool import Spool
from deployments.meter.ledger.usage import read_usage, used_since

__all__ = ["Figure", "measure"]

DAYS = 31
BEGIN_AT = 1_750_032_000.0
"""Of a UTC day."""
RECORD_FOR_S = 5.0
QUERIES = 5


class Figure(NamedTuple):
    what: str
    value: float
    unit: str


def settlement(number: int) -> Settlement:
    chance = random.Random(number)
    account = Account(
        request_id=f"cmpl-{chance.getrandbits(128):032x}",
        key_id=f"key-{number % 20}",
        team=f"team-{number % 5}",
        model=f"model-{chance.randrange(4)}",
        prompt_tokens=1000,
        choices=1,
        started_at=BEGIN_AT + chance.random() * DAYS * 86_400,
        prompt_price=0.1,
        completion_price=0.4,
    )
    return Settlement(account, "finished", 1000, 0, chance.randrange(256), 0, 0.1, 1.5, queue_s=0.01)


async def record_for(ledger: Ledger, numbers: count[int], callers: int, duration_s: float) -> float:
    """Settlements per second of `callers`, each of which waits for one before it sends the next."""
    done = 0
    until = time.perf_counter() + duration_s

    async def call() -> None:
        nonlocal done
        while time.perf_counter() < until:
            await ledger.record([settlement(next(numbers))])
            done += 1

    begun = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    return done / (time.perf_counter() - begun)


def fill(engine: sa.Engine, numbers: count[int], rows: int) -> float:
    """Rows per second, 5,000 in a transaction."""
    begun = time.perf_counter()
    for begin in range(0, rows, 5_000):
        write_settlements(engine, [settlement(next(numbers)) for _ in range(min(5_000, rows - begin))])
    return rows / (time.perf_counter() - begun)


def time_query(engine: sa.Engine, query: Callable[[sa.Connection], object]) -> float:
    """The best of several, in milliseconds."""
    times_s = []
    with engine.connect() as connection:
        for _ in range(QUERIES):
            begun = time.perf_counter()
            query(connection)
            times_s.append(time.perf_counter() - begun)
    return min(times_s) * 1000


async def measure(database_url: str, spool_folder: Path, rows: int) -> list[Figure]:
    numbers = count()
    engine = open_database(database_url)
    migrate(engine)
    ledger = Ledger(database_url, Spool(spool_folder, "Meter"))
    figures = [
        Figure(f"record, {callers} callers", await record_for(ledger, numbers, callers, RECORD_FOR_S), "rows/s")
        for callers in (1, 256)
    ]
    await ledger.close()
    figures.append(Figure(f"fill to {rows:,} rows", fill(engine, numbers, rows - next(numbers)), "rows/s"))
    by_day = UsageQuery(since=BEGIN_AT, width_s=86_400, by=("model",))
    by_minute = UsageQuery(since=BEGIN_AT + 5 * 86_400, until=BEGIN_AT + 6 * 86_400, width_s=60, by=("model",))
    for what, query in (("model, day", by_day), ("model, minute of a day", by_minute)):
        figures.append(Figure(f"usage by {what}", time_query(engine, partial(read_usage, query=query)), "ms"))
    used = partial(used_since, since=BEGIN_AT, team="team-1")
    figures.append(Figure("used by a team in a month", time_query(engine, used), "ms"))
    engine.dispose()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", metavar="URL")
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        database_url = arguments.database or f"sqlite:///{folder}/ledger.db"
        for figure in asyncio.run(measure(database_url, Path(folder), arguments.rows)):
            print(f"{figure.what:32} {figure.value:12,.1f} {figure.unit}")


if __name__ == "__main__":
    main()
