"""Every error a client can see, and the one table from exception to HTTP answer, in OpenAI's shape.

Messages say what to do and contain neither internals nor another request's data. docs/api.md and the OpenAPI document
list the classes below by their docstrings.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

__all__ = [
    "ApiError",
    "BodyTooLarge",
    "DeadlineExceeded",
    "ErrorAnswer",
    "InternalError",
    "InvalidApiKey",
    "InvalidRequest",
    "MethodNotAllowed",
    "ModelNotFound",
    "ModelNotReady",
    "Overloaded",
    "PermissionDenied",
    "RequestTimeout",
    "RouteNotFound",
    "ServiceUnavailable",
    "UnsupportedMediaType",
]


class ErrorAnswer(NamedTuple):
    """An error as HTTP."""

    status: int
    body: bytes
    headers: dict[str, str]


class ApiError(Exception):
    """Base: subclasses fix the status and OpenAI's `type` and `code`."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else type(self).code
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The JSON body `{"error": {...}}` that the OpenAI client turns into its exception classes."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": type(self).type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def answer(self) -> ErrorAnswer:
        """In OpenAI's shape; dialects that have another one are in dialect.py."""
        return ErrorAnswer(self.status, self.body(), self.headers())

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


class InvalidRequest(ApiError):
    """The body is not what this endpoint takes; `param` names the parameter. A prompt and `max_tokens` that do not fit
    into the model's context have the code `context_length_exceeded`."""

    status = 400
    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        location: tuple[str | int, ...] | None = None,
        kind: str = "value_error",
    ) -> None:
        """`location` is `param` as the path into the body, where it is deeper than one key, and `kind` the mistake in
        pydantic's words: what the dialects with `{"detail": [...]}` tell (dialect.py)."""
        super().__init__(message, param=param, code=code)
        self.location = (() if param is None else (param,)) if location is None else location
        self.kind = kind if code is None else code


class InvalidApiKey(ApiError):
    """The key is missing, unknown or revoked."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class PermissionDenied(ApiError):
    """The key is valid and may not do this."""

    status = 403
    type = "invalid_request_error"
    code = "permission_denied"


class ModelNotFound(ApiError):
    """There is no model of this name; GET /v1/models lists those there are."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RouteNotFound(ApiError):
    """There is no such URL."""

    status = 404
    type = "invalid_request_error"


class MethodNotAllowed(ApiError):
    """The URL exists and takes other methods, which the header `allow` names."""

    status = 405
    type = "invalid_request_error"


class RequestTimeout(ApiError):
    """The body of the request did not arrive in time. The connection is closed; send the request again."""

    status = 408
    type = "invalid_request_error"

    def headers(self) -> dict[str, str]:
        return {"connection": "close"}


class BodyTooLarge(ApiError):
    """The body is larger than the server's limit."""

    status = 413
    type = "invalid_request_error"


class UnsupportedMediaType(ApiError):
    """The body is not declared as `application/json`."""

    status = 415
    type = "invalid_request_error"


class InternalError(ApiError):
    """Something failed inside of the server."""

    status = 500

    def __init__(self) -> None:
        super().__init__(
            "The server had an error while processing your request. Retry it; if it happens again, tell "
            "the operator the x-request-id of this answer."
        )


class ServiceUnavailable(ApiError):
    """Keys, prompts or usage cannot be handled at the moment. Retry after the seconds in `retry-after`."""

    status = 503


class ModelNotReady(ServiceUnavailable):
    """No replica of the model came up in time. Retry after the seconds in `retry-after`."""

    code = "model_not_ready"


class DeadlineExceeded(ApiError):
    """The request took longer than the operator allows."""

    status = 504
    code = "deadline_exceeded"


class Overloaded(ServiceUnavailable):
    """All queues are full. Retry after the seconds in `retry-after`."""

    code = "overloaded"
