"""What each token of a model reads like, as vLLM's own server tells it.

A token alone may be no text: a byte of a character reads as U+FFFD. Then the token that completes the character gets
all of it and the others get nothing, so that the texts of tokens add up to the text (vLLM's LogprobsProcessor).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from tokenizers import Tokenizer, pre_tokenizers

__all__ = ["CONTEXT_TOKENS", "TokenTexts"]

CONTEXT_TOKENS: Final = 4
"""A character has at most four bytes, so at most four tokens."""
_REPLACEMENT = "\ufffd"


class TokenTexts:
    """What each token of one model reads like. Keeps what it has decoded: at most the vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        self._space_marker = _leading_space_marker(tokenizer)
        self._byte_level = _is_byte_level(tokenizer)

    def at_the_start(self, token_id: int) -> str:
        """As decoders give it: a space that a word begins with is no part of the text."""
        return self._decode([token_id])

    def alone(self, token_id: int) -> str:
        text = self._alone.get(token_id)
        if text is None:
            text = self._decode([token_id])
            if self._space_marker is not None:  # decoding strips the space that a word begins with
                raw = self._tokenizer.id_to_token(token_id) or ""
                spaces = len(raw) - len(raw.lstrip(self._space_marker))
                text = " " * (spaces - (len(text) - len(text.lstrip(" ")))) + text
            self._alone[token_id] = text
        return text

    def after(self, context: Sequence[int], token_id: int) -> str:
        """With the tokens before it: of an incomplete character nothing, unless this token completes it."""
        text = self.alone(token_id)
        return self._completed(context, token_id) if text.endswith(_REPLACEMENT) else text

    def as_bytes(self, token_id: int) -> str:
        """`bytes:` and what the token stands for: printable ASCII as it is, all else as `\\xe2`."""
        raw = self._tokenizer.id_to_token(token_id) or ""
        if byte := _BYTE_TOKEN.fullmatch(raw):
            data = bytes.fromhex(byte[1])
        elif self._byte_level and all(character in _BYTE_OF for character in raw):
            data = bytes(_BYTE_OF[character] for character in raw)
        else:
            data = (raw if self._space_marker is None else raw.replace(self._space_marker, " ")).encode()
        return "bytes:" + "".join([chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in data])

    def _completed(self, context: Sequence[int], token_id: int) -> str:
        for length in range(1, min(len(context), CONTEXT_TOKENS) + 1):
            tail = list(context[-length:])
            whole = self._decode([*tail, token_id])
            if whole.endswith(_REPLACEMENT):
                continue
            while tail and self._decode(tail[-1:]).endswith(_REPLACEMENT):
                del tail[-1]  # its bytes are part of the character that is complete now
            before = self._decode(tail) if tail else ""
            common = 0
            while common < len(before) and before[common] == whole[common : common + 1]:
                common += 1
            return whole[common:]
        return ""

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _leading_space_marker(tokenizer: Tokenizer) -> str | None:
    """The character that SentencePiece vocabularies put for a space; None for all others."""
    stage = tokenizer.pre_tokenizer
    stages: Iterable[Any] = [stage]
    if isinstance(stage, pre_tokenizers.Sequence):
        stages = map(stage.__getitem__, itertools.count())  # it has no length, and ends with an IndexError
    try:
        return next((str(each.replacement) for each in stages if isinstance(each, pre_tokenizers.Metaspace)), None)
    except IndexError:
        return None


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its vocabulary writes bytes as visible characters, as GPT-2's does."""
    decoder = tokenizer.decoder
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()  # as JSON: its parts cannot be asked for


def _byte_alphabet() -> dict[str, int]:
    """The byte of each visible character. Source: `bytes_to_unicode` of GPT-2's encoder.py."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece writes a byte."""
