"""Prompts of a wanted length in the served model's tokens, made of words.

How many tokens a word has is found out by asking the server, so this works with any tokenizer and any server.
"""

from __future__ import annotations

import random
from typing import Final, NamedTuple

__all__ = ["CALIBRATION_WORDS", "Lengths", "words"]

_WORDS: Final = (
    "river",
    "stone",
    "light",
    "engine",
    "cloud",
    "paper",
    "winter",
    "bridge",
    "signal",
    "garden",
    "metal",
    "ocean",
    "letter",
    "window",
    "mountain",
    "silver",
    "forest",
    "market",
    "candle",
    "thunder",
    "harbor",
    "copper",
    "meadow",
    "lantern",
)

CALIBRATION_WORDS: Final = (50, 250)
"""Lengths of the two prompts whose `usage` calibrates."""


def words(number: int, source: random.Random) -> str:
    return " ".join(source.choices(_WORDS, k=number))


class Lengths(NamedTuple):
    """tokens = fixed + per_word * words."""

    per_word: float
    fixed: float
    """A token for the beginning of the text, say."""

    @classmethod
    def of(cls, short_tokens: int, long_tokens: int) -> Lengths:
        """From what the server counted for prompts of CALIBRATION_WORDS. Raises ValueError when that makes no sense."""
        short, long = CALIBRATION_WORDS
        per_word = (long_tokens - short_tokens) / (long - short)
        if per_word <= 0:
            raise ValueError(f"the server counts {short_tokens} tokens for {short} words and {long_tokens} for {long}")
        return cls(per_word, short_tokens - per_word * short)

    def words(self, tokens: int) -> int:
        """At least one."""
        return max(1, round((tokens - self.fixed) / self.per_word))
