"""JSON schemas at random, of keywords that are held and of some that are not; texts at random out of a grammar."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from llguidance import LLMatcher, LLTokenizer

__all__ = ["Wanderer", "random_schema", "violation"]

_NAMES = ["a", "b", "ab", "name", "x-y", "é", ""]
_PATTERNS = [
    "^a",
    "b$",
    "^[a-c]{1,3}$",
    r"^\d{2,3}$",
    r"^\w+$",
    r"\s",
    r"^\S{1,4}$",
    "^[^a]*$",
    "^(yes|no)$",
    r"^[\w.-]+@[\w-]+$",
    r"^[\s\S]{2}$",
    "^a|b$",
    ".",
    "^$",
    r'^["\\]{1,2}$',
    r"^[^\s]{1,3}$",
    r"\bx",
    r"^\W$",
    "(",
]
_FORMATS = ["date", "date-time", "uuid", "ipv4", "ipv6", "email", "duration", "hostname", "uri", "time", "regex"]
_CONSTANTS: list[Any] = [0, 1, -3, 2.5, "a", "", 'é"\\\n', "\u0000", None, True, [], [1, "a"], {"a": 1}, {}, 1e17, 0.1]


def random_schema(drawn: random.Random, depth: int = 3) -> Any:
    """A schema, or now and then something that is none."""
    if drawn.random() < 0.04:
        return drawn.choice([True, False])
    schema: dict[str, Any] = {}
    if drawn.random() < 0.8:
        kinds = ["null", "boolean", "integer", "number", "string", "string", "object", "object", "array", "array"]
        if depth == 0:
            kinds = kinds[:6]
        schema["type"] = drawn.choice(kinds) if drawn.random() < 0.85 else drawn.sample(sorted(set(kinds)), 2)
    kind = schema.get("type", drawn.choice(["string", "object", "array", "number"]))
    for each in [kind] if isinstance(kind, str) else kind:
        _of_kind(schema, each, drawn, depth)
    if drawn.random() < 0.1:
        schema["enum"] = drawn.sample(_CONSTANTS, drawn.randint(1, 4))
    if drawn.random() < 0.05:
        schema["const"] = drawn.choice(_CONSTANTS)
    if depth and drawn.random() < 0.25:
        combining = drawn.choice(["anyOf", "anyOf", "allOf", "allOf", "oneOf"])
        schema[combining] = [random_schema(drawn, depth - 1) for _ in range(drawn.randint(1, 3))]
    if depth == 3:
        if drawn.random() < 0.3:
            schema["$defs"] = {"d": random_schema(drawn, 1)}
            place = drawn.choice([schema, *_inner(schema)])
            place["$ref"] = drawn.choice(["#/$defs/d", "#/$defs/d", "#/$defs/d", "#", "#/$defs/e"])
        if drawn.random() < 0.1:
            drawn.choice([schema, *_inner(schema)])[drawn.choice(["not", "if", "contains", "propertyNames"])] = {}
        if drawn.random() < 0.1:
            schema["description"] = "What it is."
    return schema


def _of_kind(schema: dict[str, Any], kind: str, drawn: random.Random, depth: int) -> None:
    def perhaps(share: float) -> bool:
        return drawn.random() < share

    if kind in ("integer", "number"):
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if perhaps(0.2):
                low = keyword.lower().endswith("minimum")
                schema[keyword] = drawn.choice([-100, -1.5, 0, 3] if low else [5, 12.25, 100, 1e6, 3])
        if perhaps(0.2):
            schema["multipleOf"] = drawn.choice([1, 2, 3, 10, 7.0, 0.5, 0])
    elif kind == "string":
        if perhaps(0.3):
            schema["minLength"] = drawn.choice([0, 1, 2, 5])
        if perhaps(0.4):
            schema["maxLength"] = drawn.choice([0, 1, 3, 8])
        if perhaps(0.25):
            schema["pattern"] = drawn.choice(_PATTERNS)
        if perhaps(0.12):
            schema["format"] = drawn.choice(_FORMATS)
    elif kind == "array" and depth:
        if perhaps(0.7):
            schema["items"] = random_schema(drawn, depth - 1)
        if perhaps(0.3):
            schema["prefixItems"] = [random_schema(drawn, depth - 1) for _ in range(drawn.randint(1, 2))]
        if perhaps(0.3):
            schema["minItems"] = drawn.randint(0, 3)
        if perhaps(0.5):
            schema["maxItems"] = drawn.randint(0, 3)
        if perhaps(0.05):
            schema["uniqueItems"] = drawn.choice([True, False])
    elif kind == "object" and depth:
        names = drawn.sample(_NAMES, drawn.randint(0, 3))
        if names or perhaps(0.3):
            schema["properties"] = {name: random_schema(drawn, depth - 1) for name in names}
        if perhaps(0.5):
            schema["required"] = drawn.sample(_NAMES, drawn.randint(0, 2))
        if perhaps(0.5):
            schema["additionalProperties"] = False if perhaps(0.6) else random_schema(drawn, depth - 1)
        if perhaps(0.1):
            schema["patternProperties"] = {drawn.choice(_PATTERNS): random_schema(drawn, depth - 1)}
        if perhaps(0.15):
            schema["minProperties"] = drawn.randint(0, 3)
        if perhaps(0.15):
            schema["maxProperties"] = drawn.randint(0, 3)


def _inner(schema: dict[str, Any]) -> list[dict[str, Any]]:
    places = [schema.get("items"), schema.get("additionalProperties"), *schema.get("properties", {}).values()]
    return [place for place in places if isinstance(place, dict)]


def violation(schema: Any, text: str) -> str | None:
    """Why `text` does not conform to `schema`, formats included, as jsonschema sees it."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"no JSON: {error}"
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    worst = jsonschema.exceptions.best_match(validator.iter_errors(value))
    return None if worst is None else str(worst.message)


class Wanderer:
    """Texts out of a grammar, at random: of tokens of any length, and then towards the end."""

    def __init__(self, folder: Path, end: int) -> None:
        self._end = end
        self.tokenizer = LLTokenizer(str(folder / "tokenizer.json"), eos_token=end)
        spellings = [self.tokenizer.decode_bytes([token]) for token in range(self.tokenizer.vocab_size)]
        self._short = np.array([len(spelling) <= 2 for spelling in spellings])
        self._closing = np.array([spelling in (b'"', b"}", b"]", b'"}', b'"]') for spelling in spellings])

    def text(self, grammar: str, drawn: random.Random, tokens: int = 30) -> str | None:
        """None where it has not come to an end after some three times `tokens`. Raises ValueError where the grammar
        allows nothing more."""
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        chosen: list[int] = []
        for number in range(3 * tokens):
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            if matcher.is_error():
                raise ValueError(matcher.get_error())
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            allowed = allowed[allowed != self._end]
            if matcher.is_accepting() and (not len(allowed) or number > tokens or drawn.random() < 0.2):
                return str(self.tokenizer.decode_bytes(chosen).decode())
            if not len(allowed):
                raise ValueError(f"no token after {self.tokenizer.decode_bytes(chosen)!r}")
            for wanted, preferred in ((number > tokens, self._closing), (drawn.random() < 0.6, self._short)):
                if wanted and len(narrowed := allowed[preferred[allowed]]):
                    allowed = narrowed
                    break
            token = int(allowed[drawn.randrange(len(allowed))])
            matcher.consume_token(token)
            chosen.append(token)
        return None
