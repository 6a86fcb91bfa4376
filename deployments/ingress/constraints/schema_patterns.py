"""Regular expressions of JSON schemas, narrowed to what their readers agree on: llguidance (Rust's syntax), validators
in Python, and ECMAScript, which JSON Schema refers to.

A pattern that they read differently would be held by one and broken for the other, so it is refused.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["pattern_within_dialects", "whitespace_class"]

_SPACE_OF_PYTHON: Final = r"\s\x1c-\x1f"
"""Rust's `\\s` leaves out what Python's has; a complement of both is that of the larger one."""
_EVERY_CHARACTER: Final = (r"[\s\S]", r"[\S\s]", r"[\d\D]", r"[\w\W]")
_REPETITION: Final = re.compile(r"\{(\d{1,4})(?:,(\d{0,4}))?\}")
_HEX: Final = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})")
_SAME: Final = frozenset("dwsnrtfv")
_PUNCTUATION: Final = frozenset("^$\\.*+?()[]{}|/-\"'`,:;=!<>@#%&~_ ")


def pattern_within_dialects(pattern: str) -> str:
    """`pattern` as llguidance takes it. Raises ValueError that says what in it is read differently elsewhere."""
    out: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            text, at = _escape(pattern, at, in_class=False, negated=False)
        elif (idiom := pattern[at : at + 6]) in _EVERY_CHARACTER:
            text, at = r"(?:.|\n)", at + len(idiom)
        elif char == "[":
            text, at = _class(pattern, at)
        elif char == "(" and pattern.startswith("(?", at):
            if not pattern.startswith("(?:", at):
                raise ValueError("of groups only (…) and (?:…)")
            text, at = "(?:", at + 3
        elif char in "*+?" or char == "{":
            text, at = _quantifier(pattern, at)
        elif char < " ":
            raise ValueError("no control characters")
        else:
            text, at = char, at + 1
        out.append(text)
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error})") from None
    return "".join(out)


def _quantifier(pattern: str, at: int) -> tuple[str, int]:
    if pattern[at] == "{":
        repetition = _REPETITION.match(pattern, at)
        if repetition is None:
            raise ValueError("a brace is written {n}, {n,} or {n,m}, or escaped")
        end = repetition.end()
    else:
        end = at + 1
    if end < len(pattern) and pattern[end] == "?":
        end += 1  # lazy: the same language
    if end < len(pattern) and (pattern[end] in "*+?" or pattern[end] == "{"):
        raise ValueError("one quantifier after another")
    return pattern[at:end], end


def _escape(pattern: str, at: int, *, in_class: bool, negated: bool) -> tuple[str, int]:
    char = pattern[at + 1 : at + 2]
    if hexadecimal := _HEX.match(pattern, at + 1):
        code = int(hexadecimal[1] or hexadecimal[2], 16)
        if code < 0x20 or 0xD800 <= code < 0xE000:
            raise ValueError("no control characters and surrogates")
        return pattern[at : hexadecimal.end()], hexadecimal.end()
    if char == "S":
        if in_class:
            raise ValueError(r"\S in a class with others")
        return f"[^{_SPACE_OF_PYTHON}]", at + 2
    if char in _SAME and char:
        if negated and char in "dw":
            raise ValueError(rf"\{char} in a negated class, which is not the same with and without Unicode")
        if negated and char == "s":
            return _SPACE_OF_PYTHON, at + 2
        return "\\" + char, at + 2
    if char in _PUNCTUATION and char:
        return "\\" + char if char not in "\"'`,:;=!<>@%_ " else char, at + 2
    raise ValueError(f"the escape \\{char}")


def _class(pattern: str, at: int) -> tuple[str, int]:
    out = ["["]
    at += 1
    negated = pattern.startswith("^", at)
    if negated:
        out.append("^")
        at += 1
    if pattern.startswith("]", at):
        raise ValueError("a class that begins with ]")
    while True:
        if at >= len(pattern):
            raise ValueError("a class without end")
        char = pattern[at]
        if char == "]":
            return "".join([*out, "]"]), at + 1
        if char == "[" or pattern[at : at + 2] in ("&&", "--", "~~", "||"):
            raise ValueError("sets within a class")
        if char < " ":
            raise ValueError("no control characters")
        if char == "\\":
            text, at = _escape(pattern, at, in_class=True, negated=negated)
        else:
            text, at = char, at + 1
        out.append(text)


_WHITESPACE: Final = re.compile(r"(?:\[((?:[ \t\n\r]|\\[tnrs])+)\]|([ \t\n\r]|\\[tnrs]))\*")


def whitespace_class(pattern: str) -> str | None:
    """The class of characters of a pattern for whitespace, such as `[ \\n]*`; None for the empty one. Raises ValueError
    for any other: between tokens there is nothing, or any number of these characters."""
    if not pattern:
        return None
    found = _WHITESPACE.fullmatch(pattern)
    if found is None:
        raise ValueError(r"expected a class of spaces, tabs and line ends with *, such as [ \n]*, or an empty string")
    named = (found[1] or found[2]).replace(r"\s", r" \t\n\r")
    return "".join(sorted({escape for char, escape in _JSON_SPACE.items() if char in named or escape in named}))


_JSON_SPACE: Final = {" ": r"\x20", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
