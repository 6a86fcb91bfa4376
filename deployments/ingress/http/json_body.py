"""JSON bodies checked to the last key: what all their models have in common, and how a caller is told of a mistake.

A large body is parsed in a worker thread, where each step still keeps the GIL from the event loop. So it is looked at
first, by what costs next to nothing: how many strings and escapes it has, and how long its parameters are. What is left
to be parsed takes less than 50 ms: tests/deployments/ingress/http/test_request_body.py has the worst of it.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Final, TypeVar

import msgspec
import pydantic_core
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from pydantic import BaseModel, ConfigDict, ValidationError

from deployments.ingress.errors import InvalidRequest

__all__ = ["INT32_MAX", "MAX_PROMPTS", "Body", "parse_body", "parsed", "parsed_body"]

INT32_MAX = 2**31 - 1
"""What engines keep in 32 bits."""

MAX_PROMPTS: Final = 1024
"""Of one request."""

_SMALL_BODY_BYTES: Final = 64 * 1024
"""No body of this size takes long, whatever is in it."""
_MAX_PARAMETER_BYTES: Final = 128 * 1024
"""Of JSON, for each parameter that is no content."""
_MAX_PARAMETERS_BYTES: Final = 256 * 1024
"""For all of them together, with the whitespace between them."""
_MAX_STRINGS: Final = 2**16
_MAX_ESCAPES: Final = 2**19
"""As in `\\n` and `\\u732b`."""
_MAX_TOKEN_IDS: Final = 2**17
_MAX_OUTSIDE_BYTES: Final = 32 * _MAX_TOKEN_IDS
"""Outside of strings: numbers, brackets and whitespace."""

_MAX_QUOTED = 200
"""Characters of what the caller wrote that a message repeats."""


class Body(BaseModel):
    """Strict: no number for a string, no NaN, no key that is not known. The docstrings of its fields describe them in
    the OpenAPI document and in docs/api.md."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    content: ClassVar[frozenset[str]] = frozenset()
    """Parameters that may be as long as the body: texts, arrays of texts, token ids, or arrays of these."""


B = TypeVar("B", bound=Body)
T = TypeVar("T")

_parsers = CapacityLimiter(1)
"""More would only wait for the GIL, each with a body in its hands."""


async def parsed(body: bytes, parse: Callable[[bytes], T]) -> T:
    """`parse(body)`, off the event loop if the body is large. Raises what `parse` raises."""
    if len(body) <= _SMALL_BODY_BYTES:
        return parse(body)
    return await run_sync(parse, body, limiter=_parsers)


async def parsed_body(body: bytes, kind: type[B]) -> B:
    """`parse_body(body, kind)`, off the event loop if the body is large."""
    return await parsed(body, partial(parse_body, kind=kind))


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
    if len(body) > _SMALL_BODY_BYTES:
        _look_at(body, kind)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if (mark := next((name for start, name in _BYTE_ORDER_MARKS if body.startswith(start)), None)) is not None:
            raise InvalidRequest(
                f"The body is not valid JSON: it begins with a byte order mark of {mark}. Send UTF-8 without one.",
                kind="json_invalid",
            ) from None
        raise _explained(error.errors(include_url=False, include_input=False)[0]) from None


def _look_at(body: bytes, kind: type[Body]) -> None:
    """Raises InvalidRequest where parsing would take long."""
    escapes = body.count(b"\\")
    if escapes > _MAX_ESCAPES:
        raise InvalidRequest(
            f"The body has {escapes} backslashes; expected at most {_MAX_ESCAPES}. Send text as UTF-8."
        )
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"") if escapes else body
    quotes = bare.count(b'"')
    if quotes > 2 * _MAX_STRINGS:
        raise InvalidRequest(f"The body has {quotes // 2} strings; expected at most {_MAX_STRINGS}.")
    known = {field.alias or name for name, field in kind.model_fields.items()}
    _look_outside_strings(bare, known)
    try:
        parameters = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise InvalidRequest("The body must be a JSON object.", kind="model_type") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {_malformed(error)}.", kind="json_invalid") from None
    rest = len(body)
    for name, raw in parameters.items():
        if name not in known:
            raise _unknown((name[:_MAX_QUOTED],))
        size = len(memoryview(raw))
        if name in kind.content:
            _look_at_content(name, bytes(raw))
            rest -= size
        elif size > _MAX_PARAMETER_BYTES:
            raise _invalid(name, f"expected at most {_MAX_PARAMETER_BYTES} bytes of JSON; it has {size}")
    if rest > _MAX_PARAMETERS_BYTES:
        beside = f" beside {' and '.join(sorted(kind.content))}" if kind.content else ""
        raise InvalidRequest(f"The body has {rest} bytes{beside}; expected at most {_MAX_PARAMETERS_BYTES}.")


def _look_outside_strings(body: bytes, known: set[str]) -> None:
    """`body` is without escaped quotes."""
    pieces = body.split(b'"')
    outside = pieces[::2]
    size = sum(map(len, outside))
    if size <= _MAX_OUTSIDE_BYTES:
        return
    longest = outside.index(max(outside, key=len))
    before = pieces[2 * longest - 1] if longest else b""
    name = next((name for name in known if name.encode() == before), None)
    most = f", most of them of '{name}'" if name is not None else ""
    raise InvalidRequest(
        f"The body has {size} bytes of numbers, brackets and spaces{most}; expected at most {_MAX_OUTSIDE_BYTES}, and "
        f"at most {_MAX_TOKEN_IDS} token ids.",
        param=name,
    )


def _look_at_content(name: str, raw: bytes) -> None:
    if not raw.startswith((b"[", b'"', b"null")):
        raise _invalid(name, "expected a string or an array")
    if raw.startswith(b"[") and b'"' in raw:
        try:
            texts = len(msgspec.json.decode(raw, type=list[str]))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise _invalid(name, "expected an array of strings, of token ids, or of arrays of token ids") from None
        if texts > MAX_PROMPTS:
            raise _invalid(name, f"expected at most {MAX_PROMPTS} strings; it has {texts}")
    elif raw.startswith(b"["):
        lists, values = raw.count(b"[") - 1, raw.count(b",") + 1
        if values > _MAX_TOKEN_IDS:
            raise _invalid(name, f"expected at most {_MAX_TOKEN_IDS} token ids; it has {values}")
        if lists > MAX_PROMPTS:
            raise _invalid(name, f"expected at most {MAX_PROMPTS} arrays; it has {lists}")


def _unknown(location: tuple[str | int, ...]) -> InvalidRequest:
    param = ".".join(map(str, location))
    return InvalidRequest(
        f"Unrecognized request argument supplied: {param}.", param=param, location=location, kind="extra_forbidden"
    )


def _invalid(name: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid value for '{name}': {expected}.", param=name)


def _malformed(error: Exception) -> str:
    """In msgspec's words, which tell the place; nothing of the body is in them."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return str(error).removeprefix("JSON is malformed: ")


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
    if kind == "extra_forbidden":
        return _unknown(location)
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
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
