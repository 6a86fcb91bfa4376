"""An error as a response."""

from __future__ import annotations

from starlette.responses import Response

from deployments.ingress.errors import ErrorAnswer

__all__ = ["error_response"]


def error_response(answer: ErrorAnswer) -> Response:
    return Response(answer.body, answer.status, answer.headers, media_type="application/json")
