"""How cluster.yaml is read.

The file is validated whole before anything starts, and every problem is told at once with file, line, key, value and
what was expected: the lines come from the YAML nodes, the expectations and the nearest known keys from the schema.

Environment variables: `${NAME}` anywhere in a text value is replaced, `$$` stands for a dollar, a lone `$` is
left alone. A value that is `${NAME}` alone and unquoted is read by the rules of YAML again after its
replacement, so `port: ${PORT}` gives a number and `port: "${PORT}"` a text. Values are not expanded twice,
keys not at all. A missing variable is a problem like any other, except `MILLSTREAM_HOME`, which always has a
value (see `millstream_home`).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deployments.section import Section
from serve_app.config import ClusterConfig, Location, ledger_url, millstream_home

__all__ = ["ConfigError", "Problem", "load_cluster_config"]


class Problem(NamedTuple):
    """One thing that is wrong with a file."""

    file: str
    line: int
    """1-based; 0 when the file could not be read at all."""
    key: str
    """Such as `models[0].engine.dtype`; empty for the file as a whole."""
    value: str
    """What stands there, as YAML would show it, shortened; `nothing` for a missing key."""
    expected: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        key = f"{self.key}: " if self.key else ""
        return f"{place}: {key}got {self.value}, expected {self.expected}"


class ConfigError(Exception):
    """A cluster.yaml that cannot be used; its text has one line per problem."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def load_cluster_config(path: Path, environ: Mapping[str, str] = os.environ) -> ClusterConfig:
    """Reads and checks `path`; `environ` fills in `${NAME}`. Raises ConfigError with every problem in it."""
    home = millstream_home(environ)
    document = _YamlDocument(str(path), {**environ, "MILLSTREAM_HOME": str(home)})
    raw = document.read(path)
    if isinstance(raw, dict) and isinstance(meter := raw.setdefault("meter", {}), dict):
        meter.setdefault("database", ledger_url(home))
    try:
        config = ClusterConfig.model_validate(raw, context={"folder": path.absolute().parent})
    except ValidationError as error:
        for details in error.errors(include_url=False):
            location, value, expected = _in_our_words(details)
            match details["type"]:
                case "default_factory_not_called":
                    pass  # follows from the error of another key
                case "extra_forbidden":
                    document.refuse(location, value, expected)
                case _ if not document.has_refused(location):
                    document.refuse(location, value, expected)
    if document.problems:
        raise ConfigError(sorted(document.problems, key=lambda problem: problem.line))
    return config


