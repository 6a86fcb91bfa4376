"""The four dialects as their documents and ../shared/completions.md have them, apart from what the program says of them
(deployments/ingress/api/completions/dialects.py), and the shapes of their errors."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import httpx
import pytest

__all__ = ["D0", "D1", "D2", "D3", "EACH_FACE", "FACES", "Face", "assert_completion", "assert_error", "assert_invalid"]


class Face(NamedTuple):
    name: str
    path: str
    header: str
    """That carries the key."""
    invalid: int
    """Status of an invalid body: 400 comes as `{"error": {…}}`, 422 as `{"detail": […]}`."""

    def headers(self, key: str) -> dict[str, str]:
        return {self.header: f"Bearer {key}"}


D0: Final = Face("D0", "/v1/completions", "x-llm-api-key", 422)
D1: Final = Face("D1", "/openai/v1/completions", "Authorization", 400)
D2: Final = Face("D2", "/api/v1/compatibility/openai/v1/completions", "Authorization", 422)
D3: Final = Face("D3", "/v1/completions", "Authorization", 400)
FACES: Final = (D0, D1, D2, D3)
EACH_FACE = pytest.mark.parametrize("face", FACES, ids=[face.name for face in FACES])

_TYPES: Final = {True: "server_error", False: "invalid_request_error"}


def assert_error(response: httpx.Response, status: int, code: str | None, param: str | None = None) -> str:
    """In OpenAI's shape; the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == (_TYPES[status >= 500], code, param), error
    message: str = error["message"]
    assert message
    return message


def assert_invalid(response: httpx.Response, face: Face, param: str | None, code: str | None = None) -> str:
    """An invalid body in the dialect's shape, with the parameter named (`a.b` inside of another); the message. Where
    `param` is None the body as a whole is wrong."""
    if face.invalid == 400:
        return assert_error(response, 400, code, param)
    assert response.status_code == face.invalid, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"detail"}
    [detail] = body["detail"]
    assert detail.keys() == {"loc", "msg", "type"}
    assert detail["loc"] == ["body", *([] if param is None else param.split("."))]
    assert isinstance(detail["type"], str)
    message: str = detail["msg"]
    assert message
    return message


def assert_completion(response: httpx.Response, model: str) -> dict[str, Any]:
    """A whole answer, every field of it; the body."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body: dict[str, Any] = response.json()
    schema = {"$schema"} & body.keys()
    assert body.keys() - schema == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", model)
    assert type(body["created"]) is int
    assert [choice["index"] for choice in body["choices"]] == list(range(len(body["choices"])))
    for choice in body["choices"]:
        assert choice.keys() >= {"index", "text", "logprobs", "finish_reason"}
        assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage.keys() == {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"].keys() == {"cached_tokens"}
    return body
