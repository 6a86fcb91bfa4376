"""Constraints as llguidance's grammars: the one text for each that a replica gets, and whether tokens conform to it.

Runs in the processes of worker.py. The replica's vLLM compiles the text with the same llguidance, unchanged:
it takes for Lark whatever has a line that begins with `%llguidance` or `start:`.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from llguidance import LLMatcher, LLTokenizer, StructTag, grammar_from

from deployments.contracts import (
    CheckedConstraint,
    CheckedOutputs,
    Constraint,
    ConstraintCheck,
    OutputCheck,
)
from deployments.ingress.constraints.limits import MAX_COMPILE_S, MAX_STEP_S
from deployments.ingress.constraints.schema_keywords import SchemaRefused, held_schema
from deployments.ingress.constraints.schema_patterns import whitespace_class

__all__ = ["ModelGrammars", "grammar_text"]

_HEAD: Final = '%llguidance {"no_forcing": true}\n'
"""vLLM has no use for tokens that are forced, and to look for them costs 0.35 ms per kilobyte of fixed text, at every
step of every sequence."""
_OWN_HEAD: Final = re.compile(r"(?m)^[ \t]*%llguidance\b.*$")
_STEPS: Final = 8
"""Steps of a walk by which the cost of masks is known."""
_MAX_MESSAGE: Final = 300


class _Refused(Exception):
    """`args[0]` says in words for the caller why, and `param` names the other parameter that is in the way."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


# --- the text --------------------------------------------------------------------------------------------------------


def grammar_text(constraint: Constraint, special: frozenset[str] = frozenset()) -> str:
    """The grammar in Lark's syntax; `special` are the texts of the model's special tokens. Raises _Refused, ValueError
    and SchemaRefused with words for the caller."""
    match constraint.kind:
        case "json":
            return f"{_HEAD}start: %json {_json_grammar(_parsed(constraint.text), constraint)}"
        case "json_object":
            return f"{_HEAD}start: %json {_json_grammar({'type': 'object'}, constraint)}"
        case "regex":
            return _HEAD + _regex_grammar(constraint.text)
        case "choice":
            labels = dict.fromkeys(_parsed(constraint.text))
            # One lexeme of all: each on its own makes masks slow.
            return f"{_HEAD}start: LABEL\nLABEL: {' | '.join(map(json.dumps, labels))}"
        case "grammar":
            if constraint.text.lstrip().startswith("{"):
                raise _Refused("A grammar is in GBNF, or in llguidance's Lark syntax with a rule 'start'")
            grammar = str(grammar_from("grammar", constraint.text))
            return _HEAD + _OWN_HEAD.sub("", grammar)
        case "structural_tag":
            return _tags_grammar(_parsed(constraint.text), constraint, special)


def _parsed(text: str) -> Any:
    """Raises _Refused."""

    def refuse(number: str) -> Any:
        raise _Refused(f"{number} is no number of JSON")

    try:
        parsed = json.loads(text, parse_constant=refuse)
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()  # of 1e400 comes an infinity
    except UnicodeEncodeError:
        raise _Refused("There is half of a surrogate pair in it") from None
    except ValueError as error:
        raise _Refused(f"It is not valid JSON: {error}") from None
    except RecursionError:
        raise _Refused("It is nested too deeply") from None
    return parsed


def _json_grammar(schema: Any, constraint: Constraint) -> str:
    return json.dumps(_held(schema, constraint))


def _held(schema: Any, constraint: Constraint) -> dict[str, Any]:
    held = held_schema(schema, closed=constraint.closed)
    options: dict[str, Any] = {"whitespace_flexible": constraint.any_whitespace}
    if constraint.whitespace_pattern is not None:
        try:
            characters = whitespace_class(constraint.whitespace_pattern)
        except ValueError as error:
            raise _Refused(f"whitespace_pattern is {constraint.whitespace_pattern[:40]!r}; {error}") from None
        if characters is None:
            options["whitespace_flexible"] = False
        elif constraint.any_whitespace:
            options["whitespace_pattern"] = f"[{characters}]+"
    return {**held, "x-guidance": options}


def _regex_grammar(regex: str) -> str:
    # The whole output matches, so anchors at both ends say nothing more; llguidance does not know them.
    bare = regex[1:] if regex.startswith("^") else regex
    if bare.endswith("$") and (len(bare) - len(bare[:-1].rstrip("\\"))) % 2:
        bare = bare[:-1]
    grammar = json.loads(LLMatcher.grammar_from_regex(bare))
    return str(grammar["grammars"][0]["lark_grammar"])


