"""A completion: an inference whose choices are texts, with log probabilities and an echo of the prompt where asked."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final
from uuid import uuid4

from deployments.contracts import KeyInfo, PositionLogprobs, TokenDelta
from deployments.ingress.api.completions.chunks import ChoiceDelta
from deployments.ingress.api.completions.logprobs import LogprobsWriter, WrittenLogprobs, prompt_logprobs_fields
from deployments.ingress.api.completions.request import CompletionRequest
from deployments.ingress.constraints.checker import ConstraintChecker
from deployments.ingress.errors import InvalidRequest
from deployments.ingress.inference.inference import Candidate, Inference
from deployments.ingress.inference.text_stream import TextDelta
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.routing.catalog import ServedModel

__all__ = ["CompletionInference"]

_ENTRIES_PER_TURN: Final = 2048
"""How many log probabilities of a prompt are written in one turn of the event loop, at 2 to 4 us each."""


@dataclass(slots=True)
class _Details:
    """What is told of a candidate beside its text."""

    logprobs: LogprobsWriter | None
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None
    """Of its prompt, where asked for, and so the next."""
    echoed: WrittenLogprobs | None = None
    log_probability: float = 0.0
    """Of the tokens that count, together; known where candidates are ranked."""


class CompletionInference(Inference[ChoiceDelta]):
    def __init__(
        self,
        request: CompletionRequest,
        model: ServedModel,
        key: KeyInfo,
        meter: MeterClient,
        constraints: ConstraintChecker,
        *,
        dialect: str = "D3",
        caller_request_id: str | None = None,
    ) -> None:
        """Raises InvalidRequest when the model cannot fill the gap that is asked for."""
        super().__init__(
            f"cmpl-{uuid4().hex}",
            request.inference(_prompts(request, model)),
            model,
            key,
            meter,
            constraints,
            dialect=dialect,
            caller_request_id=caller_request_id,
        )
        self.created = int(time.time())
        self.request = request
        self.model = model
        self._details: dict[int, _Details] = {}
        self._is_plain = (
            request.logprobs is None
            and request.prompt_logprobs is None
            and not request.echo
            and not request.return_token_ids
            and request.candidates == request.choices
        )
        """Nobody asked for more than text: most requests, and the least work per token."""

    def _write(
        self, number: int, candidate: Candidate, delta: TokenDelta, token_ids: list[int], text: TextDelta
    ) -> ChoiceDelta | None:
        if not self._is_plain:
            return self._detailed(number, candidate, delta, token_ids, text)
        if not text.text and text.finished is None:
            return None
        return ChoiceDelta(number, text.text, text.finished, text.stop_reason)

    def _detailed(
        self, number: int, candidate: Candidate, delta: TokenDelta, token_ids: list[int], text: TextDelta
    ) -> ChoiceDelta | None:
        request, details = self.request, self._details_of(number)
        prompt = candidate.generation.prompt
        first = not candidate.told
        shown = text.text
        if first and request.echo:
            shown = self._echo(number // request.candidates) + shown
        positions = (delta.logprobs or [])[: len(token_ids)]
        if request.candidates > request.choices:
            details.log_probability += sum(position.logprobs[0] for position in positions)
        logprobs = None
        if details.logprobs is not None:
            if first and request.echo:
                # Without an engine's word, as of a prompt of one token, nothing is known.
                logprobs = details.echoed or details.logprobs.prompt(prompt, [None] * len(prompt))
                logprobs.extend(details.logprobs.generated(token_ids, positions))
            else:
                logprobs = details.logprobs.generated(token_ids, positions)
        if not (shown or text.finished or token_ids):
            return None
        return ChoiceDelta(
            number,
            shown,
            text.finished,
            text.stop_reason,
            logprobs,
            token_ids=token_ids if request.return_token_ids else None,
            prompt_token_ids=prompt if first and request.return_token_ids else None,
            prompt_logprobs=details.prompt_logprobs if first else None,
        )

    def _details_of(self, number: int) -> _Details:
        details = self._details.get(number)
        if details is None:
            request, writer = self.request, None
            if request.logprobs is not None:
                writer = LogprobsWriter(
                    self.model.token_texts,
                    top=None if request.logprob_token_ids else request.logprobs,
                    as_token_ids=bool(request.return_tokens_as_token_ids),
                )
            details = self._details[number] = _Details(writer)
        return details

    async def _write_prompt(self, number: int, candidate: Candidate, positions: list[PositionLogprobs | None]) -> None:
        """In as many turns of the event loop as it takes."""
        request, prompt, details = self.request, candidate.generation.prompt, self._details_of(number)
        size = max(1, _ENTRIES_PER_TURN // (1 + (request.prompt_positions or 0)))
        if not request.stream:  # with an echo too, as in vLLM
            details.prompt_logprobs = []
            fields = prompt_logprobs_fields(self.model.token_texts, positions)
            while some := list(islice(fields, size)):
                details.prompt_logprobs += some
                await asyncio.sleep(0)
        if request.echo and details.logprobs is not None:
            details.echoed = WrittenLogprobs()
            for begin in range(0, len(prompt), size):
                end = begin + size
                details.echoed.extend(
                    details.logprobs.prompt(prompt[begin:end], positions[begin:end], more=end < len(prompt))
                )
                await asyncio.sleep(0)

    def _echo(self, number: int) -> str:
        """The text of prompt `number`: as it was sent, or of the tokens that the model saw instead."""
        prompt = self.request.prompt[number]
        if isinstance(prompt, str) and self.request.truncate_prompt_tokens is None:
            return prompt
        text: str = self.model.tokenizer.decode(self.prompts[number], skip_special_tokens=False)
        return text

    def best(self) -> list[int]:
        """The candidates that become choices, by prompt: of each its likeliest per token, as at OpenAI."""
        request = self.request
        best: list[int] = []
        for first in range(0, len(self.candidates), request.candidates):
            numbers = range(first, first + request.candidates)
            if request.candidates > request.choices:
                best += sorted(numbers, key=self._likelihood, reverse=True)[: request.choices]
            else:
                best += numbers
        return best

    def _likelihood(self, number: int) -> float:
        used = self.candidates[number].used
        return self._details_of(number).log_probability / used if used else -math.inf


def _prompts(request: CompletionRequest, model: ServedModel) -> list[str | list[int]]:
    """With a suffix, as the model is asked to fill the gap before it."""
    infilling = model.entry.infilling
    if request.suffix is None:
        return request.prompt
    if infilling is None:
        raise InvalidRequest(
            f"The model '{request.model}' cannot fill in text between a prompt and a suffix. Leave suffix out.",
            param="suffix",
        )
    if not all(isinstance(prompt, str) for prompt in request.prompt):
        raise InvalidRequest("suffix is only allowed with a prompt that is text.", param="suffix")
    return [infilling.prompt(str(prompt), request.suffix) for prompt in request.prompt]
