"""docs/api.md, made from what the ingress runs on: dialects, parameters, errors and endpoints cannot be told otherwise
than they are. After a change of any of them:

    .venv/bin/python -m deployments.ingress.openapi.markdown > docs/api.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, get_args

from deployments.ingress.api.completions.dialects import D1, D3, DIALECTS, SCHEMA_PATH, Dialect
from deployments.ingress.api.completions.request import CompletionRequest
from deployments.ingress.api.keys import CreateKeyRequest, LimitsRequest
from deployments.ingress.api.parameter_types import NotServed, Source
from deployments.ingress.api.tokens import DetokenizeRequest, TokenizeRequest
from deployments.ingress.constraints.constraint import MAX_CONSTRAINT_BYTES, MAX_CONSTRAINT_BYTES_OF_ALL
from deployments.ingress.constraints.limits import CHECK_CPU_S
from deployments.ingress.constraints.schema_keywords import ANNOTATIONS, FORMATS, HELD, REFUSED
from deployments.ingress.errors import InvalidRequest
from deployments.ingress.http.json_body import Body
from deployments.ingress.openapi.administration import ADMIN_SECURITY
from deployments.ingress.openapi.answers import error_classes
from deployments.ingress.openapi.document import openapi_document
from deployments.ingress.openapi.json_schemas import Json, schemas_of

__all__ = ["api_reference"]

_HEAD: Final = """\
# API

Made by `.venv/bin/python -m deployments.ingress.openapi.markdown > docs/api.md` from the models that check requests; a
test compares. The same as OpenAPI 3.1: `GET /openapi.json`, and to read and try: `GET /docs`.
"""

_DIALECTS: Final = """\
## Dialects

There is one completion endpoint with four faces, so that clients of four APIs can be pointed here without a change.
D3 is OpenAI's own; D0 shares its path and is chosen by the header of its key, `x-llm-api-key`. What the document of a
dialect leaves open is as in D3.
"""

_BODIES: Final = """\
Bodies are JSON objects, declared as `content-type: application/json`. They are checked to the last key:

- An unknown parameter is refused by name, and so is a known one with a value of another type: no number in a string, no
  1.0 for an integer, no NaN.
- Null stands for the default.
- Of a key that comes twice in an object the last one counts.
- Invalid UTF-8, lone surrogates and a byte order mark are refused.
- A body may be packed with gzip, `content-encoding: gzip`; its limit holds for what it unpacks to.
- `prompt`, `suffix` and `tokens` may be as long as the body, with up to 1024 texts or arrays, or 131072 token ids. All
  else has at most 128 KiB of JSON per parameter and 256 KiB together. A body has at most 65536 strings, 524288
  backslashes (send text as UTF-8, not as `\\u732b`) and 4 MiB outside of strings. Bodies of up to 64 KiB may have
  anything.
"""

_PARAMETERS: Final = """\
## Parameters of a completion

The source is the document that a parameter comes from: OpenAI's Completions reference, vLLM 0.32's `CompletionRequest`,
and, where they name it, the documents of the dialects; or another server, whose clients send it.
"""

_FORMS: Final = """\
## The form of the output

A request that asks for a form (`response_format`, `structured_outputs`, `guided_…`) is checked before it is admitted,
in at most {cpu_s:g} s of CPU time: there must be output that conforms, and tokens for it that other parameters leave.
All replicas hold it by the same library, llguidance.

An answer whose `finish_reason` is `stop` conforms, unless the request itself had it cut: by `stop`, by
`stop_token_ids` or by `repetition_detection`. Then, and with `length`, it is the beginning of output that conforms.
Where neither can be, since `min_tokens` or banned tokens contradict the form later than at its beginning,
or it is too complex for the engine, there is an error of code `output_not_conforming`, as an event if a stream has
begun. An answer in a form whose replica is lost after it has begun ends with an error as well.

Of one constraint there are at most {max_bytes} bytes, JSON included, and all candidates of all prompts have one each:
{all_bytes} bytes together. A `regex` is in the syntax of Rust's crate of that name and matches the whole output.
Structural tags have `structures` and `triggers`; triggers that are special tokens of the model are taken for these.

### Keywords of JSON Schema

In the draft 2020-12; `$schema` may name 2019-09, draft-07 or draft-06, if the schema has no `prefixItems`. What is
refused is refused with 400, and the message names the keyword and where it stands. Formats that are held:
{formats}.
"""

_NARROWED: Final = """\
### What a dialect narrows, widens or adds
"""

_NOT_SERVED: Final = """\
### What is known from other servers and not served

