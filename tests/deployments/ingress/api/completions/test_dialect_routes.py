"""The completion endpoint by each of its paths: keys, models, answers and errors in the caller's dialect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.ingress.api.completions.dialects import D0, D1, D2, D3, DIALECTS, Dialect
from deployments.meter.remote.meter_transport import MeterUnreachable
from tests.deployments.ingress.memory_gateway import BODY_LIMIT_BYTES, Gateway, events, gateway
from tests.deployments.ingress.memory_meter import USER_KEY
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet, run_in_virtual_time

EACH = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
DETAILED = (D0, D2)


async def post(gate: Gateway, dialect: Dialect, path: str | None = None, **request: Any) -> httpx.Response:
    """To the endpoint of `dialect`, with its key unless there are other headers."""
    headers = {"x-llm-api-key": USER_KEY} if dialect is D0 else {"authorization": f"Bearer {USER_KEY}"}
    del gate.client.headers["authorization"]
    try:
        return await gate.client.post(path or dialect.path, **{"headers": headers, **request})
    finally:
        gate.client.headers["authorization"] = f"Bearer {USER_KEY}"


async def complete(gate: Gateway, dialect: Dialect, path: str | None = None, **fields: Any) -> httpx.Response:
    return await post(gate, dialect, path, json={"model": "m", "prompt": "hello", **fields})


def assert_openai_error(response: httpx.Response, status: int, code: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code


def assert_invalid(response: httpx.Response, dialect: Dialect, param: str, *, code: str | None = None) -> None:
    if dialect not in DETAILED:
        assert_openai_error(response, 400, code)
        assert response.json()["error"]["param"] == param
        return
    assert response.status_code == 422, response.text
    [detail] = response.json()["detail"]
    assert detail.keys() == {"loc", "msg", "type"}
    assert detail["loc"] == ["body", param]


@EACH
def test_a_completion_and_a_stream(tmp_path: Path, dialect: Dialect) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            response = await complete(gate, dialect, max_tokens=3, temperature=0)
            assert response.status_code == 200, response.text
            body = response.json()
            schema = "http://gateway/openai/schemas/Completion.json"
            assert body.get("$schema") == (schema if dialect is D1 else None)
            assert body["usage"]["completion_tokens"] == 3
            response = await complete(gate, dialect, max_tokens=3, temperature=0, stream=True)
            *chunks, done = events(response.content)
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == body["choices"][0]["text"]
            assert done == "[DONE]"
            await quiet()

    run_in_virtual_time(scenario())


@EACH
def test_no_key_and_a_wrong_key_are_401_in_openais_shape(tmp_path: Path, dialect: Dialect) -> None:
    header, bare = dialect.credentials[0]

    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            for key in ("", "sk-wrong"):
                value = key if bare else f"Bearer {key}"
                response = await post(gate, dialect, headers={header: value}, content=b"not read")
                assert_openai_error(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"

    run_in_virtual_time(scenario())


@pytest.mark.parametrize(
    ("dialect", "headers"),
    [
        (D0, {"x-llm-api-key": USER_KEY}),
        (D0, {"x-llm-api-key": f"Bearer {USER_KEY}"}),
        (D0, {"x-llm-api-key": "", "authorization": f"Bearer {USER_KEY}"}),
        (D2, {"authorization": USER_KEY}),
        (D2, {"authorization": f"Bearer {USER_KEY}"}),
    ],
)
def test_keys_in_all_their_places(tmp_path: Path, dialect: Dialect, headers: dict[str, str]) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            response = await post(gate, dialect, headers=headers, json={"model": "m", "prompt": "hello"})
            assert response.status_code == 200, response.text

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_the_model_of_the_query_wins_for_d0_only(tmp_path: Path) -> None:
    async with gateway(tmp_path, models=("m", "a")) as gate:
        response = await complete(gate, D0, "/v1/completions?model=a")
        assert response.json()["model"] == "a"
        response = await post(gate, D0, "/v1/completions?model=a", json={"prompt": "hello"})
        assert response.json()["model"] == "a"
        response = await complete(gate, D3, "/v1/completions?model=a")
        assert response.json()["model"] == "m"
        response = await complete(gate, D0, "/v1/completions?model=%ff%00")
        assert_openai_error(response, 404, "model_not_found")


@EACH
def test_invalid_requests_are_told_in_the_dialect(tmp_path: Path, dialect: Dialect) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            assert_invalid(await complete(gate, dialect, temperature=3), dialect, "temperature")
            assert_invalid(await complete(gate, dialect, unheard_of=3), dialect, "unheard_of")
            response = await complete(gate, dialect, max_tokens=5000)  # known to the meter only
            assert_invalid(response, dialect, "prompt", code="context_length_exceeded")
            assert_invalid(await complete(gate, dialect, stop_token_ids=[257]), dialect, "stop_token_ids")
            await quiet()
            assert (gate.replicas["r0"].submissions, gate.meter.settlements) == ([], [])

    run_in_virtual_time(scenario())


@EACH
def test_what_the_engine_refuses_is_told_in_the_dialect(tmp_path: Path, dialect: Dialect) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            gate.pool.replicas_changed(frozenset())
            await quiet()
            response = await complete(gate, dialect)
            assert_openai_error(response, 400 if dialect is D2 else 503, "model_not_ready")
            assert response.headers["retry-after"] == "10"

    run_in_virtual_time(scenario())


@EACH
def test_other_errors_are_in_openais_shape(tmp_path: Path, dialect: Dialect) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            response = await complete(gate, dialect, model="x")
            assert_openai_error(response, 404, "model_not_found")
            assert_openai_error(await post(gate, dialect, content=b"{}"), 415, None)
            assert_openai_error(await complete(gate, dialect, user="x" * BODY_LIMIT_BYTES), 413, None)
            assert_openai_error(await gate.client.put(dialect.path), 405, None)
            gate.meter.error = MeterUnreachable("gone")
            assert_openai_error(await complete(gate, dialect), 503, None)
            gate.meter.error = RuntimeError("/srv/secret")
            response = await complete(gate, dialect)
            assert_openai_error(response, 500, None)
            assert "secret" not in response.text
            gate.meter.error = None

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_other_routes_take_the_key_of_d0_too(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        del gate.client.headers["authorization"]
        for headers, status in [({"x-llm-api-key": USER_KEY}, 200), ({"x-llm-api-key": "sk-wrong"}, 401), ({}, 401)]:
            for path in ("/v1/models", "/v1/models/m"):
                assert (await gate.client.get(path, headers=headers)).status_code == status
            response = await gate.client.post("/tokenize", headers=headers, json={"prompt": "a"})
            assert response.status_code == status