def _tags_grammar(tags: Any, constraint: Constraint, special: frozenset[str]) -> str:
    if not isinstance(tags, dict) or not isinstance(structures := tags.get("structures"), list) or not structures:
        raise _Refused("A structural tag is an object with 'structures' and 'triggers'; 'format' is not supported")
    triggers = tags.get("triggers")
    if not isinstance(triggers, list) or not all(isinstance(each, str) and each for each in triggers):
        raise _Refused("Expected 'triggers', an array of non-empty strings, in a structural tag")
    found: list[StructTag] = []
    for at, structure in enumerate(structures):
        if not isinstance(structure, dict) or not {"begin", "end"} <= structure.keys() <= {"begin", "schema", "end"}:
            raise _Refused(f"Expected an object with 'begin', 'schema' and 'end' at structures[{at}]")
        begin, end = structure["begin"], structure["end"]
        if not isinstance(begin, str) or not isinstance(end, str):
            raise _Refused(f"Expected strings as 'begin' and 'end' of structures[{at}]")
        trigger = next((each for each in triggers if begin.startswith(each)), None)
        if trigger is None:
            raise _Refused(f"'begin' of structures[{at}] starts with none of the triggers")
        schema = _held(structure.get("schema", {}), constraint)
        found.append(StructTag(trigger=trigger, begin=begin, grammar=schema, end=end))
    bracketed = {tag.trigger for tag in found if tag.trigger.startswith("<") and tag.trigger.endswith(">")}
    if bracketed & special and not bracketed <= special:
        raise _Refused("Some triggers are special tokens of the model and others in angle brackets are not")
    return str(StructTag.to_grammar(found, assume_special=bool(bracketed & special)))


# --- tokens ----------------------------------------------------------------------------------------------------------


