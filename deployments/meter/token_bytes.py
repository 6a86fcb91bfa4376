"""How much text one token can stand for, so that a text that cannot fit a context is refused before it is tokenized.

That is only known where nothing of a text is lost on its way to the tokens: byte-level BPE, or BPE that falls back to
bytes, behind normalizers and pre-tokenizers that are known to drop nothing. Everything else gets no answer, and is
tokenized to be counted. The file's format: https://huggingface.co/docs/tokenizers/components.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

__all__ = ["bytes_per_token"]

_SHRINKS_AT_MOST: Final = {"NFC": 9, "NFD": 3}
"""How many bytes of UTF-8 may become one. A character with a canonical decomposition is at most three times as long as
that (U+212A, the sign for kelvin, is `K`), and NFC also composes, by which nothing becomes shorter than a third."""
_KEEPING: Final = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}
"""Pre-tokenizers that only cut, or make text longer."""
_ALL_BYTES: Final = 256


class _Part(msgspec.Struct):
    """A normalizer or pre-tokenizer."""

    type: str
    normalizers: list[_Part] = []
    pretokenizers: list[_Part] = []
    behavior: str = ""
    pattern: dict[str, str] = {}
    content: str = ""
    prepend: str = ""


class _Model(msgspec.Struct):
    type: str = ""
    byte_fallback: bool = False
    vocab: Any = None


class _AddedToken(msgspec.Struct):
    content: str
    lstrip: bool = False
    rstrip: bool = False


class _File(msgspec.Struct):
    model: _Model
    normalizer: _Part | None = None
    pre_tokenizer: _Part | None = None
    added_tokens: list[_AddedToken] = []


def bytes_per_token(file: bytes) -> int | None:
    """The most bytes of UTF-8 that one token of this tokenizer.json stands for; None where there is no such bound."""
    try:
        described = msgspec.json.decode(file, type=_File)
    except msgspec.DecodeError:
        return None  # a form that is not known here; whether the tokenizer can be used is not decided here
    vocabulary = described.model.vocab
    if described.model.type != "BPE" or not isinstance(vocabulary, dict) or not vocabulary:
        return None
    if any(token.lstrip or token.rstrip for token in described.added_tokens):
        return None  # it takes any number of spaces with it
    shrinks = _shrinks_at_most(described.normalizer)
    cutters = _flat(described.pre_tokenizer)
    if shrinks is None or not all(map(_keeps_all, cutters)):
        return None
    if any(part.type == "ByteLevel" for part in cutters):
        # Each character of a token stands for a byte; without one of them, that byte would vanish.
        if sum(len(token) == 1 for token in vocabulary) < _ALL_BYTES:
            return None
        longest = max(map(len, vocabulary))
    elif described.model.byte_fallback:
        if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(_ALL_BYTES)):
            return None
        longest = max(len(token.encode()) for token in vocabulary)
    else:
        return None
    return shrinks * max([longest, *(len(token.content.encode()) for token in described.added_tokens)])


def _flat(part: _Part | None) -> list[_Part]:
    if part is None:
        return []
    if part.type == "Sequence":
        return [each for inner in (*part.normalizers, *part.pretokenizers) for each in _flat(inner)]
    return [part]


def _shrinks_at_most(normalizer: _Part | None) -> int | None:
    """How many bytes may become one; None where that is not known."""
    shrinks = 1
    for part in _flat(normalizer):
        match part.type:
            case "NFC" | "NFD":
                shrinks *= _SHRINKS_AT_MOST[part.type]
            case "Replace" if len(part.content.encode()) >= len(part.pattern.get("String", "").encode()) > 0:
                pass
            case "Prepend" | "ByteLevel":
                pass
            case _:
                return None
    return shrinks


def _keeps_all(part: _Part) -> bool:
    if part.type in ("Split", "Punctuation"):
        return part.behavior != "Removed"
    return part.type in _KEEPING
