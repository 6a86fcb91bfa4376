"""Types of completion parameters that take more than one form, and of those that are not served.

Each is a validator and the JSON schema of what it accepts. The validators are plain functions because pydantic's unions
cost several times as much and name branches of the union in their errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from deployments.ingress.http.json_body import INT32_MAX

__all__ = [
    "MAX_MODEL_NAME",
    "AllowedTokenIds",
    "BadWords",
    "ExtraArguments",
    "LogitBias",
    "LogprobTokenIds",
    "NotServed",
    "Prompts",
    "Source",
    "StopArray",
    "StopTokenIds",
    "Stops",
    "StopsOfOneOrMore",
    "TextPrompt",
    "TokenId",
    "TokenIds",
]

MAX_MODEL_NAME = 256
"""Characters; those of cluster.yaml have 96 at most."""

_MAX_STOPS = 4
"""OpenAI's."""
_MAX_STOPS_OF_ARRAYS = 64
"""Of the dialects whose documents name no limit. vLLM has none either; this bounds the search for them."""
_MAX_STOP_CHARACTERS = 512
"""Each token is matched against all of them."""
_MAX_BIASED_TOKENS = 1024
_MAX_EXTRA_ARGUMENTS = 64
_MAX_EXTRA_CHARACTERS = 16_384
"""Of names and texts; a number counts as eight."""

TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]