class ModelGrammars:
    """Grammars on the tokens of one model."""

    def __init__(self, folder: Path) -> None:
        """Reads the tokenizer, which takes about half a second for 50,000 tokens."""
        tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
        self._special = {
            token["content"]: token["id"] for token in tokenizer.get("added_tokens", ()) if token.get("special")
        }
        self._eos = self._special.get(_eos_text(folder / "tokenizer_config.json") or "")
        self._tokenizer = LLTokenizer(str(folder / "tokenizer.json"), eos_token=self._eos)
        self._end = self._tokenizer.eos_token
        self._spellings = [self._tokenizer.decode_bytes([token]) for token in range(self._tokenizer.vocab_size)]

    def tokens(self, text: str) -> list[int]:
        return self._tokenizer.tokenize_str(text)

    def check(self, check: ConstraintCheck) -> CheckedConstraint:
        try:
            grammar = grammar_text(check.constraint, frozenset(self._special))
            self._compile(grammar, check)
        except _Refused as refusal:
            return CheckedConstraint(message=_sentence(str(refusal)), param=refusal.param)
        except (SchemaRefused, ValueError) as refusal:
            return CheckedConstraint(message=_sentence(str(refusal)))
        except RecursionError:
            return CheckedConstraint(message="It is nested too deeply.")
        return CheckedConstraint(grammar)

    def _compile(self, grammar: str, check: ConstraintCheck) -> None:
        """Raises _Refused where no output conforms, or none of the tokens that may be sampled begins one."""
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if failed or messages:
            raise _Refused(_reason(messages[0]))
        before = time.process_time()
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        compile_s = (time.process_time() - before) * check.candidates
        first = _tokens_of(matcher.compute_bitmask())
        if matcher.is_error():
            raise _Refused(_reason(matcher.get_error()))
        if first == {self._end} and not matcher.is_accepting():
            raise _Refused("No text conforms to it")
        self._check_tokens(first, check)
        if compile_s > MAX_COMPILE_S:
            raise _Refused(
                f"It is too complex for {check.candidates} choices at a time: to compile it for each takes "
                f"{compile_s:.2g} s of CPU time, and {MAX_COMPILE_S:g} s is the limit"
            )
        self._check_cost(matcher, check.candidates)

    def _check_cost(self, matcher: LLMatcher, candidates: int) -> None:
        drawn, costs_s = random.Random(0), []
        for _ in range(_STEPS):
            before = time.process_time()
            mask = matcher.compute_bitmask()
            costs_s.append(time.process_time() - before)
            going_on = sorted(_tokens_of(mask) - {self._end})
            if not going_on or matcher.is_error():
                break
            matcher.consume_token(drawn.choice(going_on))
        step_s = sorted(costs_s)[len(costs_s) // 2] * candidates
        if step_s > MAX_STEP_S:
            raise _Refused(
                f"It is too complex for {candidates} choices at a time: with it each token takes {step_s:.2g} s of CPU "
                f"time more, and {MAX_STEP_S:g} s is the limit"
            )

    def _check_tokens(self, first: set[int], check: ConstraintCheck) -> None:
        constraint = check.constraint
        labels = [label.encode() for label in json.loads(constraint.text)] if constraint.kind == "choice" else None
        if labels is not None and check.min_tokens > max(map(len, labels)):
            raise _Refused(f"min_tokens is {check.min_tokens}; no label has so many tokens", "min_tokens")
        banned: set[int] = set()
        for param, tokens in (
            ("logit_bias", set(check.banned_token_ids)),
            ("bad_words", set(self._single_tokens(check.bad_words))),
        ):
            banned |= tokens
            if tokens and (first <= banned or (labels and not self._any_spelled(labels, None, banned))):
                raise _Refused(f"{param} leaves no token with which conforming output begins or goes on", param)
        if check.allowed_token_ids is not None:
            allowed = set(check.allowed_token_ids) - banned
            if not first & allowed or (labels and not self._any_spelled(labels, allowed, banned)):
                raise _Refused("allowed_token_ids has no tokens for output that conforms", "allowed_token_ids")

    def _single_tokens(self, words: Iterable[str]) -> Iterable[int]:
        """Of the words that vLLM bans outright: longer ones it bans only in sequence."""
        for word in words:
            for text in (word, " " + word.lstrip()):
                tokens = self._tokenizer.tokenize_str(text)
                if len(tokens) == 1:
                    yield tokens[0]

    def _any_spelled(self, labels: list[bytes], allowed: set[int] | None, banned: set[int]) -> bool:
        """Whether one of `labels` can be put together from tokens that are `allowed`, if that is said, and not
        `banned`."""
        tokens = range(len(self._spellings)) if allowed is None else allowed
        usable = {self._spellings[token] for token in tokens if token not in banned and token < len(self._spellings)}
        longest = max(map(len, usable), default=0)
        for label in labels:
            reached = {0}
            for at in range(len(label)):
                if at in reached:
                    reached |= {
                        end for end in range(at + 1, min(len(label), at + longest) + 1) if label[at:end] in usable
                    }
            if len(label) in reached:
                return True
        return False

    def conforming(self, check: OutputCheck) -> CheckedOutputs:
        start = LLMatcher(self._tokenizer, check.grammar, log_level=0)
        verdicts: list[bool] = []
        for output in check.outputs:
            tokens, ended = output.token_ids, output.ended
            matcher = start.deep_copy()
            conforms = not matcher.is_error() and matcher.try_consume_tokens(tokens) == len(tokens)
            verdicts.append(conforms and (not ended or matcher.is_accepting()))
        return CheckedOutputs(verdicts)


def _eos_text(path: Path) -> str | None:
    """The model's end of text, as vLLM's tokenizer reads it."""
    if not path.exists():
        return None
    token = json.loads(path.read_bytes()).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _tokens_of(bitmask: bytes) -> set[int]:
    number = int.from_bytes(bitmask, "little")
    digits = bin(number)[:1:-1]
    return {at.start() for at in re.finditer("1", digits)}


_CONTEXT: Final = re.compile(r"\n\s*\d+ \|.*", re.DOTALL)
_PLACE: Final = re.compile(r"^at \d+\(\d+\): ")


def _reason(message: str) -> str:
    """llguidance's, without the source that it quotes and the state that it tells."""
    if "NoExtension" in message:
        return "No text conforms to it: a rule needs itself before it can begin"
    if "Regex is empty" in message:  # which it shows as its library writes them
        return "Unsatisfiable schema: no text matches all of its patterns and formats"
    return _PLACE.sub("", _CONTEXT.sub("", message.partition("\n<state>")[0])).removeprefix(
        "failed to compile JSON schema: "
    )


def _sentence(message: str) -> str:
    text = " ".join(message.split()).rstrip(".")
    return (text[: _MAX_MESSAGE - 1] + "…" if len(text) > _MAX_MESSAGE else text) + "."