class _Loader(yaml.SafeLoader):
    """SafeLoader that also takes 1e-3 for a number, as YAML 1.2 does and PyYAML does not.

    Its dates stay dates: a library that vLLM brings makes them text, for all users of SafeLoader, when it is imported.
    """

    yaml_constructors: ClassVar = {
        **yaml.SafeLoader.yaml_constructors,
        "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_timestamp,
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

_REFERENCE = re.compile(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# References go through the YAML parser in private-use characters, because inside {…} and […] YAML would take
# the braces of an unquoted ${NAME} for its own.
_DOLLAR, _OPEN, _CLOSE = "\ue000", "\ue001", "\ue002"
_HIDDEN_REFERENCE = re.compile(f"{_DOLLAR}|{_OPEN}([^{_CLOSE}]*){_CLOSE}")


def _hide_references(text: str) -> str:
    return _REFERENCE.sub(lambda found: f"{_OPEN}{found[1]}{_CLOSE}" if found[1] else _DOLLAR, text)


def _show_references(text: str) -> str:
    return text.replace(_DOLLAR, "$$").replace(_OPEN, "${").replace(_CLOSE, "}")


class _YamlDocument:
    """One YAML file as plain values, with the line of every key and all problems found in it so far."""

    def __init__(self, file: str, variables: Mapping[str, str]) -> None:
        self.problems: list[Problem] = []
        self._file = file
        self._variables = variables
        self._loader = _Loader("")
        self._lines: dict[Location, int] = {(): 1}
        self._refused: set[Location] = set()
        self._checked_nodes: set[yaml.MappingNode] = set()

    def read(self, path: Path) -> object:
        """The file's values; one that could not be made is in `problems` and stands as it was written.

        Raises ConfigError when there is nothing to go on with.
        """
        try:
            text = path.read_text("utf-8-sig")
            node = _Loader(_hide_references(text)).get_single_node()
            if node is None:
                raise self._unusable(1, "an empty file", f"a mapping with {_listing(ClusterConfig)}")
            return self._value(node, ())
        except OSError as error:
            raise self._unusable(0, error.strerror or "an error", "a file that can be read") from None
        except UnicodeDecodeError as error:
            raise self._unusable(0, f"byte {error.start}, which is not UTF-8", "a UTF-8 text") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise self._unusable(line, f"the character {chr(error.character)!r}", "printable text") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            found = ", ".join(filter(None, (error.context, error.problem)))
            raise self._unusable(line, f"broken YAML ({_show_references(found)})", "valid YAML") from None
        except RecursionError:
            raise self._unusable(1, "values nested without end", "a finite document") from None

    def refuse(self, location: Location, value: str, expected: str) -> None:
        """Notes a problem, with the line of `location` or of what is nearest around it."""
        self._refused.add(location)
        nearest = next(location[:n] for n in range(len(location), -1, -1) if location[:n] in self._lines)
        self.problems.append(Problem(self._file, self._lines[nearest], _dotted(location), value, expected))

    def has_refused(self, location: Location) -> bool:
        """Whether a problem at `location` or around it is known, of which others may be mere consequences."""
        return any(location[:depth] in self._refused for depth in range(len(location) + 1))

    def _unusable(self, line: int, value: str, expected: str) -> ConfigError:
        return ConfigError([*self.problems, Problem(self._file, line, "", value, expected)])

    def _value(self, node: yaml.Node, location: Location) -> object:
        match node:
            case yaml.MappingNode():
                return self._mapping(node, location)
            case yaml.ScalarNode():
                return self._scalar(node, location)
            case _:
                self._lines |= {(*location, i): item.start_mark.line + 1 for i, item in enumerate(node.value)}
                return [self._value(item, (*location, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, object]:
        if node not in self._checked_nodes:  # an alias comes here again, with its `<<` already flattened
            self._checked_nodes.add(node)
            self._refuse_bad_keys(node, location)
            self._loader.flatten_mapping(node)
        values: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = _show_references(key_node.value)
            inner = (*location, key)
            self._lines[inner] = key_node.start_mark.line + 1
            values[key] = self._value(value_node, inner)
        return values

    def _refuse_bad_keys(self, node: yaml.MappingNode, location: Location) -> None:
        first: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a mapping or list stands where a key must be", key_node.start_mark
                )
            key = _show_references(key_node.value)
            if key in first:
                expected = f"the key once (it stands on line {first[key]})"
                self.problems.append(Problem(self._file, line, _dotted((*location, key)), "the key again", expected))
            first.setdefault(key, line)

    def _scalar(self, node: yaml.ScalarNode, location: Location) -> object:
        text: str = node.value
        as_written = _show_references(text)
        if "${" in text:
            self.refuse(location, _shown(as_written), "${NAME} for a variable, or $$ for a dollar")
            return as_written
        missing = [name for name in _HIDDEN_REFERENCE.findall(text) if name and name not in self._variables]
        if missing:
            expected = f"the environment variable {' and '.join(missing)} to be set"
            self.refuse(location, _shown(as_written), expected)
            return as_written
        expanded = _HIDDEN_REFERENCE.sub(lambda found: self._variables[found[1]] if found[1] else "$", text)
        alone = node.style is None and _HIDDEN_REFERENCE.fullmatch(text) is not None and text != _DOLLAR
        tag = node.tag
        if alone:
            tag = self._loader.resolve(yaml.ScalarNode, expanded, (True, False))  # type: ignore[no-untyped-call]
        try:
            return self._loader.construct_object(
                yaml.ScalarNode(tag, expanded, node.start_mark, node.end_mark, node.style)
            )
        except (yaml.constructor.ConstructorError, ValueError) as error:
            reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
            self.refuse(location, _shown(expanded), f"a plain value ({reason})")
            return as_written


# --- pydantic's errors in our words -------------------------------------------------------------------------

_EXPECTATIONS: dict[str, str] = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "a whole number",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "missing": "a value: the key is required",
    "model_attributes_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "string_too_short": "a text that is not empty",
    "string_type": "a text (quote what YAML takes for something else)",
    "tuple_type": "a list",
    "unexpected": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "union_tag_not_found": "a value: the key is required",
}
"""Type of a pydantic error -> what was expected, formatted with the error's context."""


def _in_our_words(error: ErrorDetails) -> tuple[Location, str, str]:
    """Where in the file the error is, what stands there and what was expected."""
    kind, location = error["type"], error["loc"]
    in_file = location[:3] + location[4:] if location[2:3] == ("engine",) else location
    if kind == "extra_forbidden":
        return in_file, _shown(error["input"]), _known_keys(location)
    expected = _EXPECTATIONS.get(kind, error["msg"]).format_map(error.get("ctx", {}))
    match kind:
        case "missing":
            return in_file, "nothing", expected
        case "union_tag_not_found":
            return (*in_file, "kind"), "nothing", expected
        case "union_tag_invalid":
            return (*in_file, "kind"), _shown(error["input"]["kind"]), expected
        case _:
            return in_file, _shown(error["input"]), expected


def _known_keys(location: Location) -> str:
    """What was expected instead of the unknown key that ends `location`, a location as pydantic gives it."""
    sections: list[type[Section]] = [ClusterConfig]
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        owner = next((section for section in sections if part in section.model_fields), None)
        if owner is None:  # no key, but the `kind` by which pydantic chose one of the sections
            sections = [each for each in sections if part in get_args(each.model_fields["kind"].annotation)]
        else:
            sections = _sections_in(owner.model_fields[part].annotation)
    nearest = difflib.get_close_matches(str(location[-1]), sections[0].model_fields, n=1)
    expected = f"one of {_listing(sections[0])}"
    return f"{expected} (did you mean {nearest[0]}?)" if nearest else expected


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]


def _listing(section: type[BaseModel]) -> str:
    return f"the keys {', '.join(section.model_fields)}"


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _shown(value: object) -> str:
    """`value` as YAML would show it, on one line, at most 80 characters, without the password of a URL."""
    if isinstance(value, str | bool | None):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, dict | list):
        text = "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
    else:
        text = str(value)
    text = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", text)
    return text if len(text) <= 80 else f"{text[:79]}…"
