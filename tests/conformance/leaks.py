"""What no error body may contain: paths, classes, tracebacks, keys, anything of the machine or the program's inside.

Applied to every error that a test of this folder sees: `watch_clients` looks at what httpx and the openai client get,
raw_http.py and in_process.py at what comes without them. What the caller itself sent may be told back.
"""

from __future__ import annotations

import json
import os
import re
import socket
from typing import Any, Final
from urllib.parse import unquote

import httpx
import httpx2
import pytest

__all__ = ["assert_no_leak", "leaks_in", "watch_clients"]

_ROUTES: Final = ("/v1/completions", "/v1/models")
"""What messages point to; the paths of all dialects end so."""

_FOLDERS: Final = "|".join(re.escape(name) for name in sorted(os.listdir("/")))
_SUSPECTS: Final = {
    "a path": re.compile(rf"(?<![\w.:/<])(?:(?:~|\.{{1,2}})?/[\w.+@%-]+(?:/[\w.+@%-]+)+|/(?:{_FOLDERS})\b|~/\w)"),
    "a source file": re.compile(
        r"\b[\w-]+\.(?:py|pyc|so|cc|cpp|cu|h|hpp|rs|safetensors|gguf|db|yaml)\b|\b(?:config|tokenizer)\.json\b"
    ),
    "a class": re.compile(r"\b[A-Z][a-z0-9]+(?:[A-Z][a-z0-9]+)+\b|\b[A-Z]\w*(?:Error|Exception|Warning)\b"),
    "a traceback": re.compile(r"Traceback|File \"|\bline \d+, in\b|most recent call|stack trace", re.IGNORECASE),
    "an object": re.compile(r"\bobject at (?!line )|<class |<function |\b0x[0-9a-fA-F]{6,}|\b__\w+__\b|\bself\.\w"),
    "a package": re.compile(
        r"\b(?:pydantic(?:_core)?|msgspec|starlette|fastapi|uvicorn|httptools|asyncio|ray|vllm|torch|numpy|tokenizers|"
        r"transformers|sqlite3?|sqlalchemy|structlog|deployments|serve_app|site-packages|haproxy)\b"
    ),
    "an address": re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b"),
    "a key": re.compile(r"\bsk-[\w-]{4,}"),
    "the machine": re.compile(rf"\b{re.escape(socket.gethostname())}\b"),
}


def leaks_in(body: str, sent: str = "") -> list[str]:
    """What `body` tells that it must not, such as `a path: /srv/model`. `sent` is what the caller wrote, URL included:
    what stands there literally is no leak."""
    return [
        f"{kind}: {found}"
        for kind, pattern in _SUSPECTS.items()
        for found in pattern.findall(body)
        if found.rstrip(".") not in sent and not found.rstrip(".").endswith(_ROUTES)
    ]


def assert_no_leak(body: str, sent: str = "") -> None:
    """For error bodies that no HTTP client has seen; arguments as of `leaks_in`."""
    leaks = leaks_in(body, sent)
    assert not leaks, f"{leaks} in {body}"


def watch_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the request of any httpx or httpx2 client that is answered with an error that leaks."""
    for library in (httpx, httpx2):
        _watch_sync(monkeypatch, library.Client)
        _watch_async(monkeypatch, library.AsyncClient)


def _watch_sync(monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    send = client.send

    def watched(self: Any, request: Any, **options: Any) -> Any:
        response = send(self, request, **options)
        if response.status_code >= 400:
            response.read()
            assert_no_leak(response.text, _sent(request))
        return response

    monkeypatch.setattr(client, "send", watched)


def _watch_async(monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    send = client.send

    async def watched(self: Any, request: Any, **options: Any) -> Any:
        response = await send(self, request, **options)
        if response.status_code >= 400:
            await response.aread()
            assert_no_leak(response.text, _sent(request))
        return response

    monkeypatch.setattr(client, "send", watched)


def _sent(request: Any) -> str:
    """URL and body, as they were written and as they are meant."""
    try:
        body: str = request.content.decode(errors="replace")
    except (httpx.RequestNotRead, httpx2.RequestNotRead):  # it was streamed
        body = ""
    try:
        meant = json.dumps(json.loads(body), ensure_ascii=False)
    except (ValueError, RecursionError):
        meant = ""
    return f"{request.url} {unquote(str(request.url))} {body} {meant}"
