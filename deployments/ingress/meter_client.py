"""The ingress's side of the meter: who calls, may they, and what did they use.

Admissions wait for a meter that is being replaced, up to a bound; settlements sit in an outbox until the meter has
committed them, and are sent again until then (they are idempotent by request id). Free of Ray: `MeterTransport` is
the seam.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Protocol, TypeVar

import structlog

from deployments.contracts import (
    AdmissionRefused,
    AdmissionRequest,
    Admitted,
    KeyInfo,
    Settlement,
    pack,
    unpack,
    unpack_admissions,
)
from deployments.ingress.coalescer import Coalescer
from deployments.ingress.errors import InvalidApiKey, InvalidRequest, ModelNotFound, ServiceUnavailable

__all__ = ["MeterClient", "MeterTransport", "MeterUnreachable"]

log = structlog.get_logger()
T = TypeVar("T")

_KEY_CACHE_S = 5.0
"""A revoked key acts within this time."""
_KEY_CACHE_SIZE = 10_000
_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 1.0
_CALL_LIMIT_S = 10.0
_SHORT_PROMPTS = 4096
"""Characters or token ids up to which a request's admission travels together with others, which it must not delay."""
_SETTLE_AT_ONCE = 1000
_OUTBOX_SIZE = 50_000
_CLOSE_LIMIT_S = 10.0


class MeterUnreachable(Exception):
    """The meter gave no answer; it may or may not have acted."""


class MeterTransport(Protocol):
    """One attempt to call the meter. Every method raises MeterUnreachable when there is no answer."""

    async def authenticate(self, digest: bytes) -> bytes: ...

    async def admit(self, requests: bytes) -> bytes:
        """A packed list of AdmissionRequest in, as many packed answers out."""

    async def settle(self, settlements: bytes) -> None: ...

    async def ping(self) -> None: ...


class MeterClient:
    def __init__(self, transport: MeterTransport, *, admission_timeout_s: float) -> None:
        self._transport = transport
        self._admission_timeout_s = admission_timeout_s
        self._admissions = Coalescer(self._admit)
        self._keys: OrderedDict[bytes, tuple[float, KeyInfo]] = OrderedDict()
        self._outbox: dict[str, Settlement] = {}
        self._unsettled = asyncio.Event()
        self._settled = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._sender = asyncio.create_task(self._send_settlements(), name="settlements")

    async def authenticate(self, key: str) -> KeyInfo:
        """Whose `key` it is. Raises InvalidApiKey, ServiceUnavailable."""
        digest = sha256(key.encode()).digest()
        now = asyncio.get_running_loop().time()
        cached = self._keys.get(digest)
        if cached is not None and cached[0] > now:
            return cached[1]
        answer = await self._patiently(lambda: self._transport.authenticate(digest))
        if not answer:
            self._keys.pop(digest, None)
            raise InvalidApiKey(
                "Incorrect API key provided. The operator of this server hands out keys; send yours as "
                "'Authorization: Bearer KEY'."
            )
        info = unpack(answer, KeyInfo)
        self._keys[digest] = (now + _KEY_CACHE_S, info)
        self._keys.move_to_end(digest)
        if len(self._keys) > _KEY_CACHE_SIZE:
            self._keys.popitem(last=False)
        return info

    async def admit(self, request: AdmissionRequest) -> Admitted:
        """Token ids for every prompt, and room in the ledger. Raises the refusal as an ApiError."""
        if len(self._outbox) >= _OUTBOX_SIZE:
            raise ServiceUnavailable("Usage cannot be recorded at the moment.", retry_after_s=5.0)
        if sum(map(len, request.prompts)) > _SHORT_PROMPTS:
            answer = (await self._patiently(lambda: self._admit([request])))[0]
        else:
            answer = await self._patiently(lambda: self._admissions.call(request))
        if isinstance(answer, AdmissionRefused):
            if answer.code == "model_not_found":
                raise ModelNotFound(answer.message, param="model")
            raise InvalidRequest(answer.message, param=answer.param, code=answer.code)
        return answer

    def settle(self, settlement: Settlement) -> None:
        """Record what a request used. Never fails and never waits: the outbox keeps it until it is committed."""
        self._outbox[settlement.request_id] = settlement
        self._unsettled.set()

    async def ping(self) -> None:
        """Raises MeterUnreachable unless the meter and its ledger answer."""
        async with asyncio.timeout(2.0):
            await self._transport.ping()

    async def close(self) -> None:
        """Give the outbox a bounded time to empty."""
        try:
            async with asyncio.timeout(_CLOSE_LIMIT_S):
                while self._outbox:
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            log.error("settlements lost at shutdown", count=len(self._outbox))
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait([self._sender])

    async def _admit(self, requests: list[AdmissionRequest]) -> list[Admitted | AdmissionRefused]:
        async with asyncio.timeout(_CALL_LIMIT_S):
            return unpack_admissions(await self._transport.admit(pack(requests)))

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call the meter until it answers; a replacement is usually up within seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._admission_timeout_s
        retry_s = _RETRY_FIRST_S
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    return await call()
            except (MeterUnreachable, TimeoutError) as error:
                if loop.time() + retry_s >= deadline:
                    log.warning("meter unreachable", reason=repr(error))
                    raise ServiceUnavailable(
                        "The metering service is unavailable. Retry after the seconds in Retry-After.",
                        retry_after_s=5.0,
                    ) from error
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _RETRY_MAX_S)

    async def _send_settlements(self) -> None:
        retry_s = _RETRY_FIRST_S
        while True:
            await self._unsettled.wait()
            self._unsettled.clear()
            while self._outbox:
                batch = list(self._outbox.values())[:_SETTLE_AT_ONCE]
                try:
                    async with asyncio.timeout(_CALL_LIMIT_S):
                        await self._transport.settle(pack(batch))
                except Exception as error:  # whatever it is: without this task nothing would ever be settled again
                    log.warning("settlements not taken, will retry", count=len(self._outbox), reason=repr(error))
                    await asyncio.sleep(retry_s)
                    retry_s = min(2 * retry_s, _RETRY_MAX_S)
                    continue
                retry_s = _RETRY_FIRST_S
                for settlement in batch:
                    del self._outbox[settlement.request_id]
                self._settled.set()
