"""The public pages that tell how to use the others: the OpenAPI document, and Swagger UI over it.

Swagger UI comes whole from the package fastapi-offline, of which only the two files are used: a browser that shows
`/docs` asks nobody else for anything.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.description.operations import PUBLIC, answered, operation
from deployments.ingress.api.services import ServicesOf
from deployments.ingress.http.json_response import json_response

__all__ = ["DOCUMENTATION"]

_PAGE: Final = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Millstream API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# Without validatorUrl it would send the document's address to a service of Swagger's.
_START: Final = b"""SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
});
"""
_POLICY: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}


_router = APIRouter()
DOCUMENTATION: Final = Endpoint("documentation", "Public, without a key.", _router)


@_router.get(
    "/openapi.json",
    openapi_extra=operation(
        "This document",
        "openapi",
        answered("It.", {"application/json": {"schema": {"type": "object"}}}),
        500,
        security=PUBLIC,
    ),
)
async def openapi(services: ServicesOf) -> Response:
    return json_response(services.document())


@_router.get(
    "/docs",
    openapi_extra=operation(
        "This document, to read and try",
        "docs",
        answered("A page.", {"text/html": {"schema": {"type": "string"}}}),
        500,
        security=PUBLIC,
    ),
)
async def docs() -> Response:
    return Response(_PAGE, media_type="text/html", headers=_POLICY)


@_router.get("/docs/start.js")
async def start() -> Response:
    return Response(_START, media_type="text/javascript")


@_router.get("/docs/swagger-ui.css")
async def style() -> Response:
    return FileResponse(_swagger_ui() / "swagger-ui.css")


@_router.get("/docs/swagger-ui-bundle.js")
async def script() -> Response:
    return FileResponse(_swagger_ui() / "swagger-ui-bundle.js", media_type="text/javascript")


@cache
def _swagger_ui() -> Path:
    return Path(str(distribution("fastapi-offline").locate_file("fastapi_offline/static")))
