"""Every error a client can see, and the one table from exception to HTTP answer, in OpenAI's shape.

Messages say what to do and contain neither internals nor another request's data. docs/api.md and the OpenAPI document
list the classes below by their docstrings.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from deployments.contracts import RateLimits

__all__ = [
    "ApiError",
    "BodyTooLarge",
    "ClientGone",
    "Conflict",
    "DeadlineExceeded",
    "ErrorAnswer",
    "GivenUp",
    "InsufficientQuota",
    "InternalError",
    "InvalidApiKey",
    "InvalidRequest",
    "MethodNotAllowed",
    "ModelNotAllowed",
    "ModelNotFound",
    "ModelNotReady",
    "NotResumable",
    "ObjectNotFound",
    "OutputNotConforming",
    "Overloaded",
    "PermissionDenied",
    "RateLimitExceeded",
    "RequestTimeout",
    "RouteNotFound",
    "ServiceUnavailable",
    "UnsupportedEncoding",
    "UnsupportedMediaType",
    "rate_limit_headers",
]


class ClientGone(Exception):
    """The client has closed the connection: there is nobody to answer."""


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
        """In OpenAI's shape; dialects that have another one are in api/completions/dialects.py."""
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
        pydantic's words: what the dialects with `{"detail": [...]}` tell (api/completions/dialects.py)."""
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


class ModelNotAllowed(PermissionDenied):
    """The key is valid and may not use this model; GET /v1/models lists those it may."""

    code = "model_not_allowed"


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


class UnsupportedEncoding(UnsupportedMediaType):
    """The body is compressed in another way than with gzip."""

    def headers(self) -> dict[str, str]:
        return {"accept-encoding": "gzip"}


class RateLimitExceeded(ApiError):
    """The key, or its team, has used up what it may use in a minute or at a time. Retry after the seconds in
    `retry-after`; without it the request is larger than the limit and can never be admitted."""

    status = 429
    type = "rate_limit_exceeded"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: float | None, rate_limits: RateLimits | None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.rate_limits = rate_limits

    def headers(self) -> dict[str, str]:
        headers = super().headers() | rate_limit_headers(self.rate_limits)
        if self.retry_after_s is None:
            headers["x-should-retry"] = "false"  # the official client retries a 429 otherwise, to no avail
        return headers


class InsufficientQuota(RateLimitExceeded):
    """The key, or its team, has used up what it may use in a day or a month, in UTC. Retry after the seconds in
    `retry-after`, when the next one begins."""

    type = "insufficient_quota"
    code = "insufficient_quota"


def rate_limit_headers(limits: RateLimits | None) -> dict[str, str]:
    """`x-ratelimit-…` as OpenAI names them; none for a caller without limits."""
    if limits is None:
        return {}
    fields: dict[str, str | int | None] = {
        "limit-requests": limits.limit_requests,
        "remaining-requests": limits.remaining_requests,
        "reset-requests": None if limits.reset_requests_s is None else _duration(limits.reset_requests_s),
        "limit-tokens": limits.limit_tokens,
        "remaining-tokens": limits.remaining_tokens,
        "reset-tokens": None if limits.reset_tokens_s is None else _duration(limits.reset_tokens_s),
    }
    return {f"x-ratelimit-{name}": str(value) for name, value in fields.items() if value is not None}


def _duration(seconds: float) -> str:
    """Such as `6m0s`, `1.5s` or `20ms`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"


class InternalError(ApiError):
    """Something failed inside of the server."""

    status = 500

    def __init__(self) -> None:
        super().__init__(
            "The server had an error while processing your request. If the same request fails again, tell the operator "
            "the x-request-id of this answer."
        )


class GivenUp(ApiError):
    """Two engine replicas were lost while they began to work on the request, which may be why."""

    status = 500

    def __init__(self) -> None:
        super().__init__(
            "The request was given up: two engine replicas were lost while they began to work on it. Do not send it "
            "again unchanged; tell the operator the x-request-id of this answer."
        )

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}  # the official client retries a 500 otherwise


class NotResumable(ApiError):
    """The engine replica of an answer in a required form was lost, and no other can go on exactly where it ended."""

    status = 500

    def __init__(self) -> None:
        super().__init__(
            "The engine replica of this answer was lost, and its required form cannot go on exactly where it ended. "
            "Discard what has arrived and send the request again."
        )


class OutputNotConforming(ApiError):
    """The model's output does not conform to what the request asks for, or cannot go on within it. The same request
    most likely ends so again: it is the request that has to change."""

    status = 400
    type = "invalid_request_error"
    code = "output_not_conforming"

    def __init__(self, param: str) -> None:
        super().__init__(
            f"The output came to where it cannot conform to {param}: parameters that ban tokens or the end of the "
            "text, such as allowed_token_ids, logit_bias, bad_words and min_tokens, may contradict it, or "
            "it is too complex for the engine. Change the request before you send it again.",
            param=param,
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


class ObjectNotFound(ApiError):
    """There is no such key or team."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(ApiError):
    """The key is revoked, and stays so."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"
