"""The meter in memory: knows keys and tokenizers, keeps what it is told, and can be away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from hashlib import sha256

from tokenizers import Tokenizer

from deployments.contracts import (
    AdmissionRefused,
    AdmissionRequest,
    Admitted,
    DurationSum,
    KeyInfo,
    MeterCounters,
    Settlement,
    UsageQuery,
    UsageRow,
    pack,
    unpack,
)

__all__ = ["ADMIN_KEY", "USER_KEY", "MemoryMeter"]

USER_KEY, ADMIN_KEY = "sk-user", "sk-admin"


class MemoryMeter:
    """A MeterTransport."""

    def __init__(self, tokenizers: dict[str, Tokenizer] | None = None, *, max_model_len: int = 2048) -> None:
        self.keys: dict[bytes, KeyInfo] = {}
        self.grant(USER_KEY, KeyInfo("key-user", "user", admin=False))
        self.grant(ADMIN_KEY, KeyInfo("key-admin", "admin", admin=True))
        self.error: Exception | None = None
        """Raised by every call."""
        self.answering = asyncio.Event()
        """Calls wait for it."""
        self.answering.set()
        self.slow: dict[str, asyncio.Event] = {}
        """By request: admissions that wait for theirs."""
        self.calls: list[str] = []
        self.admissions: list[AdmissionRequest] = []
        self.batches: list[list[Settlement]] = []
        """As `settle` got them, those whose answer was lost included."""
        self.renewed: list[str] = []
        """Ids of the ingresses that told of themselves."""
        self.administered: Callable[[bytes], bytes] = lambda command: command
        self.used: Callable[[UsageQuery], list[UsageRow]] = lambda _query: []
        self.counted = MeterCounters([], {}, DurationSum(), DurationSum())
        self.answer: Callable[[AdmissionRequest], Admitted | AdmissionRefused] = self._tokenized
        self._tokenizers = tokenizers or {}
        self._max_model_len = max_model_len

    @property
    def settlements(self) -> list[Settlement]:
        return [settlement for batch in self.batches for settlement in batch]

    def grant(self, key: str, info: KeyInfo) -> None:
        self.keys[sha256(key.encode()).digest()] = info

    def revoke(self, key: str) -> None:
        del self.keys[sha256(key.encode()).digest()]

    async def authenticate(self, digest: bytes) -> bytes:
        await self._call("authenticate")
        info = self.keys.get(digest)
        return b"" if info is None else pack(info)

    async def admit(self, request: bytes) -> bytes:
        asked = unpack(request, AdmissionRequest)
        self.admissions.append(asked)
        await self._call("admit")
        if (decided := self.slow.get(asked.request_id)) is not None:
            await decided.wait()
        return pack(self.answer(asked))

    async def settle(self, settlements: bytes) -> None:
        self.batches.append(unpack(settlements, list[Settlement]))
        await self._call("settle")

    async def renew(self, ingress_id: str) -> None:
        self.renewed.append(ingress_id)

    async def administer(self, command: bytes) -> bytes:
        await self._call("administer")
        return self.administered(command)

    async def usage(self, query: bytes) -> bytes:
        await self._call("usage")
        return pack(self.used(unpack(query, UsageQuery)))

    async def counters(self) -> bytes:
        await self._call("counters")
        return pack(self.counted)

    async def ping(self) -> None:
        await self._call("ping")

    async def _call(self, method: str) -> None:
        self.calls.append(method)
        await self.answering.wait()
        if self.error is not None:
            raise self.error

    def _tokenized(self, request: AdmissionRequest) -> Admitted | AdmissionRefused:
        tokenizer = self._tokenizers[request.model]
        prompts = [p if isinstance(p, list) else tokenizer.encode(p).ids for p in request.prompts]
        longest = max(map(len, prompts)) + request.max_tokens
        if longest > self._max_model_len:
            message = f"maximum context length is {self._max_model_len}, you requested {longest}"
            return AdmissionRefused("context_length_exceeded", message, param="prompt")
        return Admitted(prompts)
