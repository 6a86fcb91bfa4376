"""Tables of docs/api.md, made from the models that check requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from deployments.ingress.api.description.json_schemas import Json, schemas_of
from deployments.ingress.api.parameter_types import NotServed, Source
from deployments.ingress.http.json_body import Body

__all__ = [
    "as_json",
    "default_of",
    "introduction",
    "nested_objects",
    "parameter_table",
    "properties",
    "query_table",
    "refusal_of",
    "source_of",
    "table",
    "values",
]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return (
        "".join("| " + " | ".join(line) + " |\n" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")
    )


def properties(model: type[Body]) -> dict[str, Json]:
    told: dict[str, Json] = schemas_of([model])[model.__name__]["properties"]
    return told


def nested_objects(model: type[Body]) -> Iterator[tuple[str, type[Body]]]:
    """The parameters that are objects with parameters of their own."""
    for name, field in model.model_fields.items():
        for part in get_args(field.annotation):
            if isinstance(part, type) and issubclass(part, Body):
                yield name, part
                yield from ((f"{name}.{inner}", kind) for inner, kind in nested_objects(part))


def introduction(model: type[Body]) -> str:
    text = schemas_of([model])[model.__name__].get("description")
    return f"{text}\n\n" if text else ""


def parameter_table(model: type[Body], *, source: bool = True) -> str:
    fields = {field.alias or name: (name, field) for name, field in model.model_fields.items()}
    rows = [
        [
            f"`{name}`",
            values(schema),
            default_of(model, fields[name][0]),
            *([source_of(fields[name][1].metadata)] if source else []),
            schema.get("description", ""),
        ]
        for name, schema in properties(model).items()
        if refusal_of(fields[name][1].metadata) is None
    ]
    return table(("parameter", "value", "default", *(["source"] if source else []), "effect"), rows)


def query_table(parameters: Sequence[Json]) -> str:
    rows = [(f"`{each['name']}`", values(each["schema"]), each["description"]) for each in parameters if "name" in each]
    return table(("parameter", "value", "effect"), rows)


def source_of(metadata: Sequence[Any]) -> str:
    return next((each.name for each in metadata if isinstance(each, Source)), "")


def refusal_of(metadata: Sequence[Any]) -> NotServed | None:
    return next((each for each in metadata if isinstance(each, NotServed)), None)


def default_of(model: type[Body], name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    if field.default in (None, (), ""):
        return ""
    return f"`{as_json(field.default)}`"


def as_json(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


# --- values, from their JSON schemas -------------------------------------------------------------------------------


def values(schema: Json) -> str:
    if "anyOf" in schema:
        return " or ".join(values(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    match schema.get("type"):
        case "integer" | "number" as kind:
            return f"{kind}{_range(schema)}"
        case "array" if "enum" in schema["items"]:
            return f"some of {values(schema['items'])}"
        case "array":
            return f"{_array(schema)}{_plural(schema['items'])}"
        case "string":
            if "pattern" in schema:
                return f"string like `{schema['pattern']}`"
            length = f" of up to {schema['maxLength']} characters" if "maxLength" in schema else ""
            return f"{'non-empty ' if schema.get('minLength') else ''}string{length}"
        case "object" | None:
            return "object" if schema.get("type") or "$ref" in schema else "any"
        case kind:
            return str(kind)


def _plural(schema: Json) -> str:
    if "anyOf" in schema:
        return "strings or numbers"
    if schema.get("type") == "array":
        return f"{'non-empty ' if schema.get('minItems') else ''}arrays of {_plural(schema['items'])}"
    if schema.get("type") == "integer":
        return "token ids"
    return "non-empty strings" if schema.get("minLength") else f"{schema['type']}s"


def _array(schema: Json) -> str:
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    if most is None:
        return "non-empty array of " if least else "array of "
    return f"array of {least or 'up'} to {most} "


def _range(schema: Json) -> str:
    low, above, high = schema.get("minimum"), schema.get("exclusiveMinimum"), schema.get("maximum")
    if above is not None and high is None:
        return f", above {_number(above)}"
    if above is not None and high is not None:
        return f", above {_number(above)} and up to {_number(high)}"
    return "" if low is None or high is None else f", {_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    for bits in (31, 53, 63):
        if value == 2**bits - 1:
            return f"2^{bits} - 1"
        if value == -(2**bits):
            return f"-2^{bits}"
    return f"{value:g}"
