"""Rows of the ledger for requests that were refused, where the operator wants them: beside the way of the answer."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from deployments.contracts import AdmissionRequest, Settlement
from deployments.meter.errors import MeterError
from deployments.meter.ledger.ledger import Ledger

__all__ = ["RefusalRows"]

log = structlog.get_logger()

_MAX_WAITING: Final = 1000


class RefusalRows:
    """Records refusals some time later; those that do not fit, or that the ledger does not take, are only counted."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: list[Settlement] = []
        self._writer: asyncio.Task[None] | None = None

    def put(self, request: AdmissionRequest, now: float) -> None:
        """Never waits."""
        if len(self._waiting) >= _MAX_WAITING:
            return
        self._waiting.append(_row(request, now))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="refusal-rows")

    async def _write(self) -> None:
        while self._waiting:
            rows, self._waiting = self._waiting, []
            try:
                await self._ledger.record(rows)
            except MeterError as error:
                log.warning("refusals not recorded", count=len(rows), reason=str(error))

    async def close(self) -> None:
        """Lets the ledger take what waits, which is bounded in time. Before the ledger is closed; safe twice."""
        if self._writer is not None:
            await asyncio.wait({self._writer})


def _row(request: AdmissionRequest, now: float) -> Settlement:
    return Settlement.unused(request.account(), "refused", now)
