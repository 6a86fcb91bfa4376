"""Requests that are made to harm: what is dear to check, to compile, to tokenize, to multiply or to answer.

Each is drawn from a seed and a number alone, so that a report that names both tells the request. Sizes are drawn
log-uniformly up to the limit of a body: small ones pass the bounds of admission, large ones must be refused in no time.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["BODY_LIMIT_BYTES", "EXAMPLES", "FAMILIES", "HarmfulRequest", "Manner", "drawn", "example"]

BODY_LIMIT_BYTES = 8 * 2**20
_VOCABULARY = 49_152
_CONTEXT = 2048

Manner = Literal["whole", "stream", "leave", "truncated"]
"""To the end of the answer, the same as a stream, gone with the first bytes of the answer, gone amid the upload."""
_MANNERS: Final[tuple[Manner, ...]] = ("whole", "whole", "stream", "stream", "leave", "truncated")


@dataclass(frozen=True)
class HarmfulRequest:
    family: str
    path: str
    body: bytes
    manner: Manner
    key: str | None = None
    """Instead of a valid one."""


Fields = dict[str, Any]
_Family = Callable[[random.Random, int], Fields | bytes]
"""Gives the parameters of a completion, or a whole body, of about so many bytes."""


def drawn(
    seed: int, number: int, model: str, *, limit_bytes: int = BODY_LIMIT_BYTES, only: str | None = None
) -> HarmfulRequest:
    """The `number`-th request of a seed. `only` takes the families whose names begin so."""
    source = random.Random(f"{seed} {number}")
    family = source.choice([name for name in FAMILIES if only is None or name.startswith(only)])
    size = round(math.exp(source.uniform(math.log(200), math.log(limit_bytes * 1.02))))
    made = FAMILIES[family](source, size)
    manner = source.choice(_MANNERS)
    path, key = "/v1/completions", None
    if family.startswith("/"):
        path = family.partition(" ")[0]
    if family == "wrong key":
        key = f"sk-{source.getrandbits(64)}"
    if isinstance(made, bytes):
        body = made
    else:
        defaults: Fields = {"model": model}
        if path == "/v1/completions":
            defaults |= {"prompt": "Once upon a time", "max_tokens": source.choice((1, 1, 8, 16, 64, 512))}
            if source.random() < 0.3:
                defaults |= {"n": source.choice((2, 8, 32, 128))}
            if manner in ("stream", "leave") and "best_of" not in made and "prompt_logprobs" not in made:
                defaults |= {"stream": True}
        body = json.dumps({**defaults, **made}).encode()
    return HarmfulRequest(family, path, body, manner, key)


# --- what many of them are made of ------------------------------------------------------------------------------------


def _text(source: random.Random, size: int) -> str:
    """Of words, of one letter, of spaces, of characters of many bytes, or of no words at all: tokenizers differ."""
    kind = source.randrange(5)
    if kind == 0:
        words = source.choices(("river ", "stone ", "light ", "engine ", "cloud ", "Überbau ", "12345 "), k=1000)
        return _filled("".join(words), size)
    if kind == 1:
        return source.choice("a0 \n") * size
    if kind == 2:
        return _filled("".join(map(chr, source.choices(range(0x4E00, 0x9FFF), k=min(2000, size)))), size // 3)
    if kind == 3:
        return _filled("".join(map(chr, source.choices(range(0x21, 0x7F), k=min(4000, size)))), size)
    return _filled("🦊🚀\u200d👩‍👩‍👧", size // 4)


def _filled(piece: str, characters: int) -> str:
    return (piece * (characters // len(piece) + 1))[:characters]


def _ids(source: random.Random, count: int) -> list[int]:
    kind = source.randrange(3)
    if kind == 0:
        return [source.randrange(_VOCABULARY)] * count
    if kind == 1:
        return source.choices(range(_VOCABULARY), k=count)
    return [*source.choices(range(_VOCABULARY), k=count - 1), source.choice((_VOCABULARY, 2**31 - 1))]


def _nested(piece: Callable[[Any], Any], core: Any, depth: int) -> Any:
    for _ in range(depth):
        core = piece(core)
    return core


def _labels(source: random.Random, size: int) -> list[str]:
    length = source.choice((2, 10, 40, 2000))
    count = max(1, min(200_000, size // (length + 4)))
    return [f"{number:0{length}d}"[-length:] for number in range(count)]


# --- structured outputs -----------------------------------------------------------------------------------------------


def _schema(source: random.Random, size: int) -> Any:
    kind = source.randrange(12)
    leaf: dict[str, Any] = {"type": source.choice(("string", "integer", "number", "boolean", "null"))}
    if kind == 0:  # doubles at each level
        depth = min(17, max(1, int(math.log2(max(2, size // 60)))))
        return _nested(lambda inner: {"oneOf": [inner, {"type": "object", "properties": {"a": inner}}]}, leaf, depth)
    if kind == 1:
        depth = min(size // 20, source.choice((10, 100, 1000, 20_000)))
        keyword = source.choice(("allOf", "anyOf", "oneOf"))
        return (
            json.loads(_deep(f'{{"{keyword}":[', json.dumps(leaf), "]}", depth))
            if depth < 200
            else _deep(f'{{"{keyword}":[', json.dumps(leaf), "]}", depth)
        )
    if kind == 2:
        count = max(1, size // 40)
        return {"type": "object", "properties": {f"p{number}": leaf for number in range(count)}}
    if kind == 3:
        count = max(1, size // 60)
        names = [f"p{number}" for number in range(count)]
        return {"type": "object", "properties": dict.fromkeys(names, leaf), "required": names}
    if kind == 4:
        return {"enum": _labels(source, size)}
    if kind == 5:
        return {"type": "string", source.choice(("maxLength", "minLength")): source.choice((1000, 10**5, 10**7, 2**31))}
    if kind == 6:
        name = source.choice(("minItems", "maxItems"))
        return {"type": "array", "items": leaf, name: source.choice((1000, 10**5, 10**7))}
    if kind == 7:
        return {"type": "string", "pattern": _regex(source, size)}
    if kind == 8:  # each definition refers to all others
        count = max(2, min(400, int(math.sqrt(size / 30))))
        each = [{"$ref": f"#/$defs/d{number}"} for number in range(count)]
        return {"$ref": "#/$defs/d0", "$defs": {f"d{number}": {"anyOf": [*each, leaf]} for number in range(count)}}
    if kind == 9:
        return source.choice(
            (
                {"$ref": "#"},
                {"$ref": "https://example.com/schema.json"},
                {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
                {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
                {"allOf": [{"type": "string"}, {"type": "integer"}]},
                {"not": {}},
                False,
            )
        )
    if kind == 10:
        depth = max(1, min(12, int(math.log(max(2, size // 40), 4))))
        properties = _nested(
            lambda inner: {"type": "object", "properties": dict.fromkeys("abcd", inner), "required": ["a", "d"]},
            leaf,
            depth,
        )
        return {"type": "array", "items": properties, "minItems": source.choice((0, 1, 50))}
    return {"type": "object", "description": _text(source, size), "properties": {"a": leaf}}


def _deep(begin: str, core: str, end: str, depth: int) -> str:
    return begin * depth + core + end * depth


def _regex(source: random.Random, size: int) -> str:
    pieces: tuple[Callable[[], str], ...] = (
        lambda: _nested(lambda inner: f"({inner}+)*", "a", min(size // 5, source.choice((3, 30, 300)))),
        lambda: _nested(lambda inner: f"({inner}){{1,9}}", "[a-z]", min(size // 7, source.choice((2, 4, 6, 9)))),
        lambda: f"[a-z]{{{source.choice((1, 1000, 10**5, 10**7))}}}",
        lambda: f".{{0,{source.choice((1000, 10**5, 2**31))}}}x",
        lambda: "|".join(_labels(source, size)),
        lambda: _filled("(a|b|ab|ba)*", size - size % 12),
        lambda: "(" * size,
        lambda: r"\p{L}+",
        lambda: r"(?=a)(?!b)a\1",
        lambda: _filled("(a|aa)?", size - size % 7),
        lambda: "[" + "".join(map(chr, range(0x100, 0x100 + min(size // 2, 60_000)))) + "]*",
        lambda: _text(source, size).replace("(", "").replace("[", "") or "a",
    )
    return source.choice(pieces)()


def _grammar(source: random.Random, size: int) -> str:
    rules = max(1, size // 40)
    pieces: tuple[Callable[[], str], ...] = (
        lambda: (
            "root ::= r0\n"
            + "\n".join(f'r{number} ::= "a" r{number + 1} | "b"' for number in range(rules))
            + f'\nr{rules} ::= "c"'
        ),
        lambda: "root ::= " + " | ".join(f'"{label}"' for label in _labels(source, size)),
        lambda: (
            "start: r0\n" + "\n".join(f'r{number}: "a" r{number + 1}' for number in range(rules)) + f'\nr{rules}: "c"'
        ),
        lambda: 'root ::= root "a" | "b"',
        lambda: "root ::= " + "(" * min(size, 100_000) + '"a"' + ")" * min(size, 100_000),
        lambda: 'root ::= "' + "a" * size + '"',
        lambda: "root ::= " + _nested(lambda inner: f"({inner}){{1,9}}", '"a"', min(size // 7, 8)),
        lambda: "root ::= a\n" + "\n".join("a ::= " + " ".join("a" * 20) for _ in range(max(1, size // 50))),
        lambda: "root ::= " + f"[a-z]{{1,{source.choice((1000, 10**6))}}}",
        lambda: " ",
        lambda: "?" * size,
        lambda: "# " + "x" * size + '\nroot ::= "a"',
    )
    return source.choice(pieces)()


def _schema_family(source: random.Random, size: int) -> Fields:
    schema = _schema(source, size)
    return source.choice(
        (
            {"structured_outputs": {"json": schema if isinstance(schema, str | dict) else json.dumps(schema)}},
            {"guided_json": schema if isinstance(schema, str) else json.dumps(schema)},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": schema if isinstance(schema, dict) else {"enum": ["a"]}},
                }
            },
        )
    )


def _structural_tags(source: random.Random, size: int) -> Fields:
    count = max(1, min(10_000, size // 90))
    structures = [{"begin": f"<f{number}>", "schema": {"type": "string"}, "end": "</f>"} for number in range(count)]
    return {"response_format": {"type": "structural_tag", "structures": structures, "triggers": ["<f"]}}


def _contradiction(source: random.Random, size: int) -> Fields:
    del size
    return source.choice(
        (
            {"guided_choice": ["yes", "no"], "allowed_token_ids": [1000]},
            {"guided_choice": ["yes", "no"], "bad_words": ["yes", "no"]},
            {"guided_choice": ["yes"], "logit_bias": {str(number): -100 for number in range(1000)}},
            {"guided_regex": "[0-9]{5}", "min_tokens": 60, "max_tokens": 64},
            {"guided_choice": ["yes"], "stop": "y", "min_tokens": 8, "max_tokens": 8},
            {"structured_outputs": {"json": {"type": "string"}, "whitespace_pattern": "((("}},
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}, "bad_words": ["{"]},
            {"guided_choice": [""], "min_tokens": 1},
        )
    )


# --- what multiplies --------------------------------------------------------------------------------------------------


def _choices(source: random.Random, size: int) -> Fields:
    n = source.choice((1, 2, 8, 32, 128))
    prompts = source.randint(1, max(1, 1024 // n))
    each = max(1, size // prompts)
    if source.random() < 0.5:
        return {"prompt": [_text(source, max(4, each)) for _ in range(prompts)], "n": n}
    return {"prompt": [_ids(source, max(1, each // 7)) for _ in range(prompts)], "n": n}


def _long_ids(source: random.Random, size: int) -> Fields:
    n = source.choice((1, 16, 128))
    prompts = source.randint(1, 8)
    each = min(source.choice((_CONTEXT - 20, 8000)), max(1, size // 7 // prompts))
    return {"prompt": [_ids(source, each) for _ in range(prompts)], "n": n, "max_tokens": source.choice((1, 16))}


def _many_prompts(source: random.Random, size: int) -> Fields:
    count = max(1, min(1100, size // 20))
    return {"prompt": [f"Prompt {number} of many" for number in range(count)], "max_tokens": source.choice((1, 16, 64))}


def _grammar_for_many(source: random.Random, size: int) -> Fields:
    return {"n": 128, "guided_grammar": _grammar(source, size), "max_tokens": 1}


def _best_of(source: random.Random, size: int) -> Fields:
    best_of = source.choice((2, 16, 128))
    fields: Fields = {"best_of": best_of, "n": source.randint(1, best_of), "max_tokens": source.choice((1, 16, 256))}
    fields["prompt"] = _ids(source, max(1, min(_CONTEXT - 300, size // 7)))
    return {**fields, "logprobs": source.choice((0, 5))}


def _prompt_logprobs(source: random.Random, size: int) -> Fields:
    prompts = source.choice((1, 1, 8, 64))
    each = max(1, min(_CONTEXT - 30, size // 7 // prompts))
    fields: Fields = {"prompt": [_ids(source, each) for _ in range(prompts)], "n": source.choice((1, 8))}
    if source.random() < 0.5:
        return {**fields, "prompt_logprobs": 20, "return_token_ids": True}
    return {**fields, "echo": True, "logprobs": 5, "max_tokens": source.choice((0, 16))}


# --- texts, ids and lists ---------------------------------------------------------------------------------------------


def _token_lists(source: random.Random, size: int) -> Fields:
    count = max(1, size // 8)
    return source.choice(
        (
            lambda: {"allowed_token_ids": _ids(source, count), "n": source.choice((1, 128))},
            lambda: {"allowed_token_ids": list(range(_VOCABULARY)), "n": 128},
            lambda: {"logit_bias": {str(number): 1 for number in range(min(count, source.choice((1024, 200_000))))}},
            lambda: {"stop_token_ids": _ids(source, min(count, source.choice((128, 10**6))))},
            lambda: {"logprobs": 5, "logprob_token_ids": _ids(source, min(count, source.choice((128, 10**6))))},
        )
    )()


def _bad_words(source: random.Random, size: int) -> Fields:
    count = source.choice((1, 2, 128, 128, 1000))
    return {"bad_words": [_text(source, max(4, size // count)) for _ in range(count)], "n": source.choice((1, 1, 128))}


def _stops(source: random.Random, size: int) -> Fields:
    count = source.choice((1, 4))
    stops = [_text(source, max(4, size // count)) for _ in range(count)]
    return {"stop": stops, "max_tokens": 64, "n": source.choice((1, 128))}


def _extra(source: random.Random, size: int) -> Fields:
    return source.choice(
        (
            lambda: {"vllm_xargs": {f"k{number}": "x" * (size // 64) for number in range(64)}, "n": 128},
            lambda: {"vllm_xargs": {"k": list(range(max(1, size // 8)))}, "n": 128},
            lambda: {"cache_salt": "s" * source.choice((1, 128, size)), "n": 128},
            lambda: {"user": "u" * size, "n": 128},
            lambda: {"suffix": _text(source, size)},
            lambda: {"repetition_detection": {"max_pattern_size": 4096, "min_count": 2}, "max_tokens": 1024, "n": 16},
            lambda: {"thinking_token_budget": source.choice((-1, 0, 2**31 - 1)), "n": 128},
            lambda: {"min_tokens": 1024, "max_tokens": 1024, "seed": source.choice((-(2**63), 2**63 - 1)), "n": 64},
            lambda: {"stream_interval": 2**31 - 1, "stream": True, "n": 128, "max_tokens": 512},
            lambda: {"temperature": 2, "top_k": 2**31 - 1, "min_p": 0.999, "top_p": 0, "n": 128, "seed": 1},
            lambda: {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.01, "n": 128},
            lambda: {"truncate_prompt_tokens": 1, "prompt": _text(source, size)},
            lambda: {"request_id": "r" * source.choice((256, size)), "session_id": "s" * 256},
        )
    )()


def _tokenize(source: random.Random, size: int) -> Fields:
    return {"prompt": _text(source, size), "return_token_strs": source.random() < 0.5}


def _detokenize(source: random.Random, size: int) -> Fields:
    return {"tokens": _ids(source, max(1, size // 7))}


# --- bodies that are none ---------------------------------------------------------------------------------------------


def _no_json(source: random.Random, size: int) -> bytes:
    head = b'{"model":"m","prompt":'
    return source.choice(
        (
            lambda: head + b"[" * size,
            lambda: head + b"[" * (size // 2) + b"]" * (size // 2) + b"}",
            lambda: b'{"a":' * (size // 6) + b"1" + b"}" * (size // 6),
            lambda: head + b'"a","seed":' + b"9" * size + b"}",
            lambda: head + b'"' + b"\\u00e9" * (size // 6) + b'"}',
            lambda: head + b'"' + b"\\ud800" * (size // 6) + b'"}',
            lambda: source.randbytes(size),
            lambda: head + b'"a",' + b",".join(b'"k%d":1' % number for number in range(max(1, size // 10))) + b"}",
            lambda: head + b'"a",' + b'"seed":1,' * (size // 9) + b'"n":1}',
            lambda: head + b'"a","vllm_xargs":{' + b",".join(b'"%d":0' % n for n in range(max(1, size // 8))) + b"}}",
            lambda: b" " * size + b"{}",
            lambda: head + b"[" + b"1e9," * (size // 4) + b"1]}",
            lambda: head + b"[" + b'"a",' * (size // 4) + b"1]}",
            lambda: head + b"[" + b"[0]," * (size // 4) + b"[]]}",
        )
    )()


FAMILIES: Final[Mapping[str, _Family]] = {
    "schema": _schema_family,
    "regex": lambda source, size: {"guided_regex": _regex(source, size)},
    "grammar": lambda source, size: {"structured_outputs": {"grammar": _grammar(source, size)}},
    "grammar for many": _grammar_for_many,
    "choice": lambda source, size: {"guided_choice": _labels(source, size), "n": source.choice((1, 1, 128))},
    "structural tags": _structural_tags,
    "contradiction": _contradiction,
    "prompts and choices": _choices,
    "long ids": _long_ids,
    "many prompts": _many_prompts,
    "best_of": _best_of,
    "prompt logprobs": _prompt_logprobs,
    "text": lambda source, size: {"prompt": _text(source, size)},
    "ids": lambda source, size: {"prompt": _ids(source, max(1, size // 7))},
    "token lists": _token_lists,
    "bad_words": _bad_words,
    "stop": _stops,
    "extras": _extra,
    "wrong key": lambda source, size: {"prompt": _text(source, size)},
    "no JSON": _no_json,
    "/tokenize": _tokenize,
    "/detokenize": _detokenize,
}


# --- what was seen to harm --------------------------------------------------------------------------------------------


def _nested_one_of() -> Any:
    """oneOf nested 12 deep, 643 kB: each level has the one below it twice."""
    return _nested(
        lambda inner: {"oneOf": [{"type": "object", "properties": {"some_property": inner}}, {"const": 1}, inner]},
        {"type": "string", "maxLength": 40},
        12,
    )


EXAMPLES: Final[Mapping[str, Callable[[], Fields]]] = {
    "oneOf nested 12 deep": lambda: {"structured_outputs": {"json": _nested_one_of()}},
    "one bad word of 1.8 MB": lambda: {"bad_words": ["river stone light " * 100_000]},
    "20,000 labels": lambda: {"guided_choice": [f"label number {number}" for number in range(20_000)]},
    "a grammar of 4 MB for 128 choices": lambda: {
        "n": 128,
        "max_tokens": 1,
        "structured_outputs": {
            "grammar": "root ::= r0\n"
            + "\n".join(f'r{number} ::= "a" r{number + 1} | "b"' for number in range(130_000))
            + '\nr130000 ::= "c"'
        },
    },
    "8 prompts of 8,000 ids for 128 choices": lambda: {
        "prompt": [[prompt] * 8000 for prompt in range(8)],
        "n": 128,
        "max_tokens": 1,
    },
    "8 prompts of 2,000 ids for 128 choices": lambda: {
        "prompt": [[prompt] * 2000 for prompt in range(8)],
        "n": 128,
        "max_tokens": 1,
    },
    "700 prompts": lambda: {"prompt": [f"Prompt {number}" for number in range(700)], "max_tokens": 16},
}
"""Those of issue 13, and the neighbour of one that fits into a context of 2,048 tokens."""


def example(name: str, model: str) -> HarmfulRequest:
    fields: Fields = {"model": model, "prompt": "Once upon a time", "max_tokens": 16, **EXAMPLES[name]()}
    return HarmfulRequest(name, "/v1/completions", json.dumps(fields).encode(), "whole")
