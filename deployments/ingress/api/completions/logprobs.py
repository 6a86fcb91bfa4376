"""Log probabilities in OpenAI's legacy format, with the texts of tokens that vLLM's own server gives.

`top_logprobs` is an object by text, in which vLLM loses all but the last of the entries that read alike: parts of
characters, mostly. Here the chosen token keeps its text, so that it is found by what `tokens` calls it, and the others
of that text are told by their bytes, as OpenAI did: `bytes:\\xe2\\x80`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from deployments.contracts import PositionLogprobs
from deployments.ingress.inference.token_texts import CONTEXT_TOKENS, TokenTexts

__all__ = ["LogprobsWriter", "WrittenLogprobs", "prompt_logprobs_fields"]

_LOWEST = -9999.0
"""What OpenAI and vLLM put for minus infinity, which JSON does not have."""


class WrittenLogprobs(msgspec.Struct):
    """One entry per token in each list. Source: the Completions reference, `choices[].logprobs`."""

    text_offset: list[int] = []
    """Characters before the token, in the text that all tokens make."""
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []
    """Of the likeliest tokens and the one chosen, which comes first. Never fewer entries than tokens."""

    def extend(self, more: WrittenLogprobs) -> None:
        self.text_offset += more.text_offset
        self.token_logprobs += more.token_logprobs
        self.tokens += more.tokens
        self.top_logprobs += more.top_logprobs


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
    ) -> WrittenLogprobs:
        """For an echo: of the first token nothing is known. With `more` another piece of the prompt follows."""
        written = self._write(token_ids, positions)
        if not more:
            self._context = []  # as in vLLM, which does not look back from what it generates into the prompt
        return written

    def generated(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs]) -> WrittenLogprobs:
        return self._write(token_ids, positions)

    def _write(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> WrittenLogprobs:
        written = WrittenLogprobs()
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
                self._context = [*self._context[1 - CONTEXT_TOKENS :], token_id]
            written.tokens.append(token)
            written.text_offset.append(self._offset)
            self._offset += len(token)
        return written

    def _told_apart(self, token_ids: Sequence[int], texts: Sequence[str]) -> list[str]:
        """One name for each token of a position, of which several read alike; the first keeps its text."""
        names: dict[str, None] = {texts[0]: None}
        alike = Counter(texts)  # there may be a thousand of them, at each position
        for token_id, text in zip(token_ids[1:], texts[1:], strict=True):
            name = text if alike[text] == 1 else self._texts.as_bytes(token_id)
            names[f"token_id:{token_id}" if name in names or (name != text and name in alike) else name] = None
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
        context = [*context[1 - CONTEXT_TOKENS :], position.token_ids[0]]
