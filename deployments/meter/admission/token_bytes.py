"""How much text one token can stand for, so that a text that cannot fit a context is refused before it is tokenized.

That is only known where it is known what of a text is lost on its way to the tokens: byte-level BPE, or BPE that falls
back to bytes, behind normalizers and pre-tokenizers that drop nothing. Everything else gets no answer, and is tokenized
to be counted. The file's format: https://huggingface.co/docs/tokenizers/components.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
from tokenizers import pre_tokenizers

__all__ = ["TokenBytes", "token_bytes"]

_SHRINKS_AT_MOST: Final = {"NFC": 9, "NFD": 3}
"""How many bytes of UTF-8 may become one. A character with a canonical decomposition is at most three times as long as
that (U+212A, the sign for kelvin, is `K`), and NFC also composes, by which nothing becomes shorter than a third."""
_KEEPING: Final = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}
"""Pre-tokenizers that only cut, or make text longer."""
_ALL_BYTES: Final = 256


class TokenBytes(NamedTuple):
    most: int
    """Bytes of UTF-8 that one token stands for."""
    lost: bytes = b""
    """Those that the vocabulary has no token for, and that vanish: SmolLM2 has none for some control characters."""

    def fewest_tokens(self, text: str) -> int:
        """That `text` makes, special tokens aside."""
        encoded = text.encode(errors="surrogatepass")
        return -(-len(encoded.translate(None, self.lost) if self.lost else encoded) // self.most)


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


def token_bytes(file: bytes) -> TokenBytes | None:
    """Of a tokenizer.json; None where there is no such bound."""
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
    lost = b""
    if any(part.type == "ByteLevel" for part in cutters):
        longest = max(map(len, vocabulary))  # each character of a token stands for a byte
        lost = bytes(byte for byte, character in _ALPHABET.items() if character not in vocabulary)
        if lost and described.normalizer is not None:
            return None  # it may make such bytes of others
    elif described.model.byte_fallback:
        if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(_ALL_BYTES)):
            return None
        longest = max(len(token.encode()) for token in vocabulary)
    else:
        return None
    longest = max([longest, *(len(token.content.encode()) for token in described.added_tokens)])
    return TokenBytes(shrinks * longest, lost)


def _byte_alphabet() -> dict[int, str]:
    """The character that byte-level tokenizers write for each byte: itself where it can be printed, else the next from
    U+0100 on (OpenAI's GPT-2, encoder.py)."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(character for character in alphabet if ord(character) >= _ALL_BYTES))
    return {byte: chr(byte) if chr(byte) in alphabet else next(others) for byte in range(_ALL_BYTES)}


_ALPHABET: Final = _byte_alphabet()


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