# Told of its first mistake only: an array of thousands would make thousands of errors.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
StopTokenIds = Annotated[TokenIds, Field(max_length=128)]
LogprobTokenIds = Annotated[TokenIds, Field(min_length=1, max_length=128)]
AllowedTokenIds = Annotated[TokenIds, Field(min_length=1, max_length=8192)]


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from, for docs/api.md: put into `Annotated`."""

    name: str


# --- prompt ----------------------------------------------------------------------------------------------------------


def _prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {str}:
            return value
        if kinds == {int}:
            return [_in_range(value)]
        if kinds == {list} and [] in value:
            raise ValueError(f"prompt {value.index([])} is empty; expected at least one token id in each")
        if kinds == {list} and all(set(map(type, prompt)) == {int} for prompt in value):
            return [_in_range(prompt) for prompt in value]
    raise ValueError("expected a string, or a non-empty array of strings, of token ids, or of arrays of token ids")


def _in_range(token_ids: list[int]) -> list[int]:
    """Those that fit into a message; whether the model knows them is for the meter to say."""
    if min(token_ids) < 0 or max(token_ids) > INT32_MAX:
        raise ValueError("expected token ids of the model")
    return token_ids


def _text_prompt(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    raise ValueError("expected a string")


_TokenIds = Annotated[list[TokenId], Field(min_length=1)]  # in the schema only
_PROMPT_SCHEMA = (
    str | Annotated[list[str], Field(min_length=1)] | _TokenIds | Annotated[list[_TokenIds], Field(min_length=1)]
)
Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts, json_schema_input_type=_PROMPT_SCHEMA)]
"""A text, texts, token ids, or lists of token ids, as a list of prompts."""
TextPrompt = Annotated[list[str | list[int]], PlainValidator(_text_prompt, json_schema_input_type=str)]
"""A text, as a list of one prompt."""


# --- stop ------------------------------------------------------------------------------------------------------------


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    return _checked(stops, _MAX_STOPS, f"a non-empty string or an array of up to {_MAX_STOPS} of them")


def _stop_array(value: Any) -> tuple[str, ...]:
    return _checked(value, _MAX_STOPS_OF_ARRAYS, f"an array of up to {_MAX_STOPS_OF_ARRAYS} non-empty strings")


def _stops_of_one_or_more(value: Any) -> tuple[str, ...]:
    stops = 0 if value == [] else value
    return _checked(stops, _MAX_STOPS_OF_ARRAYS, f"an array of 1 to {_MAX_STOPS_OF_ARRAYS} non-empty strings")


def _checked(stops: Any, most: int, expected: str) -> tuple[str, ...]:
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > most or not all(isinstance(each, str) and each for each in stops):
        raise ValueError(f"expected {expected}")
    if any(len(stop) > _MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"expected strings of at most {_MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


_Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARACTERS)]
_StopArray = Annotated[list[_Stop], Field(max_length=_MAX_STOPS)]
Stops = Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=_Stop | _StopArray | None)]
StopArray = Annotated[
    tuple[str, ...],
    PlainValidator(
        _stop_array,
        json_schema_input_type=Annotated[list[_Stop], Field(max_length=_MAX_STOPS_OF_ARRAYS)] | None,
    ),
]
StopsOfOneOrMore = Annotated[
    tuple[str, ...],
    PlainValidator(
        _stops_of_one_or_more,
        json_schema_input_type=Annotated[list[_Stop], Field(min_length=1, max_length=_MAX_STOPS_OF_ARRAYS)] | None,
    ),
]


# --- the engine's extras ---------------------------------------------------------------------------------------------


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if isinstance(value, dict) and len(value) <= _MAX_BIASED_TOKENS:
        bias = {
            int(token_id): float(number)
            for token_id, number in value.items()
            if _TOKEN_ID.fullmatch(token_id) and type(number) in (int, float) and -100 <= number <= 100
        }
        if len(bias) == len(value):
            return bias
    raise ValueError(f"expected an object of up to {_MAX_BIASED_TOKENS} token ids, each with a number from -100 to 100")


_TOKEN_ID = re.compile("[0-9]{1,9}")
LogitBias = Annotated[
    dict[int, float] | None,
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                    "maxProperties": _MAX_BIASED_TOKENS,
                },
                {"type": "null"},
            ]
        }
    ),
]


_MAX_BAD_WORDS = 64
_MAX_BAD_WORD_CHARACTERS = 128
BadWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_MAX_BAD_WORD_CHARACTERS)]],
    Field(max_length=_MAX_BAD_WORDS, fail_fast=True),
]
"""vLLM makes up to two sequences of tokens of each, and takes 128 of these."""


def _extra_arguments(value: Any) -> dict[str, Any] | None:
    if value is None or (
        isinstance(value, dict)
        and len(value) <= _MAX_EXTRA_ARGUMENTS
        and all(
            all(map(_is_scalar, entry)) if isinstance(entry, list) else _is_scalar(entry) for entry in value.values()
        )
    ):
        if value is not None and _extra_characters(value) > _MAX_EXTRA_CHARACTERS:
            raise ValueError(f"expected at most {_MAX_EXTRA_CHARACTERS} characters in all, a number counted as eight")
        return value
    raise ValueError(f"expected an object of up to {_MAX_EXTRA_ARGUMENTS} strings, finite numbers, and arrays of these")


def _extra_characters(arguments: dict[str, Any]) -> int:
    values = [each for value in arguments.values() for each in (value if isinstance(value, list) else [value])]
    return sum(map(len, arguments)) + sum(len(each) if isinstance(each, str) else 8 for each in values)


def _is_scalar(value: Any) -> bool:
    """What fits into a message."""
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return isinstance(value, str) or (isinstance(value, float) and value - value == 0)


_Scalar = str | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float
ExtraArguments = Annotated[
    dict[str, Any] | None,
    PlainValidator(
        _extra_arguments,
        json_schema_input_type=Annotated[dict[str, _Scalar | list[_Scalar]], Field(max_length=_MAX_EXTRA_ARGUMENTS)]
        | None,
    ),
]


# --- what is known and not served ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NotServed:
    """A parameter that clients know from other servers and that has no effect here. Null and its neutral value, with
    which it has none there either, are accepted; all others are refused with the reason. For `Annotated`. An empty
    array is as neutral as an empty text, where that is it."""

    reason: str
    neutral: str | float | bool | None = None

    def _check(self, value: Any) -> Any:
        if value is None or (value == self.neutral and isinstance(value, bool) == isinstance(self.neutral, bool)):
            return value
        if value == [] and self.neutral == "":
            return value
        raise ValueError(self.reason)

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        empty: list[list[str]] = [[]] if self.neutral == "" else []
        accepted: JsonSchemaValue = {"type": "null"} if self.neutral is None else {"enum": [None, self.neutral, *empty]}
        return accepted | {"description": f"Not served: {self.reason}."}
