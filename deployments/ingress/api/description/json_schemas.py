"""JSON schemas (2020-12) of the models of bodies and answers, for all that describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue, models_json_schema

__all__ = ["Json", "schemas_of"]

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
