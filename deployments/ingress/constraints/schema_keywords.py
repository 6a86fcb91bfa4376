"""Which keywords of JSON Schema (2020-12) constrain the output, and the schema that llguidance gets instead of the
caller's: only what is held, so that nothing is ignored in silence.

llguidance refuses most of what it cannot hold. What it takes and does not hold, or holds otherwise than a validator
reads it, is refused here, by name. docs/api.md has the table; a test holds each row against what is generated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

from deployments.ingress.constraints.schema_patterns import pattern_within_dialects

__all__ = ["ANNOTATIONS", "FORMATS", "HELD", "REFUSED", "SchemaRefused", "held_schema"]

HELD: Final[Mapping[str, str]] = {
    "type": "",
    "enum": "numbers of at most 15 digits",
    "const": "numbers of at most 15 digits",
    "anyOf": "",
    "allOf": "",
    "oneOf": "where no value can conform to two of them, as types or constants show; else refused",
    "$ref": "to a schema of the same document, as `#` or `#/$defs/name`; else refused",
    "$defs": "",
    "definitions": "the same as `$defs`",
    "properties": "",
    "required": "",
    "additionalProperties": "",
    "patternProperties": "where no name can match two of the patterns; else refused",
    "minProperties": "at most one more than `required` has: a name that is free may come twice, and parsers take "
    "that for one. Only where all `properties` are required",
    "maxProperties": "only where all `properties` are required",
    "items": "a schema; refused as an array, which `prefixItems` has replaced",
    "prefixItems": "",
    "minItems": "at most 10,000",
    "maxItems": "at most 10,000",
    "minLength": "at most 100,000",
    "maxLength": "at most 100,000",
    "pattern": "what ECMAScript, Python and Rust read alike: no look-around, back-references, "
    "`\\b`, `\\D`, `\\W` and `\\p`",
    "format": "",
    "minimum": "",
    "maximum": "",
    "exclusiveMinimum": "",
    "exclusiveMaximum": "",
    "multipleOf": "an integer, beside a `type` with `integer` and without `number`: validators round fractions",
    "uniqueItems": "only `false`, which asks for nothing; `true` is refused",
}
"""Keyword -> what is held of it; empty for all of it."""

REFUSED: Final[frozenset[str]] = frozenset(
    {
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "propertyNames",
        "unevaluatedProperties",
        "unevaluatedItems",
        "additionalItems",
        "$anchor",
        "$dynamicRef",
        "$dynamicAnchor",
        "$recursiveRef",
        "$recursiveAnchor",
        "$vocabulary",
        "extends",
        "disallow",
        "divisibleBy",
        "x-guidance",
    }
)

ANNOTATIONS: Final[tuple[str, ...]] = (
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
    "$schema",
    "$id",
    "contentEncoding",
    "contentMediaType",
    "contentSchema",
)
"""Of no effect on the output, by JSON Schema's own rules; so is every keyword that it does not define."""

_YEAR: Final = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_DAY: Final = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_LEAP_YEAR: Final = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE: Final = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR: Final = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_DATE_TIME: Final = f"{_DATE}T{_HOUR}:[0-5][0-9](?:\\.[0-9]{{1,9}})?(?:Z|[+-]{_HOUR})"

FORMATS: Final[Mapping[str, str | None]] = {
    "date": f"^{_DATE}$",
    "date-time": f"^{_DATE_TIME}$",
    "duration": None,
    "email": None,
    "hostname": None,
    "ipv4": None,
    "ipv6": None,
    "uri": None,
    "uuid": None,
}
"""Format -> our pattern where llguidance's own lets through what is none, such as 29 February of any year."""

