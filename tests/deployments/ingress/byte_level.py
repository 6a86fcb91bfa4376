"""Tokenizers of GPT-2's kind, whose tokens are bytes, each written as a visible character."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

__all__ = ["byte_alphabet", "byte_level_tokenizer"]


def byte_alphabet() -> dict[int, str]:
    """The visible character of every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def byte_level_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """`<|end|>`, which must be in the vocabulary, is special."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer
