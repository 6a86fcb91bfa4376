"""The OpenAPI 3.1 document, made once from the models and the table of errors.

FastAPI's own generator is not used: the routes read and check their bodies themselves, and two dialects share a path.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Final

from pydantic import BaseModel

from deployments.ingress.api.completions.dialects import (
    API_KEY_HEADER,
    D1,
    D2,
    D3,
    SCHEMA_PATH,
    CompletionRequestD0,
    CompletionRequestD1,
    CompletionRequestD2,
)
from deployments.ingress.api.completions.request import CompletionRequest
from deployments.ingress.api.tokens import DetokenizeRequest, TokenizeRequest
from deployments.ingress.openapi import answer_models
from deployments.ingress.openapi.administration import ADMIN_SECURITY, ADMINISTRATION_BODIES, administration_paths
from deployments.ingress.openapi.answers import (
    ANY_WITH_KEY,
    INVALID,
    READING_A_BODY,
    answered,
    error_responses,
    errors,
    headers,
    json_content,
    operation,
    posted,
    ref,
    schema_ref,
)
from deployments.ingress.openapi.json_schemas import Json, schemas_of

__all__ = ["openapi_document"]

_BODIES: Final = (
    CompletionRequest,
    CompletionRequestD0,
    CompletionRequestD1,
    CompletionRequestD2,
    TokenizeRequest,
    DetokenizeRequest,
    *ADMINISTRATION_BODIES,
)
_ANSWERS: Final[tuple[type[BaseModel], ...]] = tuple(getattr(answer_models, name) for name in answer_models.__all__)

_COMPLETING: Final = (*ANY_WITH_KEY, *READING_A_BODY, 403, 404, 504)

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


def _completion(summary: str, description: str, body: Json, examples: Json, more: Json) -> Json:
    return {
        "tags": ["completions"],
        "summary": summary,
        "description": description,
        "parameters": [ref("parameters", "RequestId")],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": body, "examples": examples}},
        },
        "responses": {
            "200": answered(
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
            ),
            **errors(*_COMPLETING),
            **more,
        },
    }


def _completions() -> Json:
    bearer: list[Json] = [{"HTTPBearer": []}]
    shared = _completion(
        "Complete prompts",
        f"With the header `{API_KEY_HEADER}` the model may be given as `?model=`, which wins over the body, and "
        "an invalid body is answered 422. Without it an invalid body is answered 400.",
        {"anyOf": [schema_ref("CompletionRequest"), schema_ref("CompletionRequestD0")]},
        _examples("text", "stream", "score", "tokens", "schema"),
        errors(400) | INVALID,
    )
    shared["operationId"] = "createCompletion"
    shared["parameters"] = [
        *shared["parameters"],
        {
            "name": "model",
            "in": "query",
            "description": f"Name of the model; heeded with the header `{API_KEY_HEADER}` only.",
            "schema": {"type": "string"},
        },
    ]
    strict = _completion(
        "Complete a prompt",
        "The answer links its JSON Schema as `$schema`.",
        schema_ref("CompletionRequestD1"),
        _examples("text", "stream"),
        errors(400),
    )
    compatible = _completion(
        "Complete a prompt",
        "Takes the likeliest tokens unless a temperature is given. An invalid body is answered 422, and 400 says that "
        "no replica of the model is up. The key may stand in `Authorization` with or without `Bearer`.",
        schema_ref("CompletionRequestD2"),
        _examples("text", "stream"),
        {"400": ref("responses", "NotReady")} | INVALID,
    )
    return {
        D3.path: {"post": shared | {"security": [*bearer, {"APIKeyHeader": []}]}},
        D1.path: {"post": strict | {"operationId": "createOpenAICompletion", "security": bearer}},
        D2.path: {
            "post": compatible
            | {"operationId": "createCompatibleCompletion", "security": [*bearer, {"AuthorizationHeader": []}]}
        },
    }


def _tokenization() -> Json:
    statuses = (400, 404, *ANY_WITH_KEY, *READING_A_BODY)
    return {
        "/tokenize": {
            "post": operation(
                "tokens",
                "Turn a text into token ids",
                "tokenize",
                answered("The tokens.", json_content("TokenizeResponse")),
                *statuses,
                requestBody=posted("TokenizeRequest", {"model": _EXAMPLE_MODEL, "prompt": "Once upon a time"}),
            )
        },
        "/detokenize": {
            "post": operation(
                "tokens",
                "Turn token ids into a text",
                "detokenize",
                answered("The text.", json_content("DetokenizeResponse")),
                *statuses,
                requestBody=posted("DetokenizeRequest", {"model": _EXAMPLE_MODEL, "tokens": [504, 2365]}),
            )
        },
    }


def _models() -> Json:
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    one = operation(
        "models",
        "Tell a model",
        "retrieveModel",
        answered("It.", json_content("Model")),
        *ANY_WITH_KEY,
        404,
        parameters=[name],
    )
    every = operation(
        "models",
        "List the models",
        "listModels",
        answered("Those that the key may use.", json_content("ModelList")),
        *ANY_WITH_KEY,
    )
    return {"/v1/models": {"get": every}, "/v1/models/{model}": {"get": one}}


def _operations() -> Json:
    public: Json = {"security": []}
    ready = operation(
        "operation",
        "Tell whether requests can be served",
        "readiness",
        answered("They can.", json_content("Readiness")),
        500,
        **public,
    )
    ready["responses"]["503"] = answered("They cannot.", json_content("Readiness"))
    any_object = {"application/json": {"schema": {"type": "object"}}}
    return {
        "/admin/v1/replicas": {
            "get": operation(
                "operation",
                "List the engine replicas",
                "listReplicas",
                answered("All, as this server sees them.", json_content("ReplicaList")),
                *ANY_WITH_KEY,
                403,
                security=ADMIN_SECURITY,
            )
        },
        "/metrics": {
            "get": operation(
                "operation",
                "Tell Prometheus of the cluster",
                "metrics",
                answered("In Prometheus' text format.", {"text/plain": {"schema": {"type": "string"}}}),
                *ANY_WITH_KEY,
                403,
                security=ADMIN_SECURITY,
            )
        },
        **{
            path: {
                "get": operation(
                    "operation",
                    "Tell whether the process runs",
                    name,
                    answered("It does.", json_content("Health")),
                    500,
                    **public,
                )
            }
            for path, name in (("/healthz", "health"), ("/health", "healthAsInVllm"))
        },
        "/readyz": {"get": ready},
        "/openapi.json": {
            "get": operation("documentation", "This document", "openapi", answered("It.", any_object), 500, **public)
        },
        SCHEMA_PATH: {
            "get": operation(
                "documentation",
                "The JSON Schema of a completion",
                "completionSchema",
                answered("It.", any_object),
                500,
                **public,
            )
        },
        "/docs": {
            "get": operation(
                "documentation",
                "This document, to read and try",
                "docs",
                answered("A page.", {"text/html": {"schema": {"type": "string"}}}),
                500,
                **public,
            )
        },
    }


@cache
def openapi_document() -> Json:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Millstream",
            "version": version("millstream"),
            "description": "OpenAI-compatible completions. Of a key that comes twice in a JSON object the last one "
            "counts; a parameter that is not listed is refused by name. HEAD is answered wherever GET is.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"HTTPBearer": []}, {"APIKeyHeader": []}],
        "tags": [
            {"name": "completions", "description": "Texts that go on from a prompt."},
            {"name": "models", "description": "What can complete."},
            {"name": "tokens", "description": "Texts as models see them, in the shapes of vLLM."},
            {"name": "usage", "description": "What was used, as the ledger has it."},
            {"name": "keys", "description": "Keys, teams and their limits, with the admin key."},
            {"name": "operation", "description": "For those who run the server."},
            {"name": "documentation", "description": "Public, without a key."},
        ],
        "paths": {**_completions(), **_models(), **_tokenization(), **administration_paths(), **_operations()},
        "components": {
            "securitySchemes": {
                "HTTPBearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
                "APIKeyHeader": {
                    "type": "apiKey",
                    "in": "header",
                    "name": API_KEY_HEADER,
                    "description": f"`{API_KEY_HEADER}: KEY`, or `{API_KEY_HEADER}: Bearer KEY`",
                },
                "AdminKey": {"type": "http", "scheme": "bearer", "description": "The admin key, sent as any other."},
                "AuthorizationHeader": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "`Authorization: KEY`",
                },
            },
            "parameters": {
                "RequestId": {
                    "name": "x-request-id",
                    "in": "header",
                    "description": "Names the request in the answer and in the server's log: up to 128 of "
                    "`A-Z a-z 0-9 . _ -`. What does not conform is replaced.",
                    "schema": {"type": "string"},
                }
            },
            "headers": headers(),
            "responses": error_responses(),
            "schemas": schemas_of([*_BODIES, *_ANSWERS]),
        },
    }
