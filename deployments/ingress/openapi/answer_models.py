"""What the ingress answers, as models from which the OpenAPI document and `Completion.json` are made.

They describe and build nothing: completions are written by api/completions/chunks.py, with which `Completion` and
`CompletionChunk` are coupled. tests/deployments/ingress/openapi/test_openapi.py holds answers against them.
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
    "IssuedKey",
    "Key",
    "KeyList",
    "Model",
    "ModelList",
    "Readiness",
    "ReplicaList",
    "Team",
    "TeamDeleted",
    "TeamList",
    "TokenizeResponse",
    "UsageList",
    "UsagePage",
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
    token_ids: list[int] | None
    """With `return_token_ids`."""
    prompt_token_ids: list[int] | None
    """With `return_token_ids`."""
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None
    """With `prompt_logprobs`: by token id, for each position of the prompt."""


class ChunkChoice(_Answer):
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
    obfuscation: str = ""
    """Only with `stream_options.include_obfuscation`: random letters."""


class ModelPermission(_Answer):
    """The same of every model: what a key may do is told by the key."""

    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: Literal[False]
    allow_sampling: Literal[True]
    allow_logprobs: Literal[True]
    allow_search_indices: Literal[False]
    allow_view: Literal[True]
    allow_fine_tuning: Literal[False]
    organization: Literal["*"]
    group: None
    is_blocking: Literal[False]


class Model(_Answer):
    id: str
    object: Literal["model"]
    created: int
    """Unix time in seconds since which this server has it."""
    owned_by: str
    root: str
    """The name by which the Hugging Face hub knows it, where the operator told it: clients load its tokenizer by that.
    Else `id`."""
    parent: str | None
    """Of an alias: the model's own name, which answers and usage have."""
    max_model_len: int
    """Tokens of a prompt and its completion together, at most."""
    permission: list[ModelPermission]


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
    start_up_s: float
    """How long it took to start."""
    kv_block_tokens: Count
    max_num_seqs: Count
    unsettled: Count


class ReplicaList(_Answer):
    object: Literal["list"]
    data: list[Replica]


class LimitsInForce(_Answer):
    """Null sets no limit."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrency: int | None
    tokens_per_day: int | None
    tokens_per_month: int | None
    money_per_day: float | None
    money_per_month: float | None


class Key(_Answer):
    object: Literal["key"]
    id: str
    name: str
    prefix: str
    """The first characters of the key, to know it by."""
    owner: str | None
    team: str | None
    labels: dict[str, str]
    models: list[str] | None
    """Null allows all."""
    limits: LimitsInForce
    created_at: int
    """Unix time in seconds, as all of them."""
    expires_at: int | None
    revoked_at: int | None


class IssuedKey(Key):
    key: str
    """The key itself, which is not shown again."""


class KeyList(_Answer):
    object: Literal["list"]
    data: list[Key]


class Team(_Answer):
    object: Literal["team"]
    name: str
    limits: LimitsInForce
    created_at: int
    """Unix time in seconds."""


class TeamDeleted(Team):
    deleted: Literal[True]


class TeamList(_Answer):
    object: Literal["list"]
    data: list[Team]


class UsageOfGroup(_Answer):
    object: Literal["usage"]
    begins_at: int = 0
    """Of the day or hour, with `by=day` or `by=hour`: Unix time in seconds."""
    model: str = ""
    """With `by=model`."""
    dialect: str = ""
    """With `by=dialect`."""
    status: str = ""
    """With `by=status`: how the requests ended."""
    requests: Count
    prompt_tokens: Count
    cached_tokens: Count
    """Those of the prompt tokens that were found in the prefix cache."""
    completion_tokens: Count
    total_tokens: Count
    cost: float
    """In the currency of the models' prices."""


class UsageList(_Answer):
    object: Literal["list"]
    key_id: str
    since: int
    """Unix time in seconds."""
    until: int
    data: list[UsageOfGroup]
    """Groups without requests are left out."""


class UsageResult(_Answer):
    object: Literal["organization.usage.completions.result"]
    input_tokens: Count
    """Prompt tokens, cached ones included."""
    output_tokens: Count
    input_cached_tokens: Count
    input_audio_tokens: Literal[0]
    output_audio_tokens: Literal[0]
    num_model_requests: Count
    project_id: str | None
    """The team, with `group_by=project_id`; null for keys without one."""
    user_id: None
    api_key_id: str | None
    """With `group_by=api_key_id`."""
    model: str | None
    """With `group_by=model`."""
    batch: None


class UsageBucket(_Answer):
    object: Literal["bucket"]
    start_time: int
    """Unix time in seconds."""
    end_time: int
    results: list[UsageResult]
    """One per group; none of a bucket without requests."""


class UsagePage(_Answer):
    """OpenAI's shape."""

    object: Literal["page"]
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None
    """The `page` of the next request."""


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
