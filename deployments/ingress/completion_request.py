"""The body of `POST /v1/completions`: parsed, checked to the last key, and turned into what the engines take.

Names, defaults and ranges are those of OpenAI's Completions reference, and of vLLM's SamplingParams for its extras.
"""

from __future__ import annotations

from typing import Annotated, Any

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deployments.contracts import Sampling
from deployments.ingress.errors import InvalidRequest

__all__ = ["CompletionRequest", "StreamOptions", "parse_completion_request"]

_MAX_GENERATIONS = 1024
"""Prompts times n of one request."""
_INT32_MAX = 2**31 - 1
"""What engines keep in 32 bits. Larger ones would not even fit the messages of contracts.py."""

TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, texts, token ids, or lists of token ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {str}:
            return value
        if kinds == {int}:
            return [_in_range(value)]
        if kinds == {list} and all(prompt and set(map(type, prompt)) == {int} for prompt in value):
            return [_in_range(prompt) for prompt in value]
    raise ValueError("expected a string, or a non-empty array of strings, of token ids, or of arrays of token ids")


def _in_range(token_ids: list[int]) -> list[int]:
    """Those that fit into a message; whether the model knows them is for the meter to say."""
    if min(token_ids) < -_INT32_MAX or max(token_ids) > _INT32_MAX:
        raise ValueError("expected token ids of the model")
    return token_ids


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(s, str) and s for s in stops):
        raise ValueError("expected a non-empty string or an array of up to 4 of them")
    return tuple(stops)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class CompletionRequest(_Body):
    model: str
    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(default=16, ge=1, le=_INT32_MAX)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    n: int | None = Field(default=1, ge=1, le=128)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    echo: bool | None = False
    user: str | None = None
    # vLLM's extras
    top_k: int | None = Field(default=0, ge=-1, le=_INT32_MAX)
    min_p: float | None = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(default=1.0, gt=0, le=2)
    min_tokens: int | None = Field(default=0, ge=0)
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=128)
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False

    @property
    def choices(self) -> int:
        """Per prompt."""
        return self.n or 1

    @property
    def max_completion_tokens(self) -> int:
        """Per choice."""
        return self.max_tokens or 16

    def sampling(self, choice: int) -> Sampling:
        """For the `choice`-th of a prompt's n: each samples with a seed of its own, counted up as in vLLM.

        After the largest seed comes the smallest.
        """
        seed = None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63
        return Sampling(
            max_tokens=self.max_completion_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Raises InvalidRequest that names the first wrong parameter and says what was expected."""
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False, include_context=True)[0]) from None
    if len(request.prompt) * request.choices > _MAX_GENERATIONS:
        raise InvalidRequest(
            f"{len(request.prompt)} prompts with n={request.choices} make more than {_MAX_GENERATIONS} choices.",
            param="n",
        )
    if (request.min_tokens or 0) > request.max_completion_tokens:
        raise InvalidRequest(
            f"min_tokens is {request.min_tokens}; expected at most max_tokens, {request.max_completion_tokens}.",
            param="min_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true.", param="stream_options")
    return request


_KINDS: dict[str, str] = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "an array",
    "model_type": "an object",
    "string_unicode": "text that is valid Unicode",
}


def _explained(error: pydantic_core.ErrorDetails) -> InvalidRequest:
    kind, context = error["type"], error.get("ctx", {})
    param = ".".join(str(part) for part in error["loc"])
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {context['error']}.")
    if not error["loc"]:
        return InvalidRequest("The body must be a JSON object.")
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if kind == "extra_forbidden":
        return InvalidRequest(f"Unrecognized request argument supplied: {param}.", param=param)
    if kind == "value_error":
        expected = str(context["error"])
    elif kind == "too_long":
        expected = f"expected an array of at most {context['max_length']}"
    elif kind in _KINDS:
        expected = f"expected {_KINDS[kind]}"
    else:
        message = error["msg"]
        expected = message[0].lower() + message[1:].replace("Input should", "should")
        expected = expected.replace("input should be", "expected a value")
    return InvalidRequest(f"Invalid value for '{param}': {expected}.", param=param)
