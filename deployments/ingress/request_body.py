"""JSON bodies checked to the last key: what all their models have in common, and how a caller is told of a mistake."""

from __future__ import annotations

import codecs
from typing import TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError

from deployments.ingress.errors import InvalidRequest

__all__ = ["INT32_MAX", "Body", "parse_body"]

INT32_MAX = 2**31 - 1
"""What engines keep in 32 bits."""

_MAX_QUOTED = 200
"""Characters of what the caller wrote that a message repeats."""


class Body(BaseModel):
    """Strict: no number for a string, no NaN, no key that is not known. The docstrings of its fields describe them in
    the OpenAPI document and in docs/api.md."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


B = TypeVar("B", bound=Body)

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32"),  # begins like that of UTF-16
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
"""What editors and PowerShell put before a text, and JSON does not allow: RFC 8259, section 8.1."""


def parse_body(body: bytes, kind: type[B]) -> B:
    """Raises InvalidRequest that names the first wrong parameter and says what was expected. Of a key that comes twice
    the last one counts."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if (mark := next((name for start, name in _BYTE_ORDER_MARKS if body.startswith(start)), None)) is not None:
            raise InvalidRequest(
                f"The body is not valid JSON: it begins with a byte order mark of {mark}. Send UTF-8 without one.",
                kind="json_invalid",
            ) from None
        raise _explained(error.errors(include_url=False, include_input=False)[0]) from None


_KINDS: dict[str, str] = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "string_unicode": "text that is valid Unicode",
}


def _explained(error: pydantic_core.ErrorDetails) -> InvalidRequest:
    kind, context = error["type"], error.get("ctx", {})
    location = tuple(part[:_MAX_QUOTED] if isinstance(part, str) else part for part in error["loc"])
    param = ".".join(map(str, location))
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {context['error']}.", kind=kind)
    if not location:
        return InvalidRequest("The body must be a JSON object.", kind=kind)
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
    elif kind == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}."
    else:
        message = f"Invalid value for '{param}': {_expected(error)}."
    return InvalidRequest(message, param=param, location=location, kind=kind)


def _expected(error: pydantic_core.ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "value_error":
            return str(context["error"])
        case "too_long":
            return f"expected an array of at most {context['max_length']}"
        case "too_short":
            return f"expected an array of at least {context['min_length']}"
        case "string_too_long":
            return f"expected at most {context['max_length']} characters"
        case "string_too_short":
            return f"expected at least {context['min_length']} character"
        case "string_pattern_mismatch":
            return f"expected a string that matches {context['pattern']}"
        case "literal_error":
            return f"expected {context['expected']}"
        case _ if kind in _KINDS:
            return f"expected {_KINDS[kind]}"
        case _:
            return error["msg"].replace("Input should be", "expected a value")
