"""The `openai` package of npm and Vercel's AI SDK, in a real browser, from a page of another origin."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from deployments.ingress.app import IngressSettings, build_app
from tests.deployments.ingress.http.test_connection import served
from tests.deployments.ingress.memory_gateway import BODY_LIMIT_BYTES, gateway, meter_client_of
from tests.deployments.ingress.memory_meter import USER_KEY

MODULES = Path(os.environ.get("MILLSTREAM_NODE_MODULES") or Path(sys.prefix) / "javascript" / "node_modules")
"""Where requirements/install.sh puts requirements/javascript."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
    pytest.mark.skipif(
        shutil.which("node") is None or not MODULES.is_dir(), reason="there is no Node.js with its modules here"
    ),
]


async def run(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **(environment or {})})
    assert await asyncio.wait_for(process.wait(), 60.0) == 0


@asynccontextmanager
async def browser(folder: Path, url: str) -> AsyncIterator[None]:
    """Has `url` open."""
    assert CHROMIUM is not None
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    process = await asyncio.create_subprocess_exec(
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet),
        *(f"--user-data-dir={folder}", url),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, 9)
        await process.wait()


async def test_clients_in_a_page_of_a_configured_origin_get_what_they_ask_for(tmp_path: Path) -> None:
    bundle = tmp_path / "page.js"
    source = Path(__file__).parent / "browser" / "page.js"
    esbuild = MODULES / ".bin" / "esbuild"
    options = ("--bundle", "--format=esm", "--log-level=warning", f"--outfile={bundle}")
    await run(esbuild, source, *options, environment={"NODE_PATH": str(MODULES)})
    told: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def results(request: Request) -> Response:
        told.set_result(json.loads(await request.body()))
        return Response()

    async def page(_request: Request) -> Response:
        return HTMLResponse('<!doctype html><script type="module" src="page.js"></script>')

    async def script(_request: Request) -> Response:
        return FileResponse(bundle, media_type="text/javascript")

    routes = [Route("/", page), Route("/page.js", script), Route("/results", results, methods=["POST"])]
    async with gateway(tmp_path, models=("Hub/Model-1.5B",), aliases=("alias",)) as gate:
        meter = meter_client_of(gate.meter, tmp_path, "browsed")
        await meter.start()
        try:
            async with served(Starlette(routes=routes), "httptools") as pages:
                origin = f"http://127.0.0.1:{pages.port}"
                settings = IngressSettings(BODY_LIMIT_BYTES, 15.0, cors_origins=(origin,))
                app = build_app(gate.catalog, meter, settings)
                async with served(app, "httptools") as serving:
                    query = {"server": f"http://localhost:{serving.port}", "key": USER_KEY, "model": "alias"}
                    async with browser(tmp_path / "profile", f"{origin}/?{urlencode(query)}"):
                        answers = await asyncio.wait_for(told, 90.0)
        finally:
            await meter.close()
    whole = answers["openai"]
    assert answers["openai models"] == ["Hub/Model-1.5B", "alias"]
    assert len(whole["text"]) == 9
    assert whole["request_id"], "the page may not read x-request-id"
    assert answers["openai stream"] == whole["text"]
    assert answers["openai wrong key"].startswith("AuthenticationError: 401 ")
    assert (answers["ai-sdk"], answers["ai-sdk stream"]) == (9, 9)
