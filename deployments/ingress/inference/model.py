"""What a request must know of the model that it asks and of the replicas behind it; routing/ has all of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from deployments.ingress.inference.generation import Generation
from deployments.ingress.inference.token_texts import TokenTexts
from deployments.ingress.inference.write_scheduler import WriteScheduler

__all__ = ["ModelEntry", "Pool", "RequestedModel"]


class Pool(Protocol):
    """The engine replicas of one model."""

    writes: WriteScheduler

    @property
    def cold(self) -> bool: ...

    def start(self, generations: list[Generation]) -> None: ...

    def abort(self, generations: Iterable[Generation]) -> None: ...

    def release(self, request_id: str) -> None: ...

    def first_token(self, first_token_s: float) -> None: ...

    def inter_token(self, inter_token_s: float) -> None: ...


class ModelEntry(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def priority_scheduling(self) -> bool: ...

    @property
    def verifies_outputs(self) -> bool: ...


class RequestedModel(Protocol):
    @property
    def entry(self) -> ModelEntry: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def pool(self) -> Pool: ...

    @property
    def token_texts(self) -> TokenTexts: ...
