"""Each row of the table of keywords, and schemas at random: what is taken is held, as jsonschema sees it."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from deployments.contracts import Constraint, ConstraintCheck
from deployments.ingress.constraints.grammar import ModelGrammars
from deployments.ingress.constraints.schema_keywords import ANNOTATIONS, FORMATS, HELD, REFUSED
from tests.conftest import THOROUGH
from tests.random_schemas import Wanderer, random_schema, violation

EOS = 2
SECONDS = float(os.environ.get("MILLSTREAM_PROPERTY_SECONDS", "300" if THOROUGH else "10"))
TEXTS = 6
"""Of each schema."""


@pytest.fixture(scope="module")
def grammars(smollm2: Path) -> ModelGrammars:
    return ModelGrammars(smollm2)


@pytest.fixture(scope="module")
def wanderer(smollm2: Path) -> Wanderer:
    return Wanderer(smollm2, EOS)


def checked(grammars: ModelGrammars, schema: Any) -> tuple[str, str]:
    """Its grammar and why there is none: one of them."""
    answer = grammars.check(ConstraintCheck("", Constraint("json", json.dumps(schema))))
    return answer.grammar, answer.message


DEFINED = {"$defs": {"d": {"type": "string", "maxLength": 2}}}
HELD_SCHEMAS: dict[str, list[dict[str, Any]]] = {
    "type": [{"type": "integer"}, {"type": ["null", "boolean"]}],
    "enum": [{"enum": [1, "a", None, [1], {"a": 1.5}]}, {"enum": ["a", 2], "type": "string"}],
    "const": [{"const": {"a": [1, "é\u0000"]}}],
    "anyOf": [{"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "minimum": 3}]}],
    "allOf": [{"allOf": [{"type": "string"}, {"enum": ["yes", "no", 1]}]}],
    "oneOf": [{"oneOf": [{"type": "string"}, {"type": "integer"}]}],
    "$ref": [{"$ref": "#/$defs/d", **DEFINED}, {"$ref": "#/$defs/d", "minLength": 1, **DEFINED}],
    "$defs": [{"items": {"$ref": "#/$defs/d"}, "type": "array", **DEFINED}],
    "definitions": [{"$ref": "#/definitions/d", "definitions": {"d": {"type": "null"}}}],
    "properties": [{"type": "object", "properties": {"a": {"type": "null"}}}],
    "required": [{"type": "object", "required": ["a"]}, {"required": ["a", "b"], "properties": {"b": {"const": 1}}}],
    "additionalProperties": [{"type": "object", "additionalProperties": {"type": "null"}}],
    "patternProperties": [{"type": "object", "patternProperties": {"^a": {"type": "null"}}}],
    "minProperties": [
        {"type": "object", "minProperties": 2, "required": ["a"], "additionalProperties": {"type": "null"}},
    ],
    "maxProperties": [{"type": "object", "maxProperties": 1, "additionalProperties": {"type": "null"}}],
    "items": [{"type": "array", "items": {"type": "null"}}],
    "prefixItems": [{"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False}],
    "minItems": [{"type": "array", "minItems": 2, "items": {"type": "null"}}],
    "maxItems": [{"type": "array", "maxItems": 1}],
    "minLength": [{"type": "string", "minLength": 3}],
    "maxLength": [{"type": "string", "maxLength": 3}],
    "pattern": [{"type": "string", "pattern": pattern} for pattern in ["^[a-c]+$", r"^\S\s\w\d$", "a", "^[^a]$"]],
    "format": [{"type": "string", "format": name} for name in FORMATS],
    "minimum": [{"type": "number", "minimum": -1.5}],
    "maximum": [{"type": "integer", "maximum": 5}],
    "exclusiveMinimum": [{"type": "number", "exclusiveMinimum": 0}],
    "exclusiveMaximum": [{"type": "number", "exclusiveMaximum": 10}],
    "multipleOf": [{"type": "integer", "multipleOf": 7}, {"type": ["integer", "null"], "multipleOf": 3}],
    "uniqueItems": [{"type": "array", "uniqueItems": False}],
}


def test_every_keyword_that_is_held_is_tried() -> None:
    assert HELD_SCHEMAS.keys() == HELD.keys()


@pytest.mark.parametrize("keyword", HELD_SCHEMAS)
def test_a_keyword_is_held(grammars: ModelGrammars, wanderer: Wanderer, keyword: str) -> None:
    drawn = random.Random(keyword)
    for schema in HELD_SCHEMAS[keyword]:
        grammar, message = checked(grammars, schema)
        assert grammar, message
        texts = {text for _ in range(15) if (text := wanderer.text(grammar, drawn)) is not None}
        assert texts or schema.get("format") in ("email", "uri"), "none came to an end"
        assert {text: found for text in texts if (found := violation(schema, text))} == {}


@pytest.mark.parametrize("keyword", sorted(REFUSED))
def test_a_keyword_that_is_not_held_is_refused_by_name(grammars: ModelGrammars, keyword: str) -> None:
    schemas: list[dict[str, Any]] = [{keyword: {}}, {"properties": {"a": {keyword: True}}}]
    for schema in schemas:
        grammar, message = checked(grammars, schema)
        assert not grammar
        assert f"'{keyword}'" in message


@pytest.mark.parametrize("keyword", [*ANNOTATIONS, "example", "nullable", "x-mine"])
def test_an_annotation_has_no_effect(grammars: ModelGrammars, keyword: str) -> None:
    value: Any = "https://json-schema.org/draft/2020-12/schema" if keyword == "$schema" else "x"
    assert checked(grammars, {keyword: value, "type": "integer"}) == checked(grammars, {"type": "integer"})


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 2 + 120)
def test_what_is_taken_is_held(grammars: ModelGrammars, wanderer: Wanderer) -> None:
    drawn = random.Random(None if THOROUGH else 13)
    ends = time.monotonic() + SECONDS
    schemas = taken = texts = open_ended = 0
    while time.monotonic() < ends:
        schemas += 1
        schema = random_schema(drawn)
        grammar, _ = checked(grammars, schema)
        if not grammar:
            continue
        taken += 1
        for _ in range(TEXTS):
            text = wanderer.text(grammar, drawn)
            if text is None:
                open_ended += 1
                continue
            texts += 1
            assert violation(schema, text) is None, (json.dumps(schema), text)
    print(f"{schemas} schemas, {taken} taken, {texts} texts, {open_ended} not at an end")
    assert texts > 10 * SECONDS / 10
