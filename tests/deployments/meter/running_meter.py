"""A meter on a folder of its own, with a clock that tests may set, and what an ingress would send to it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from deployments.contracts import Account, AdmissionRefused, AdmissionRequest, Admitted, Settlement
from deployments.meter.errors import NotAdmitted
from deployments.meter.keys.keys import key_digest
from deployments.meter.meter import Meter, MeterSettings
from tests.sqlite import new_database

__all__ = ["ADMIN_KEY", "Clock", "answer_of", "running_meter", "settlement"]

ADMIN_KEY = "sk-ms-test"


class Clock:
    """Unix time that passes only when it is told to."""

    def __init__(self, now: float | None = None) -> None:
        self.now = time.time() if now is None else now

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running_meter(
    folder: Path, *, clock: Clock | None = None, database: Path | None = None, **settings: Any
) -> AsyncIterator[Meter]:
    """Started and closed; its files and, unless given, its database are in `folder`."""
    settings.setdefault("admin_digest", key_digest(ADMIN_KEY))
    file = database or folder / "ledger.db"
    if file.parent.is_dir() and not file.exists():
        new_database(file)
    meter = Meter(MeterSettings(folder / "meter", f"sqlite:///{file}", **settings), clock=clock)
    try:
        await meter.start()
        yield meter
    finally:
        await meter.close()


def settlement(
    request: AdmissionRequest | str,
    admitted: Admitted | None = None,
    *,
    completion_tokens: int = 4,
    **changes: Any,
) -> Settlement:
    """Of a request, as its ingress settles it: of all its prompts and so many tokens."""
    if isinstance(request, str):
        request = AdmissionRequest(request, "admin", "tiny", [[1, 2, 3]], 4, 1, started_at=time.time())
    prompts = request.prompts if admitted is None else admitted.token_ids
    account = Account(
        request.request_id,
        request.key_id,
        request.model,
        prompt_tokens=sum(map(len, prompts)),
        choices=len(prompts) * request.choices,
        team=request.team,
        started_at=request.started_at,
        admitted_at=None if admitted is None else admitted.admitted_at,
        reserved_tokens=0 if admitted is None else admitted.reserved_tokens,
        prompt_price=0.0 if admitted is None else admitted.prompt_price,
        completion_price=0.0 if admitted is None else admitted.completion_price,
    )
    values: dict[str, Any] = {
        "status": "finished",
        "prompt_tokens": account.prompt_tokens,
        "cached_tokens": 0,
        "completion_tokens": completion_tokens,
        "resumes": 0,
        "first_token_s": 0.1,
        "total_s": 0.2,
    }
    return Settlement(account, **(values | changes))


async def answer_of(meter: Meter, request: AdmissionRequest) -> Admitted | AdmissionRefused:
    """As MeterService answers it. Raises as Meter.admit, but for refusals."""
    try:
        return await meter.admit(request)
    except NotAdmitted as refused:
        return refused.refusal
