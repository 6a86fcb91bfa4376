"""The models this ingress serves, and the pool of each; follows models that come and go without a restart.

What a model is (name, tokenizer, lengths) comes from the deployment's user_config; whether its application exists
comes from Serve, asked every second. A model is served while both are there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import structlog
from pydantic import BaseModel
from tokenizers import Tokenizer

from deployments.ingress.constraints.checker import ConstraintChecker
from deployments.ingress.errors import ModelNotFound
from deployments.ingress.inference.token_texts import TokenTexts
from deployments.ingress.routing.engine_pool import EnginePool, PoolLimits

__all__ = ["Catalog", "CatalogEntry", "FillInTheMiddle", "ServedModel"]

log = structlog.get_logger()

_REFRESH_S = 1.0
_WATCH_S = 0.25
_LAG_HORIZON_S = 5.0


class FillInTheMiddle(BaseModel, frozen=True, extra="forbid"):
    """The special tokens, as text, by which a model is asked for what comes between a prefix and a suffix."""

    prefix: str
    suffix: str
    middle: str

    def prompt(self, prefix: str, suffix: str) -> str:
        """In the order prefix, suffix, middle, which all common models were trained on."""
        return f"{self.prefix}{prefix}{self.suffix}{suffix}{self.middle}"


class CatalogEntry(BaseModel, frozen=True, extra="forbid"):
    """One model as the application builder (serve_app/applications.py) describes it to the ingress."""

    name: str
    aliases: tuple[str, ...] = ()
    """More names by which clients may ask for it."""
    root: str = ""
    """The name by which the Hugging Face hub knows the model; empty where it is not known."""
    application: str
    folder: Path
    """Prepared model; the ingress reads its tokenizer."""
    max_model_len: int
    fingerprint: str
    """Of all that shapes what the model answers: `system_fingerprint` on the wire."""
    priority_scheduling: bool = False
    verifies_outputs: bool = True
    """Whether what its engines make in a required form is checked at its end. Not where they are simulated: those make
    filler, whatever is asked."""
    infilling: FillInTheMiddle | None = None
    limits: PoolLimits
    min_replicas: int = 1
    max_replicas: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Its own, and the aliases."""
        return self.name, *self.aliases


@dataclass(frozen=True)
class ServedModel:
    entry: CatalogEntry
    tokenizer: Tokenizer
    pool: EnginePool
    created: int
    """Unix time in seconds since which this ingress serves it."""

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)


