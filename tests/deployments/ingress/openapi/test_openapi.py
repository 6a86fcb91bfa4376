"""The OpenAPI document: valid, whole, and true of what the ingress takes and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from deployments.ingress.api.completions.answers import completion_schema
from deployments.ingress.api.completions.dialects import D0, D1, D2, D3, DIALECTS
from deployments.ingress.api.description.json_schemas import Json, schemas_of
from deployments.ingress.api.description.operations import error_classes
from deployments.ingress.api.keys.bodies import CreateKeyRequest, TeamRequest, UpdateKeyRequest
from deployments.ingress.api.tokens import DetokenizeRequest, TokenizeRequest
from deployments.ingress.errors import ApiError, Conflict, InvalidRequest, MethodNotAllowed
from deployments.ingress.http.json_body import parse_body
from deployments.ingress.openapi.document import openapi_document
from tests.deployments.ingress.memory_administration import USER, administration, record_hour
from tests.deployments.ingress.memory_gateway import events, gateway
from tests.deployments.ingress.memory_meter import ADMIN_KEY, USER_KEY
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet

DOCUMENT = openapi_document()
ENDPOINTS = {
    *("POST /v1/completions", "POST /openai/v1/completions", "POST /api/v1/compatibility/openai/v1/completions"),
    *("GET /v1/models", "GET /v1/models/{model}", "POST /tokenize", "POST /detokenize"),
    *("GET /v1/usage", "GET /v1/organization/usage/completions"),
    *("GET /admin/v1/keys", "POST /admin/v1/keys", "POST /admin/v1/keys/{key_id}/rotate"),
    *("GET /admin/v1/keys/{key_id}", "PATCH /admin/v1/keys/{key_id}", "DELETE /admin/v1/keys/{key_id}"),
    *("GET /admin/v1/teams", "PUT /admin/v1/teams/{name}", "DELETE /admin/v1/teams/{name}"),
    *("GET /admin/v1/replicas", "GET /metrics", "GET /healthz", "GET /health", "GET /readyz"),
    *("GET /openapi.json", "GET /openai/schemas/Completion.json", "GET /docs"),
}


def resolved(part: Json) -> Json:
    while "$ref" in part:
        found: Any = DOCUMENT
        for key in part["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        part = found
    return part


def validator(schema: Json) -> Draft202012Validator:
    """Of a schema of the document, in which references lead into the document."""
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def operation(method: str, path: str) -> Json:
    documented: Json = DOCUMENT["paths"][path][method.lower()]
    return documented


def assert_documented(response: httpx.Response, path: str) -> None:
    """Status, headers, media type and body are those of the document."""
    responses = operation(response.request.method, path)["responses"]
    assert str(response.status_code) in responses, response.text
    documented = resolved(responses[str(response.status_code)])
    for name in documented["headers"].keys() - {"retry-after"}:
        assert name in response.headers or name.startswith("x-")  # x-request-id is Ray Serve's, x-ratelimit- of limits
    media_type = response.headers["content-type"].partition(";")[0]
    content = documented["content"][media_type]
    if media_type == "application/json":
        validator(content["schema"]).validate(response.json())
    elif media_type == "text/event-stream":
        for event in events(response.content):
            if isinstance(event, dict):
                validator(content["x-event-schema"]).validate(event)


# --- the document --------------------------------------------------------------------------------------------------


def test_it_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    assert DOCUMENT["openapi"].startswith("3.1")


def test_it_has_every_endpoint() -> None:
    documented = {f"{method.upper()} {path}" for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert documented == ENDPOINTS


def test_operations_have_names_of_their_own() -> None:
    names = [each["operationId"] for methods in DOCUMENT["paths"].values() for each in methods.values()]
    assert len(set(names)) == len(names) == len(ENDPOINTS)


def test_keys_and_where_they_are_sent() -> None:
    schemes = DOCUMENT["components"]["securitySchemes"]
    assert (schemes["HTTPBearer"]["type"], schemes["HTTPBearer"]["scheme"]) == ("http", "bearer")
    key = schemes["APIKeyHeader"]
    assert (key["type"], key["in"], key["name"]) == ("apiKey", "header", "x-llm-api-key")
    assert {"APIKeyHeader": []} in operation("POST", D0.path)["security"]
    public = {
        path for path, methods in DOCUMENT["paths"].items() for each in methods.values() if each.get("security") == []
    }
    assert public == {"/healthz", "/health", "/readyz", "/openapi.json", "/openai/schemas/Completion.json", "/docs"}


def test_every_error_that_a_client_can_see_is_documented() -> None:
    completions = operation("POST", D3.path)["responses"]
    for kind in error_classes():
        # Never of an operation that there is, and of keys only.
        if kind not in (MethodNotAllowed, Conflict):
            assert str(kind.status) in completions, kind
    assert {"401", "403", "404", "408", "413", "415", "429", "500", "503", "504"} < completions.keys()
    assert ("422" in completions, "400" in completions) == (True, True)
    assert "422" not in operation("POST", D1.path)["responses"]
    assert "422" in operation("POST", D2.path)["responses"]


def test_errors_are_described_by_their_classes() -> None:
    assert all(kind.__doc__ and kind.__doc__ != ApiError.__doc__ for kind in error_classes())
    assert InvalidRequest in set(error_classes())


def test_a_limited_key_is_told_when_to_come_back() -> None:
    headers = resolved(operation("POST", D3.path)["responses"]["429"])["headers"]
    assert {
        "retry-after",
        "x-ratelimit-remaining-tokens",
        "x-ratelimit-reset-requests",
        "x-request-id",
    } < headers.keys()


def test_administration_is_for_the_admin_key() -> None:
    taking_it = {
        path
        for path, methods in DOCUMENT["paths"].items()
        for each in methods.values()
        if each.get("security") == [{"AdminKey": []}]
    }
    assert taking_it == {
        path for path in DOCUMENT["paths"] if path.startswith(("/admin/", "/metrics", "/v1/organization/"))
    }
    for path in taking_it:
        for each in DOCUMENT["paths"][path].values():
            assert "403" in each["responses"]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_the_examples_of_completions_are_valid(dialect: Any) -> None:
    content = operation("POST", dialect.path)["requestBody"]["content"]["application/json"]
    assert content["examples"]
    for example in content["examples"].values():
        assert dialect.parse(json.dumps(example["value"]).encode(), None).model == "smollm2-135m"
        validator(content["schema"]).validate(example["value"])


@pytest.mark.parametrize(
    ("method", "path", "model"),
    [
        ("POST", "/tokenize", TokenizeRequest),
        ("POST", "/detokenize", DetokenizeRequest),
        ("POST", "/admin/v1/keys", CreateKeyRequest),
        ("PATCH", "/admin/v1/keys/{key_id}", UpdateKeyRequest),
        ("PUT", "/admin/v1/teams/{name}", TeamRequest),
    ],
)
def test_the_examples_of_other_bodies_are_valid(method: str, path: str, model: Any) -> None:
    content = operation(method, path)["requestBody"]["content"]["application/json"]
    assert content["examples"]
    for example in content["examples"].values():
        assert parse_body(json.dumps(example["value"]).encode(), model)
        validator(content["schema"]).validate(example["value"])


def test_every_parameter_is_described() -> None:
    for dialect in DIALECTS:
        for name, schema in schemas_of([dialect.body])[dialect.body.__name__]["properties"].items():
            assert schema["description"], name


# --- what is taken -------------------------------------------------------------------------------------------------

LITERALS: list[Any] = [
    *(
        None,
        True,
        False,
        -(2**63) - 1,
        -101,
        -2,
        -1,
        0,
        1,
        2,
        5,
        6,
        20,
        21,
        100,
        128,
        129,
        1024,
        2**31 - 1,
        2**31,
        2**63,
    ),
    *(-2.5, -0.5, 0.5, 1.5, 2.5, 1e300, "", "a", "a@b", "left", "tensors", "x" * 300),
    *([], [""], ["a"], ["a"] * 4, ["a"] * 5, ["a"] * 129, [0], [-1], [2**31], [1.5], [1] * 129, [[1]], [[]], [["a"]]),
    *(["a", 1], [None], [True], {}, {"1": 1}, {"1": 101}, {"a": 1}, {"1": "a"}, {"a": [1]}, {"a": [[1]]}, {"a": None}),
    *({"type": "text"}, {"type": "xml"}, {"type": "text", "x": 1}, {"include_usage": True}, {"include_usage": 1}),
    *({"regex": "a"}, {"regex": ""}, {"choice": []}, {"regex": "a", "x": 1}, {"max_pattern_size": 5000}),
]
TOLD_IN_WORDS: list[tuple[str, Any]] = [("structured_outputs", {})]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("name", [*D3.body.model_fields, "max_completion_tokens"])
def test_values_are_taken_as_their_schemas_say(dialect: Any, name: str) -> None:
    schema = DOCUMENT["components"]["schemas"][dialect.body.__name__]
    assert schema["additionalProperties"] is False
    check = validator(schema["properties"].get(name, {"not": {}}))
    for value in LITERALS:
        try:
            parse_body(json.dumps({"model": "m", "prompt": "p", name: value}).encode(), dialect.body)
            accepted = True
        except InvalidRequest:
            accepted = False
        if (name, value) not in TOLD_IN_WORDS:
            assert check.is_valid(value) == accepted, value


# --- what is answered ----------------------------------------------------------------------------------------------


@in_virtual_time
async def test_completions_are_as_documented(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        for fields in (
            {},
            {"n": 2, "logprobs": 2, "echo": True},
            {"max_tokens": 200, "stop": [" "], "return_token_ids": True},
            {"max_tokens": 200, "stop_token_ids": [5]},
            {"max_tokens": 0, "echo": True, "logprobs": 0},
            {"logprobs": 1, "return_tokens_as_token_ids": True},
        ):
            for stream in ({}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}):
                for path in (D1.path, D2.path, D3.path):
                    if path == D2.path and fields.get("max_tokens") == 0:
                        continue
                    body = {"model": "m", "prompt": "hello", **fields, **stream}
                    response = await gate.client.post(path, json=body)
                    assert response.status_code == 200, response.text
                    assert_documented(response, path)
        body = {"model": "m", "prompt": "hello", "prompt_logprobs": 2}
        response = await gate.client.post(D1.path, json=body)
        assert_documented(response, D1.path)
        Draft202012Validator(completion_schema()).validate(response.json())
        await quiet()


@in_virtual_time
async def test_all_other_answers_are_as_documented(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        described = ("/openapi.json", "/openai/schemas/Completion.json", "/docs")
        for path in ("/v1/models", "/healthz", "/health", "/readyz", *described):
            response = await gate.client.get(path)
            assert response.status_code == 200
            assert_documented(response, path)
        assert_documented(await gate.client.get("/v1/models/m"), "/v1/models/{model}")
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        for path in ("/admin/v1/replicas", "/metrics"):
            assert_documented(await gate.client.get(path, headers=admin), path)
        for path, body in (("/tokenize", {"prompt": "a", "return_token_strs": True}), ("/detokenize", {"tokens": [2]})):
            assert_documented(await gate.client.post(path, json=body), path)
        gate.pool.replicas_changed(frozenset())
        await quiet()
        response = await gate.client.get("/readyz")
        assert response.status_code == 503
        assert_documented(response, "/readyz")


@in_virtual_time
async def test_errors_are_as_documented(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        bodies: list[Any] = [{}, {"model": "x", "prompt": "p"}, {"model": "m", "prompt": "p", "n": 0}]
        keys = ({"authorization": f"Bearer {USER_KEY}"}, {"authorization": ""}, {"x-llm-api-key": USER_KEY})
        for path in (D1.path, D2.path, D3.path, "/tokenize", "/detokenize"):
            for headers in keys:
                for body in bodies:
                    assert_documented(await gate.client.post(path, json=body, headers=headers), path)
                assert_documented(await gate.client.post(path, content=b"{}", headers=headers), path)
        assert_documented(await gate.client.get("/v1/models/x"), "/v1/models/{model}")
        assert_documented(await gate.client.get("/admin/v1/replicas"), "/admin/v1/replicas")


async def test_keys_and_teams_are_as_documented(tmp_path: Path) -> None:
    keys, key, rotate = "/admin/v1/keys", "/admin/v1/keys/{key_id}", "/admin/v1/keys/{key_id}/rotate"
    teams, team = "/admin/v1/teams", "/admin/v1/teams/{name}"
    async with administration(tmp_path) as admin:
        body = {"name": "k", "limits": {"money_per_day": 1}, "models": ["m"], "expires_at": 4_000_000_000}
        made = await admin.client.post(keys, json=body)
        key_id = made.json()["id"]
        for path, response in (
            (keys, made),
            (keys, await admin.client.post(keys, json={})),
            (keys, await admin.client.get(keys)),
            (keys, await admin.client.get(keys, params={"team": "/"})),
            (keys, await admin.client.get(keys, headers=USER)),
            (key, await admin.client.get(f"{keys}/{key_id}")),
            (key, await admin.client.get(f"{keys}/none")),
            (key, await admin.client.patch(f"{keys}/{key_id}", json={"name": "n"})),
            (rotate, await admin.client.post(f"{keys}/{key_id}/rotate")),
            (key, await admin.client.delete(f"{keys}/{key_id}")),
            (key, await admin.client.patch(f"{keys}/{key_id}", json={"name": "n"})),
            (rotate, await admin.client.post(f"{keys}/{key_id}/rotate")),
            (team, await admin.client.put(f"{teams}/t", json={"limits": {"concurrency": 1}})),
            (team, await admin.client.put(f"{teams}/a b", json={})),
            (teams, await admin.client.get(teams)),
            (team, await admin.client.delete(f"{teams}/t")),
            (team, await admin.client.delete(f"{teams}/t")),
        ):
            assert_documented(response, path)


async def test_usage_is_as_documented(tmp_path: Path) -> None:
    own, everybodys = "/v1/usage", "/v1/organization/usage/completions"
    async with administration(tmp_path) as admin:
        record_hour(admin.engine, 3600)
        for query in ("since=0", "since=0&by=model,dialect,status,day&until=86400", "since=x"):
            assert_documented(await admin.client.get(f"{own}?{query}", headers=USER), own)
        for query in ("start_time=0", "start_time=0&group_by=model,api_key_id,project_id", "start_time=x"):
            assert_documented(await admin.client.get(f"{everybodys}?{query}"), everybodys)
