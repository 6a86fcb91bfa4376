"""A byte-level tokenizer of one token per byte, whose first tokens are letters: what a simulated engine makes of them
can be read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

__all__ = ["LETTERS", "VOCABULARY_TOKENS", "letter_tokenizer", "save_letter_tokenizer", "text_of"]

LETTERS: Final = " abcdefghijklmnopqrstuvwxyz"
"""Token 1 is the space, 2 is `a`, and so on; token 0 is special."""
VOCABULARY_TOKENS: Final = 257


@cache
def letter_tokenizer() -> Tokenizer:
    letters = ["Ġ", *LETTERS[1:]]  # byte-level tokenizers write a space as Ġ
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters))
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *letters, *others])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def save_letter_tokenizer(folder: Path) -> Path:
    """Writes `folder/tokenizer.json` and returns `folder`, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    letter_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def text_of(token_ids: list[int]) -> str:
    text: str = letter_tokenizer().decode(token_ids)
    return text
