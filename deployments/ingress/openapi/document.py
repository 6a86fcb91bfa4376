"""The OpenAPI 3.1 document: what each endpoint says of itself, merged.

FastAPI's own generator is not used: the routes read and check their bodies themselves, and two dialects share a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from deployments.ingress.api.description.answers import Error, HTTPValidationError
from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.description.json_schemas import Json, schemas_of
from deployments.ingress.api.description.operations import error_responses, headers
from deployments.ingress.api.endpoints import ENDPOINTS
from deployments.ingress.http.auth import API_KEY_HEADER

__all__ = ["openapi_document"]


def openapi_document(endpoints: Sequence[Endpoint] = ENDPOINTS) -> Json:
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        for path, method, operation in endpoint.operations():
            paths.setdefault(path, {})[method] = operation
    schemas = [schema for endpoint in endpoints for schema in endpoint.schemas]
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
        "tags": [{"name": endpoint.name, "description": endpoint.description} for endpoint in endpoints],
        "paths": paths,
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
            "schemas": schemas_of([*schemas, Error, HTTPValidationError]),
        },
    }
