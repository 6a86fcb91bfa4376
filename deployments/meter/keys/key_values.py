"""What the values of keys and teams may be: checked wherever one is made or changed, by whatever way it came.

Raises InvalidValue, which names the field, the value and what was expected.
"""

from __future__ import annotations

import math
import re
from typing import Final

import msgspec

from deployments.contracts import KeyChanges, KeyDraft, Limits
from deployments.meter.errors import InvalidValue

__all__ = [
    "LARGEST_LIMIT",
    "MAX_LABELS",
    "MAX_MODELS",
    "MAX_TEXT",
    "TEAM_NAME",
    "changed",
    "check_key",
    "check_team",
    "check_team_name",
]

LARGEST_LIMIT: Final = 2**53 - 1
"""Integers up to here survive in programs that keep all JSON numbers as doubles."""
MAX_TEXT: Final = 100
"""Characters of a name, an owner, a label and its value."""
MAX_LABELS: Final = 32
MAX_MODELS: Final = 100
TEAM_NAME: Final = "[A-Za-z0-9._-]{1,100}"
"""A team is named in URLs and in lists with commas."""

_YEAR_10000_AT: Final = 253_402_300_800
_TEXT: Final = f"1 to {MAX_TEXT} printable characters"


def check_key(values: KeyDraft | KeyChanges, now_at: float) -> None:
    """Limits of KeyChanges are for `changed`. `now_at` is Unix time in seconds."""
    if values.name is not msgspec.UNSET:
        _check_text("name", values.name)
    if values.owner is not msgspec.UNSET and values.owner is not None:
        _check_text("owner", values.owner)
    if values.team is not msgspec.UNSET and values.team is not None:
        check_team_name("team", values.team)
    if not isinstance(values.labels, msgspec.UnsetType):
        _check_labels(values.labels)
    if not isinstance(values.models, msgspec.UnsetType) and values.models is not None:
        _check_models(values.models)
    expires_at = values.expires_at
    if (
        not isinstance(expires_at, msgspec.UnsetType)
        and expires_at is not None
        and not now_at < expires_at < _YEAR_10000_AT
    ):
        raise InvalidValue("expires_at", expires_at, "a time in the future, in Unix seconds, before the year 10000")
    if isinstance(values.limits, Limits):
        _check_limits(values.limits)


def check_team(name: str, limits: Limits) -> None:
    check_team_name("name", name)
    _check_limits(limits)


def check_team_name(field: str, name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(TEAM_NAME, name):
        raise InvalidValue(field, name, f"1 to {MAX_TEXT} of A-Z a-z 0-9 . _ -")


def changed(limits: Limits, changes: dict[str, int | float | None]) -> Limits:
    """`limits` with some of them changed, see KeyChanges."""
    for name, value in changes.items():
        if name not in Limits.__struct_fields__:
            raise InvalidValue(f"limits.{name}", value, f"one of {', '.join(Limits.__struct_fields__)}")
    replaced = msgspec.structs.replace(limits, **changes)
    _check_limits(replaced)
    return replaced


def _check_text(field: str, text: object) -> None:
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_TEXT or not text.isprintable():
        raise InvalidValue(field, text, _TEXT)


def _check_labels(labels: dict[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise InvalidValue("labels", len(labels), f"at most {MAX_LABELS}")
    for name, value in labels.items():
        _check_text("labels", name)
        _check_text(f"labels.{name}", value)


def _check_models(models: tuple[str, ...]) -> None:
    if not 1 <= len(models) <= MAX_MODELS:
        raise InvalidValue("models", list(models), f"1 to {MAX_MODELS} names; to allow all models, leave it out")
    for index, model in enumerate(models):
        _check_text(f"models.{index}", model)


def _check_limits(limits: Limits) -> None:
    for name, value in msgspec.structs.asdict(limits).items():
        if value is None:
            continue
        if name.startswith("money"):
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise InvalidValue(f"limits.{name}", value, "a number above 0")
        elif not (type(value) is int and 1 <= value <= LARGEST_LIMIT):
            raise InvalidValue(f"limits.{name}", value, f"an integer from 1 to {LARGEST_LIMIT}")
