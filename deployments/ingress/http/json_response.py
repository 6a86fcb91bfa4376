"""JSON as a response, errors among it."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from deployments.ingress.errors import ErrorAnswer

__all__ = ["error_response", "json_response"]


def json_response(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


def error_response(answer: ErrorAnswer) -> Response:
    return json_response(answer.body, answer.status, answer.headers)
