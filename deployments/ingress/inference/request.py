"""What is asked of a model, in words that all endpoints share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from deployments.contracts import PromptOptions, Sampling
from deployments.ingress.constraints.constraint import GivenConstraint
from deployments.ingress.errors import InvalidRequest
from deployments.ingress.inference.model import RequestedModel
from deployments.ingress.inference.text_stream import TextOptions

__all__ = ["NO_SEED", "InferenceRequest"]

_MAX_PROMPT_ENTRIES: Final = 2**16
"""Log probabilities of one prompt: what the engine and the ingress pass on as a whole, in 30 to 50 ms."""
_MAX_PROMPT_ENTRIES_OF_ALL: Final = 2**18
"""Of all prompts, for each of the choices generated."""

_SEEDS: Final = 2**64
NO_SEED: Final = -1
"""For vLLM's sampling parameters."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """What is asked of a model, whichever endpoint was asked. Parameters have the same names at all of them."""

    model: str
    """As the caller calls it."""
    prompts: list[str | list[int]]
    prompt_options: PromptOptions
    candidates: int
    """Generated per prompt."""
    max_tokens: int
    """Of one candidate. 0 scores the prompt only: the engine makes one token, which nobody sees or pays."""
    sampling: Sampling
    """Of the first candidate of each prompt, without a grammar."""
    text: TextOptions
    constraint: GivenConstraint | None = None
    asks_prompt_logprobs: str = "prompt_logprobs"
    """The parameter that asks for them."""

    def of_candidate(self, number: int, grammar: str | None) -> Sampling:
        """For the `number`-th of a prompt: each samples with a seed of its own, counted up as in vLLM. After the
        largest seed comes the smallest."""
        seed = self.sampling.seed
        if number and seed is not None:
            seed = (seed + number + _SEEDS // 2) % _SEEDS - _SEEDS // 2
            if seed == NO_SEED:
                seed = _SEEDS // 2 - 1
        return msgspec.structs.replace(self.sampling, seed=seed, grammar=grammar)

    @property
    def constraining(self) -> str | None:
        """The parameter that says what the output must conform to."""
        return None if self.constraint is None else self.constraint.param.partition(".")[0]

    def check(self, model: RequestedModel) -> None:
        """What depends on the model, and can be told before an engine is asked. Raises InvalidRequest."""
        sampling = self.sampling
        if sampling.priority and not model.entry.priority_scheduling:
            raise InvalidRequest(
                f"The model '{self.model}' serves requests in the order of their arrival. Leave priority out.",
                param="priority",
            )
        for param, token_ids in (
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", sampling.logit_bias),
            ("allowed_token_ids", sampling.allowed_token_ids),
            ("logprob_token_ids", sampling.logprob_token_ids),
        ):
            for token_id in set(token_ids or ()):
                if model.tokenizer.id_to_token(token_id) is None:
                    raise InvalidRequest(f"Token id {token_id} is out of vocabulary.", param=param)

    def check_prompts(self, prompts: list[list[int]]) -> None:
        """How many log probabilities `prompts` have is known once they are tokens. Raises InvalidRequest."""
        told, param = self.sampling.prompt_logprobs, self.asks_prompt_logprobs
        if told is None:
            return
        lengths = list(map(len, prompts))
        if max(lengths) * (told + 1) > _MAX_PROMPT_ENTRIES:
            raise InvalidRequest(
                f"A prompt of {max(lengths)} tokens with {told + 1} log probabilities for each has "
                f"{max(lengths) * (told + 1)} of them; expected at most {_MAX_PROMPT_ENTRIES} for one prompt.",
                param=param,
            )
        entries = sum(lengths) * (told + 1) * self.candidates
        if entries > _MAX_PROMPT_ENTRIES_OF_ALL:
            raise InvalidRequest(
                f"{sum(lengths)} tokens of prompts with {told + 1} log probabilities each, for {self.candidates} "
                f"choices of each prompt, have {entries} of them; expected at most {_MAX_PROMPT_ENTRIES_OF_ALL}.",
                param=param,
            )
