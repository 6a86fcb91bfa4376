"""What a caller may demand of the form of the output: the parameters of api/completions/request.py that say it, as
objects.

Names are those of OpenAI's `response_format` and of vLLM 0.32's StructuredOutputsParams. Only their size is looked at
here, on the event loop; checker.py has the rest done elsewhere.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, PlainValidator, model_validator

from deployments.contracts import Constraint
from deployments.ingress.http.json_body import Body

__all__ = [
    "MAX_CONSTRAINT_BYTES",
    "MAX_CONSTRAINT_BYTES_OF_ALL",
    "ConstraintText",
    "GivenConstraint",
    "JsonSchema",
    "JsonSchemaFormat",
    "JsonSchemaOrText",
    "Labels",
    "ResponseFormat",
    "StructuredOutputsOptions",
    "json_constraint",
]

MAX_CONSTRAINT_BYTES: Final = 64 * 1024
"""Of one constraint as text, JSON included. llguidance compiles so much in some 20 ms."""
MAX_CONSTRAINT_BYTES_OF_ALL: Final = 1024 * 1024
"""A constraint's size times prompts times the choices generated for each: vLLM compiles it for each."""
_MAX_NESTING: Final = 100
"""Objects and arrays within each other in a JSON schema; serde, which reads it behind us, stops at 127."""
_MAX_LABELS: Final = 2000


class GivenConstraint(NamedTuple):
    param: str
    """The parameter, such as `structured_outputs.json`."""
    constraint: Constraint


# --- bounds ----------------------------------------------------------------------------------------------------------


def _bounded_json(value: Any) -> Any:
    """`value`, unless it is too large or too deep, or no JSON. Walks no further than the limit: it may be most of a
    large body."""
    budget = MAX_CONSTRAINT_BYTES
    level: list[Any] = [value]
    for _ in range(_MAX_NESTING + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, str):
                budget -= len(each) + 3
            elif isinstance(each, dict):
                budget -= sum(len(name) + 5 for name in each) + 2
                inner += each.values()
            elif isinstance(each, list):
                budget -= len(each) + 2
                inner += each
            elif isinstance(each, float) and not math.isfinite(each):
                raise ValueError("expected a JSON schema without NaN and Infinity")
            else:
                budget -= 4
            if budget < 0:
                raise ValueError(f"expected at most {MAX_CONSTRAINT_BYTES} bytes of JSON")
        if not inner:
            return value
        level = inner
    raise ValueError(f"expected objects and arrays at most {_MAX_NESTING} deep")


def _bounded_text(value: str) -> str:
    if len(value) > MAX_CONSTRAINT_BYTES or len(value.encode()) > MAX_CONSTRAINT_BYTES:
        raise ValueError(f"expected at most {MAX_CONSTRAINT_BYTES} bytes")
    return value


def _json_schema_or_text(value: Any) -> Any:
    if isinstance(value, str):
        return _bounded_text(value)
    if value is None or isinstance(value, dict):
        return _bounded_json(value)
    raise ValueError("expected a JSON schema, as an object or as text")


def _labels(value: list[str]) -> list[str]:
    if len(value) > _MAX_LABELS:
        raise ValueError(f"expected at most {_MAX_LABELS} labels")
    _bounded_json(value)
    return value


ConstraintText = Annotated[str, Field(min_length=1), AfterValidator(_bounded_text)]
Labels = Annotated[list[str], Field(min_length=1, fail_fast=True), AfterValidator(_labels)]
JsonSchema = Annotated[dict[str, Any], AfterValidator(_bounded_json)]
JsonSchemaOrText = Annotated[
    str | dict[str, Any] | None,
    PlainValidator(_json_schema_or_text, json_schema_input_type=str | dict[str, Any] | None),
]


# --- parameters ------------------------------------------------------------------------------------------------------