class Catalog:
    def __init__(
        self,
        existing: Callable[[Iterable[str]], Awaitable[frozenset[str]]],
        open_pool: Callable[[CatalogEntry], Awaitable[EnginePool]],
        forget_others: Callable[[frozenset[str]], Awaitable[None]] | None = None,
    ) -> None:
        """`existing` tells which of the named applications Serve has; `open_pool` starts following one's replicas;
        `forget_others` lets go of what is kept for applications but those named."""
        self._existing = existing
        self._forget_others = forget_others
        self._open_pool = open_pool
        self.constraints = ConstraintChecker()
        """Of all models."""
        self._entries: dict[str, CatalogEntry] = {}
        self._served: dict[str, ServedModel] = {}
        self._tokenizers: dict[_FileState, Tokenizer] = {}
        """By file, shared by models of one folder: SmolLM2's takes 15 MB, and reading it leaves 10 MB of holes."""
        self._aliases: dict[str, str] = {}
        """The model's own name by each of the others."""
        self._retired: list[tuple[str, EnginePool]] = []
        """Applications and pools of models that have gone, while their last streams run."""
        self._refreshing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self.loop_lag_s = 0.0
        """How much later than asked for the event loop wakes, averaged over about five seconds."""
        self.known = False
        """Serve has been asked at least once: an unknown model is unknown, not merely not seen yet."""

    async def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._refresh_loop(), name="catalog"),
            asyncio.create_task(self._watch_for_silence(), name="silence"),
        ]

    async def replace(self, entries: list[CatalogEntry]) -> None:
        """Take a new list of models. Returns when all of them that exist can be served."""
        self._entries = {entry.name: entry for entry in entries}
        self._aliases = {alias: entry.name for entry in entries for alias in entry.aliases}
        await self.refresh()

    def find(self, name: str) -> ServedModel:
        """`name` may be an alias. Raises ModelNotFound."""
        try:
            return self._served[self._aliases.get(name, name)]
        except KeyError:
            raise ModelNotFound(
                f"The model '{name}' does not exist. GET /v1/models lists the models you can use.",
                param="model",
            ) from None

    def models(self) -> list[ServedModel]:
        return sorted(self._served.values(), key=lambda model: model.entry.name)

    async def refresh(self) -> None:
        async with self._refreshing:
            entries = self._entries
            existing = await self._existing([entry.application for entry in entries.values()])
            self.known = True
            wanted = {name: entry for name, entry in entries.items() if entry.application in existing}
            for name in self._served.keys() - wanted.keys():
                log.info("model removed", model=name)
                model = self._served.pop(name)
                model.pool.retire()
                self._retired.append((model.entry.application, model.pool))
            for name, entry in wanted.items():
                served = self._served.get(name)
                if served is None or served.entry != entry:
                    try:
                        self._served[name] = await self._serve(entry, served)
                    except Exception as error:  # tried again at the next refresh; the other models go on
                        log.error("model not served", model=name, reason=repr(error))
            if self._forget_others is not None:
                retired = (application for application, pool in self._retired if not pool.empty)
                listed = (entry.application for entry in self._entries.values())
                await self._forget_others(frozenset((*listed, *retired)))

    async def _serve(self, entry: CatalogEntry, served: ServedModel | None) -> ServedModel:
        """`entry` as a served model; keeps the pool, and with it the streams, of the one served before."""
        tokenizer = await self._tokenizer(entry.folder / "tokenizer.json")
        if served is not None:
            log.info("model changed", model=entry.name)
            served.pool.limits = entry.limits
            return ServedModel(entry, tokenizer, served.pool, served.created)
        log.info("model added", model=entry.name)
        return ServedModel(entry, tokenizer, await self._open_pool(entry), int(time.time()))

    async def _tokenizer(self, path: Path) -> Tokenizer:
        state = await asyncio.to_thread(_file_state, path)
        if state not in self._tokenizers:
            in_use = {id(model.tokenizer) for model in self._served.values()}
            self._tokenizers = {known: kept for known, kept in self._tokenizers.items() if id(kept) in in_use}
            self._tokenizers[state] = await asyncio.to_thread(_read_tokenizer, path)
        return self._tokenizers[state]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for pool in self._pools():
            await pool.close()
        await self.constraints.close()

    def _pools(self) -> list[EnginePool]:
        self._retired = [(application, pool) for application, pool in self._retired if not pool.empty]
        return [*(model.pool for model in self._served.values()), *(pool for _, pool in self._retired)]

    async def _refresh_loop(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await self.refresh()
            except Exception as error:  # the controller may be away for a while: what is served goes on
                log.warning("applications not refreshed", reason=repr(error))

    async def _watch_for_silence(self) -> None:
        loop = asyncio.get_running_loop()
        stalled_until = woke = loop.time()
        while True:
            await asyncio.sleep(_WATCH_S)
            now = loop.time()
            self.loop_lag_s += _WATCH_S / _LAG_HORIZON_S * (now - woke - _WATCH_S - self.loop_lag_s)
            if now - woke > 4 * _WATCH_S:
                # This process was stalled, not the replicas: their messages lie unread, so give them time to be read.
                stalled_until = now + 4 * _WATCH_S
            woke = now
            if now >= stalled_until:
                for pool in self._pools():
                    try:
                        pool.check_silence(now)
                    except Exception:  # of one pool: the others must still notice replicas that hang
                        log.exception("silence not looked for", model=pool.model)


class _FileState(NamedTuple):
    """What tells a file from another, and from itself before it was written anew."""

    path: Path
    modified_ns: int
    size_bytes: int


def _file_state(path: Path) -> _FileState:
    found = path.stat()
    return _FileState(path.resolve(), found.st_mtime_ns, found.st_size)


def _read_tokenizer(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    # Left in the file by training; transformers, and so vLLM, sets both per call.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
