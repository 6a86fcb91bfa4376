"""One test per row of the table of errors, with the exception that the official client makes of it; then what holds for
all answers: `x-request-id` and no CORS.

Rows that a healthy cluster does not give come from the ingress in memory (403, 500, 503, 504). 429 is not here: there
are no limits yet.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from structlog.testing import capture_logs

from deployments.ingress.api.completions.chunks import ChoiceDelta
from deployments.ingress.api.completions.completion import CompletionInference
from deployments.meter.remote.meter_transport import MeterUnreachable
from tests.conformance.faces import D0, D2, EACH_FACE, Face, assert_error, assert_invalid
from tests.conformance.in_process import app_with_deadline, replayed, speaking
from tests.conformance.raw_http import STALLS, RawAnswer, connected, request_of
from tests.conftest import RunningCluster
from tests.deployments.ingress.memory_gateway import Gateway, gateway
from tests.deployments.ingress.memory_meter import ADMIN_KEY
from tests.deployments.ingress.memory_replicas import LIMITS, SETTINGS
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet, run_in_virtual_time

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120), pytest.mark.usefixtures("stalled_uploads")]

BODY: dict[str, Any] = {"model": "sim-a", "prompt": "The capital of France is", "max_tokens": 2}
BODY_LIMIT = 8 * 2**20


def raised(
    caught: pytest.ExceptionInfo[openai.APIStatusError], status: int, code: str | None, param: str | None
) -> str:
    """What the official client tells of it; the message."""
    error = caught.value
    assert (error.status_code, error.code, error.param) == (status, code, param)
    assert error.type == ("server_error" if status >= 500 else "invalid_request_error")
    assert error.request_id
    assert isinstance(error.body, dict)
    message: str = error.body["message"]
    return message


# --- 400 -----------------------------------------------------------------------------------------------------------


def test_400_names_the_parameter(official: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        official.completions.create(**BODY, temperature=3)
    assert "'temperature'" in raised(caught, 400, None, "temperature")


def test_400_in_a_stream_is_raised_at_once(official: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        official.completions.create(**BODY, stream=True, extra_body={"top_k": "many"})
    raised(caught, 400, None, "top_k")


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [({"prompt": [504] * 3000}, 3002), ({"max_tokens": 5000}, 5005), ({"prompt": "hi " * 4000}, None)],
    ids=["token ids", "max_tokens", "text"],
)
def test_400_context_length_exceeded_says_both_numbers(
    official: openai.OpenAI, fields: dict[str, Any], tokens: int | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        official.completions.create(**{**BODY, **fields})
    message = raised(caught, 400, "context_length_exceeded", "prompt")
    numbers = list(map(int, re.findall(r"\d+", message)))
    assert numbers[0] == 2048
    assert numbers[1] > 2048
    assert tokens is None or numbers[1] == tokens


# --- 401 -----------------------------------------------------------------------------------------------------------

Call = Callable[[openai.OpenAI], object]
CALLS: dict[str, Call] = {
    "completions": lambda client: client.completions.create(**BODY),
    "stream": lambda client: client.completions.create(**BODY, stream=True),
    "models": lambda client: client.models.list(),
    "model": lambda client: client.models.retrieve("sim-a"),
    "unknown model": lambda client: client.models.retrieve("nobody"),
    "admin": lambda client: client.get("/../admin/v1/replicas", cast_to=object),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("key", ["sk-wrong", "x" * 4000], ids=["wrong", "long"])
def test_401_invalid_api_key(official: openai.OpenAI, call: Call, key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        call(official.with_options(api_key=key))
    assert key not in raised(caught, 401, "invalid_api_key", None)
    assert caught.value.response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/sim-a", "/admin/v1/replicas"])
async def test_401_without_any_key(http_without_key: httpx.AsyncClient, path: str) -> None:
    assert_error(await http_without_key.get(path), 401, "invalid_api_key")


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
async def test_401_comes_before_the_body_is_looked_at(http_without_key: httpx.AsyncClient, path: str) -> None:
    assert_error(await http_without_key.post(path, content=b"{"), 401, "invalid_api_key")


# --- 403 -----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_403_is_for_keys_that_are_not_the_admins(tmp_path: Path) -> None:
    """In memory, since a cluster has one key, the admin's. No key is barred from a model yet."""
    async with gateway(tmp_path) as gate:
        refused = await gate.client.get("/admin/v1/replicas")
        assert refused.status_code == 403
        with (
            replayed(403, refused.content, {"x-request-id": "r"}) as client,
            pytest.raises(openai.PermissionDeniedError) as caught,
        ):
            client.models.list()
        raised(caught, 403, "permission_denied", None)
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        assert (await gate.client.get("/admin/v1/replicas", headers=headers)).status_code == 200