_TYPES: Final = frozenset({"null", "boolean", "object", "array", "number", "string", "integer"})
_PROPERTY_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS: Final = ("anyOf", "allOf", "oneOf", "prefixItems")
_SCHEMAS: Final = ("items", "additionalProperties")
_COUNTS: Final[Mapping[str, int]] = {
    "minProperties": 10_000,
    "maxProperties": 10_000,
    "minItems": 10_000,
    "maxItems": 10_000,
    "minLength": 100_000,
    "maxLength": 100_000,
}
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LARGEST: Final = 10**15
"""Beyond it llguidance, which reads numbers as doubles, writes others than it was given."""
_DRAFTS: Final = re.compile(
    r"https?://json-schema\.org/(?:draft/2020-12|(?P<older>draft/2019-09|draft-07|draft-06))/schema#?"
)


class SchemaRefused(Exception):
    """`args[0]` says in words for the caller what is refused, and where in the schema."""


def held_schema(schema: Any, *, closed: bool = False) -> dict[str, Any]:
    """The schema that is given to llguidance in the place of `schema`. `closed` adds `additionalProperties: false` to
    each that lists properties and does not say what else there may be. Raises SchemaRefused."""
    if isinstance(schema, bool):
        if not schema:
            raise SchemaRefused("The schema is false: nothing conforms to it")
        return {}
    return _Walk(schema, closed).held()


class _Walk:
    def __init__(self, root: Any, closed: bool) -> None:
        self._root = root
        self._closed = closed
        self._places: set[str] = set()
        """JSON pointers of all schemas within the root."""
        self._references: list[tuple[str, str]] = []
        self._older = False

    def held(self) -> dict[str, Any]:
        if isinstance(self._root, dict) and "$schema" in self._root:
            draft = self._root["$schema"]
            known = _DRAFTS.fullmatch(draft) if isinstance(draft, str) else None
            if known is None:
                raise SchemaRefused("'$schema' is not one of JSON Schema's 2020-12, 2019-09, draft-07 and draft-06")
            self._older = known["older"] is not None
        held: dict[str, Any] = self._schema(self._root, "#")
        for place, reference in self._references:
            if reference not in self._places:
                raise SchemaRefused(
                    f"'$ref' at {_shown(place)} is {reference[:80]!r}; expected a schema of this document, such as "
                    "'#/$defs/name'"
                )
        return held

    def _schema(self, schema: Any, place: str) -> Any:
        self._places.add(place)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaRefused(f"The schema at {_shown(place)} is no object")
        held: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in REFUSED:
                raise SchemaRefused(f"The keyword '{keyword}' at {_shown(place)} is not supported")
            if keyword == "$id" and place != "#":
                raise SchemaRefused(f"The keyword '$id' at {_shown(place)} is not supported within a schema")
            if keyword == "$schema" and place != "#":
                raise SchemaRefused(f"The keyword '$schema' at {_shown(place)} is not supported within a schema")
            if keyword in HELD:
                self._keyword(held, keyword, value, place)
        if (
            self._closed
            and "additionalProperties" not in held
            and ("properties" in held or "patternProperties" in held)
        ):
            held["additionalProperties"] = False
        if "multipleOf" in held and "number" in held.get("type", "number"):
            raise SchemaRefused(
                f"The keyword 'multipleOf' at {_shown(place)} is not supported without a 'type' that is 'integer' "
                "rather than 'number'"
            )
        least, names = held.get("minProperties", 0), set(held.get("required", ()))
        if least > len(names) + 1:
            raise SchemaRefused(
                f"The value of 'minProperties' at {_shown(place)} is not supported: expected at most one more than "
                "'required' has names"
            )
        return held

    def _keyword(self, held: dict[str, Any], keyword: str, value: Any, place: str) -> None:
        if keyword in _PROPERTY_MAPS:
            if not isinstance(value, dict):
                raise _unexpected(keyword, place, "an object of schemas")
            held[keyword] = {
                (pattern_of(name, place) if keyword == "patternProperties" else name): self._schema(
                    inner, f"{place}/{keyword}/{_pointer(name)}"
                )
                for name, inner in value.items()
            }
        elif keyword in _SCHEMA_LISTS:
            if not isinstance(value, list) or not value:
                raise _unexpected(keyword, place, "a non-empty array of schemas")
            if keyword == "prefixItems" and self._older:
                raise SchemaRefused(
                    f"The keyword 'prefixItems' at {_shown(place)} is not in the draft that '$schema' names"
                )
            held[keyword] = [self._schema(inner, f"{place}/{keyword}/{at}") for at, inner in enumerate(value)]
        elif keyword in _SCHEMAS:
            if isinstance(value, list):
                raise _unexpected(keyword, place, "a schema; for an array of schemas use 'prefixItems'")
            held[keyword] = self._schema(value, f"{place}/{keyword}")
        elif keyword == "$ref":
            if not isinstance(value, str):
                raise _unexpected(keyword, place, "a string")
            self._references.append((place, "#" if value == "#/" else value))
            held[keyword] = value
        else:
            self._assertion(held, keyword, value, place)

    def _assertion(self, held: dict[str, Any], keyword: str, value: Any, place: str) -> None:
        match keyword:
            case "type":
                names = value if isinstance(value, list) else [value]
                if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
                    raise _unexpected(keyword, place, "one or more of JSON's types")
            case "enum":
                if not isinstance(value, list) or not value:
                    raise _unexpected(keyword, place, "a non-empty array")
                _check_numbers(value, keyword, place)
            case "const":
                _check_numbers(value, keyword, place)
            case "required":
                if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                    raise _unexpected(keyword, place, "an array of strings")
            case "uniqueItems":
                if value is not False:
                    raise SchemaRefused(f"The keyword 'uniqueItems' at {_shown(place)} is not supported")
                return
            case "pattern":
                value = pattern_of(value, place)
            case "format":
                if not isinstance(value, str) or value not in FORMATS:
                    raise _unexpected(keyword, place, f"one of {', '.join(FORMATS)}")
                if (pattern := FORMATS[value]) is not None:
                    held["allOf"] = [*held.get("allOf", []), {"pattern": pattern}]
                    return
                if value == "hostname":
                    held["allOf"] = [*held.get("allOf", []), {"maxLength": 253}]
            case "multipleOf":
                if type(value) is not int or not 0 < value <= _LARGEST:
                    raise _unexpected(keyword, place, "an integer above 0")
            case _ if keyword in _COUNTS:
                if not _is_integer(value) or not 0 <= value <= _COUNTS[keyword]:
                    raise _unexpected(keyword, place, f"an integer from 0 to {_COUNTS[keyword]}")
                value = int(value)
            case _ if keyword in _BOUNDS:
                if not _is_number(value) or not -_LARGEST <= value <= _LARGEST:
                    raise _unexpected(keyword, place, f"a number from {-_LARGEST} to {_LARGEST}")
        if keyword == "allOf":
            value = [*held.get("allOf", []), *value]
        held[keyword] = value


