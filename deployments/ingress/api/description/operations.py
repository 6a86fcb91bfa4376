"""The words in which an endpoint says what it takes and answers, as a part of the OpenAPI document; and what all
operations share: every error, made from the table in errors.py, and the headers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from deployments.ingress.api.description.json_schemas import Json
from deployments.ingress.errors import ApiError

__all__ = [
    "ADMIN_SECURITY",
    "ANY_WITH_KEY",
    "INVALID",
    "PUBLIC",
    "READING_A_BODY",
    "answered",
    "error_classes",
    "error_responses",
    "errors",
    "headers",
    "json_content",
    "operation",
    "parameter",
    "posted",
    "ref",
    "schema_ref",
]


def error_classes(root: type[ApiError] = ApiError) -> Iterator[type[ApiError]]:
    """All that a client can see."""
    for kind in root.__subclasses__():
        yield kind
        yield from error_classes(kind)


def ref(section: str, name: str) -> Json:
    return {"$ref": f"#/components/{section}/{name}"}


def schema_ref(name: str) -> Json:
    return ref("schemas", name)


def json_content(schema: str, examples: Json | None = None) -> Json:
    """`schema` names one of the components."""
    content: Json = {"schema": schema_ref(schema)}
    if examples:
        content["examples"] = examples
    return {"application/json": content}


_REQUEST_ID: Final = {"x-request-id": ref("headers", "RequestId")}


def answered(description: str, content: Json) -> Json:
    return {"description": description, "headers": _REQUEST_ID, "content": content}


def headers() -> Json:
    headers = {
        "RequestId": {
            "description": "The caller's `x-request-id`, if it was valid, or the server's own.",
            "schema": {"type": "string"},
        },
        "RetryAfter": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
        "ShouldRetry": {
            "description": "`false` where the request can never be admitted; the official client heeds it.",
            "schema": {"type": "string"},
        },
        "Authenticate": {"description": "`Bearer`.", "schema": {"type": "string"}},
    }
    for unit in ("requests", "tokens"):
        for what, meaning in (
            ("limit", "that the key has in a minute"),
            ("remaining", "that are left of them"),
            ("reset", "until all are there again, as in `6m0s`"),
        ):
            headers[f"{what.capitalize()}{unit.capitalize()}"] = {
                "description": f"{unit.capitalize()} {meaning}." if what != "reset" else f"Time {meaning}.",
                "schema": {"type": "string"} if what == "reset" else {"type": "integer", "minimum": 0},
            }
    return headers


_RETRY_AFTER: Final = {"retry-after": ref("headers", "RetryAfter")}
_MORE_HEADERS: Final[dict[int, Json]] = {
    401: {"www-authenticate": ref("headers", "Authenticate")},
    429: {
        **_RETRY_AFTER,
        "x-should-retry": ref("headers", "ShouldRetry"),
        **{
            f"x-ratelimit-{what}-{unit}": ref("headers", f"{what.capitalize()}{unit.capitalize()}")
            for unit in ("requests", "tokens")
            for what in ("limit", "remaining", "reset")
        },
    },
    503: _RETRY_AFTER,
}


def error_responses() -> Json:
    """By status, in OpenAI's shape."""
    texts: dict[int, list[str]] = {}
    for kind in error_classes():
        texts.setdefault(kind.status, []).append(" ".join((kind.__doc__ or "").split()))
    responses: Json = {
        f"Error{status}": {
            "description": " Or: ".join(text),
            "headers": _REQUEST_ID | _MORE_HEADERS.get(status, {}),
            "content": json_content("Error"),
        }
        for status, text in sorted(texts.items())
    }
    responses["Invalid"] = answered("The body is not what this endpoint takes.", json_content("HTTPValidationError"))
    responses["NotReady"] = {
        "description": "No replica of the model came up in time. Retry after the seconds in `retry-after`.",
        "headers": _REQUEST_ID | _RETRY_AFTER,
        "content": json_content("Error"),
    }
    return responses


def errors(*statuses: int) -> Json:
    return {str(status): ref("responses", f"Error{status}") for status in statuses}


ADMIN_SECURITY: Final[list[Json]] = [{"AdminKey": []}]
PUBLIC: Final[list[Json]] = []
"""The security of what needs no key."""
READING_A_BODY: Final = (408, 413, 415)
ANY_WITH_KEY: Final = (401, 429, 500, 503)


def operation(summary: str, operation_id: str, answer: Json, *statuses: int, success: int = 200, **more: Any) -> Json:
    """For a route's `openapi_extra`. `statuses` are those of errors; `more` are fields of the operation."""
    return {
        "summary": summary,
        "operationId": operation_id,
        "parameters": [ref("parameters", "RequestId"), *more.pop("parameters", ())],
        "responses": {str(success): answer, **errors(*statuses)},
        **more,
    }


def parameter(name: str, description: str, schema: Json, *, required: bool = False, place: str = "query") -> Json:
    return {"name": name, "in": place, "required": required, "description": description, "schema": schema}


def posted(schema: str, example: Json) -> Json:
    return {"required": True, "content": json_content(schema, {"example": {"value": example}})}


INVALID: Final[Json] = {"422": ref("responses", "Invalid")}
