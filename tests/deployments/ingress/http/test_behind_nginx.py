"""nginx in front, configured as docs/operations.md says."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from tests.conftest import eventually
from tests.deployments.ingress.http.test_connection import limited, read_body, served

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="there is no nginx here")

OPERATIONS = Path(__file__).parents[4] / "docs" / "operations.md"


def documented_location() -> str:
    [text] = re.findall(r"(?s)```nginx\n(.*?)```", OPERATIONS.read_text())
    assert isinstance(text, str)
    return text


@asynccontextmanager
async def nginx(folder: Path, port: int, location: str) -> AsyncIterator[str]:
    """In front of `port`; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = free.getsockname()[1]
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\n"
        f"server {{ listen 127.0.0.1:{own};\n{location.replace(':8000', f':{port}')}\n}} }}\n"
    )
    process = await asyncio.create_subprocess_exec("nginx", "-c", str(configuration), "-p", str(folder))
    try:
        async with httpx.AsyncClient(trust_env=False) as client:

            async def is_up() -> bool:
                try:
                    await client.head(f"http://127.0.0.1:{own}/")
                except httpx.ConnectError:
                    return False
                return True

            await eventually(is_up, 10.0, every_s=0.05)
        yield f"http://127.0.0.1:{own}"
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 10.0)


async def test_large_prompts_and_single_tokens_pass_nginx_as_documented(tmp_path: Path) -> None:
    goes_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(scope, receive, send)
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["method"] == "POST":
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await asyncio.wait_for(goes_on.wait(), 10.0)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    large = b"x" * (7 * 2**20)
    default = re.sub(r"(?m)^ *client_max_body_size.*$", "", documented_location())
    async with served(limited(app), "httptools") as serving, httpx.AsyncClient(trust_env=False) as client:
        async with nginx(tmp_path, serving.port, documented_location()) as url:
            async with client.stream("POST", url, content=large) as answer:
                assert answer.status_code == 200
                pieces = answer.aiter_raw()
                assert await anext(pieces) == b"data: 1\n\n"  # while the rest is not there yet
                goes_on.set()
                assert b"".join([piece async for piece in pieces]) == b"data: [DONE]\n\n"
            assert (await client.head(url)).status_code == 200
        async with nginx(tmp_path, serving.port, default) as url:
            assert (await client.post(url, content=large)).status_code == 413  # what the line is for
