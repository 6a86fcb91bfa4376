"""Log probabilities in OpenAI's legacy format, with the texts of tokens that vLLM's own server gives.

A token alone may be no text: a byte of a character reads as U+FFFD. Then the token that completes the character gets
all of it and the others get nothing, so that the texts of tokens add up to the text (vLLM's LogprobsProcessor).

`top_logprobs` is an object by text, in which vLLM loses all but the last of the entries that read alike: parts of
characters, mostly. Here the chosen token keeps its text, so that it is found by what `tokens` calls it, and the others
of that text are told by their bytes, as OpenAI did: `bytes:\\xe2\\x80`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from tokenizers import Tokenizer, pre_tokenizers

from deployments.contracts import PositionLogprobs

__all__ = ["Logprobs", "LogprobsWriter", "TokenTexts", "prompt_logprobs_fields"]

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 4
"""A character has at most four bytes, so at most four tokens."""
_LOWEST = -9999.0
"""What OpenAI and vLLM put for minus infinity, which JSON does not have."""


class Logprobs(msgspec.Struct):
    """One entry per token in each list. Source: the Completions reference, `choices[].logprobs`."""

    text_offset: list[int] = []
    """Characters before the token, in the text that all tokens make."""
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []
    """Of the likeliest tokens and the one chosen, which comes first. Never fewer entries than tokens."""

    def extend(self, more: Logprobs) -> None:
        self.text_offset += more.text_offset
        self.token_logprobs += more.token_logprobs
        self.tokens += more.tokens
        self.top_logprobs += more.top_logprobs


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
        for length in range(1, min(len(context), _CONTEXT_TOKENS) + 1):
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


class LogprobsWriter:
    """The log probabilities of one choice, written as its tokens come."""

    def __init__(self, texts: TokenTexts, *, top: int | None, as_token_ids: bool) -> None:
        """`top`: of how many tokens to tell beside the one that is there; None tells all that come."""
        self._texts = texts
        self._told = None if top is None else top + 1
        self._as_token_ids = as_token_ids
        self._offset = 0
        self._context: list[int] = []

    def prompt(
        self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None], *, more: bool = False
    ) -> Logprobs:
        """For an echo: of the first token nothing is known. With `more` another piece of the prompt follows."""
        written = self._write(token_ids, positions)
        if not more:
            self._context = []  # as in vLLM, which does not look back from what it generates into the prompt
        return written

    def generated(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs]) -> Logprobs:
        return self._write(token_ids, positions)

    def _write(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> Logprobs:
        written = Logprobs()
        for token_id, position in zip(token_ids, positions, strict=True):
            if position is None:
                token = f"token_id:{token_id}" if self._as_token_ids else self._texts.at_the_start(token_id)
                written.token_logprobs.append(None)
                written.top_logprobs.append(None)
            else:
                told = position.token_ids[: self._told]
                texts = [self._text(each) for each in told]
                logprobs = [max(each, _LOWEST) for each in position.logprobs[: self._told]]
                token = texts[0]
                written.token_logprobs.append(logprobs[0])
                top = dict(zip(texts, logprobs, strict=True))
                if len(top) < len(texts):
                    top = dict(zip(self._told_apart(told, texts), logprobs, strict=True))
                written.top_logprobs.append(top)
                self._context = [*self._context[1 - _CONTEXT_TOKENS :], token_id]
            written.tokens.append(token)
            written.text_offset.append(self._offset)
            self._offset += len(token)
        return written

    def _told_apart(self, token_ids: Sequence[int], texts: Sequence[str]) -> list[str]:
        """One name for each token of a position, of which several read alike; the first keeps its text."""
        names: dict[str, None] = {texts[0]: None}
        for token_id, text in zip(token_ids[1:], texts[1:], strict=True):
            name = text if texts.count(text) == 1 else self._texts.as_bytes(token_id)
            names[f"token_id:{token_id}" if name in names or (name != text and name in texts) else name] = None
        return list(names)

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_token_ids else self._texts.after(self._context, token_id)


def prompt_logprobs_fields(
    texts: TokenTexts, positions: Sequence[PositionLogprobs | None]
) -> Iterator[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: per position, by token id, what is known of each token."""
    context: list[int] = []
    for position in positions:
        if position is None:
            yield None
            continue
        yield {
            str(token_id): {
                "logprob": max(logprob, _LOWEST),
                "rank": rank,
                "decoded_token": texts.after(context, token_id),
            }
            for token_id, logprob, rank in zip(position.token_ids, position.logprobs, position.ranks, strict=True)
        }
        context = [*context[1 - _CONTEXT_TOKENS :], position.token_ids[0]]
