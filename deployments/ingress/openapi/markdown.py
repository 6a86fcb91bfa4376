"""docs/api.md, made from what the ingress runs on: endpoints, parameters and errors cannot be told otherwise than they
are. After a change of any of them:

    .venv/bin/python -m deployments.ingress.openapi.markdown > docs/api.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Final

from deployments.ingress.api.completions.dialects import D3, DIALECTS
from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.description.operations import ADMIN_SECURITY, PUBLIC, error_classes
from deployments.ingress.api.description.tables import table
from deployments.ingress.api.endpoints import ENDPOINTS
from deployments.ingress.errors import InvalidRequest

__all__ = ["api_reference"]

_HEAD: Final = """\
# API

Made by `.venv/bin/python -m deployments.ingress.openapi.markdown > docs/api.md` from the models that check requests; a
test compares. The same as OpenAPI 3.1: `GET /openapi.json`, and to read and try: `GET /docs`.
"""

_BODIES: Final = """\
## Bodies

Bodies are JSON objects, declared as `content-type: application/json`. They are checked to the last key:

- An unknown parameter is refused by name, and so is a known one with a value of another type: no number in a string, no
  1.0 for an integer, no NaN.
- Null stands for the default.
- Of a key that comes twice in an object the last one counts.
- Invalid UTF-8, lone surrogates and a byte order mark are refused.
- A body may be packed with gzip, `content-encoding: gzip`; its limit holds for what it unpacks to.
- `prompt`, `suffix` and `tokens` may be as long as the body, with up to 1024 texts or arrays, or 131072 token ids. All
  else has at most 128 KiB of JSON per parameter and 256 KiB together. A body has at most 65536 strings, 524288
  backslashes (send text as UTF-8, not as `\\u732b`) and 4 MiB outside of strings. Bodies of up to 64 KiB may have
  anything.
"""

_ERRORS: Final = """\
## Errors

The body is `{"error": {"message", "type", "param", "code"}}`, which OpenAI's client turns into its exceptions. Where a
dialect says 422, an invalid body is answered `{"detail": [{"loc", "msg", "type"}]}` instead.
"""

_HEADERS: Final = """\
## Headers

| header | of | meaning |
|---|---|---|
| `authorization` | request | `Bearer KEY`; see the dialects for other places of the key |
| `x-llm-api-key` | request | the key, with or without `Bearer`; chooses D0 on `/v1/completions` |
| `x-request-id` | request | names the request: up to 128 of `A-Z a-z 0-9 . _ -`; what does not conform is replaced |
| `x-request-id` | answer | the same, or the server's own |
| `x-ratelimit-limit-…` | answer | of `requests` and `tokens`: the narrowest limit per minute of the key and its team |
| `x-ratelimit-remaining-…` | answer | what is left of it |
| `x-ratelimit-reset-…` | answer | until all of it is there again, as in `6m0s` |
| `retry-after` | answer | seconds, where a retry helps |
| `x-should-retry` | answer | `false`, with a 429 that would never be admitted |
| `www-authenticate` | answer | `Bearer`, with 401 |
| `allow` | answer | the methods there are, with 405 |
"""


def api_reference(endpoints: Sequence[Endpoint] = ENDPOINTS) -> str:
    parts = [
        _HEAD,
        "## Endpoints\n",
        table(("endpoint", "what it does", "key"), _rows(endpoints)),
        "HEAD is answered wherever GET is.\n",
        _BODIES,
        *(endpoint.reference() for endpoint in endpoints),
        _ERRORS,
        table(("status", "`type`", "`code`", "when"), _errors()),
        _HEADERS,
    ]
    return "\n".join([part for part in parts if part]).rstrip() + "\n"


def _rows(endpoints: Sequence[Endpoint]) -> Iterator[tuple[str, str, str]]:
    for endpoint in endpoints:
        for path, method, operation in endpoint.operations():
            security = operation.get("security")
            key = "no" if security == PUBLIC else "admin" if security == ADMIN_SECURITY else "yes"
            yield f"`{method.upper()} {path}`", operation["summary"], key


def _errors() -> Iterator[tuple[str, str, str, str]]:
    for kind in sorted(error_classes(), key=lambda kind: kind.status):
        status = str(kind.status)
        if issubclass(kind, InvalidRequest):
            others = sorted({d.name for d in DIALECTS if d.invalid_body == "detail"} - {D3.name})
            status += f" (422 in {' and '.join(others)})"
        code = "" if kind.code is None else f"`{kind.code}`"
        yield status, f"`{kind.type}`", code, " ".join((kind.__doc__ or "").split())


if __name__ == "__main__":
    sys.stdout.write(api_reference())