Null and the value in the table are accepted, so that clients that send every parameter go on working, and so is an
empty array where the value is an empty text. All else is refused.
"""

_ANSWER: Final = """\
## The answer

`id`, `object`, `created`, `model`, `system_fingerprint`, `choices` and `usage`; their schema is served at
`{schema_path}`, to which the `$schema` of {d1}'s answers points. Choices are ordered by prompt and
then by `n`, and `index` runs over all. `usage` counts each prompt once, and every token generated, those of all
`best_of` candidates included. Log probabilities are in OpenAI's legacy format, `tokens`, `token_logprobs`,
`top_logprobs`, `text_offset`; with `echo` those of the prompt come first. What was not asked for is null, as in vLLM's
answers.

### Streams

With `stream` the answer is `text/event-stream`: `data: {{chunk}}` for each delta, then `data: [DONE]`.

- All chunks have the same `id`, `created` and `model`. Texts are whole characters and hold back what may become a stop
  string.
- The last chunk of a choice has its `finish_reason`. Chunks of several choices come interleaved; `index` tells them
  apart.
- With `stream_options.include_usage` one more chunk comes before `[DONE]`, with the usage and no choices; all others
  have `usage: null`. With `continuous_usage_stats` each has the usage of its choice so far.
- An error before the first byte is a status as below. Later it is an event, `data: {{"error": {{...}}}}`, and no
  `[DONE]` follows.
- A comment, `: keep-alive`, is sent while nothing else was for some time (`ingress.keep_alive_s`, 15 s). Clients ignore
  it.
- A client that closes the connection ends the generation.

### Where it differs from vLLM's own server

Texts, log probabilities, offsets, reasons and usage are those of vLLM's server on the same weights
(tests/conformance/test_values.py), but for these:

- `max_tokens: 0` counts no completion token and ends with `length`; vLLM counts the one that it makes to score with.
- `echo` with `return_token_ids` keeps the prompt's text, and a truncated prompt is echoed as the model saw it.
- Of tokens that read alike, such as parts of characters, `top_logprobs` has all: the chosen one by its text, the others
  by their bytes, as in `bytes:\\xe2\\x80`, which is OpenAI's form. In vLLM's only the last of them is left.
- `best_of` exists, and `finish_reason` is only ever `stop` or `length`: a repetition is told by `stop_reason`.
- Unknown parameters are refused, and so are values out of OpenAI's ranges. Beam search is not served.
- What was not asked for, such as `prompt_logprobs` and `token_ids`, is left out of a choice; vLLM writes null.
- Errors have the same status, and texts of their own.
"""

_ERRORS: Final = """\
## Errors

The body is `{"error": {"message", "type", "param", "code"}}`, which OpenAI's client turns into its exceptions. Where a
dialect says 422, an invalid body is answered `{"detail": [{"loc", "msg", "type"}]}` instead.
"""

_HEADERS: Final = """\
## Headers

| header | of | meaning |
|---|---|---|
| `authorization` | request | `Bearer KEY`; see the dialects for other places of the key |
| `x-llm-api-key` | request | the key, with or without `Bearer`; chooses D0 on `/v1/completions` |
| `x-request-id` | request | names the request: up to 128 of `A-Z a-z 0-9 . _ -`; what does not conform is replaced |
| `x-request-id` | answer | the same, or the server's own |
| `x-ratelimit-limit-…` | answer | of `requests` and `tokens`: the narrowest limit per minute of the key and its team |
| `x-ratelimit-remaining-…` | answer | what is left of it |
| `x-ratelimit-reset-…` | answer | until all of it is there again, as in `6m0s` |
| `retry-after` | answer | seconds, where a retry helps |
| `x-should-retry` | answer | `false`, with a 429 that would never be admitted |
| `www-authenticate` | answer | `Bearer`, with 401 |
| `allow` | answer | the methods there are, with 405 |
"""

_USAGE: Final = """\
## Usage

`GET /v1/usage` tells what the key that asks has used:
"""

_ORGANIZATION_USAGE: Final = """\
`GET /v1/organization/usage/completions` is OpenAI's Usage API, for dashboards made for it; projects are teams. Answers
are pages of buckets, which begin at whole minutes, hours or days in UTC:
"""

_KEYS: Final = """\
## Keys and teams

