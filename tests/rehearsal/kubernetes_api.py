"""As much of Kubernetes' API as Ray's autoscaler asks for in a pod of KubeRay's: its RayCluster, and the pods of it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Generator
from pathlib import Path
from typing import Any

import trustme
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

__all__ = ["serve_api"]

_NAMESPACE = "default"


@contextlib.asynccontextmanager
async def serve_api(
    host: str,
    account: Path,
    ray_cluster: dict[str, Any],
    pods: Callable[[], list[dict[str, Any]]],
    changed: Callable[[], None],
) -> AsyncIterator[None]:
    """Serve at `host`, as `https://kubernetes`. `account` gets what lets a pod in: token, ca.crt and namespace.

    `ray_cluster` is changed in place by JSON patches, after each of which `changed` is called.
    """
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(account / "ca.crt"))
    token = secrets.token_hex(16)
    (account / "token").write_text(token)
    (account / "namespace").write_text(_NAMESPACE)
    certificate = account.with_name("api-server.pem")
    authority.issue_cert("kubernetes").private_key_and_cert_chain_pem.write_to_path(str(certificate))

    app = FastAPI()
    clusters = f"/apis/ray.io/v1/namespaces/{_NAMESPACE}/rayclusters/{{name}}"

    @app.middleware("http")
    async def authenticate(request: Request, call_next: Any) -> Any:
        if request.headers.get("authorization") != f"Bearer {token}":
            return JSONResponse({"message": "Unauthorized"}, 401)
        return await call_next(request)

    @app.get(clusters)
    async def cluster(name: str) -> dict[str, Any]:
        return _found(ray_cluster if ray_cluster["metadata"]["name"] == name else None)

    @app.patch(clusters)
    async def patch(name: str, request: Request) -> dict[str, Any]:
        for operation in await request.json():
            _replace(_found(ray_cluster), **operation)
        changed()
        return ray_cluster

    @app.get(f"/api/v1/namespaces/{_NAMESPACE}/pods")
    async def listed() -> dict[str, Any]:
        return {"metadata": {"resourceVersion": "1"}, "items": pods()}

    @app.get(f"/api/v1/namespaces/{_NAMESPACE}/pods/{{name}}")
    async def pod(name: str) -> dict[str, Any]:
        return _found(next((each for each in pods() if each["metadata"]["name"] == name), None))

    config = uvicorn.Config(app, host=host, port=443, log_level="warning", ssl_certfile=str(certificate))
    server = _Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await serving


class _Server(uvicorn.Server):
    """Leaves signals to the rehearsal: Ctrl-C ends all of it in order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _found(resource: dict[str, Any] | None) -> dict[str, Any]:
    if resource is None:
        raise HTTPException(404)
    return resource


def _replace(document: Any, op: str, path: str, value: Any) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    if op != "replace":
        raise HTTPException(422, f"no such operation here: {op}")
    *parents, last = path.strip("/").split("/")
    for part in parents:
        document = document[int(part) if isinstance(document, list) else part]
    document[last] = value
