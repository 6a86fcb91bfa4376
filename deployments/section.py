"""Mappings in cluster.yaml, wherever they are read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

__all__ = ["Section", "unexpected"]


class Section(BaseModel):
    """A mapping in cluster.yaml. `"1"` is no number, `1` no text and an unknown key an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def unexpected(expected: str) -> PydanticCustomError:
    """An error of one value, in the words of `Problem.expected`."""
    return PydanticCustomError("unexpected", "expected {expected}", {"expected": expected})