With the admin key, which is in `MILLSTREAM_HOME/admin.key`. A change acts after 5 seconds at most; a new key works at
once. Limits of a team hold for all its keys together, beside their own. `millstream keys` and `millstream teams` do the
same from the command line, on the database itself.

`POST /admin/v1/keys` answers 201 with the key and its secret, `key`, which is not shown again and not kept: only its
SHA-256 is.
"""

_LIMITS: Final = """\
`limits`, of keys and teams. Null sets no limit; minutes slide, days and months are those of UTC, and tokens are
prompt + completion, with `max_tokens` of every choice until the request has ended:
"""

_CHANGES: Final = """\
`PATCH /admin/v1/keys/{key_id}` takes the same, all of it optional. What is left out stays as it is, each of the limits
too, and null takes a value away. `DELETE` revokes the key for good, and `POST /admin/v1/keys/{key_id}/rotate` answers
the same key with another secret. `PUT /admin/v1/teams/{name}` takes `{"limits": {...}}`, all of them: those that are
left out are lifted. A team need not be made before its first key.
"""


def api_reference() -> str:
    return (
        "\n".join(
            [
                _HEAD,
                "## Endpoints\n",
                _table(("endpoint", "what it does", "key"), _endpoints()),
                "HEAD is answered wherever GET is.\n",
                _DIALECTS,
                _dialect_table(),
                _BODIES,
                _PARAMETERS,
                _parameter_table(CompletionRequest),
                _nested_tables(),
                _FORMS.format(
                    cpu_s=CHECK_CPU_S,
                    max_bytes=MAX_CONSTRAINT_BYTES,
                    all_bytes=MAX_CONSTRAINT_BYTES_OF_ALL,
                    formats=", ".join(f"`{name}`" for name in FORMATS),
                ),
                _table(("keyword", "", "of it"), _keywords()),
                _NARROWED,
                _table(("dialect", "parameter", "value", "default", "effect"), _narrowed()),
                _NOT_SERVED,
                _table(("parameter", "accepted", "why", "source"), _not_served()),
                _ANSWER.format(schema_path=SCHEMA_PATH, d1=D1.name),
                _ERRORS,
                _table(("status", "`type`", "`code`", "when"), _errors()),
                _HEADERS,
                "## Tokens\n",
                "In the shapes of vLLM. `POST /tokenize`:\n",
                _parameter_table(TokenizeRequest, source=False),
                "`POST /detokenize`:\n",
                _parameter_table(DetokenizeRequest, source=False),
                _USAGE,
                _query_table("/v1/usage"),
                _ORGANIZATION_USAGE,
                _query_table("/v1/organization/usage/completions"),
                _KEYS,
                _parameter_table(CreateKeyRequest, source=False),
                _LIMITS,
                _parameter_table(LimitsRequest, source=False),
                _CHANGES,
            ]
        ).rstrip()
        + "\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return (
        "".join("| " + " | ".join(line) + " |\n" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")
    )


def _endpoints() -> Iterator[tuple[str, str, str]]:
    document = openapi_document()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            security = operation.get("security")
            key = "no" if security == [] else "admin" if security == ADMIN_SECURITY else "yes"
            yield f"`{method.upper()} {path}`", operation["summary"], key


# --- dialects ------------------------------------------------------------------------------------------------------


def _dialect_table() -> str:
    rows = [
        ("path", [f"`POST {dialect.path}`" for dialect in DIALECTS]),
        ("chosen by", ["header `x-llm-api-key`" if dialect is DIALECTS[0] else "path" for dialect in DIALECTS]),
        ("key", [_key(dialect) for dialect in DIALECTS]),
        ("model", ["body, or `?model=`, which wins" if d.model_in_query else "body" for d in DIALECTS]),
        (
            "invalid body",
            ['422, `{"detail": […]}`' if d.invalid_body == "detail" else '400, `{"error": {…}}`' for d in DIALECTS],
        ),
        ("unknown model", ["404" for _ in DIALECTS]),
        ("model not ready", [f"{dialect.not_ready_status}, `retry-after`" for dialect in DIALECTS]),
        ("more in the answer", ["`$schema`" if dialect.links_schema else "" for dialect in DIALECTS]),
    ]
    return _table(("", *(dialect.name for dialect in DIALECTS)), [(name, *cells) for name, cells in rows])


def _key(dialect: Dialect) -> str:
    return " or ".join(
        f"`{header}: {form}`"
        for header, bare in dialect.credentials
        for form in (("KEY", "Bearer KEY") if bare else ("Bearer KEY",))
    )


def _narrowed() -> Iterator[tuple[str, str, str, str, str]]:
    canonical = _properties(CompletionRequest)
    for dialect in DIALECTS:
        for name, schema in _properties(dialect.body).items():
            if schema != canonical.get(name):
                yield dialect.name, f"`{name}`", _values(schema), _default(dialect.body, name), schema["description"]


# --- parameters ----------------------------------------------------------------------------------------------------


def _properties(model: type[Body]) -> dict[str, Json]:
    properties: dict[str, Json] = schemas_of([model])[model.__name__]["properties"]
    return properties


def _nested_tables() -> str:
    return "\n".join(
        f"### `{name}`\n\n{_introduction(model)}{_parameter_table(model, source=False)}"
        for name, model in _objects(CompletionRequest)
    )


def _objects(model: type[Body]) -> Iterator[tuple[str, type[Body]]]:
    """The parameters that are objects with parameters of their own."""
    for name, field in model.model_fields.items():
        for part in get_args(field.annotation):
            if isinstance(part, type) and issubclass(part, Body):
                yield name, part
                yield from ((f"{name}.{inner}", kind) for inner, kind in _objects(part))


def _introduction(model: type[Body]) -> str:
    text = schemas_of([model])[model.__name__].get("description")
    return f"{text}\n\n" if text else ""


def _parameter_table(model: type[Body], *, source: bool = True) -> str:
    fields = {field.alias or name: (name, field) for name, field in model.model_fields.items()}
    rows = [
        [
            f"`{name}`",
            _values(schema),
            _default(model, fields[name][0]),
            *([_source(fields[name][1].metadata)] if source else []),
            schema.get("description", ""),
        ]
        for name, schema in _properties(model).items()
        if _reason(fields[name][1].metadata) is None
    ]
    return _table(("parameter", "value", "default", *(["source"] if source else []), "effect"), rows)


def _keywords() -> Iterator[tuple[str, str, str]]:
    for keyword, extent in HELD.items():
        yield f"`{keyword}`", "held", extent
    for keyword in sorted(REFUSED):
        yield f"`{keyword}`", "refused", ""
    for keyword in ANNOTATIONS:
        yield f"`{keyword}`", "annotation", "at the root of a schema" if keyword in ("$id", "$schema") else ""
    yield "all others", "annotation", "JSON Schema does not define them"


def _query_table(path: str) -> str:
    parameters = [each for each in openapi_document()["paths"][path]["get"]["parameters"] if each.get("in") == "query"]
    rows = [(f"`{each['name']}`", _values(each["schema"]), each["description"]) for each in parameters]
    return _table(("parameter", "value", "effect"), rows)


def _not_served() -> Iterator[tuple[str, str, str, str]]:
    for name, field in CompletionRequest.model_fields.items():
        reason = _reason(field.metadata)
        if reason is not None:
            neutral = "" if reason.neutral is None else f"`{_json(reason.neutral)}`".replace("``", '`""`')
            yield f"`{name}`", neutral, reason.reason, _source(field.metadata)


def _source(metadata: Sequence[Any]) -> str:
    return next((each.name for each in metadata if isinstance(each, Source)), "")


def _reason(metadata: Sequence[Any]) -> NotServed | None:
    return next((each for each in metadata if isinstance(each, NotServed)), None)


def _default(model: type[Body], name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    if field.default in (None, (), ""):
        return ""
    return f"`{_json(field.default)}`"


def _json(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


# --- values, from their JSON schemas -------------------------------------------------------------------------------


def _values(schema: Json) -> str:
    if "anyOf" in schema:
        return " or ".join(_values(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    match schema.get("type"):
        case "integer" | "number" as kind:
            return f"{kind}{_range(schema)}"
        case "array" if "enum" in schema["items"]:
            return f"some of {_values(schema['items'])}"
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


# --- errors --------------------------------------------------------------------------------------------------------


def _errors() -> Iterator[tuple[str, str, str, str]]:
    for kind in sorted(error_classes(), key=lambda kind: kind.status):
        status = str(kind.status)
        if issubclass(kind, InvalidRequest):
            others = sorted({d.name for d in DIALECTS if d.invalid_body == "detail"} - {D3.name})
            status += f" (422 in {' and '.join(others)})"
        code = "" if kind.code is None else f"`{kind.code}`"
        yield status, f"`{kind.type}`", code, " ".join((kind.__doc__ or "").split())


if __name__ == "__main__":
    sys.stdout.write(api_reference())
