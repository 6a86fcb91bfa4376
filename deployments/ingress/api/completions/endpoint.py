"""The routes of completions: one for each path of a dialect, and the schema that answers may link."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Final

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from deployments.ingress.api.completions.answers import Completion, CompletionChunk, completion_schema
from deployments.ingress.api.completions.completion import CompletionInference
from deployments.ingress.api.completions.dialects import (
    D1,
    D2,
    D3,
    SCHEMA_PATH,
    CompletionRequestD0,
    CompletionRequestD1,
    CompletionRequestD2,
    dialect_of,
)
from deployments.ingress.api.completions.reference import completions_reference
from deployments.ingress.api.completions.request import CompletionRequest
from deployments.ingress.api.completions.response import CompletionResponse
from deployments.ingress.api.description.endpoint import DirectRoute, Endpoint
from deployments.ingress.api.description.json_schemas import Json
from deployments.ingress.api.description.operations import (
    ANY_WITH_KEY,
    INVALID,
    PUBLIC,
    READING_A_BODY,
    answered,
    errors,
    json_content,
    operation,
    ref,
    schema_ref,
)
from deployments.ingress.api.services import services_of
from deployments.ingress.errors import ApiError
from deployments.ingress.http.auth import API_KEY_HEADER
from deployments.ingress.http.json_body import parsed
from deployments.ingress.http.json_response import error_response, json_response

__all__ = ["COMPLETIONS"]

_STATUSES: Final = (*ANY_WITH_KEY, *READING_A_BODY, 403, 404, 504)

_EXAMPLE_MODEL: Final = "smollm2-135m"
_EXAMPLES: Final[dict[str, Json]] = {
    "text": {
        "summary": "A text",
        "value": {"model": _EXAMPLE_MODEL, "prompt": "Once upon a time", "max_tokens": 50, "temperature": 0.7},
    },
    "stream": {
        "summary": "A stream that ends with its usage",
        "value": {
            "model": _EXAMPLE_MODEL,
            "prompt": "Once upon a time",
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    },
    "score": {
        "summary": "The log probabilities of a prompt",
        "value": {
            "model": _EXAMPLE_MODEL,
            "prompt": "The quick brown fox",
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        },
    },
    "tokens": {
        "summary": "Several prompts as token ids",
        "value": {"model": _EXAMPLE_MODEL, "prompt": [[504, 2365], [28]], "n": 2, "seed": 7},
    },
    "schema": {
        "summary": "Output that conforms to a JSON schema",
        "value": {
            "model": _EXAMPLE_MODEL,
            "prompt": "A person as JSON: ",
            "max_tokens": 100,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "person",
                    "schema": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
                },
            },
        },
    },
}
_EXAMPLE_CHUNK: Final = (
    'data: {"id":"cmpl-1","object":"text_completion","created":1753859563,"model":"smollm2-135m",'
    '"system_fingerprint":"fp_1","choices":[{"index":0,"text":", there","logprobs":null,"finish_reason":null,'
    '"stop_reason":null,"token_ids":null,"prompt_token_ids":null}]}'
    "\n\ndata: [DONE]\n\n"
)


def _examples(*names: str) -> Json:
    return {name: _EXAMPLES[name] for name in names}


def _completion(summary: str, operation_id: str, body: Json, examples: Json, more: Json, **fields: Any) -> Json:
    """`more`: further responses; `fields` are those of the operation."""
    answer = answered(
        "The completion; with `stream` its chunks as server-sent events. An error after the first of them is "
        'an event `data: {"error": {...}}`, after which no `[DONE]` follows.',
        {
            **json_content("Completion"),
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": _EXAMPLE_CHUNK,
                "x-event-schema": schema_ref("CompletionChunk"),
            },
        },
    )
    content = {"application/json": {"schema": body, "examples": examples}}
    completion = operation(
        summary, operation_id, answer, *_STATUSES, requestBody={"required": True, "content": content}, **fields
    )
    completion["responses"] |= more
    return completion


def _operations() -> dict[str, Json]:
    bearer: list[Json] = [{"HTTPBearer": []}]
    model = {
        "name": "model",
        "in": "query",
        "description": f"Name of the model; heeded with the header `{API_KEY_HEADER}` only.",
        "schema": {"type": "string"},
    }
    return {
        D3.path: _completion(
            "Complete prompts",
            "createCompletion",
            {"anyOf": [schema_ref("CompletionRequest"), schema_ref("CompletionRequestD0")]},
            _examples("text", "stream", "score", "tokens", "schema"),
            errors(400) | INVALID,
            description=f"With the header `{API_KEY_HEADER}` the model may be given as `?model=`, which wins over the "
            "body, and an invalid body is answered 422. Without it an invalid body is answered 400.",
            parameters=[model],
            security=[*bearer, {"APIKeyHeader": []}],
        ),
        D1.path: _completion(
            "Complete a prompt",
            "createOpenAICompletion",
            schema_ref("CompletionRequestD1"),
            _examples("text", "stream"),
            errors(400),
            description="The answer links its JSON Schema as `$schema`.",
            security=bearer,
        ),
        D2.path: _completion(
            "Complete a prompt",
            "createCompatibleCompletion",
            schema_ref("CompletionRequestD2"),
            _examples("text", "stream"),
            {"400": ref("responses", "NotReady")} | INVALID,
            description="Takes the likeliest tokens unless a temperature is given. An invalid body is answered 422, "
            "and 400 says that no replica of the model is up. The key may stand in `Authorization` with or without "
            "`Bearer`.",
            security=[*bearer, {"AuthorizationHeader": []}],
        ),
    }


async def _create_completion(path: str, request: Request) -> Response:
    services = await services_of(request)
    dialect = dialect_of(path, request.headers)
    try:
        key = await services.authenticate(request, dialect.credentials)
        body = await services.read_body(request)
        asked = await parsed(body, partial(dialect.parse, query_model=request.query_params.get("model")))
        completion = CompletionInference(
            asked,
            services.catalog.find(asked.model),
            key,
            services.meter,
            services.catalog.constraints,
            dialect=dialect.name,
            caller_request_id=request.state.request_id,
        )
        await completion.admit()
    except ApiError as error:
        return error_response(dialect.answer(error))
    return CompletionResponse(
        completion,
        keep_alive_s=services.settings.keep_alive_s,
        deadline_s=services.settings.request_timeout_s,
        answer_error=dialect.answer,
        extras=dialect.extras(str(request.base_url).rstrip("/")),
    )


@cache
def _schema() -> bytes:
    return msgspec.json.encode(completion_schema())


async def _completion_schema(_request: Request) -> Response:
    return json_response(_schema())


_router = APIRouter(route_class=DirectRoute)
for _path, _operation in _operations().items():
    _router.add_api_route(_path, partial(_create_completion, _path), methods=["POST"], openapi_extra=_operation)
_router.add_api_route(
    SCHEMA_PATH,
    _completion_schema,
    openapi_extra=operation(
        "The JSON Schema of a completion",
        "completionSchema",
        answered("It.", {"application/json": {"schema": {"type": "object"}}}),
        500,
        security=PUBLIC,
        tags=["documentation"],
    ),
)

COMPLETIONS: Final = Endpoint(
    "completions",
    "Texts that go on from a prompt.",
    _router,
    (
        CompletionRequest,
        CompletionRequestD0,
        CompletionRequestD1,
        CompletionRequestD2,
        Completion,
        CompletionChunk,
    ),
    completions_reference,
)
