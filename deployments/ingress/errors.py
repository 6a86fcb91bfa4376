"""Every error a client can see, and the one table from exception to HTTP answer, in OpenAI's shape.

Messages say what to do and contain neither internals nor another request's data.
"""

from __future__ import annotations

import math

import msgspec

__all__ = [
    "ApiError",
    "BodyTooLarge",
    "InternalError",
    "InvalidApiKey",
    "InvalidRequest",
    "MethodNotAllowed",
    "ModelNotFound",
    "ModelNotReady",
    "Overloaded",
    "PermissionDenied",
    "RouteNotFound",
    "ServiceUnavailable",
    "UnsupportedMediaType",
]


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

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class InvalidApiKey(ApiError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class PermissionDenied(ApiError):
    status = 403
    type = "invalid_request_error"
    code = "permission_denied"


class ModelNotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RouteNotFound(ApiError):
    status = 404
    type = "invalid_request_error"


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"


class UnsupportedMediaType(ApiError):
    status = 415
    type = "invalid_request_error"


class InternalError(ApiError):
    status = 500

    def __init__(self) -> None:
        super().__init__(
            "The server had an error while processing your request. Retry it; if it happens again, tell "
            "the operator the x-request-id of this answer."
        )


class ServiceUnavailable(ApiError):
    status = 503


class ModelNotReady(ServiceUnavailable):
    code = "model_not_ready"


class Overloaded(ServiceUnavailable):
    code = "overloaded"
