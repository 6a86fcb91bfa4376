"""The body of a completion request: what is accepted, and how each mistake is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.contracts import Sampling, Submission, pack
from deployments.ingress.completion_request import CompletionRequest, parse_completion_request
from deployments.ingress.errors import InvalidRequest

PROMPTS = "expected a string, or a non-empty array of strings, of token ids, or of arrays of token ids"
STOPS = "expected a non-empty string or an array of up to 4 of them"


def parse(**fields: Any) -> CompletionRequest:
    return parse_completion_request(json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def refused(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion_request(body)
    error = caught.value
    for internal in (
        "pydantic",
        "http",
        "CompletionRequest",
        "StreamOptions",
        "Traceback",
        "validation error",
        "Input",
    ):
        assert internal not in error.message
    assert json.loads(error.body())["error"]["type"] == "invalid_request_error"
    return error


def refusal(name: str, literal: str) -> str:
    """Why `literal` is no value of the parameter `name`."""
    fields = {"model": '"m"', "prompt": '"p"', name: literal}
    body = "{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}"
    error = refused(body.encode())
    assert error.param == name
    prefix = f"Invalid value for '{name}': "
    assert error.message.startswith(prefix)
    return error.message.removeprefix(prefix)


# --- what is accepted ----------------------------------------------------------------------------------------------


def test_defaults_are_those_of_openai() -> None:
    request = parse()
    assert (request.prompt, request.choices, request.max_completion_tokens, request.stop) == (["p"], 1, 16, ())
    assert request.sampling(0) == Sampling(max_tokens=16)
    assert (request.stream, request.echo) == (False, False)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]),
        ("a\x00b", ["a\x00b"]),
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_may_be_a_text_texts_token_ids_or_lists_of_them(prompt: Any, prompts: list[str | list[int]]) -> None:
    assert parse(prompt=prompt).prompt == prompts


@pytest.mark.parametrize(
    ("stop", "stops"),
    [(None, ()), ([], ()), ("a", ("a",)), (["a"], ("a",)), (["a", "b", "c", "d"], ("a", "b", "c", "d"))],
)
def test_stop_may_be_a_text_or_up_to_four(stop: Any, stops: tuple[str, ...]) -> None:
    assert parse(stop=stop).stop == stops


@pytest.mark.parametrize(
    "name",
    [
        *("max_tokens", "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty"),
        *("stream", "stream_options", "echo", "user", "top_k", "min_p", "repetition_penalty", "min_tokens"),
        *("stop_token_ids", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output"),
    ],
)
def test_null_is_the_default(name: str) -> None:
    default, request = parse(), parse(**{name: None})
    assert request.sampling(0) == default.sampling(0)
    assert (request.choices, request.stop) == (default.choices, default.stop)
    assert bool(request.stream) == bool(default.stream)
    assert (request.skip_special_tokens is False) == (default.skip_special_tokens is False)


def test_every_sampling_parameter_reaches_the_engine() -> None:
    fields: dict[str, Any] = {
        "max_tokens": 7,
        "min_tokens": 3,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.25,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.5,
        "seed": -5,
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
    }
    assert parse(**fields).sampling(0) == Sampling(**{**fields, "stop_token_ids": (1, 2)})


def test_top_k_of_minus_one_considers_all_tokens() -> None:
    assert parse(top_k=-1).sampling(0).top_k == 0


def test_each_choice_has_a_seed_of_its_own() -> None:
    request = parse(n=3, seed=41)
    assert [request.sampling(choice).seed for choice in range(3)] == [41, 42, 43]
    assert [parse(n=2).sampling(choice).seed for choice in range(2)] == [None, None]


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 0])
def test_seeds_that_count_up_stay_in_64_bits(seed: int) -> None:
    seeds = [parse(n=128, seed=seed).sampling(choice).seed for choice in range(128)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 128
    assert all(each is not None and -(2**63) <= each < 2**63 for each in seeds)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [1, 2**31 - 1]),
        ("temperature", [0, 2, 0.0, 2.0]),
        ("top_p", [1e-9, 1]),
        ("n", [1, 128]),
        ("seed", [-(2**63), 2**63 - 1]),
        ("presence_penalty", [-2, 2]),
        ("frequency_penalty", [-2, 2]),
        ("top_k", [-1, 0, 2**31 - 1]),
        ("min_p", [0, 1]),
        ("repetition_penalty", [1e-9, 2]),
        ("min_tokens", [0, 16]),
        ("stop_token_ids", [[], [0], [2**31 - 1] * 128]),
        ("user", ["", "x" * 10_000]),
    ],
)
def test_the_ends_of_each_range_belong_to_it(name: str, values: list[Any]) -> None:
    for value in values:
        request = parse(**{name: value})
        assert getattr(request, name) == value
        pack(Submission(1, "req", [1], request.sampling(127)))  # whatever is accepted fits into a message


# --- what is refused -----------------------------------------------------------------------------------------------


AN_INTEGER, A_NUMBER, FINITE = "expected an integer.", "expected a number.", "expected a finite number."
NO_INTEGERS = ["true", '"1"', "1.5", "1.0", "[1]", "{}", "NaN", "Infinity", "1e400"]
NO_NUMBERS = ["true", '"1"', "[1]", "{}"]
NOT_FINITE = ["NaN", "Infinity", "-Infinity", "1e400"]


@pytest.mark.parametrize("name", ["max_tokens", "n", "seed", "top_k", "min_tokens"])
@pytest.mark.parametrize("literal", NO_INTEGERS)
def test_integers_are_integers(name: str, literal: str) -> None:
    assert refusal(name, literal) == AN_INTEGER


FLOATS = ["temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty"]


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_finite_numbers(name: str) -> None:
    assert {refusal(name, literal) for literal in NO_NUMBERS} == {A_NUMBER}
    assert {refusal(name, literal) for literal in NOT_FINITE} == {FINITE}


@pytest.mark.parametrize("name", ["stream", "echo", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output"])
@pytest.mark.parametrize("literal", ["1", "0", '"true"', "[]", "1.0"])
def test_flags_are_true_or_false(name: str, literal: str) -> None:
    assert refusal(name, literal) == "expected true or false."


@pytest.mark.parametrize("name", ["model", "user"])
@pytest.mark.parametrize("literal", ["1", "true", "[]", '["m"]', "{}"])
def test_names_are_strings(name: str, literal: str) -> None:
    assert refusal(name, literal) == "expected a string."


@pytest.mark.parametrize(
    ("name", "literal", "expected"),
    [
        ("max_tokens", "0", "greater than or equal to 1"),
        ("max_tokens", "-1", "greater than or equal to 1"),
        ("max_tokens", str(2**31), f"less than or equal to {2**31 - 1}"),
        ("max_tokens", "9" * 30, f"less than or equal to {2**31 - 1}"),
        ("temperature", "-0.1", "greater than or equal to 0"),
        ("temperature", "2.1", "less than or equal to 2"),
        ("top_p", "0", "greater than 0"),
        ("top_p", "1.1", "less than or equal to 1"),
        ("n", "0", "greater than or equal to 1"),
        ("n", "10000", "less than or equal to 128"),
        ("seed", str(2**63), f"less than {2**63}"),
        ("seed", str(-(2**63) - 1), f"greater than or equal to {-(2**63)}"),
        ("presence_penalty", "2.1", "less than or equal to 2"),
        ("presence_penalty", "-2.1", "greater than or equal to -2"),
        ("frequency_penalty", "2.1", "less than or equal to 2"),
        ("frequency_penalty", "-2.1", "greater than or equal to -2"),
        ("top_k", "-2", "greater than or equal to -1"),
        ("top_k", "9" * 30, f"less than or equal to {2**31 - 1}"),
        ("min_p", "-0.1", "greater than or equal to 0"),
        ("min_p", "1.1", "less than or equal to 1"),
        ("repetition_penalty", "0", "greater than 0"),
        ("repetition_penalty", "2.1", "less than or equal to 2"),
        ("min_tokens", "-1", "greater than or equal to 0"),
    ],
)
def test_numbers_out_of_range_are_told_the_range(name: str, literal: str, expected: str) -> None:
    assert refusal(name, literal) == f"expected a value {expected}."


@pytest.mark.parametrize(
    "literal",
    [
        *("null", "1", "1.5", "true", "{}", "[]", "[[]]", "[[1], []]", '["a", 1]', '["a", ["b"]]', "[1, [2]]"),
        *("[true]", "[1, true]", "[1.5]", "[1.0]", "[null]", '[["a"]]', "[[[1]]]", "[NaN]", "[[1], [true]]"),
    ],
)
def test_no_other_form_of_prompt(literal: str) -> None:
    assert refusal("prompt", literal) == f"{PROMPTS}."


@pytest.mark.parametrize("literal", ["[" + "9" * 30 + "]", "[[1], [-" + "9" * 30 + "]]", f"[{2**31}]"])
def test_token_ids_of_no_model(literal: str) -> None:
    assert refusal("prompt", literal) == "expected token ids of the model."


@pytest.mark.parametrize("literal", ['""', '["a", ""]', '["a","b","c","d","e"]', "1", "true", "{}", "[1]", "[null]"])
def test_no_other_form_of_stop(literal: str) -> None:
    assert refusal("stop", literal) == f"{STOPS}."


@pytest.mark.parametrize(
    ("literal", "param", "expected"),
    [
        ('"1"', "stop_token_ids", "expected an array"),
        ("1", "stop_token_ids", "expected an array"),
        ("[1, true]", "stop_token_ids.1", "expected an integer"),
        ('["a"]', "stop_token_ids.0", "expected an integer"),
        ("[1, -1]", "stop_token_ids.1", "expected a value greater than or equal to 0"),
        (f"[{'9' * 30}]", "stop_token_ids.0", f"expected a value less than or equal to {2**31 - 1}"),
        (json.dumps([1] * 129), "stop_token_ids", "expected an array of at most 128"),
    ],
)
def test_stop_token_ids_are_up_to_128_token_ids(literal: str, param: str, expected: str) -> None:
    error = refused(b'{"model":"m","prompt":"p","stop_token_ids":%b}' % literal.encode())
    assert (error.param, error.message) == (param, f"Invalid value for '{param}': {expected}.")


@pytest.mark.parametrize(
    ("literal", "param", "message"),
    [
        ("1", "stream_options", "Invalid value for 'stream_options': expected an object."),
        ("[]", "stream_options", "Invalid value for 'stream_options': expected an object."),
        (
            '{"usage": true}',
            "stream_options.usage",
            "Unrecognized request argument supplied: stream_options.usage.",
        ),
        (
            '{"include_usage": 1}',
            "stream_options.include_usage",
            "Invalid value for 'stream_options.include_usage': expected true or false.",
        ),
    ],
)
def test_stream_options_are_checked_too(literal: str, param: str, message: str) -> None:
    error = refused(b'{"model":"m","prompt":"p","stream":true,"stream_options":%b}' % literal.encode())
    assert (error.param, error.message) == (param, message)


@pytest.mark.parametrize("name", ["model", "prompt"])
def test_a_missing_parameter_is_named(name: str) -> None:
    fields = {"model": "m", "prompt": "p"}
    del fields[name]
    error = refused(json.dumps(fields).encode())
    assert (error.param, error.message) == (name, f"Missing required parameter: '{name}'.")


@pytest.mark.parametrize("name", ["max_token", "messages", "", "a.b", "N", "логprobs", "\u2028", "x" * 1000])
def test_an_unknown_parameter_is_named(name: str) -> None:
    error = refused(json.dumps({"model": "m", "prompt": "p", name: 1}).encode())
    assert (error.param, error.message) == (name, f"Unrecognized request argument supplied: {name}.")


def test_parameters_that_contradict_each_other() -> None:
    error = refused(b'{"model":"m","prompt":"p","min_tokens":17}')
    assert (error.param, error.message) == ("min_tokens", "min_tokens is 17; expected at most max_tokens, 16.")
    error = refused(b'{"model":"m","prompt":"p","stream_options":{}}')
    assert (error.param, error.message) == ("stream_options", "stream_options is only allowed when stream is true.")


def test_prompts_times_n_are_bounded() -> None:
    assert len(parse(prompt=["p"] * 8, n=128).prompt) == 8
    error = refused(json.dumps({"model": "m", "prompt": ["p"] * 9, "n": 128}).encode())
    assert (error.param, error.message) == ("n", "9 prompts with n=128 make more than 1024 choices.")


@pytest.mark.parametrize("body", [b"null", b"[]", b'"text"', b"1", b"true", b"NaN"])
def test_a_body_that_is_no_object(body: bytes) -> None:
    error = refused(body)
    assert (error.param, error.message) == (None, "The body must be a JSON object.")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"model":"m","prompt":"p"',
        b'{"model":"m","prompt":"p"}}',
        b'{"model":"m","prompt":"p",}',
        b"{'model':'m'}",
        b'{"model":"m","prompt":"a\x00b"}',
        b'{"model":"m","prompt":"\xff\xfe"}',
        b'{"model":"m","prompt":"\xed\xa0\x80"}',
        b'\xff\xfe{\x00"\x00',
        rb'{"model":"m","prompt":"\ud800"}',
        rb'{"model":"m","prompt":"\udc00x"}',
        rb'{"model":"m","prompt":"p","\ud800":1}',
        b'{"model":"m","prompt":"p","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","prompt":"p","max_tokens":' + b"9" * 5000 + b"}",
        b'{"model":"m","prompt":"p","max_tokens":01}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_body_that_is_no_json_is_told_where(body: bytes) -> None:
    error = refused(body)
    assert error.param is None
    assert error.message.startswith("The body is not valid JSON: ")
    assert " at line 1 column " in error.message
    assert len(error.message) < 150


def test_of_a_key_given_twice_the_last_counts() -> None:
    assert parse_completion_request(b'{"model":"a","prompt":"p","model":"b"}').model == "b"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([*CompletionRequest.model_fields, "other"])


@settings(deadline=None)
@given(st.dictionaries(names, json_values, max_size=5))
def test_any_json_is_either_accepted_or_refused_in_our_words(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", "prompt": "p", **fields}).encode()
    try:
        request = parse_completion_request(body)
    except InvalidRequest:
        refused(body)
    else:
        pack(Submission(1, "req", [1], request.sampling(0)))


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_in_our_words(body: bytes) -> None:
    refused(body)
