"""The body of a completion request: what is accepted, and how each mistake is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.contracts import Constraint, PromptOptions, RepetitionDetection, Sampling, Submission, pack
from deployments.ingress.api.completions import request as completion_request
from deployments.ingress.api.completions.request import CompletionRequest
from deployments.ingress.errors import InvalidRequest
from tests.deployments.accounts import account

PROMPTS = "expected a string, or a non-empty array of strings, of token ids, or of arrays of token ids"
STOPS = "expected a non-empty string or an array of up to 4 of them"


def parse_completion_request(body: bytes) -> CompletionRequest:
    return completion_request.parse_completion_request(body, CompletionRequest)


def parse(**fields: Any) -> CompletionRequest:
    return parse_completion_request(json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def of_candidate(request: CompletionRequest, number: int, grammar: str | None = None) -> Sampling:
    return request.inference(request.prompt).of_candidate(number, grammar)


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
    assert (request.prompt, request.choices, request.candidates, request.tokens_per_choice) == (["p"], 1, 1, 16)
    assert request.sampling() == Sampling(max_tokens=16)
    assert (request.stop, request.stream, request.echo, request.prompt_positions) == ((), False, False, None)
    assert request.prompt_options == PromptOptions()


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


OPTIONAL = [name for name, field in CompletionRequest.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_is_the_default(name: str) -> None:
    default, request = parse(), parse(**{name: None})
    assert request.sampling() == default.sampling()
    assert (request.choices, request.candidates, request.stop) == (1, 1, ())
    assert request.prompt_options == default.prompt_options
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
        "logprobs": 2,
        "logit_bias": {"3": 1, "4": -100},
        "allowed_token_ids": [5, 6],
        "bad_words": ["a"],
        "priority": -4,
        "cache_salt": "salt",
        "repetition_detection": {"max_pattern_size": 4, "min_count": 2},
        "vllm_xargs": {"text": "a", "number": 0.5, "list": [1, "b"]},
        "prompt_logprobs": 3,
    }
    expected = {
        **fields,
        "stop_token_ids": (1, 2),
        "logit_bias": {3: 1.0, 4: -100.0},
        "allowed_token_ids": (5, 6),
        "bad_words": ("a",),
        "repetition_detection": RepetitionDetection(4, 0, 2),
    }
    expected["extra_args"] = expected.pop("vllm_xargs")
    assert parse(**fields).sampling() == Sampling(**expected)


def test_a_stream_interval_is_for_streams() -> None:
    assert parse(stream_interval=4, stream=True).sampling().stream_interval == 4
    assert parse(stream_interval=4).sampling().stream_interval is None


def test_a_top_p_of_zero_leaves_the_likeliest_token() -> None:
    assert parse(top_p=0).sampling().top_p == 1e-9  # vLLM refuses 0


def test_no_tokens_are_one_for_the_engine() -> None:
    request = parse(max_tokens=0)
    assert (request.tokens_per_choice, request.sampling().max_tokens) == (0, 1)


def test_what_the_engine_tells_of_the_prompt() -> None:
    assert parse(echo=True, logprobs=2).prompt_positions == 2
    assert parse(echo=True, logprobs=2, prompt_logprobs=5).prompt_positions == 5
    assert parse(logprobs=2).prompt_positions is None
    assert parse(echo=True).prompt_positions is None


def test_tokens_named_for_logprobs_replace_the_likeliest() -> None:
    sampling = parse(logprobs=2, logprob_token_ids=[7, 8]).sampling()
    assert (sampling.logprobs, sampling.logprob_token_ids) == (None, (7, 8))


def test_candidates_are_ranked_by_their_log_probabilities() -> None:
    request = parse(n=2, best_of=3)
    assert (request.choices, request.candidates, request.sampling().logprobs) == (2, 3, 0)
    assert parse(n=2, best_of=2).sampling().logprobs is None
    assert parse(n=2, best_of=3, logprobs=4).sampling().logprobs == 4


def test_prompt_options_are_those_of_vllm() -> None:
    request = parse(add_special_tokens=False, truncate_prompt_tokens=9, truncation_side="left")
    assert request.prompt_options == PromptOptions(False, 9, "left")
    assert parse(truncate_prompt_tokens=-1).prompt_options == PromptOptions(True, -1, "left")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAGS = {"structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}], "triggers": ["<a>"]}


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("response_format", Constraint("json_object", ""))),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            ("response_format", Constraint("json", json.dumps(SCHEMA))),
        ),
        (
            {"response_format": {"type": "structural_tag", **TAGS}},
            ("response_format", Constraint("structural_tag", json.dumps(TAGS))),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ("structured_outputs.json", Constraint("json", json.dumps(SCHEMA)))),
        ({"structured_outputs": {"json": "{}"}}, ("structured_outputs.json", Constraint("json", "{}"))),
        ({"structured_outputs": {"regex": "a+"}}, ("structured_outputs.regex", Constraint("regex", "a+"))),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            ("structured_outputs.choice", Constraint("choice", '["a", "b"]')),
        ),
        (
            {"structured_outputs": {"grammar": "start: 'a'"}},
            ("structured_outputs.grammar", Constraint("grammar", "start: 'a'")),
        ),
        (
            {"structured_outputs": {"json_object": True}},
            ("structured_outputs.json_object", Constraint("json_object", "")),
        ),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            ("structured_outputs.structural_tag", Constraint("structural_tag", "{}")),
        ),
        (
            {
                "structured_outputs": {
                    "json": "{}",
                    "json_object": False,
                    "disable_any_whitespace": True,
                    "disable_additional_properties": True,
                    "whitespace_pattern": " *",
                }
            },
            (
                "structured_outputs.json",
                Constraint("json", "{}", any_whitespace=False, whitespace_pattern=" *", closed=True),
            ),
        ),
        ({"guided_json": SCHEMA}, ("guided_json", Constraint("json", json.dumps(SCHEMA)))),
        ({"guided_json": "{}"}, ("guided_json", Constraint("json", "{}"))),
        (
            {"guided_json": "{}", "guided_whitespace_pattern": " *"},
            ("guided_json", Constraint("json", "{}", whitespace_pattern=" *")),
        ),
        ({"guided_regex": "a+"}, ("guided_regex", Constraint("regex", "a+"))),
        ({"guided_choice": ["a"]}, ("guided_choice", Constraint("choice", '["a"]'))),
        ({"guided_grammar": "g"}, ("guided_grammar", Constraint("grammar", "g"))),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, ("guided_regex", Constraint("regex", "a"))),
    ],
)
def test_the_form_of_the_output(fields: dict[str, Any], given: tuple[str, Constraint] | None) -> None:
    assert parse(**fields).constraint() == given


def test_the_engine_gets_the_constraint_as_it_was_checked() -> None:
    sampling = of_candidate(parse(guided_regex="a"), 0, "start: /a/")
    assert sampling.grammar == "start: /a/"
    pack(Submission(1, [1], sampling, account("req"), "Meter"))


LARGE = "a" * 65_536


@pytest.mark.parametrize(
    ("fields", "param", "bound"),
    [
        ({"guided_regex": LARGE + "a"}, "guided_regex", "65536 bytes"),
        ({"guided_json": {"const": LARGE}}, "guided_json", "65536 bytes"),
        ({"guided_json": json.dumps({"const": LARGE})}, "guided_json", "65536 bytes"),
        ({"guided_json": {"enum": [[]] * 30_000}}, "guided_json", "65536 bytes"),
        ({"guided_choice": ["a"] * 2001}, "guided_choice", "2000 labels"),
        ({"guided_choice": ["a" * 1000] * 100}, "guided_choice", "65536 bytes"),
        ({"structured_outputs": {"json": {"const": LARGE}}}, "structured_outputs.json", "65536 bytes"),
        ({"structured_outputs": {"structural_tag": LARGE + "a"}}, "structured_outputs.structural_tag", "65536 bytes"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": LARGE}}}},
            "response_format.json_schema.schema",
            "65536 bytes",
        ),
        ({"guided_json": json.loads('{"items":' * 101 + "{}" + "}" * 101)}, "guided_json", "100 deep"),
        ({"guided_regex": LARGE, "n": 17}, "guided_regex", "1048576 bytes together"),
        ({"guided_regex": LARGE, "n": 2, "prompt": ["a"] * 9}, "guided_regex", "1048576 bytes together"),
        ({"guided_regex": LARGE, "best_of": 17}, "guided_regex", "1048576 bytes together"),
    ],
)
def test_a_constraint_has_bounds_which_the_error_names(fields: dict[str, Any], param: str, bound: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(**fields)
    assert refused.value.param == param
    assert bound in refused.value.message


def test_a_constraint_within_its_bounds_is_taken() -> None:
    assert parse(guided_regex=LARGE, n=16).constraint() is not None
    assert parse(guided_json=json.loads('{"items":' * 99 + "{}" + "}" * 99)).constraint() is not None
    assert parse(guided_choice=["a"] * 2000, n=32).constraint() is not None


@pytest.mark.parametrize("name", ["disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"])
def test_what_shapes_json_is_refused_without_json(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        parse(structured_outputs={"regex": "a", name: " *" if name == "whitespace_pattern" else True})


def test_a_whitespace_pattern_belongs_to_json() -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(guided_regex="a", guided_whitespace_pattern=" *")
    assert refused.value.param == "guided_whitespace_pattern"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_embeds": None},
        {"use_beam_search": False},
        {"length_penalty": 1.0},
        {"length_penalty": 1},
        {"watermarking": False},
        {"routed_experts_prompt_start": 0},
        {"return_token_offsets": False},
        {"mm_payload": "tensors"},
        {"return_mm_kwargs": True},
        {"request_id": "r", "session_id": "s", "user": "u"},
    ],
)
def test_what_has_no_effect_in_vllm_either_is_accepted(fields: dict[str, Any]) -> None:
    assert parse(**fields).sampling() == parse().sampling()


def test_top_k_of_minus_one_considers_all_tokens() -> None:
    assert parse(top_k=-1).sampling().top_k == 0


def test_each_choice_has_a_seed_of_its_own() -> None:
    request = parse(n=3, seed=41)
    assert [of_candidate(request, choice).seed for choice in range(3)] == [41, 42, 43]
    assert [of_candidate(parse(n=2), choice).seed for choice in range(2)] == [None, None]


def test_a_seed_of_minus_one_is_none() -> None:
    """As vLLM takes it; a seed that counts up to it is one all the same."""
    assert [of_candidate(parse(n=3, seed=-1), choice).seed for choice in range(3)] == [None, None, None]
    assert [of_candidate(parse(n=3, seed=-2), choice).seed for choice in range(3)] == [-2, 2**63 - 1, 0]


@pytest.mark.parametrize("word", [" ", "\n\t", "\u3000"])
def test_a_word_without_a_letter_is_refused_by_its_place(word: str) -> None:
    error = refused(json.dumps({"model": "m", "prompt": "p", "bad_words": ["a", word]}).encode())
    assert (error.param, error.location) == ("bad_words.1", ("bad_words", 1))
    assert "whitespace only is no word" in error.message


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 0])
def test_seeds_that_count_up_stay_in_64_bits(seed: int) -> None:
    seeds = [of_candidate(parse(n=128, seed=seed), choice).seed for choice in range(128)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 128
    assert all(each is not None and -(2**63) <= each < 2**63 for each in seeds)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, 1, 2**31 - 1]),
        ("temperature", [0, 2, 0.0, 2.0]),
        ("top_p", [0, 1]),
        ("n", [1, 128]),
        ("seed", [-(2**63), 2**63 - 1]),
        ("presence_penalty", [-2, 2]),
        ("frequency_penalty", [-2, 2]),
        ("top_k", [-1, 0, 2**31 - 1]),
        ("min_p", [0, 1]),
        ("repetition_penalty", [1e-9, 2]),
        ("min_tokens", [0, 16]),
        ("stop_token_ids", [[], [0], [2**31 - 1] * 128]),
        ("model", ["m", "x" * 256]),
        ("user", ["", "x" * 1024]),
        ("suffix", ["", "\n"]),
        ("logprobs", [0, 5]),
        ("prompt_logprobs", [0, 20]),
        ("best_of", [1, 128]),
        ("truncate_prompt_tokens", [-1, 1, 2**31 - 1]),
        ("truncation_side", ["left", "right"]),
        ("allowed_token_ids", [[0], [2**31 - 1] * 2048]),
        ("bad_words", [[], ["a"] * 64, ["a" * 128] * 16]),
        ("priority", [-(2**31), 2**31 - 1]),
        ("cache_salt", ["s", "s" * 128]),
        ("stream_interval", [1, 2**31 - 1]),
        ("vllm_xargs", [{}, {"a": [], "b": 2**63 - 1, "c": -(2**63)}, {"a": "x" * 16_383}]),
    ],
)
def test_the_ends_of_each_range_belong_to_it(name: str, values: list[Any]) -> None:
    for value in values:
        request = parse(**{name: value})
        assert getattr(request, name) == value
        pack(
            Submission(1, [1], of_candidate(request, 127), account("req"), "Meter")
        )  # whatever is accepted fits into a message


# --- what is refused -----------------------------------------------------------------------------------------------


AN_INTEGER, A_NUMBER, FINITE = "expected an integer.", "expected a number.", "expected a finite number."
NO_INTEGERS = ["true", '"1"', "1.5", "1.0", "[1]", "{}", "NaN", "Infinity", "1e400"]
NO_NUMBERS = ["true", '"1"', "[1]", "{}"]
NOT_FINITE = ["NaN", "Infinity", "-Infinity", "1e400"]


INTEGERS = [
    *("max_tokens", "n", "best_of", "logprobs", "seed", "top_k", "min_tokens", "prompt_logprobs", "priority"),
    *("truncate_prompt_tokens", "stream_interval"),
]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("literal", NO_INTEGERS)
def test_integers_are_integers(name: str, literal: str) -> None:
    assert refusal(name, literal) == AN_INTEGER


FLOATS = ["temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty"]


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_finite_numbers(name: str) -> None:
    assert {refusal(name, literal) for literal in NO_NUMBERS} == {A_NUMBER}
    assert {refusal(name, literal) for literal in NOT_FINITE} == {FINITE}


FLAGS = [
    *("stream", "echo", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "add_special_tokens"),
    *("spaces_between_special_tokens", "return_tokens_as_token_ids", "return_token_ids"),
]


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("literal", ["1", "0", '"true"', "[]", "1.0"])
def test_flags_are_true_or_false(name: str, literal: str) -> None:
    assert refusal(name, literal) == "expected true or false."


@pytest.mark.parametrize("name", ["model", "user", "suffix", "cache_salt", "session_id", "request_id", "guided_regex"])
@pytest.mark.parametrize("literal", ["1", "true", "[]", '["m"]', "{}"])
def test_names_are_strings(name: str, literal: str) -> None:
    assert refusal(name, literal) == "expected a string."


@pytest.mark.parametrize(
    ("name", "literal", "expected"),
    [
        ("max_tokens", "-1", "greater than or equal to 0"),
        ("max_tokens", str(2**31), f"less than or equal to {2**31 - 1}"),
        ("max_tokens", "9" * 30, f"less than or equal to {2**31 - 1}"),
        ("temperature", "-0.1", "greater than or equal to 0"),
        ("temperature", "2.1", "less than or equal to 2"),
        ("top_p", "-0.1", "greater than or equal to 0"),
        ("top_p", "1.1", "less than or equal to 1"),
        ("n", "0", "greater than or equal to 1"),
        ("n", "10000", "less than or equal to 128"),
        ("seed", str(2**63), f"less than or equal to {2**63 - 1}"),
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
        ("min_tokens", str(2**31), f"less than or equal to {2**31 - 1}"),
        ("best_of", "0", "greater than or equal to 1"),
        ("best_of", "129", "less than or equal to 128"),
        ("logprobs", "-1", "greater than or equal to 0"),
        ("logprobs", "6", "less than or equal to 5"),
        ("prompt_logprobs", "-1", "greater than or equal to 0"),
        ("prompt_logprobs", "21", "less than or equal to 20"),
        ("truncate_prompt_tokens", "-2", "greater than or equal to -1"),
        ("priority", str(2**31), f"less than or equal to {2**31 - 1}"),
        ("priority", str(-(2**31) - 1), f"greater than or equal to {-(2**31)}"),
        ("stream_interval", "0", "greater than or equal to 1"),
    ],
)
def test_numbers_out_of_range_are_told_the_range(name: str, literal: str, expected: str) -> None:
    assert refusal(name, literal) == f"expected a value {expected}."


@pytest.mark.parametrize(
    "literal",
    [
        *("null", "1", "1.5", "true", "{}", "[]", '["a", 1]', '["a", ["b"]]', "[1, [2]]"),
        *("[true]", "[1, true]", "[1.5]", "[1.0]", "[null]", '[["a"]]', "[[[1]]]", "[NaN]", "[[1], [true]]"),
    ],
)
def test_no_other_form_of_prompt(literal: str) -> None:
    assert refusal("prompt", literal) == f"{PROMPTS}."


@pytest.mark.parametrize(("literal", "place"), [("[[]]", 0), ("[[1], []]", 1), ("[[1], [2], [3], [], []]", 3)])
def test_an_empty_prompt_is_told_by_its_place(literal: str, place: int) -> None:
    assert refusal("prompt", literal) == f"prompt {place} is empty; expected at least one token id in each."


@pytest.mark.parametrize("literal", ["[" + "9" * 30 + "]", "[[1], [-" + "9" * 30 + "]]", f"[{2**31}]", "[-1]"])
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


BIASES = "expected an object of up to 1024 token ids, each with a number from -100 to 100."
EXTRAS = "expected an object of up to 64 strings, finite numbers, and arrays of these."
NO_NAN = "expected a JSON schema without NaN and Infinity."
ONE_KIND = "expected exactly one of json, regex, choice, grammar, json_object, structural_tag."


@pytest.mark.parametrize(
    ("name", "literal", "expected"),
    [
        *[
            ("logit_bias", literal, BIASES)
            for literal in (
                *("1", "[]", '{"a":1}', '{"-1":1}', '{"1.0":1}', '{" 1":1}', '{"1_0":1}', '{"":1}', '{"1":"1"}'),
                *(
                    '{"1":true}',
                    '{"1":null}',
                    '{"1":101}',
                    '{"1":-100.5}',
                    '{"1":NaN}',
                    '{"1":1e400}',
                    '{"1":1,"01":2}',
                ),
                *(f'{{"{10**9}":1}}', '{"٣":1}', json.dumps(dict.fromkeys(map(str, range(1025)), 0))),
            )
        ],
        *[
            ("vllm_xargs", literal, EXTRAS)
            for literal in (
                *("1", "[]", '{"a":true}', '{"a":null}', '{"a":{}}', '{"a":[[1]]}', '{"a":[null]}', '{"a":NaN}'),
                *(f'{{"a":{2**63}}}', f'{{"a":[{-(2**63) - 1}]}}', json.dumps(dict.fromkeys(map(str, range(65)), 0))),
            )
        ],
        ("bad_words", '"a"', "expected an array."),
        ("bad_words", json.dumps(["a"] * 65), "expected an array of at most 64."),
        ("allowed_token_ids", json.dumps([1] * 8193), "expected an array of at most 8192."),
        ("model", json.dumps("x" * 257), "expected at most 256 characters."),
        ("user", json.dumps("x" * 1025), "expected at most 1024 characters."),
        ("stop", json.dumps(["a", "x" * 513]), "expected strings of at most 512 characters."),
        *(
            ("vllm_xargs", json.dumps(extra), "expected at most 16384 characters in all, a number counted as eight.")
            for extra in ({"a": "x" * 16_384}, {"x" * 16_385: ""}, {"a": [1] * 2048}, {"a": [0.5, "x" * 16_380]})
        ),
        ("allowed_token_ids", "[]", "expected an array of at least 1."),
        ("logprob_token_ids", "[]", "expected an array of at least 1."),
        ("logprob_token_ids", json.dumps([1] * 129), "expected an array of at most 128."),
        ("truncation_side", '"middle"', "expected 'left' or 'right'."),
        ("cache_salt", '""', r"expected a string that matches ^[^@/\\\x00]{1,128}$."),
        ("cache_salt", '"a@b"', r"expected a string that matches ^[^@/\\\x00]{1,128}$."),
        ("session_id", json.dumps("s" * 257), "expected at most 256 characters."),
        ("guided_json", "1", "expected a JSON schema, as an object or as text."),
        ("guided_json", "[]", "expected a JSON schema, as an object or as text."),
        ("guided_json", '{"minimum":NaN}', NO_NAN),
        ("guided_regex", '""', "expected at least 1 character."),
        ("guided_choice", "[]", "expected an array of at least 1."),
        ("response_format", '"json_object"', "expected an object."),
        ("response_format", '{"type":"json_schema"}', "expected json_schema.schema beside type 'json_schema'."),
        (
            "response_format",
            '{"type":"json_schema","json_schema":{"name":"n"}}',
            "expected json_schema.schema beside type 'json_schema'.",
        ),
        (
            "response_format",
            '{"type":"structural_tag"}',
            "expected structures and triggers beside type 'structural_tag'; format is not supported.",
        ),
        ("structured_outputs", "{}", ONE_KIND),
        ("structured_outputs", '{"json_object":false}', ONE_KIND),
        ("structured_outputs", '{"json":"{}","regex":"a"}', ONE_KIND),
        ("repetition_detection", '{"max_pattern_size":2}', "expected min_count of at least 2."),
        (
            "repetition_detection",
            '{"max_pattern_size":2,"min_pattern_size":3}',
            "expected min_pattern_size of at most max_pattern_size.",
        ),
    ],
)
def test_other_values_out_of_range(name: str, literal: str, expected: str) -> None:
    assert refusal(name, literal) == expected


@pytest.mark.parametrize(
    ("fields", "param", "location"),
    [
        ({"stop_token_ids": [1, "a"]}, "stop_token_ids.1", ("stop_token_ids", 1)),
        ({"bad_words": [""]}, "bad_words.0", ("bad_words", 0)),
        ({"guided_choice": [1]}, "guided_choice.0", ("guided_choice", 0)),
        ({"response_format": {}}, "response_format.type", ("response_format", "type")),
        ({"response_format": {"type": "xml"}}, "response_format.type", ("response_format", "type")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": 1}}},
            "response_format.json_schema.name",
            ("response_format", "json_schema", "name"),
        ),
        ({"structured_outputs": {"json": 1}}, "structured_outputs.json", ("structured_outputs", "json")),
        ({"structured_outputs": {"xml": ""}}, "structured_outputs.xml", ("structured_outputs", "xml")),
        ({"a.b": 1}, "a.b", ("a.b",)),
    ],
)
def test_a_mistake_within_a_parameter_is_located(
    fields: dict[str, Any], param: str, location: tuple[str | int, ...]
) -> None:
    error = refused(json.dumps({"model": "m", "prompt": "p", **fields}).encode())
    assert (error.param, error.location) == (param, location)


@pytest.mark.parametrize(
    ("name", "literal", "reason"),
    [
        ("prompt_embeds", '"AAAA"', "prompts are texts or token ids, not embeddings"),
        ("use_beam_search", "true", "beam search is not supported; use n and best_of"),
        ("use_beam_search", "0", "beam search is not supported; use n and best_of"),
        ("length_penalty", "0.5", "it belongs to beam search, which is not supported"),
        ("length_penalty", "true", "it belongs to beam search, which is not supported"),
        ("watermarking", "true", "the engines have no watermark"),
        ("kv_transfer_params", "{}", "transfers between engines are up to the cluster"),
        ("ec_transfer_params", "{}", "transfers between engines are up to the cluster"),
        ("routed_experts_prompt_start", "1", "the routing of experts is not told"),
        ("return_token_offsets", "true", "offsets are not told; logprobs has text_offset"),
        ("mm_payload", '"none"', "prompts have text only"),
        ("return_mm_kwargs", "false", "prompts have text only"),
        *(
            ("thinking_token_budget", literal, "the engines do not tell thinking from text")
            for literal in ("0", "9", "-2", "1.5", "true")
        ),
        ("guided_decoding_backend", '"outlines"', "the engine chooses the backend itself"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(name: str, literal: str, reason: str) -> None:
    assert refusal(name, literal) == f"{reason}."


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


@pytest.mark.parametrize("name", ["max_token", "messages", "", "a.b", "N", "логprobs", "\u2028", "x" * 200])
def test_an_unknown_parameter_is_named(name: str) -> None:
    error = refused(json.dumps({"model": "m", "prompt": "p", name: 1}).encode())
    assert (error.param, error.message) == (name, f"Unrecognized request argument supplied: {name}.")


def test_of_a_long_unknown_name_its_beginning_is_told() -> None:
    error = refused(json.dumps({"model": "m", "prompt": "p", "x" * 100_000: 1}).encode())
    assert (error.param, error.location) == ("x" * 200, ("x" * 200,))


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"min_tokens": 17}, "min_tokens", "min_tokens is 17; expected at most max_tokens, 16."),
        ({"stream_options": {}}, "stream_options", "only allowed when stream is true"),
        ({"n": 3, "best_of": 2}, "best_of", "best_of is 2; expected at least n, 3."),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "cannot be streamed"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids", "only allowed with logprobs"),
        ({"logprob_token_ids": [1], "logprobs": 1, "max_tokens": 0}, "logprob_token_ids", "max_tokens of at least 1"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "leaves no prompt"),
        (
            {"guided_regex": "a", "structured_outputs": {"regex": "a"}},
            "guided_regex",
            "Only one of structured_outputs and guided_regex can be given.",
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_json": {}},
            "guided_json",
            "Only one of response_format and guided_json can be given.",
        ),
        ({"suffix": "s", "echo": True, "logprobs": 1}, "suffix", "cannot be combined"),
    ],
)
def test_parameters_that_contradict_each_other(fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(json.dumps({"model": "m", "prompt": "p", **fields}).encode())
    assert error.param == param
    assert words in error.message


def test_prompts_times_n_are_bounded() -> None:
    assert len(parse(prompt=["p"] * 8, n=128).prompt) == 8
    error = refused(json.dumps({"model": "m", "prompt": ["p"] * 9, "n": 128}).encode())
    assert (error.param, error.message) == ("n", "9 prompts with n=128 make more than 1024 choices.")
    error = refused(json.dumps({"model": "m", "prompt": ["p"] * 9, "best_of": 128}).encode())
    assert (error.param, error.message) == ("best_of", "9 prompts with best_of=128 make more than 1024 choices.")


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
        b'{"model":"m","prompt":"p","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"model":"m","prompt":"p","max_tokens":' + b"9" * 5000 + b"}",
        b'{"model":"m","prompt":"p","max_tokens":01}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_body_that_is_no_json_is_told_where(body: bytes) -> None:
    error = refused(body)
    assert error.param is None
    assert error.message.startswith("The body is not valid JSON: ")
    assert " at line 1 column " in error.message or "it begins with a byte order mark" in error.message
    assert len(error.message) < 150


def test_a_mistake_within_bad_words_is_located() -> None:
    error = refused(json.dumps({"model": "m", "prompt": "p", "bad_words": ["a", "x" * 1_000]}).encode())
    assert (error.param, error.message) == (
        "bad_words.1",
        "Invalid value for 'bad_words.1': expected at most 128 characters.",
    )


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"bad_words": ["x" * 128] * 17}, "bad_words", "2176 characters; expected at most 2048"),
        ({"bad_words": ["x"] * 64, "n": 33}, "bad_words", "64 entries for each of 33 choices; expected at most 2048"),
        ({"bad_words": ["x"] * 3, "prompt": ["p"] * 100, "n": 7}, "bad_words", "each of 700 choices"),
        (
            {"allowed_token_ids": [1] * 8192, "n": 33},
            "allowed_token_ids",
            "33 choices; expected at most 262144",
        ),
        ({"logit_bias": {str(token): 1 for token in range(1024)}, "prompt": ["p"] * 257}, "logit_bias", "257 choices"),
    ],
)
def test_what_is_told_the_engine_of_each_choice_is_bounded(fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(json.dumps({"model": "m", "prompt": "p", **fields}).encode())
    assert error.param == param
    assert words in error.message


def test_of_a_key_given_twice_the_last_counts() -> None:
    assert parse_completion_request(b'{"model":"a","prompt":"p","model":"b"}').model == "b"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([*CompletionRequest.model_fields, "other"])


@given(st.dictionaries(names, json_values, max_size=5))
def test_any_json_is_either_accepted_or_refused_in_our_words(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", "prompt": "p", **fields}).encode()
    try:
        request = parse_completion_request(body)
    except InvalidRequest:
        refused(body)
    else:
        pack(Submission(1, [1], request.sampling(), account("req"), "Meter"))


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_in_our_words(body: bytes) -> None:
    refused(body)


# --- what clients of other servers send ----------------------------------------------------------------------------

SILLYTAVERN: dict[str, Any] = {
    "temperature": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "use_beam_search": False,
    "length_penalty": 1,
    "early_stopping": False,
    "typical_p": 1,
    "top_a": 0,
    "tfs": 1,
    "mirostat_mode": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "add_bos_token": True,
    "ban_eos_token": False,
    "custom_token_bans": "",
    "banned_strings": [],
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "xtc_threshold": 0.1,
    "xtc_probability": 0,
    "smoothing_factor": 0,
    "smoothing_curve": 1,
    "guidance_scale": 1,
    "negative_prompt": "",
    "do_sample": True,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "penalty_alpha": 0,
    "sampler_priority": [],
}
LLAMA_CPP: dict[str, Any] = {
    "cache_prompt": True,
    "repeat_penalty": 1,
    "repeat_last_n": -1,
    "tfs_z": 1,
    "mirostat": 0,
    "n_predict": -1,
    "n_probs": 0,
    "n_keep": 0,
    "id_slot": -1,
    "grammar": "",
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "timings_per_token": False,
}
OPENAI_CHAT: dict[str, Any] = {"store": False, "metadata": {"trace": "1"}, "service_tier": "auto"}


@pytest.mark.parametrize("sent", [SILLYTAVERN, LLAMA_CPP, OPENAI_CHAT], ids=["SillyTavern", "llama.cpp", "OpenAI"])
def test_what_other_servers_clients_send_by_default_is_taken(sent: dict[str, Any]) -> None:
    assert parse(**sent).sampling() == parse().sampling()


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("early_stopping", True, "beam search"),
        ("repeat_penalty", 1.1, "use repetition_penalty"),
        ("mirostat_mode", 2, "no Mirostat"),
        ("ban_eos_token", True, "use ignore_eos"),
        ("banned_strings", ["x"], "use bad_words"),
        ("n_predict", 50, "use max_tokens"),
        ("typical_p", 0.9, "no typical sampling"),
        ("store", True, "nothing of a request is kept"),
    ],
)
def test_what_would_have_an_effect_elsewhere_is_refused_by_name(name: str, value: Any, advice: str) -> None:
    with pytest.raises(InvalidRequest, match=advice) as error:
        parse(**{name: value})
    assert error.value.param == name


@pytest.mark.parametrize(
    ("encoding", "name"), [("utf-8-sig", "UTF-8"), ("utf-16", "UTF-16"), ("utf-32", "UTF-32")], ids=lambda each: each
)
def test_a_byte_order_mark_is_named(encoding: str, name: str) -> None:
    message = refused('{"model":"m","prompt":"p"}'.encode(encoding)).message
    assert message == f"The body is not valid JSON: it begins with a byte order mark of {name}. Send UTF-8 without one."


def test_ignoring_the_end_of_text_contradicts_a_form() -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(guided_regex="a", ignore_eos=True)
    assert refused.value.param == "ignore_eos"
