"""JSON schemas (2020-12) of the models of bodies and answers, for whoever describes them: the OpenAPI document,
`Completion.json` and docs/api.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue, models_json_schema

from deployments.ingress.openapi.answer_models import Completion

__all__ = ["Json", "completion_schema", "schemas_of"]

Json = dict[str, Any]


class _Generator(GenerateJsonSchema):
    """Without titles, which repeat the names, and without defaults that mean absence."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        if schema.get("default") in (None, [], "", ()):
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def schemas_of(
    models: Sequence[type[BaseModel]], ref_template: str = "#/components/schemas/{model}"
) -> dict[str, Json]:
    """JSON schemas by name, of `models` and of all that they refer to."""
    mode: JsonSchemaMode = "validation"
    _, definitions = models_json_schema(
        [(model, mode) for model in models], ref_template=ref_template, schema_generator=_Generator
    )
    schemas: dict[str, Json] = definitions["$defs"]
    for schema in schemas.values():
        del schema["title"]
        _unwrap(schema)
    return schemas


def _unwrap(schema: Json) -> None:
    """Descriptions are docstrings, broken into lines."""
    for described in (schema, *schema.get("properties", {}).values()):
        if "description" in described:
            described["description"] = " ".join(described["description"].split())


@cache
def completion_schema() -> Json:
    """What the `$schema` of an answer refers to."""
    definitions = schemas_of([Completion], "#/$defs/{model}")
    completion = definitions.pop("Completion")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Completion",
        **completion,
        "$defs": definitions,
    }
