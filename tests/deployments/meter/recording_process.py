"""A process that does nothing but record, for tests that kill it. Its module is preloaded, so that it starts fast."""

from __future__ import annotations

import asyncio
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

from deployments.meter.ledger.ledger import Ledger
from deployments.meter.ledger.spool import Spool
from tests.deployments.accounts import settlement

__all__ = ["CALLERS", "record_until_killed"]

CALLERS = 4


def record_until_killed(database_url: str, spool_folder: Path, name: str, acknowledged: Connection) -> None:
    """Sends each request id as soon as its settlement is acknowledged. `name` makes the ids its own."""
    asyncio.run(_record(Ledger(database_url, Spool(spool_folder, "Meter")), name, acknowledged))


async def _record(ledger: Ledger, name: str, acknowledged: Connection) -> None:
    await ledger.start()

    async def record(caller: int) -> None:
        for number in count():
            request_id = f"cmpl-{name}-{caller}-{number}"
            await ledger.record([settlement(request_id)])
            acknowledged.send_bytes(request_id.encode())

    async with asyncio.TaskGroup() as callers:
        for caller in range(CALLERS):
            callers.create_task(record(caller))
