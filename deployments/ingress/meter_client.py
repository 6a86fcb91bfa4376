"""The ingress's side of the meter: who calls, may they, and what did they use.

Each owner belongs to one meter (deployments/meter/remote/shards.py). Admissions wait for a meter that is being
replaced, up to a bound; settlements go through an outbox that keeps them until their meter has committed them, and
outlives this process (deployments/settlement/outbox.py). Free of Ray: `MeterTransport` is the seam.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from deployments.contracts import (
    AdministrationAnswer,
    AdministrationCommand,
    AdmissionRefused,
    AdmissionRequest,
    Admitted,
    KeyInfo,
    MeterCounters,
    Settlement,
    UsageQuery,
    UsageRow,
    owner_of,
    pack,
    unpack,
    unpack_admission,
)
from deployments.ingress.errors import (
    ApiError,
    InsufficientQuota,
    InvalidApiKey,
    InvalidRequest,
    ModelNotAllowed,
    ModelNotFound,
    RateLimitExceeded,
    ServiceUnavailable,
)
from deployments.meter.remote.meter_transport import MeterTransport, MeterUnreachable
from deployments.meter.remote.shards import meter_names, shard_of
from deployments.settlement.outbox import OUTBOX_SIZE, SettlementOutbox

__all__ = ["MeterClient"]

log = structlog.get_logger()
T = TypeVar("T")

_KEY_CACHE_S = 2.0
"""Together with the second that a meter takes to notice it (deployments/meter/keys/key_directory.py), the time in which
a revoked key acts: 5 s at most."""
_KEY_CACHE_SIZE = 10_000
_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 1.0
_CALL_LIMIT_S = 10.0
"""For one attempt: an admission, of which a meter that lives may make no end, or a batch of settlements."""
_RENEW_S = 5.0
"""Far below the times after which a meter gives this ingress up (deployments/meter/limits/reservations.py)."""


class MeterClient:
    def __init__(
        self, meters: Sequence[MeterTransport], *, ingress_id: str, outbox_folder: Path, admission_timeout_s: float
    ) -> None:
        """`meters` in the order of `meter_names`. `outbox_folder` is shared by the processes of this node."""
        self._meters = dict(zip(meter_names(len(meters)), meters, strict=True))
        self._names = list(self._meters)
        self._admission_timeout_s = admission_timeout_s
        self.ingress_id = ingress_id
        self._keys: OrderedDict[bytes, tuple[float, KeyInfo]] = OrderedDict()
        self._outbox = SettlementOutbox(outbox_folder, ingress_id, self._settle, call_limit_s=_CALL_LIMIT_S)
        self._renewals: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self._outbox.start()
        self._renewals = [
            asyncio.create_task(self._renew_loop(meter), name=f"renew-{name}") for name, meter in self._meters.items()
        ]

    @property
    def unsettled(self) -> int:
        """Settlements that no meter has acknowledged yet."""
        return len(self._outbox)

    @property
    def oldest_unsettled_s(self) -> float:
        """How long the oldest of them has waited; 0 when none does."""
        return self._outbox.lag_s(time.time())

    @property
    def full(self) -> bool:
        """Nothing more should be admitted until some of them are."""
        return self.unsettled >= OUTBOX_SIZE

    def meter_of(self, key_id: str, team: str | None) -> str:
        """Serve's name of the meter that accounts for a key."""
        return self._names[shard_of(owner_of(key_id, team), len(self._names))]

    async def authenticate(self, key: str) -> KeyInfo:
        """Whose `key` it is. Raises InvalidApiKey, ServiceUnavailable."""
        digest = sha256(key.encode()).digest()
        now = asyncio.get_running_loop().time()
        cached = self._keys.get(digest)
        if cached is not None and cached[0] > now:
            return cached[1]
        meter = self._meters[self._names[digest[0] % len(self._names)]]
        answer = await self._patiently(lambda: meter.authenticate(digest))
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
        """Token ids for every prompt, and room in the limits. Raises the refusal as an ApiError.

        After ServiceUnavailable, and when it is cancelled, the meter may have reserved all the same: settle it.
        """
        meter = self._meters[self.meter_of(request.key_id, request.team)]
        packed = pack(msgspec.structs.replace(request, ingress_id=self.ingress_id))
        answer = await self._patiently(lambda: self._ask_to_admit(meter, packed), attempt_s=_CALL_LIMIT_S)
        if isinstance(answer, AdmissionRefused):
            raise _refusal(answer)
        return answer

    def settle(self, settlement: Settlement, acknowledged: Callable[[], None] | None = None) -> None:
        """Record what a request used. Never waits, and survives this process; `acknowledged` once it is committed."""
        self._outbox.put(self.meter_of(settlement.account.key_id, settlement.account.team), settlement, acknowledged)

    def checkpoint(self, meter: str, settlement: Settlement) -> None:
        """What a request has used so far, in case this process does not live to settle it."""
        self._outbox.checkpoint(meter, settlement)

    async def administer(self, command: AdministrationCommand) -> AdministrationAnswer:
        """Raises ServiceUnavailable."""
        answer = await self._ask_first(lambda meter: meter.administer(pack(command)))
        return unpack(answer, AdministrationAnswer)

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """Of the whole ledger. Raises ServiceUnavailable."""
        return unpack(await self._ask_first(lambda meter: meter.usage(pack(query))), list[UsageRow])

    async def counters(self) -> dict[str, MeterCounters | None]:
        """Of each meter by its name; None of those that do not answer."""

        async def one(meter: MeterTransport) -> MeterCounters | None:
            try:
                async with asyncio.timeout(2.0):
                    return unpack(await meter.counters(), MeterCounters)
            except (MeterUnreachable, TimeoutError):
                return None

        return dict(zip(self._meters, await asyncio.gather(*map(one, self._meters.values())), strict=True))

    async def ping(self) -> None:
        """Raises MeterUnreachable unless every meter and its ledger answer."""
        async with asyncio.timeout(2.0):
            await asyncio.gather(*(meter.ping() for meter in self._meters.values()))

    async def close(self) -> None:
        """Give the outbox a bounded time to empty."""
        for renewal in self._renewals:
            renewal.cancel()
        if self._renewals:
            await asyncio.wait(self._renewals)
        await self._outbox.close(_CALL_LIMIT_S)

    # --- internals ---------------------------------------------------------------------------------------------------

    async def _ask_to_admit(self, meter: MeterTransport, request: bytes) -> Admitted | AdmissionRefused:
        answer = unpack_admission(await meter.admit(request))
        if isinstance(answer, AdmissionRefused) and answer.code == "unavailable":
            raise MeterUnreachable(answer.message)
        return answer

    async def _settle(self, name: str, settlements: list[Settlement]) -> None:
        # A meter that is no more may be named in an recovered outbox; any other records as well.
        meter = self._meters.get(name) or self._meters[self._names[0]]
        await meter.settle(pack(settlements))

    async def _ask_first(self, ask: Callable[[MeterTransport], Awaitable[bytes]]) -> bytes:
        return await self._patiently(lambda: ask(self._meters[self._names[0]]))

    async def _patiently(self, call: Callable[[], Awaitable[T]], *, attempt_s: float = math.inf) -> T:
        """Call the meter until it answers; a replacement is usually up within seconds. One attempt takes `attempt_s` at
        most."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._admission_timeout_s
        retry_s = _RETRY_FIRST_S
        while True:
            try:
                async with asyncio.timeout_at(min(deadline, loop.time() + attempt_s)):
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

    async def _renew_loop(self, meter: MeterTransport) -> None:
        while True:
            try:
                async with asyncio.timeout(_RENEW_S):
                    await meter.renew(self.ingress_id)
            except Exception as error:  # whatever it is: without this task all that runs here would be given up
                log.warning("lease not renewed", reason=repr(error))
            await asyncio.sleep(_RENEW_S)


def _refusal(answer: AdmissionRefused) -> ApiError:
    match answer.code:
        case "model_not_found":
            return ModelNotFound(answer.message, param="model")
        case "invalid_api_key":
            return InvalidApiKey(answer.message)
        case "model_not_allowed":
            return ModelNotAllowed(answer.message, param="model")
        case "rate_limit_exceeded":
            return RateLimitExceeded(answer.message, answer.retry_after_s, answer.rate_limits)
        case "insufficient_quota":
            return InsufficientQuota(answer.message, answer.retry_after_s, answer.rate_limits)
        case _:
            return InvalidRequest(answer.message, param=answer.param, code=answer.code)
