"""What a caller may demand of the form of the output: the parameters of completion_request.py that say it, as objects.

Names are those of OpenAI's `response_format` and of vLLM 0.32's StructuredOutputsParams.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from deployments.contracts import StructuredOutputs
from deployments.ingress.parameter_types import JsonSchema, JsonSchemaOrText, json_without_nan
from deployments.ingress.request_body import Body

__all__ = ["JsonSchemaFormat", "ResponseFormat", "StructuredOutputsOptions", "json_constraint"]


def json_constraint(schema: str | dict[str, Any]) -> StructuredOutputs:
    """Output that conforms to a JSON schema, given as text or as an object."""
    return StructuredOutputs(json=schema if isinstance(schema, str) else json.dumps(schema))


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
    format: Annotated[Any, AfterValidator(json_without_nan)] = None
    """For type `structural_tag`: the structure, as xgrammar defines it."""
    structures: list[JsonSchema] | None = None
    """For type `structural_tag` in its older form: objects with `begin`, `schema` and `end`."""
    triggers: list[str] | None = None
    """For type `structural_tag` in its older form: texts at which a structure may begin."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.json_schema is None):
            raise ValueError("expected json_schema.schema beside type 'json_schema'")
        if self.type == "structural_tag" and (self.format is None) == (self.structures is None):
            raise ValueError("expected format, or structures and triggers, beside type 'structural_tag'")
        return self

    def constraint(self) -> StructuredOutputs | None:
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.type == "json_schema" and self.json_schema is not None:
            return StructuredOutputs(json=json.dumps(self.json_schema.json_schema))
        if self.type == "structural_tag":
            return StructuredOutputs(
                structural_tag=json.dumps(
                    self.model_dump(include={"type", "format", "structures", "triggers"}, exclude_none=True)
                )
            )
        return None


class StructuredOutputsOptions(Body):
    """Exactly one of json, regex, choice, grammar, json_object and structural_tag."""

    json_: JsonSchemaOrText = Field(default=None, alias="json")
    """A JSON schema that the output conforms to."""
    regex: Annotated[str, Field(min_length=1)] | None = None
    """A regular expression that the whole output matches."""
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    """Texts of which the output is one."""
    grammar: Annotated[str, Field(min_length=1)] | None = None
    """A context-free grammar in EBNF, or in Lark's form, that the output follows."""
    json_object: bool | None = None
    """The output is any JSON object."""
    structural_tag: Annotated[str, Field(min_length=1)] | None = None
    """A structural tag of xgrammar, as JSON text."""
    disable_any_whitespace: bool = False
    """No whitespace between the tokens of JSON output."""
    disable_additional_properties: bool = False
    """Objects have no properties beside those of the schema."""
    whitespace_pattern: str | None = None
    """A regular expression for whitespace between the tokens of JSON output."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        kinds = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None, self.structural_tag)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("expected exactly one of json, regex, choice, grammar, json_object, structural_tag")
        return self

    def constraint(self) -> StructuredOutputs:
        return StructuredOutputs(
            json=None if self.json_ is None else json_constraint(self.json_).json,
            regex=self.regex,
            choice=None if self.choice is None else tuple(self.choice),
            grammar=self.grammar,
            json_object=self.json_object or None,
            structural_tag=self.structural_tag,
            disable_any_whitespace=self.disable_any_whitespace,
            disable_additional_properties=self.disable_additional_properties,
            whitespace_pattern=self.whitespace_pattern,
        )