def json_constraint(schema: str | dict[str, Any], whitespace_pattern: str | None = None) -> Constraint:
    """Output that conforms to a JSON schema, given as text or as an object."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return Constraint("json", text, whitespace_pattern=whitespace_pattern)


class JsonSchemaFormat(Body):
    name: str
    """Of no effect; OpenAI demands it."""
    description: str | None = None
    """Of no effect."""
    json_schema: JsonSchema | None = Field(default=None, alias="schema")
    """What the output conforms to."""
    strict: bool | None = None
    """Of no effect: the output always conforms."""


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    """`text` constrains nothing, `json_object` is any JSON object, `json_schema` what its schema describes,
    `structural_tag` text with constrained parts."""
    json_schema: JsonSchemaFormat | None = None
    """For type `json_schema`."""
    format: Annotated[Any, AfterValidator(_bounded_json)] = None
    """For type `structural_tag`: xgrammar's newer form, which is not supported; use `structures` and `triggers`."""
    structures: Annotated[list[dict[str, Any]], Field(fail_fast=True), AfterValidator(_bounded_json)] | None = None
    """For type `structural_tag`: objects with `begin`, `schema` and `end`."""
    triggers: Annotated[list[str], Field(fail_fast=True), AfterValidator(_bounded_json)] | None = None
    """For type `structural_tag`: texts at which a structure begins."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.json_schema is None):
            raise ValueError("expected json_schema.schema beside type 'json_schema'")
        if self.type == "structural_tag" and (self.structures is None or self.triggers is None):
            raise ValueError("expected structures and triggers beside type 'structural_tag'; format is not supported")
        return self

    def constraint(self) -> GivenConstraint | None:
        if self.type == "json_object":
            return GivenConstraint("response_format", Constraint("json_object", ""))
        if self.type == "json_schema" and self.json_schema is not None:
            return GivenConstraint("response_format", json_constraint(self.json_schema.json_schema or {}))
        if self.type == "structural_tag":
            tags = {"structures": self.structures, "triggers": self.triggers}
            return GivenConstraint("response_format", Constraint("structural_tag", json.dumps(tags)))
        return None


class StructuredOutputsOptions(Body):
    """Exactly one of json, regex, choice, grammar, json_object and structural_tag."""

    json_: JsonSchemaOrText = Field(default=None, alias="json")
    """A JSON schema that the output conforms to."""
    regex: ConstraintText | None = None
    """A regular expression, in the syntax of Rust's regex crate, that the whole output matches."""
    choice: Labels | None = None
    """Texts of which the output is one."""
    grammar: ConstraintText | None = None
    """A context-free grammar that the output follows, in GBNF or in llguidance's Lark syntax."""
    json_object: bool | None = None
    """The output is any JSON object."""
    structural_tag: ConstraintText | None = None
    """A structural tag as JSON text, with `structures` and `triggers`."""
    disable_any_whitespace: bool = False
    """No whitespace between the tokens of JSON output."""
    disable_additional_properties: bool = False
    """Objects have no properties beside those of the schema, where it lists some and does not say what else there may
    be."""
    whitespace_pattern: Annotated[str, Field(max_length=100)] | None = None
    """The whitespace between the tokens of JSON output: characters of a class, any number of them, such as `[ \\n]*`;
    none if empty."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        kinds = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None, self.structural_tag)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("expected exactly one of json, regex, choice, grammar, json_object, structural_tag")
        shaping_json = self.json_ is not None or self.json_object or self.structural_tag is not None
        for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
            if not shaping_json and getattr(self, name) not in (None, False):
                raise ValueError(f"expected {name} only with json, json_object or structural_tag")
        return self

    def constraint(self) -> GivenConstraint:
        if self.json_ is not None:
            name, constraint = "json", json_constraint(self.json_)
        elif self.regex is not None:
            name, constraint = "regex", Constraint("regex", self.regex)
        elif self.choice is not None:
            name, constraint = "choice", Constraint("choice", json.dumps(self.choice))
        elif self.grammar is not None:
            name, constraint = "grammar", Constraint("grammar", self.grammar)
        elif self.structural_tag is not None:
            name, constraint = "structural_tag", Constraint("structural_tag", self.structural_tag)
        else:
            name, constraint = "json_object", Constraint("json_object", "")
        return GivenConstraint(
            f"structured_outputs.{name}",
            Constraint(
                constraint.kind,
                constraint.text,
                any_whitespace=not self.disable_any_whitespace,
                whitespace_pattern=self.whitespace_pattern,
                closed=self.disable_additional_properties,
            ),
        )
