"""Completions in docs/api.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from deployments.ingress.api.completions.dialects import D1, DIALECTS, SCHEMA_PATH, Dialect
from deployments.ingress.api.completions.request import CompletionRequest
from deployments.ingress.api.description.tables import (
    as_json,
    default_of,
    introduction,
    nested_objects,
    parameter_table,
    properties,
    refusal_of,
    source_of,
    table,
    values,
)
from deployments.ingress.constraints.constraint import MAX_CONSTRAINT_BYTES, MAX_CONSTRAINT_BYTES_OF_ALL
from deployments.ingress.constraints.limits import CHECK_CPU_S, MAX_COMPILE_S, MAX_STEP_S
from deployments.ingress.constraints.schema_keywords import ANNOTATIONS, FORMATS, HELD, REFUSED

__all__ = ["completions_reference"]

_DIALECTS: Final = """\
## Dialects

There is one completion endpoint with four faces, so that clients of four APIs can be pointed here without a change.
D3 is OpenAI's own; D0 shares its path and is chosen by the header of its key, `x-llm-api-key`. What the document of a
dialect leaves open is as in D3.
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
All replicas hold it by the same library, llguidance. For many choices it must be simple: the engine compiles it for
each of them, which may take {compile_s:g} s of CPU time together, and each token of them all {step_s:g} s.

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
- Errors have the same status, and texts of their own.
"""


def completions_reference() -> str:
    return "\n".join(
        [
            _DIALECTS,
            _dialect_table(),
            _PARAMETERS,
            parameter_table(CompletionRequest),
            _nested_tables(),
            _FORMS.format(
                cpu_s=CHECK_CPU_S,
                compile_s=MAX_COMPILE_S,
                step_s=MAX_STEP_S,
                max_bytes=MAX_CONSTRAINT_BYTES,
                all_bytes=MAX_CONSTRAINT_BYTES_OF_ALL,
                formats=", ".join(f"`{name}`" for name in FORMATS),
            ),
            table(("keyword", "", "of it"), _keywords()),
            _NARROWED,
            table(("dialect", "parameter", "value", "default", "effect"), _narrowed()),
            _NOT_SERVED,
            table(("parameter", "accepted", "why", "source"), _not_served()),
            _ANSWER.format(schema_path=SCHEMA_PATH, d1=D1.name),
        ]
    )


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
    return table(("", *(dialect.name for dialect in DIALECTS)), [(name, *cells) for name, cells in rows])


def _key(dialect: Dialect) -> str:
    return " or ".join(
        f"`{header}: {form}`"
        for header, bare in dialect.credentials
        for form in (("KEY", "Bearer KEY") if bare else ("Bearer KEY",))
    )


def _narrowed() -> Iterator[tuple[str, str, str, str, str]]:
    canonical = properties(CompletionRequest)
    for dialect in DIALECTS:
        for name, schema in properties(dialect.body).items():
            if schema != canonical.get(name):
                yield dialect.name, f"`{name}`", values(schema), default_of(dialect.body, name), schema["description"]


def _nested_tables() -> str:
    return "\n".join(
        f"### `{name}`\n\n{introduction(model)}{parameter_table(model, source=False)}"
        for name, model in nested_objects(CompletionRequest)
    )


def _keywords() -> Iterator[tuple[str, str, str]]:
    for keyword, extent in HELD.items():
        yield f"`{keyword}`", "held", extent
    for keyword in sorted(REFUSED):
        yield f"`{keyword}`", "refused", ""
    for keyword in ANNOTATIONS:
        yield f"`{keyword}`", "annotation", "at the root of a schema" if keyword in ("$id", "$schema") else ""
    yield "all others", "annotation", "JSON Schema does not define them"


def _not_served() -> Iterator[tuple[str, str, str, str]]:
    for name, field in CompletionRequest.model_fields.items():
        refused = refusal_of(field.metadata)
        if refused is not None:
            neutral = "" if refused.neutral is None else f"`{as_json(refused.neutral)}`".replace("``", '`""`')
            yield f"`{name}`", neutral, refused.reason, source_of(field.metadata)
