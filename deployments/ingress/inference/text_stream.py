"""The text of one choice: detokenizing, stop strings and the count of the tokens that made it.

It knows nothing of replicas: a generation keeps its `TextStream` when another replica resumes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from tokenizers import Tokenizer

from deployments.contracts import FinishReason
from deployments.ingress.inference.detokenizer import Detokenizer
from deployments.ingress.inference.stop_strings import StopStrings

__all__ = ["TextDelta", "TextOptions", "TextStream"]


class TextDelta(NamedTuple):
    text: str
    """Whole characters; no part of a stop string."""
    tokens_used: int
    """Pushed tokens that count: those behind the one that completed a stop string do not."""
    finished: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    """The stop string or token id that ended it; None for the end of text or the length, as in vLLM."""


class TextOptions(NamedTuple):
    stops: Sequence[str] = ()
    include_stop_in_output: bool = False
    """Keep the stop string, or the text of the stop token, as vLLM does."""
    min_tokens: int = 0
    """Stop strings that end within the text of so many tokens are ignored."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


class TextStream:
    """Pushing ends with the first delta that has `finished` set."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], options: TextOptions) -> None:
        self._detokenizer = Detokenizer(
            tokenizer,
            prompt_token_ids,
            skip_special_tokens=options.skip_special_tokens,
            spaces_between_special_tokens=options.spaces_between_special_tokens,
        )
        stops, include_stop = options.stops, options.include_stop_in_output
        self._stop_strings = StopStrings(stops, include_in_output=include_stop) if stops else None
        self._include_stop_in_output = include_stop
        self._tokens_unarmed = options.min_tokens

    def push(self, token_ids: Sequence[int], finish: FinishReason | None = None) -> TextDelta:
        """Take the next tokens and how the engine ended the generation with them.

        `refused` and `failed` do not end the text.
        """
        visible = token_ids
        if finish in ("stop_token", "end_of_text") and not self._include_stop_in_output:
            visible = token_ids[:-1]
        finished = _FINISHED[finish]
        stop_reason: int | str | None = None
        if finish == "stop_token":
            stop_reason = token_ids[-1]
        elif finish == "repetition":
            stop_reason = "repetition_detected"
        if self._stop_strings is None:
            return TextDelta(self._detokenizer.push(visible), len(token_ids), finished, stop_reason)

        texts: list[str] = []
        for position, token_id in enumerate(visible, start=1):
            text = self._detokenizer.push((token_id,))
            scan = self._stop_strings.push(text, armed=position > self._tokens_unarmed)
            texts.append(scan.text)
            if scan.found is not None:
                return TextDelta("".join(texts), position, "stop", scan.found)
        self._tokens_unarmed = max(0, self._tokens_unarmed - len(token_ids))
        if finished is not None:
            texts.append(self._stop_strings.flush())
        return TextDelta("".join(texts), len(token_ids), finished, stop_reason)


_FINISHED: dict[FinishReason | None, Literal["stop", "length"] | None] = {
    "stop": "stop",
    "stop_token": "stop",
    "end_of_text": "stop",
    "repetition": "stop",
    "length": "length",
    "refused": None,
    "failed": None,
    None: None,
}
