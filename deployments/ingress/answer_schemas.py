"""What the ingress answers, as models from which the OpenAPI document and `Completion.json` are made.

They describe and build nothing: completions are written by wire.py, with which `Completion` and `CompletionChunk` are
coupled. tests/deployments/ingress/test_openapi.py holds answers against them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Completion",
    "CompletionChunk",
    "DetokenizeResponse",
    "Error",
    "HTTPValidationError",
    "Health",
    "Model",
    "ModelList",
    "Readiness",
    "ReplicaList",
    "TokenizeResponse",
]


class _Answer(BaseModel):
    """A field with a default may be absent."""

    model_config = ConfigDict(use_attribute_docstrings=True)


Count = Annotated[int, Field(ge=0)]


class PromptTokensDetails(_Answer):
    cached_tokens: Count
    """Prompt tokens that were found in the prefix cache."""


class Usage(_Answer):
    prompt_tokens: Count
    """Of each prompt once."""
    completion_tokens: Count
    """Over all that was generated, each candidate of `best_of` included."""
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class Logprobs(_Answer):
    """One entry per token in each list; with `echo` those of the prompt come first."""

    tokens: list[str]
    """The text of each token, or `token_id:123` with `return_tokens_as_token_ids`."""
    token_logprobs: list[float | None]
    """The log probability of each token; null for the first one of a prompt."""
    top_logprobs: list[dict[str, float] | None]
    """Of the likeliest tokens at each position and the one that is there."""
    text_offset: list[Count]
    """Characters of the text before each token."""


class PromptLogprob(_Answer):
    logprob: float
    rank: int | None
    """1 is the likeliest of the vocabulary."""
    decoded_token: str | None


class Choice(_Answer):
    index: Count
    """By prompt, then by `n`."""
    text: str
    logprobs: Logprobs | None
    """Null unless asked for."""
    finish_reason: Literal["stop", "length"]
    """`length`: there are `max_tokens` tokens."""
    stop_reason: int | str | None
    """The stop text or token id that ended it; null at the model's end of text, and for `length`."""
    token_ids: list[int] = []
    """With `return_token_ids`."""
    prompt_token_ids: list[int] = []
    """With `return_token_ids`."""
    prompt_logprobs: list[dict[str, PromptLogprob] | None] = []
    """With `prompt_logprobs`: by token id, for each position of the prompt."""


class ChunkChoice(_Answer):
    index: Count
    text: str
    """What the choice gained, whole characters only."""
    logprobs: Logprobs | None
    """Of the tokens of this chunk."""
    finish_reason: Literal["stop", "length"] | None
    """In the last chunk of the choice."""
    stop_reason: int | str | None = None
    """Beside `finish_reason`."""
    token_ids: list[int] = []
    """With `return_token_ids`: those of this chunk."""
    prompt_token_ids: list[int] = []
    """With `return_token_ids`, in the first chunk of the choice."""


class _Head(_Answer):
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


class Model(_Answer):
    id: str
    object: Literal["model"]
    created: int
    """Unix time in seconds since which this server has it."""
    owned_by: str
    max_model_len: int
    """Tokens of a prompt and its completion together, at most."""


class ModelList(_Answer):
    object: Literal["list"]
    data: list[Model]


class TokenizeResponse(_Answer):
    count: Count
    max_model_len: int
    """Tokens of a prompt and its completion together, at most."""
    tokens: list[int]
    token_strs: list[str] | None
    """With `return_token_strs`: the tokens as they stand in the vocabulary."""


class DetokenizeResponse(_Answer):
    prompt: str


class Replica(_Answer):
    id: str
    model: str
    in_rotation: bool
    draining: bool
    running: Count
    waiting: Count
    waiting_prefill_tokens: Count
    kv_blocks_free: Count
    kv_blocks_total: Count
    finished_per_s: float


class ReplicaList(_Answer):
    object: Literal["list"]
    data: list[Replica]


class Health(_Answer):
    status: Literal["ok"]


class Readiness(_Answer):
    status: Literal["ready", "not ready"]
    routes: bool
    """The list of models is known."""
    meter: bool
    """Keys can be checked and usage recorded."""
    models: dict[str, bool]
    """Which of them have a replica."""


class ErrorBody(_Answer):
    message: str
    """What is wrong and what to do."""
    type: str
    param: str | None
    """The parameter that is wrong."""
    code: str | None


class Error(_Answer):
    """OpenAI's shape."""

    error: ErrorBody


class ValidationError(_Answer):
    loc: list[str | int]
    """`body`, and the path of the parameter in it."""
    msg: str
    """What is wrong and what to do."""
    type: str
    """The mistake in a word."""


class HTTPValidationError(_Answer):
    detail: list[ValidationError]