# --- 404 -----------------------------------------------------------------------------------------------------------


def test_404_model_not_found(official: openai.OpenAI) -> None:
    for call in (
        lambda: official.completions.create(**{**BODY, "model": "gpt-4"}),
        lambda: official.models.retrieve("gpt-4"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert "'gpt-4'" in raised(caught, 404, "model_not_found", "model")


def test_404_unknown_route(official: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        official.chat.completions.create(model="sim-a", messages=[{"role": "user", "content": "x"}])
    assert "POST /v1/chat/completions" in raised(caught, 404, None, None)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/completions/", "/v1/completions/x", "/v2/completions", "//", "/%00"])
async def test_404_unknown_path(http: httpx.AsyncClient, path: str) -> None:
    assert_error(await http.post(path, json=BODY), 404, None)


# --- 405, 408, 413, 415 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
@EACH_FACE
async def test_405_names_the_methods_there_are(http: httpx.AsyncClient, face: Face, method: str) -> None:
    response = await http.request(method, face.path)
    assert_error(response, 405, None)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("path", "method"),
    [("/v1/models", "POST"), ("/v1/models/sim-a", "DELETE"), ("/tokenize", "GET"), ("/healthz", "POST")],
)
async def test_405_on_other_routes(http: httpx.AsyncClient, path: str, method: str) -> None:
    response = await http.request(method, path)
    assert_error(response, 405, None)
    assert response.headers["allow"]
    assert method not in response.headers["allow"]


def test_405_as_the_client_sees_it(official: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        official.get("/completions", cast_to=object)
    raised(caught, 405, None, None)


async def test_413_says_the_limit(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={**BODY, "user": "x" * BODY_LIMIT})
    assert str(BODY_LIMIT) in assert_error(response, 413, None)


def test_413_as_the_client_sees_it(official: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        official.completions.create(**{**BODY, "prompt": "x" * BODY_LIMIT})
    raised(caught, 413, None, None)


@pytest.mark.parametrize("given", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
@EACH_FACE
async def test_415_says_what_was_expected(
    http: httpx.AsyncClient, simulated_cluster: RunningCluster, face: Face, given: str | None
) -> None:
    headers = face.headers(simulated_cluster.key) | ({} if given is None else {"content-type": given})
    response = await http.post(face.path, content=json.dumps(BODY), headers=headers)
    assert "'application/json'" in assert_error(response, 415, None)


def test_415_as_the_client_sees_it(official: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        official.completions.create(**BODY, extra_headers={"Content-Type": "text/plain"})
    raised(caught, 415, None, None)


# --- 422 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", [D0, D2], ids=["D0", "D2"])
async def test_422_in_the_dialects_that_say_it(
    http_without_key: httpx.AsyncClient, simulated_cluster: RunningCluster, face: Face
) -> None:
    headers = face.headers(simulated_cluster.key)
    for fields, param, code in (
        ({"temperature": 3}, "temperature", "less_than_equal"),
        ({"prompt": "x " * 4000}, "prompt", "context_length_exceeded"),
        ({"unheard_of": 1}, "unheard_of", "extra_forbidden"),
    ):
        response = await http_without_key.post(face.path, json={**BODY, **fields}, headers=headers)
        assert_invalid(response, face, param)
        assert response.json()["detail"][0]["type"] == code
    with (
        replayed(422, response.content, {"x-request-id": "r"}) as client,
        pytest.raises(openai.UnprocessableEntityError) as caught,
    ):
        client.completions.create(**BODY)
    assert caught.value.body == response.json()


# --- 500, 503, 504 -------------------------------------------------------------------------------------------------


def failing(
    folder: Path,
    scenario: Callable[[Gateway, httpx.AsyncClient], Coroutine[Any, Any, httpx.Response]],
    face: Face,
    **options: Any,
) -> httpx.Response:
    """The answer that a gateway in memory gives in `scenario`, whatever became of it freed."""

    async def run() -> httpx.Response:
        async with gateway(folder, **options) as gate, speaking(gate, face) as client:
            response = await scenario(gate, client)
            await quiet()
            return response

    return run_in_virtual_time(run())


def assert_server_error(response: httpx.Response, status: int, code: str | None) -> None:
    """In OpenAI's shape in every dialect, and what the official client makes of it."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("server_error", code, None)
    with replayed(status, response.content, dict(response.headers)) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**BODY)
        raised(caught, status, code, None)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**BODY, stream=True)


@EACH_FACE
def test_500_tells_nothing_of_the_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, face: Face) -> None:
    async def broken(_completion: CompletionInference) -> list[ChoiceDelta]:
        raise RuntimeError("/srv/secret/weights.bin of sk-secret-key")

    monkeypatch.setattr(CompletionInference, "deltas", broken)

    async def scenario(_gate: Gateway, client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(face.path, json={"model": "m", "prompt": "hello"})

    response = failing(tmp_path, scenario, face)
    assert_server_error(response, 500, None)
    assert "x-request-id" in response.json()["error"]["message"]
    assert "secret" not in response.text


@EACH_FACE
def test_500_before_the_body_is_known(tmp_path: Path, face: Face) -> None:
    async def scenario(gate: Gateway, client: httpx.AsyncClient) -> httpx.Response:
        gate.meter.error = RuntimeError("/srv/secret/ledger.db")
        response = await client.post(face.path, json={"model": "m", "prompt": "hello"})
        gate.meter.error = None
        return response

    assert_server_error(failing(tmp_path, scenario, face), 500, None)


@EACH_FACE
def test_503_overloaded_with_retry_after(tmp_path: Path, face: Face) -> None:
    async def scenario(gate: Gateway, client: httpx.AsyncClient) -> httpx.Response:
        taken = []
        for _ in range(2):  # one that runs and one that waits
            taken.append(gate.request(max_tokens=1000))
            await asyncio.sleep(2 * SETTINGS.step_s)
        response = await client.post(face.path, json={"model": "m", "prompt": "hello"})
        for exchange in taken:
            exchange.hang_up()
            await exchange.task
        return response

    options = {"settings": replace(SETTINGS, max_num_seqs=1), "max_waiting": 1}
    response = failing(tmp_path, scenario, face, **options)
    assert_server_error(response, 503, "overloaded")
    assert 1 <= int(response.headers["retry-after"]) <= 60


def test_503_model_not_ready_with_retry_after(tmp_path: Path) -> None:
    """Its rows in test_dialects.py have all dialects."""

    async def scenario(gate: Gateway, client: httpx.AsyncClient) -> httpx.Response:
        gate.pool.replicas_changed(frozenset())
        await quiet()
        return await client.post("/v1/completions", json={"model": "m", "prompt": "hello"})

    response = failing(tmp_path, scenario, D0, limits=replace(LIMITS, hold_timeout_s=5.0))
    assert_server_error(response, 503, "model_not_ready")
    assert int(response.headers["retry-after"]) >= 1


@EACH_FACE
def test_503_without_the_meter_with_retry_after(tmp_path: Path, face: Face) -> None:
    async def scenario(gate: Gateway, client: httpx.AsyncClient) -> httpx.Response:
        gate.meter.error = MeterUnreachable("/srv/meter is gone")
        response = await client.post(face.path, json={"model": "m", "prompt": "hello"})
        gate.meter.error = None
        return response

    response = failing(tmp_path, scenario, face)
    assert_server_error(response, 503, None)
    assert int(response.headers["retry-after"]) >= 1


@EACH_FACE
def test_504_after_the_deadline(tmp_path: Path, face: Face) -> None:
    async def scenario(gate: Gateway, _client: httpx.AsyncClient) -> httpx.Response:
        async with app_with_deadline(gate, 5.0), speaking(gate, face) as client:
            response = await client.post(face.path, json={"model": "m", "prompt": "hello", "max_tokens": 1000})
            await quiet()
            assert gate.sequences == 0
            return response

    response = failing(tmp_path, scenario, face)
    assert_server_error(response, 504, "deadline_exceeded")
    assert "5 s" in response.json()["error"]["message"]


# --- a client that leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_is_no_error(tmp_path: Path, streamed: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            with capture_logs() as logs:
                exchange = gate.request(stream=streamed, max_tokens=1000)
                await asyncio.sleep(10 * SETTINGS.step_s)
                exchange.hang_up()
                await exchange.task
                settled = await gate.settlement()
            assert settled.status == "cancelled"
            assert [log for log in logs if log["log_level"] in ("error", "critical")] == []
            assert b"error" not in exchange.body
            assert exchange.status == (200 if streamed else None)

    run_in_virtual_time(scenario())


# --- every answer has one x-request-id -----------------------------------------------------------------------------

OWN_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
Request = tuple[str, str, dict[str, Any] | None, int]
REQUESTS: dict[str, Request] = {
    "200": ("POST", "/v1/completions", {}, 200),
    "200 stream": ("POST", "/v1/completions", {"stream": True}, 200),
    "200 models": ("GET", "/v1/models", None, 200),
    "200 health": ("GET", "/healthz", None, 200),
    "200 schema": ("GET", "/openai/schemas/Completion.json", None, 200),
    "400": ("POST", "/v1/completions", {"n": 0}, 400),
    "400 context": ("POST", "/openai/v1/completions", {"max_tokens": 10**6}, 400),
    "404 model": ("POST", "/v1/completions", {"model": "x"}, 404),
    "404 route": ("GET", "/nowhere", None, 404),
    "405": ("GET", "/v1/completions", None, 405),
    "413": ("POST", "/v1/completions", {"user": "x" * BODY_LIMIT}, 413),
    "422": ("POST", "/api/v1/compatibility/openai/v1/completions", {"n": 0}, 422),
}
VALID_IDS = ["a", "req_1.2-3", "A" * 128, "538c15a2-de5b-4335-a11f-3e577b043003"]
INVALID_IDS = ["", "a" * 129, "a b", "a,b", '{"a":1}', "<script>", "../../etc/passwd", "ä"]


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
async def test_every_answer_has_one_request_id(http: httpx.AsyncClient, request_: Request) -> None:
    method, path, fields, status = request_
    body = None if fields is None else {**BODY, **fields}

    async def answered(headers: dict[str, Any]) -> str:
        response = await http.request(method, path, json=body, headers=headers)
        assert response.status_code == status, response.text
        [told] = response.headers.get_list("x-request-id")
        return told

    assert await answered({"x-request-id": "mine-1"}) == "mine-1"
    assert OWN_ID.fullmatch(await answered({}))
    assert OWN_ID.fullmatch(await answered({"x-request-id": "not valid"}))


async def test_401_and_415_have_one_too(http_without_key: httpx.AsyncClient, simulated_cluster: RunningCluster) -> None:
    key = simulated_cluster.headers
    for headers, status in (({}, 401), ({"Authorization": "Bearer x"}, 401), ({**key, "content-type": "a/b"}, 415)):
        given = {**headers, "x-request-id": "mine-2"}
        response = await http_without_key.post("/v1/completions", content=b"{}", headers=given)
        assert response.status_code == status
        assert response.headers.get_list("x-request-id") == ["mine-2"]


@pytest.mark.parametrize("given", VALID_IDS)
async def test_a_valid_id_is_echoed(http: httpx.AsyncClient, given: str) -> None:
    response = await http.post("/v1/completions", json=BODY, headers={"x-request-id": given})
    assert response.headers.get_list("x-request-id") == [given]
    assert response.json()["id"] != given


@pytest.mark.parametrize("given", INVALID_IDS)
async def test_an_invalid_id_is_replaced(http: httpx.AsyncClient, given: str) -> None:
    response = await http.post("/v1/completions", json=BODY, headers=[(b"x-request-id", given.encode())])
    [told] = response.headers.get_list("x-request-id")
    assert OWN_ID.fullmatch(told)
    assert response.status_code == 200


def test_the_official_client_tells_the_id(official: openai.OpenAI) -> None:
    completion = official.completions.create(**BODY, extra_headers={"x-request-id": "mine-3"})
    assert completion._request_id == "mine-3"
    with pytest.raises(openai.BadRequestError) as caught:
        official.completions.create(**BODY, n=0, extra_headers={"x-request-id": "mine-4"})
    assert caught.value.request_id == "mine-4"


# --- CORS ----------------------------------------------------------------------------------------------------------

ORIGIN = {"Origin": "https://chat.example.com"}


@pytest.mark.parametrize("request_", [REQUESTS["200"], REQUESTS["200 stream"], REQUESTS["400"], REQUESTS["404 route"]])
async def test_no_cors_header_unless_configured(http: httpx.AsyncClient, request_: Request) -> None:
    method, path, fields, status = request_
    response = await http.request(method, path, json=None if fields is None else {**BODY, **fields}, headers=ORIGIN)
    assert response.status_code == status
    assert not [name for name in response.headers if name.startswith("access-control-")]


@EACH_FACE
async def test_a_preflight_is_405(http_without_key: httpx.AsyncClient, face: Face) -> None:
    headers = {**ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    response = await http_without_key.options(face.path, headers=headers)
    assert_error(response, 405, None)
    assert not [name for name in response.headers if name.startswith("access-control-")]


# --- 408, for which the uploads were begun with the first test ----------------------------------------------------


@pytest.mark.parametrize("upload", STALLS)
async def test_408_for_an_upload_that_stalls(
    simulated_cluster: RunningCluster, stalled_uploads: dict[str, asyncio.Task[RawAnswer]], upload: str
) -> None:
    async with asyncio.timeout(60.0):
        answer = await stalled_uploads[upload]
    assert answer.status == 408
    assert (answer.error["type"], answer.error["code"], answer.error["param"]) == ("invalid_request_error", None, None)
    assert "30 s" in answer.error["message"]
    assert answer.headers["x-request-id"]
    with replayed(408, answer.body, answer.headers) as client, pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**BODY)
    raised(caught, 408, None, None)


async def test_408_is_not_for_uploads_that_only_take_their_time(simulated_cluster: RunningCluster) -> None:
    data = request_of(simulated_cluster, "Connection: close", max_tokens=1)
    async with connected(simulated_cluster) as (reader, writer), asyncio.timeout(30.0):
        for piece in (data[:50], data[50:300], data[300:-20], data[-20:]):
            writer.write(piece)
            await writer.drain()
            async with simulated_cluster.client() as client:  # others are answered meanwhile
                assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        assert RawAnswer.of(await reader.read()).status == 200
