"""What a constraint becomes, and what is refused: every example here was answered 200 and wrong, or 500, before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import grammar_from

from deployments.contracts import Constraint, ConstraintCheck, ConstraintKind, Output, OutputCheck
from deployments.ingress.constraints.grammar import ModelGrammars

EOS = 2


@pytest.fixture(scope="module")
def grammars(smollm2: Path) -> ModelGrammars:
    return ModelGrammars(smollm2)


def constraint_of(kind: ConstraintKind, value: Any, **options: Any) -> Constraint:
    return Constraint(kind, value if isinstance(value, str) else json.dumps(value), **options)


def refusal(grammars: ModelGrammars, kind: ConstraintKind, value: Any, **options: Any) -> str:
    checked = grammars.check(ConstraintCheck("", constraint_of(kind, value, **options)))
    assert not checked.grammar
    assert checked.message.endswith(".")
    return checked.message


def grammar_of(grammars: ModelGrammars, kind: ConstraintKind, value: Any, **options: Any) -> str:
    checked = grammars.check(ConstraintCheck("", constraint_of(kind, value, **options)))
    assert not checked.message
    return checked.grammar


def conforms(grammars: ModelGrammars, grammar: str, text: str, *, ended: bool = True) -> bool:
    tokens = grammars.tokens(text)
    [conforming] = grammars.conforming(OutputCheck("", grammar, [Output(tokens, ended)])).conforming
    return conforming


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "items": [{"type": "string"}]}, "'items'"),
        ({"$ref": "#"}, "needs itself"),
        ({"type": "string", "pattern": r"\p{L}+"}, r"\p"),
        ({"if": {"type": "string"}, "then": {"maxLength": 1}}, "'if'"),
        ({"then": False}, "'then'"),
        ({"$ref": "https://example.com/schema"}, "'$ref'"),
        ({"$ref": "#/$defs/nowhere"}, "'$ref'"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a'"),
        ({"allOf": [{"type": "string"}, {"type": "number"}]}, "Unsatisfiable"),
        ({"type": "string", "allOf": [{"format": "email"}, {"format": "date"}]}, "no text matches all of its patterns"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"not": {}}, "'not'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "string", "format": "time"}, "'format'"),
        ({"type": "string", "format": "of my own"}, "'format'"),
        ({"x-guidance": {"lenient": True}, "type": "string"}, "'x-guidance'"),
        ({"properties": {"a": {"type": "array", "contains": {}}}}, "at properties.a "),
        ({"type": "array", "minItems": 1_000_000}, "'minItems'"),
        ({"type": "object", "minProperties": 2}, "'minProperties'"),
        ({"minProperties": 3, "required": ["a", "a"]}, "'minProperties'"),
        ({"type": "string", "maxLength": 10**9}, "'maxLength'"),
        ({"type": "number", "multipleOf": 0.01}, "'multipleOf'"),
        ({"type": "integer", "multipleOf": 7.0}, "'multipleOf'"),
        ({"type": ["number", "string"], "multipleOf": 7}, "'multipleOf'"),
        ({"multipleOf": 7}, "'multipleOf'"),
        ({"const": 12345678901234567890}, "'const'"),
        ({"const": 1e30}, "'const'"),
        ({"enum": []}, "'enum'"),
        ({"type": "nonsense"}, "'type'"),
        ({"type": 5}, "'type'"),
        ({"exclusiveMinimum": True, "minimum": 0}, "'exclusiveMinimum'"),
        ({"type": "number", "minimum": 1, "maximum": 0}, "minimum"),
        ({"patternProperties": {"^a": {}, "b$": {}}, "type": "object"}, "disjoint"),
        ({"patternProperties": {"(": {}}, "type": "object"}, "pattern"),
        ({"type": "string", "pattern": r"^\W$"}, r"\W"),
        ({"type": "string", "pattern": r"^[\x00-\x1f]$"}, "control"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "'$schema'"),
        ({"properties": {"a": {"$id": "b"}}}, "'$id'"),
        (False, "false"),
        ("not JSON", "JSON"),
        ('{"const":NaN}', "NaN"),
        ('{"const":1e400}', "JSON"),
        (r'{"const":"\ud800"}', "surrogate"),
        ("[" * 50_000, "deep"),
    ],
    ids=str,
)
def test_a_schema_that_is_not_held_is_refused_by_name(grammars: ModelGrammars, schema: Any, named: str) -> None:
    assert named in refusal(grammars, "json", schema)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"allOf": [{"type": "string"}, {"enum": ["yes", "no"]}]}, ['"yes"', '"no"'], ["1", '"maybe"']),
        ({"type": "object", "minProperties": 1}, ['{"a":1}', '{ "b" : [] }'], ["{}"]),
        ({"type": "object", "required": ["a"]}, ['{"a":null}'], ["{}", '{"b":1}']),
        ({"type": "string", "format": "date"}, ['"2024-02-29"', '"2000-02-29"'], ['"2023-02-29"', '"1900-02-29"']),
        ({"type": "string", "format": "date-time"}, ['"2024-02-29T23:59:59Z"'], ['"2024-02-29T23:59:60Z"']),
        ({"type": "string", "pattern": r"^\S$"}, ['"a"'], [r'"\u001c"', '" "']),
        ({"type": "array", "uniqueItems": False, "maxItems": 1}, ["[]", "[1]"], ["[1,1]"]),
        ({"const": "a\u0000b"}, [r'"a\u0000b"'], ['"ab"']),
        ({"properties": {"a": {"type": "integer"}}, "type": "object"}, ['{"a":1,"b":2}'], ['{"a":"x"}']),
        ({"$ref": "#/$defs/a", "maxLength": 2, "$defs": {"a": {"type": "string"}}}, ['"ab"'], ['"abc"', "1"]),
        ({}, ["1", "null", "[{}]"], ["nothing"]),
    ],
    ids=str,
)
def test_a_schema_is_held(grammars: ModelGrammars, schema: Any, good: list[str], bad: list[str]) -> None:
    grammar = grammar_of(grammars, "json", schema)
    assert [conforms(grammars, grammar, text) for text in good] == [True] * len(good)
    assert [conforms(grammars, grammar, text) for text in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({}, ['{"a":1}', '{ "a" : 1 }', '{"a":1,"b":1}'], []),
        ({"any_whitespace": False}, ['{"a":1}', '{"a":1,"b":1}'], ['{ "a":1}', '{"a": 1}']),
        ({"whitespace_pattern": ""}, ['{"a":1}'], ['{ "a":1}']),
        ({"whitespace_pattern": "[ ]*"}, ['{"a":1}', '{  "a" :1}'], ['{\n"a":1}']),
        ({"whitespace_pattern": r"\s*"}, ['{\n"a" : 1\t}'], []),
        ({"closed": True}, ['{"a":1}', "{}"], ['{"a":1,"b":1}', '{"b":1}']),
    ],
    ids=str,
)
def test_what_shapes_json_is_in_effect(
    grammars: ModelGrammars, options: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = grammar_of(grammars, "json", {"type": "object", "properties": {"a": {"type": "integer"}}}, **options)
    assert all(conforms(grammars, grammar, text) for text in good)
    assert not any(conforms(grammars, grammar, text) for text in bad)


@pytest.mark.parametrize("pattern", ["(((", "[ ]?", " ", " +", "x*", r"[^a]*", r"\S*", "[ ]*x"])
def test_a_whitespace_pattern_that_is_not_held_is_refused(grammars: ModelGrammars, pattern: str) -> None:
    assert "whitespace_pattern" in refusal(grammars, "json", {}, whitespace_pattern=pattern)


@pytest.mark.parametrize(
    ("regex", "good", "bad"),
    [
        (r"\p{L}+", ["é", "猫"], ["1", ""]),
        ("^a|b$", ["a", "b"], ["ab", "^a"]),
        (r"a\$", ["a$"], ["a"]),
        (r"a/b\n", ["a/b\n"], ["a/b"]),
        ("a|", ["a", ""], ["b"]),
        ("(?i)ab", ["AB", "ab"], ["b"]),
        ("((((a*)*)*)*)*b", ["aab"], ["a"]),
    ],
)
def test_a_regular_expression_matches_the_whole(
    grammars: ModelGrammars, regex: str, good: list[str], bad: list[str]
) -> None:
    grammar = grammar_of(grammars, "regex", regex)
    assert all(conforms(grammars, grammar, text) for text in good)
    assert not any(conforms(grammars, grammar, text) for text in bad)


@pytest.mark.parametrize("regex", ["(", "[z-a]", r"(a)\1", "a(?=b)", "a{1,0}"])
def test_a_regular_expression_that_is_none_is_refused(grammars: ModelGrammars, regex: str) -> None:
    refusal(grammars, "regex", regex)


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= (",
        "root ::= nowhere",
        'root ::= root "a"',
        'start: start "a"',
        "start: x\nx: x",
        '{"grammars": [{"json_schema": {}}]}',
        'start: %json {"not": {}, "x-guidance": {"lenient": true}}',
        "start: /(/",
        "nonsense",
    ],
)
def test_a_grammar_without_output_is_refused(grammars: ModelGrammars, grammar: str) -> None:
    refusal(grammars, "grammar", grammar)


@pytest.mark.parametrize("grammar", ['root ::= "yes" | "no"', 'start: "yes" | "no"', '%llguidance {}\nstart: "no"'])
def test_grammars_of_both_kinds_are_held(grammars: ModelGrammars, grammar: str) -> None:
    text = grammar_of(grammars, "grammar", grammar)
    assert conforms(grammars, text, "no")
    assert not conforms(grammars, text, "nope")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json", {"const": 'root ::= "a"\nstart: b\n%llguidance'}),
        ("json_object", ""),
        ("regex", 'a ::= "b"'),
        ("choice", ["root ::= a", "\nstart: x"]),
        ("grammar", 'root ::= "::="'),
        ("grammar", 'start: "a"'),
        ("structural_tag", {"structures": [{"begin": "<f>", "schema": {}, "end": ""}], "triggers": ["<f"]}),
    ],
    ids=str,
)
def test_vllm_takes_the_text_unchanged(grammars: ModelGrammars, kind: ConstraintKind, value: Any) -> None:
    """It calls this for `StructuredOutputsParams(grammar=...)`, in backend_guidance.py."""
    grammar = grammar_of(grammars, kind, value)
    assert grammar_from("grammar", grammar) == grammar


def test_labels_are_texts(grammars: ModelGrammars) -> None:
    labels = ["a", "ab", "a", "", '"\\\n', "é\U0001f389"]
    grammar = grammar_of(grammars, "choice", labels)
    assert all(conforms(grammars, grammar, label) for label in labels)
    assert not conforms(grammars, grammar, "abc")
    special = grammar_of(grammars, "choice", ["<|im_end|>"])
    letters = [token for letter in "<|im_end|>" for token in grammars.tokens(letter)]  # the token itself ends it
    assert grammars.conforming(OutputCheck("", special, [Output(letters, True)])).conforming == [True]
    assert not conforms(grammars, special, "")


def test_a_grammar_that_makes_steps_slow_is_refused_for_many_choices(grammars: ModelGrammars) -> None:
    slow = constraint_of("regex", "(.*a.{20}|.*b.{30}|.*c.{40})*")
    assert grammars.check(ConstraintCheck("", slow)).grammar
    refused = grammars.check(ConstraintCheck("", slow, candidates=128))
    assert "128 choices" in refused.message
    assert grammars.check(ConstraintCheck("", constraint_of("json", {"type": "object"}), candidates=1024)).grammar


def test_fixed_text_does_not_make_steps_slow(grammars: ModelGrammars) -> None:
    fixed = constraint_of("json", {"const": "word " * 12_000})
    assert grammars.check(ConstraintCheck("", fixed, candidates=16)).grammar


def test_what_takes_long_to_compile_is_not_compiled_for_many_choices(grammars: ModelGrammars) -> None:
    """Twenty choices of 2,000 labels took a core of the engine for a second, beside its steps."""
    labels = constraint_of("choice", [f"label{number}" for number in range(2000)])
    assert grammars.check(ConstraintCheck("", labels, candidates=2)).grammar
    refused = grammars.check(ConstraintCheck("", labels, candidates=1024))
    assert "for 1024 choices at a time: to compile it for each takes" in refused.message


def test_a_structural_tag_holds_its_schema(grammars: ModelGrammars) -> None:
    tag = {"structures": [{"begin": "<f>", "schema": {"enum": [1, 2]}, "end": "</f>"}], "triggers": ["<f"]}
    grammar = grammar_of(grammars, "structural_tag", tag)
    assert conforms(grammars, grammar, "anything")
    assert conforms(grammars, grammar, "so <f>1</f> and <f>2</f>.")
    assert not conforms(grammars, grammar, "so <f>3</f>")
    assert not conforms(grammars, grammar, "so <f>1")


@pytest.mark.parametrize(
    "tag",
    [
        {},
        {"format": {"type": "any_text"}},
        {"structures": [], "triggers": []},
        {"structures": [{"begin": "<f>", "schema": {}, "end": ""}], "triggers": ["<g"]},
        {"structures": [{"begin": "<f>", "schema": {"not": {}}, "end": ""}], "triggers": ["<f"]},
        {"structures": [{"begin": "<f>", "schema": {}}], "triggers": ["<f"]},
        {"structures": [{"begin": 1, "schema": {}, "end": ""}], "triggers": ["<f"]},
        {"structures": [5], "triggers": ["<f"]},
        {"structures": [{"begin": "<f>", "schema": {}, "end": ""}], "triggers": [""]},
        [],
    ],
    ids=str,
)
def test_a_structural_tag_that_is_not_held_is_refused(grammars: ModelGrammars, tag: Any) -> None:
    refusal(grammars, "structural_tag", tag)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 7}, "min_tokens"),
        ({"allowed_token_ids": (5, 6, EOS)}, "allowed_token_ids"),
        ({"banned_token_ids": tuple(range(49_000))}, "logit_bias"),
        ({"bad_words": ("R", "L")}, None),
    ],
)
def test_what_leaves_no_token_for_any_label_is_named(
    grammars: ModelGrammars, fields: dict[str, Any], param: str | None
) -> None:
    checked = grammars.check(ConstraintCheck("", constraint_of("choice", ["London", "Rome"]), **fields))
    assert checked.param == param
    assert bool(checked.grammar) == (param is None)


def test_a_label_that_can_be_spelled_is_no_contradiction(grammars: ModelGrammars) -> None:
    [letter] = grammars.tokens("R")
    rest = grammars.tokens("ome")
    check = ConstraintCheck("", constraint_of("choice", ["London", "Rome"]), allowed_token_ids=(letter, *rest, EOS))
    assert grammars.check(check).grammar


def test_outputs_are_judged_by_their_tokens(grammars: ModelGrammars) -> None:
    grammar = grammar_of(grammars, "choice", ["yes", "no"])
    yes, no = grammars.tokens("yes"), grammars.tokens("no")
    judged = {
        "whole": Output(yes, True),
        "beginning": Output([], False),
        "cut": Output([], True),
        "both": Output(yes + no, True),
        "more behind the end": Output([*yes, EOS, *yes], False),
        "an end before it conforms": Output([EOS], False),
    }
    conforming = grammars.conforming(OutputCheck("", grammar, list(judged.values()))).conforming
    assert [name for name, holds in zip(judged, conforming, strict=True) if holds] == ["whole", "beginning"]
