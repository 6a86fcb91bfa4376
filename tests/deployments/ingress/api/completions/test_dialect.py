"""The four dialects: what each accepts, how each is told its key, and the shape of each one's errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.datastructures import Headers

from deployments.ingress.api.completions.dialects import D0, D1, D2, D3, DIALECTS, Dialect, dialect_of
from deployments.ingress.api.completions.request import CompletionRequest
from deployments.ingress.errors import (
    ApiError,
    BodyTooLarge,
    DeadlineExceeded,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    PermissionDenied,
    RequestTimeout,
    UnsupportedMediaType,
)
from deployments.ingress.http.auth import key_in, missing_key

EACH = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)


def parse(dialect: Dialect, *, query_model: str | None = None, **fields: Any) -> CompletionRequest:
    body = {"model": "m", "prompt": "p", **fields}
    return dialect.parse(json.dumps(body).encode(), query_model)


def refused(dialect: Dialect, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(dialect, **fields)
    return caught.value


# --- which one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "headers", "dialect"),
    [
        ("/v1/completions", {}, D3),
        ("/v1/completions", {"authorization": "Bearer k"}, D3),
        ("/v1/completions", {"X-LLM-API-Key": "k"}, D0),
        ("/v1/completions", {"x-llm-api-key": ""}, D0),
        ("/v1/completions", {"x-llm-api-key": "k", "authorization": "Bearer k"}, D0),
        ("/openai/v1/completions", {}, D1),
        ("/openai/v1/completions", {"x-llm-api-key": "k"}, D1),
        ("/api/v1/compatibility/openai/v1/completions", {}, D2),
        ("/api/v1/compatibility/openai/v1/completions", {"x-llm-api-key": "k"}, D2),
    ],
)
def test_path_and_header_choose_the_dialect(path: str, headers: dict[str, str], dialect: Dialect) -> None:
    assert dialect_of(path, Headers(headers)) is dialect


# --- the key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "keys"),
    [  # the key that D0, D1, D2 and D3 see
        ({}, ("", "", "", "")),
        ({"authorization": "Bearer k"}, ("k", "k", "k", "k")),
        ({"authorization": "bEARER   k "}, ("k", "k", "k", "k")),
        ({"authorization": "Bearer"}, ("", "", "", "")),
        ({"authorization": "Bearer  "}, ("", "", "", "")),
        ({"authorization": " "}, ("", "", "", "")),
        ({"authorization": "k"}, ("", "", "k", "")),
        ({"authorization": "Basic k"}, ("", "", "Basic k", "")),
        ({"x-llm-api-key": "k"}, ("k", "", "", "")),
        ({"x-llm-api-key": "Bearer k"}, ("k", "", "", "")),
        ({"x-llm-api-key": "Bearer"}, ("", "", "", "")),
        ({"x-llm-api-key": "", "authorization": "Bearer k"}, ("k", "k", "k", "k")),
        ({"x-llm-api-key": "a", "authorization": "Bearer b"}, ("a", "b", "b", "b")),
    ],
)
def test_where_the_key_is(headers: dict[str, str], keys: tuple[str, ...]) -> None:
    assert tuple(key_in(Headers(headers), dialect.credentials) for dialect in DIALECTS) == keys


@pytest.mark.parametrize(
    ("dialect", "usage"),
    [
        (D0, "'x-llm-api-key: KEY'"),
        (D1, "'authorization: Bearer KEY'"),
        (D2, "'authorization: KEY'"),
        (D3, "'authorization: Bearer KEY'"),
    ],
)
def test_who_sends_no_key_is_told_how(dialect: Dialect, usage: str) -> None:
    told = missing_key(Headers({}), dialect.credentials).message
    assert "didn't provide" in told
    assert usage in told


@pytest.mark.parametrize("dialect", [D0, D1, D3], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("sk-secret", "does not begin with Bearer"),
        ("Basic secret", "does not begin with Bearer"),
        ("Bearersecret", "does not begin with Bearer"),
        ("Bearer ", "has no key behind Bearer"),
    ],
)
def test_who_sends_a_key_in_another_form_is_told_so(dialect: Dialect, value: str, wrong: str) -> None:
    headers = Headers({"authorization": value})
    assert key_in(headers, dialect.credentials) == ""
    told = missing_key(headers, dialect.credentials).message
    assert wrong in told
    assert "secret" not in told


# --- the body ------------------------------------------------------------------------------------------------------


@EACH
def test_all_take_what_they_do_not_narrow(dialect: Dialect) -> None:
    fields: dict[str, Any] = {
        "top_k": 3,
        "echo": True,
        "logprobs": 2,
        "best_of": 2,
        "n": 2,
        "stop": ["a"],
        "min_p": 0.5,
        "seed": 1,
    }
    request = parse(dialect, **fields)
    assert request.sampling() == parse(D3, **fields, temperature=request.default_temperature).sampling()
    assert request.stop == ("a",)


@EACH
def test_all_refuse_what_is_unknown_by_name(dialect: Dialect) -> None:
    error = refused(dialect, unheard_of=1)
    assert (error.param, error.kind) == ("unheard_of", "extra_forbidden")


@EACH
@pytest.mark.parametrize("fields", [{"top_p": 2}, {"n": 0}, {"stop": [""]}, {"best_of": 1, "n": 2}])
def test_all_have_the_ranges_of_the_canonical_request(dialect: Dialect, fields: dict[str, Any]) -> None:
    refused(dialect, **fields)


@pytest.mark.parametrize("prompt", [["a"], [1], [[1]]])
def test_only_texts_are_prompts_of_d1_and_d2(prompt: Any) -> None:
    for dialect in (D1, D2):
        error = refused(dialect, prompt=prompt)
        assert (error.param, error.message) == ("prompt", "Invalid value for 'prompt': expected a string.")
    for dialect in (D0, D3):
        assert parse(dialect, prompt=prompt)


@EACH
def test_logprobs_and_stops_have_vllms_limits_where_no_document_narrows_them(dialect: Dialect) -> None:
    most_logprobs, most_stops = (20, 64) if dialect in (D1, D2) else (5, 4)
    assert parse(dialect, logprobs=most_logprobs, stop=["a"] * most_stops).logprobs == most_logprobs
    assert refused(dialect, logprobs=most_logprobs + 1).param == "logprobs"
    assert refused(dialect, stop=["a"] * (most_stops + 1)).param == "stop"


def test_stop_of_d1_and_d2_is_an_array() -> None:
    for dialect in (D1, D2):
        assert "64 non-empty strings" in refused(dialect, stop="a").message
        assert refused(dialect, stop=["a"] * 65).param == "stop"
        assert parse(dialect, stop=["a", "b"]).stop == ("a", "b")
        assert len(parse(dialect, stop=list(map(str, range(64)))).stop) == 64
        assert parse(dialect, stop=None).stop == ()
    assert parse(D1, stop=[]).stop == ()
    assert "1 to 64" in refused(D2, stop=[]).message
    for dialect in (D0, D3):
        assert parse(dialect, stop="a").stop == ("a",)


def test_max_completion_tokens_is_of_d1_and_wins() -> None:
    assert parse(D1, max_completion_tokens=5).tokens_per_choice == 5
    assert parse(D1, max_completion_tokens=5, max_tokens=9).sampling().max_tokens == 5
    assert parse(D1, max_completion_tokens=None, max_tokens=9).tokens_per_choice == 9
    assert parse(D1).tokens_per_choice == 16
    assert refused(D1, max_completion_tokens=-1).param == "max_completion_tokens"
    assert refused(D1, max_completion_tokens=5, min_tokens=6).param == "min_tokens"
    for dialect in (D0, D2, D3):
        assert refused(dialect, max_completion_tokens=5).kind == "extra_forbidden"


@pytest.mark.parametrize(("dialect", "temperature"), [(D0, 1), (D1, 1), (D2, 0), (D3, 1)])
def test_default_temperatures(dialect: Dialect, temperature: float) -> None:
    assert dialect.body.model_fields["temperature"].default == temperature
    assert parse(dialect).sampling().temperature == temperature
    assert parse(dialect, temperature=None).sampling().temperature == temperature
    assert parse(dialect, temperature=0.5).sampling().temperature == 0.5


def test_d2_generates_at_least_one_token() -> None:
    assert refused(D2, max_tokens=0).param == "max_tokens"
    for dialect in (D0, D1, D3):
        assert parse(dialect, max_tokens=0).tokens_per_choice == 0


@pytest.mark.parametrize(
    ("body", "query_model", "model"),
    [
        ({"model": "a"}, None, "a"),
        ({"model": "a"}, "", "a"),
        ({"model": "a"}, "b", "b"),
        ({}, "b", "b"),
        ({"model": None}, "b", "b"),
    ],
)
def test_the_model_of_the_query_wins_in_d0(body: dict[str, Any], query_model: str | None, model: str) -> None:
    assert D0.parse(json.dumps({"prompt": "p", **body}).encode(), query_model).model == model


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": ""}])
def test_d0_needs_a_model_somewhere(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="Missing required parameter: 'model'") as caught:
        D0.parse(json.dumps({"prompt": "p", **body}).encode(), None)
    assert (caught.value.param, caught.value.kind) == ("model", "missing")


@pytest.mark.parametrize("dialect", [D1, D2, D3], ids=lambda dialect: dialect.name)
def test_the_others_do_not_heed_the_query(dialect: Dialect) -> None:
    assert parse(dialect, query_model="b").model == "m"
    with pytest.raises(InvalidRequest, match="Missing required parameter: 'model'"):
        dialect.parse(b'{"prompt":"p"}', "b")


# --- the answer ----------------------------------------------------------------------------------------------------


@EACH
def test_only_d1_links_its_schema(dialect: Dialect) -> None:
    schema = {"$schema": "https://host:1/openai/schemas/Completion.json"}
    assert dialect.extras("https://host:1") == (schema if dialect is D1 else {})


@pytest.mark.parametrize(
    ("error", "location", "kind"),
    [
        (InvalidRequest("no", param="prompt", code="context_length_exceeded"), ["prompt"], "context_length_exceeded"),
        (InvalidRequest("no", param="n"), ["n"], "value_error"),
        (InvalidRequest("no", param="a.0", location=("a", 0), kind="int_type"), ["a", 0], "int_type"),
        (InvalidRequest("no"), [], "value_error"),
    ],
)
def test_invalid_requests_are_422_with_details_in_d0_and_d2(
    error: InvalidRequest, location: list[str | int], kind: str
) -> None:
    for dialect in (D0, D2):
        answer = dialect.answer(error)
        detail = {"loc": ["body", *location], "msg": "no", "type": kind}
        assert (answer.status, json.loads(answer.body)) == (422, {"detail": [detail]})
    for dialect in (D1, D3):
        answer = dialect.answer(error)
        expected = {"message": "no", "type": "invalid_request_error", "param": error.param, "code": error.code}
        assert (answer.status, json.loads(answer.body)) == (400, {"error": expected})


@pytest.mark.parametrize(
    ("body", "location", "kind"),
    [
        (b"{", [], "json_invalid"),
        (b"[]", [], "model_type"),
        (b'{"model":"m"}', ["prompt"], "missing"),
        (b'{"model":"m","prompt":"p","temperature":3}', ["temperature"], "less_than_equal"),
        (b'{"model":"m","prompt":"p","stop_token_ids":[1,-1]}', ["stop_token_ids", 1], "greater_than_equal"),
        (b'{"model":"m","prompt":"p","a.b":1}', ["a.b"], "extra_forbidden"),
    ],
)
def test_details_locate_the_mistake(body: bytes, location: list[str | int], kind: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        D2.parse(body, None)
    [detail] = json.loads(D2.answer(caught.value).body)["detail"]
    assert (detail["loc"], detail["type"]) == (["body", *location], kind)


def test_a_model_that_is_not_ready_is_400_in_d2_and_503_elsewhere() -> None:
    error = ModelNotReady("no", retry_after_s=3)
    for dialect in DIALECTS:
        answer = dialect.answer(error)
        assert answer.status == (400 if dialect is D2 else 503)
        assert answer.headers == {"retry-after": "3"}
        assert json.loads(answer.body)["error"]["code"] == "model_not_ready"


@EACH
@pytest.mark.parametrize(
    "error",
    [
        InvalidApiKey("no"),
        PermissionDenied("no"),
        ModelNotFound("no", param="model"),
        RequestTimeout("no"),
        BodyTooLarge("no"),
        UnsupportedMediaType("no"),
        InternalError(),
        Overloaded("no", retry_after_s=1),
        DeadlineExceeded("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_all_else_is_told_as_openai_does(dialect: Dialect, error: ApiError) -> None:
    assert dialect.answer(error) == error.answer()
