"""An endpoint as the app and the documents know it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import Response

from deployments.ingress.api.description.json_schemas import Json

__all__ = ["DirectRoute", "Endpoint"]


@dataclass(frozen=True)
class Endpoint:
    """Routes that belong together. Each has its part of the OpenAPI document as `openapi_extra`; routes without are not
    documented."""

    name: str
    """Their tag."""
    description: str
    router: APIRouter
    schemas: tuple[type[BaseModel], ...] = ()
    """What the operations refer to by name."""
    reference: Callable[[], str] = lambda: ""
    """Their part of docs/api.md."""

    def operations(self) -> Iterator[tuple[str, str, Json]]:
        """Path, method and operation, in the order of the routes."""
        for route in self.router.routes:
            if isinstance(route, APIRoute) and route.openapi_extra is not None:
                for method in sorted(route.methods - {"HEAD"}):
                    yield route.path_format, method.lower(), {"tags": [self.name], **route.openapi_extra}


class DirectRoute(APIRoute):
    """For the hot path: calls the endpoint with the request, beneath FastAPI's dependencies and serialization."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handler: Any = self.endpoint
        return handler  # type: ignore[no-any-return]
