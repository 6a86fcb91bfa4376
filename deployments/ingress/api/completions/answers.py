"""What a completion's answers look like: the schemas of what chunks.py writes."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal

from pydantic import Field

from deployments.ingress.api.description.answers import Answer, Count
from deployments.ingress.api.description.json_schemas import Json, schemas_of

__all__ = ["Completion", "CompletionChunk", "completion_schema"]


class PromptTokensDetails(Answer):
    cached_tokens: Count
    """Prompt tokens that were found in the prefix cache."""


class Usage(Answer):
    prompt_tokens: Count
    """Of each prompt once."""
    completion_tokens: Count
    """Over all that was generated, each candidate of `best_of` included."""
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class Logprobs(Answer):
    """One entry per token in each list; with `echo` those of the prompt come first."""

    tokens: list[str]
    """The text of each token, or `token_id:123` with `return_tokens_as_token_ids`."""
    token_logprobs: list[float | None]
    """The log probability of each token; null for the first one of a prompt."""
    top_logprobs: list[dict[str, float] | None]
    """Of the likeliest tokens at each position and the one that is there."""
    text_offset: list[Count]
    """Characters of the text before each token."""


class PromptLogprob(Answer):
    logprob: float
    rank: int | None
    """1 is the likeliest of the vocabulary."""
    decoded_token: str | None


class Choice(Answer):
    index: Count
    """By prompt, then by `n`."""
    text: str
    logprobs: Logprobs | None
    """Null unless asked for."""
    finish_reason: Literal["stop", "length"]
    """`length`: there are `max_tokens` tokens."""
    stop_reason: int | str | None
    """The stop text or token id that ended it; null at the model's end of text, and for `length`."""
    token_ids: list[int] | None
    """With `return_token_ids`."""
    prompt_token_ids: list[int] | None
    """With `return_token_ids`."""
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None
    """With `prompt_logprobs`: by token id, for each position of the prompt."""


class ChunkChoice(Answer):
    index: Count
    text: str
    """What the choice gained, whole characters only."""
    logprobs: Logprobs | None
    """Of the tokens of this chunk."""
    finish_reason: Literal["stop", "length"] | None
    """In the last chunk of the choice."""
    stop_reason: int | str | None
    """Beside `finish_reason`."""
    token_ids: list[int] | None
    """With `return_token_ids`: those of this chunk."""
    prompt_token_ids: list[int] | None
    """With `return_token_ids`, in the first chunk of the choice."""


class _Head(Answer):
    schema_: Annotated[str, Field(alias="$schema", json_schema_extra={"format": "uri"})] = ""
    """URL of the JSON Schema of a whole answer; on `/openai/v1/completions` only."""
    id: str
    object: Literal["text_completion"]
    created: int
    """Unix time in seconds."""
    model: str
    system_fingerprint: str | None
    """Changes when what shapes the model's answers changes."""


class Completion(_Head):
    choices: list[Choice]
    usage: Usage


class CompletionChunk(_Head):
    """The data of one event of a stream. All chunks of a stream have the same head; the event `[DONE]` ends it."""

    choices: list[ChunkChoice]
    """None in the chunk that `stream_options.include_usage` asks for."""
    usage: Usage | None = None
    """Only with `stream_options.include_usage`."""
    obfuscation: str = ""
    """Only with `stream_options.include_obfuscation`: random letters."""


@cache
def completion_schema() -> Json:
    """What the `$schema` of an answer refers to."""
    definitions = schemas_of([Completion], "#/$defs/{model}")
    completion = definitions.pop("Completion")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Completion",
        **completion,
        "$defs": definitions,
    }
