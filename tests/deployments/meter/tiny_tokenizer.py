"""A byte-level BPE tokenizer of a few hundred tokens, for tests that turn text into token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

__all__ = ["BEGIN_ID", "save_tiny_tokenizer"]

BEGIN_ID: Final = 0
"""The special token that `begin` puts in front of every text."""


def save_tiny_tokenizer(folder: Path, *, begin: bool = False, truncate_at: int | None = None) -> Path:
    """Writes `folder/tokenizer.json` and returns `folder`, made if missing.

    `truncate_at` adds the truncation and padding that training may leave in such a file.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the mill turns and the stream runs through the mill "] * 50, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", BEGIN_ID)]
        )
    if truncate_at is not None:
        tokenizer.enable_truncation(truncate_at)
        tokenizer.enable_padding(length=truncate_at)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
