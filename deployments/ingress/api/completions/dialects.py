"""The faces of the one completion endpoint: what clients of four APIs send and expect, as data over one request.

All take every parameter of request.py, narrowed where their documents are narrower and with vLLM's limits
where only OpenAI's document has narrower ones, and answer alike but for what stands here. docs/api.md has them side by
side, made from these instances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import msgspec
from pydantic import BeforeValidator, Field

from deployments.ingress.api.completions.request import CompletionRequest, parse_completion_request
from deployments.ingress.api.parameter_types import MAX_MODEL_NAME, Source, StopArray, StopsOfOneOrMore, TextPrompt
from deployments.ingress.errors import ApiError, ErrorAnswer, InvalidRequest, ModelNotReady
from deployments.ingress.http.auth import API_KEY, API_KEY_HEADER, BEARER, Credential
from deployments.ingress.http.json_body import INT32_MAX

__all__ = [
    "D0",
    "D1",
    "D2",
    "D3",
    "DIALECTS",
    "SCHEMA_PATH",
    "CompletionRequestD0",
    "CompletionRequestD1",
    "CompletionRequestD2",
    "Dialect",
    "dialect_of",
]

SCHEMA_PATH: Final = "/openai/schemas/Completion.json"


_ModelName = Annotated[str, Field(max_length=MAX_MODEL_NAME)]


class CompletionRequestD0(CompletionRequest):
    model: Annotated[
        _ModelName,
        BeforeValidator(lambda name: "" if name is None else name, json_schema_input_type=_ModelName | None),
        Source("D0"),
    ] = ""
    """Name of the model, unless the query has it as `?model=`."""


class CompletionRequestD1(CompletionRequest):
    prompt: Annotated[TextPrompt, Source("D1")]
    """What to complete: one text."""
    max_completion_tokens: Annotated[int | None, Field(ge=0, le=INT32_MAX), Source("D1")] = None
    """Wins over `max_tokens`."""
    stop: Annotated[StopArray, Source("D1")] = ()
    """Texts that end a choice; they are not part of its text."""
    logprobs: Annotated[int | None, Field(ge=0, le=20), Source("vLLM")] = None
    """Tells the log probability of each token, and of so many of the likeliest at its position."""

    @property
    def tokens_per_choice(self) -> int:
        return super().tokens_per_choice if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequestD2(CompletionRequest):
    default_temperature: ClassVar[float] = 0.0

    prompt: Annotated[TextPrompt, Source("D2")]
    """What to complete: one text."""
    max_tokens: Annotated[int | None, Field(ge=1, le=INT32_MAX), Source("D2")] = 16
    """Tokens of one choice, at most."""
    temperature: Annotated[float | None, Field(ge=0, le=2), Source("D2")] = default_temperature
    """Randomness of sampling; 0 always takes the likeliest token."""
    stop: Annotated[StopsOfOneOrMore, Source("D2")] = ()
    """Texts that end a choice; they are not part of its text."""
    logprobs: Annotated[int | None, Field(ge=0, le=20), Source("vLLM")] = None
    """Tells the log probability of each token, and of so many of the likeliest at its position."""


@dataclass(frozen=True)
class Dialect:
    name: str
    path: str
    body: type[CompletionRequest]
    credentials: tuple[Credential, ...] = (BEARER,)
    """The first that carries something counts."""
    model_in_query: bool = False
    """`?model=` wins over the body, which may then do without."""
    invalid_body: Literal["error", "detail"] = "error"
    """400 with OpenAI's `{"error": {...}}`, or 422 with FastAPI's `{"detail": [...]}`."""
    not_ready_status: Literal[503, 400] = 503
    """When no replica of the model is up."""
    links_schema: bool = False
    """Answers have `$schema`, the URL of their JSON Schema."""

    def parse(self, body: bytes, query_model: str | None) -> CompletionRequest:
        """`query_model` is the `model` of the query. Raises InvalidRequest that names the first wrong parameter."""
        request = parse_completion_request(body, self.body)
        if self.model_in_query:
            if query_model:
                if len(query_model) > MAX_MODEL_NAME:
                    raise InvalidRequest(
                        f"Invalid value for 'model': expected at most {MAX_MODEL_NAME} characters.", param="model"
                    )
                return request.model_copy(update={"model": query_model})
            if not request.model:
                raise InvalidRequest("Missing required parameter: 'model'.", param="model", kind="missing")
        return request

    def extras(self, base_url: str) -> dict[str, str]:
        """What only this dialect's answers have. `base_url`: the server as the caller sees it, without a slash."""
        return {"$schema": base_url + SCHEMA_PATH} if self.links_schema else {}

    def answer(self, error: ApiError) -> ErrorAnswer:
        if isinstance(error, InvalidRequest) and self.invalid_body == "detail":
            detail = {"loc": ["body", *error.location], "msg": error.message, "type": error.kind}
            return ErrorAnswer(422, msgspec.json.encode({"detail": [detail]}), error.headers())
        if isinstance(error, ModelNotReady):
            return error.answer()._replace(status=self.not_ready_status)
        return error.answer()


D0: Final = Dialect(
    "D0",
    "/v1/completions",
    CompletionRequestD0,
    credentials=(API_KEY, BEARER),
    model_in_query=True,
    invalid_body="detail",
)
D1: Final = Dialect("D1", "/openai/v1/completions", CompletionRequestD1, links_schema=True)
D2: Final = Dialect(
    "D2",
    "/api/v1/compatibility/openai/v1/completions",
    CompletionRequestD2,
    credentials=(Credential("authorization", bare=True),),
    invalid_body="detail",
    not_ready_status=400,
)
D3: Final = Dialect("D3", "/v1/completions", CompletionRequest)

DIALECTS: Final = (D0, D1, D2, D3)

_BY_PATH: Final = {dialect.path: dialect for dialect in (D1, D2, D3)}


def dialect_of(path: str, headers: Mapping[str, str]) -> Dialect:
    """Of a request to a path of one of DIALECTS; on the path that two share, D0 is known by its key's header."""
    dialect = _BY_PATH[path]
    return D0 if dialect is D3 and API_KEY_HEADER in headers else dialect
