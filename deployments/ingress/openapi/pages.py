"""The public pages that tell how to use the others: the OpenAPI document, Swagger UI over it, and `Completion.json`.

Swagger UI comes whole from the package fastapi-offline, of which only the two files are used: a browser that shows
`/docs` asks nobody else for anything.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from deployments.ingress.api.completions.dialects import SCHEMA_PATH
from deployments.ingress.openapi.document import openapi_document
from deployments.ingress.openapi.json_schemas import completion_schema

__all__ = ["documentation_routes"]

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


def documentation_routes() -> list[Route]:
    return [
        Route("/openapi.json", _openapi),
        Route(SCHEMA_PATH, _completion_schema),
        Route("/docs", _docs),
        Route("/docs/start.js", _start),
        Route("/docs/swagger-ui.css", _style),
        Route("/docs/swagger-ui-bundle.js", _script),
    ]


async def _openapi(_request: Request) -> Response:
    return Response(_openapi_body(), media_type="application/json")


async def _completion_schema(_request: Request) -> Response:
    return Response(_completion_schema_body(), media_type="application/json")


async def _docs(_request: Request) -> Response:
    return Response(_PAGE, media_type="text/html", headers=_POLICY)


async def _start(_request: Request) -> Response:
    return Response(_START, media_type="text/javascript")


async def _style(_request: Request) -> Response:
    return FileResponse(_swagger_ui() / "swagger-ui.css")


async def _script(_request: Request) -> Response:
    return FileResponse(_swagger_ui() / "swagger-ui-bundle.js", media_type="text/javascript")


@cache
def _openapi_body() -> bytes:
    return msgspec.json.encode(openapi_document())


@cache
def _completion_schema_body() -> bytes:
    return msgspec.json.encode(completion_schema())


@cache
def _swagger_ui() -> Path:
    return Path(str(distribution("fastapi-offline").locate_file("fastapi_offline/static")))
