"""Which models the meter admits requests for. Replaced whole while requests run, which keep what they began with."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from deployments.meter.admission.tokenizer import PromptTokenizer
from deployments.meter.admission.tokenizer_lanes import TokenizerLanes

__all__ = ["CatalogueEntry", "MeteredModel", "ModelCatalog"]


@dataclass(frozen=True)
class MeteredModel:
    """One model of the cluster, as the meter needs to know it."""

    name: str
    """As requests name it, whatever the client wrote."""
    folder: Path
    """Holds `tokenizer.json`."""
    max_model_len: int
    """Tokens of prompt and completion together, >= 1; the same number that the model's engines run with."""
    prompt_price: float = 0.0
    """Per million tokens, as the one below."""
    completion_price: float = 0.0
    aliases: tuple[str, ...] = ()
    """Its other names, which keys may be limited to."""

    def usable_with(self, models: Collection[str] | None) -> bool:
        """Whether a key may use it that is limited to `models`; None allows all."""
        return models is None or self.name in models or any(alias in models for alias in self.aliases)


class CatalogueEntry(NamedTuple):
    model: MeteredModel
    tokenizer: PromptTokenizer


class ModelCatalog:
    """The listed models by name. Models of one folder share its tokenizer."""

    def __init__(self, lanes: TokenizerLanes) -> None:
        self._lanes = lanes
        self._entries: dict[str, CatalogueEntry] = {}

    def set_models(self, models: Iterable[MeteredModel]) -> None:
        """Lists exactly these, keeps the tokenizers of folders that stay and forgets the others."""
        tokenizers = {entry.model.folder: entry.tokenizer for entry in self._entries.values()}
        entries: dict[str, CatalogueEntry] = {}
        for model in models:
            tokenizer = tokenizers.setdefault(model.folder, PromptTokenizer(model.folder, self._lanes))
            entries[model.name] = CatalogueEntry(model, tokenizer)
        self._entries = entries

    def find(self, name: str) -> CatalogueEntry | None:
        return self._entries.get(name)