def pattern_of(pattern: Any, place: str) -> str:
    """`pattern` as llguidance gets it. Raises SchemaRefused where its readers would differ on it."""
    if not isinstance(pattern, str):
        raise _unexpected("pattern", place, "a string")
    try:
        return pattern_within_dialects(pattern)
    except ValueError as error:
        raise SchemaRefused(f"The pattern {pattern[:80]!r} at {_shown(place)} is not supported: {error}") from None


def _unexpected(keyword: str, place: str, expected: str) -> SchemaRefused:
    return SchemaRefused(f"The value of '{keyword}' at {_shown(place)} is not supported: expected {expected}")


def _shown(place: str) -> str:
    """A JSON pointer for the caller, who may take one for a path of ours."""
    return (
        "the root" if place == "#" else place.removeprefix("#/").replace("/", ".").replace("~1", "/").replace("~0", "~")
    )


def _pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _check_numbers(value: Any, keyword: str, place: str) -> None:
    """Numbers within constants that llguidance would write otherwise."""
    if isinstance(value, dict):
        for inner in value.values():
            _check_numbers(inner, keyword, place)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, keyword, place)
    elif type(value) in (int, float) and not (
        _is_number(value) and -_LARGEST < value < _LARGEST and len(json.dumps(value).strip("-").replace(".", "")) <= 16
    ):
        raise _unexpected(keyword, place, "numbers of at most 15 digits")
