"""The query of a URL checked to the last parameter, as bodies are (json_body.py)."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from starlette.datastructures import QueryParams

from deployments.ingress.errors import InvalidRequest
from deployments.time_parsing import parse_moment

__all__ = ["QueryParameters"]

_MAX_VALUES = 100


class QueryParameters:
    """Every method raises InvalidRequest that names the parameter, and gives None for one that is missing."""

    def __init__(self, query: QueryParams, known: tuple[str, ...], not_served: Mapping[str, str] | None = None) -> None:
        """Raises InvalidRequest for a parameter that is not `known`; `not_served` gives reasons for some of them."""
        self._values: dict[str, list[str]] = {}
        for written, value in query.multi_items():
            name = written.removesuffix("[]")  # as the official client writes the name of an array
            if not_served and name in not_served:
                raise InvalidRequest(f"Invalid value for '{name}': {not_served[name]}.", param=name)
            if name not in known:
                raise InvalidRequest(f"Unrecognized request argument supplied: {name[:100]}.", param=name[:100])
            if not value.isprintable():
                raise _invalid(name, "expected printable characters")
            self._values.setdefault(name, []).append(value)

    def text(self, name: str) -> str | None:
        values = self._values.get(name, [])
        if len(values) > 1:
            raise _invalid(name, "expected it once")
        return values[0] if values else None

    def flag(self, name: str) -> bool | None:
        text = self.text(name)
        if text not in (None, "true", "false"):
            raise _invalid(name, "expected true or false")
        return None if text is None else text == "true"

    def integer(self, name: str, least: int, most: int) -> int | None:
        text = self.text(name)
        if text is None:
            return None
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise _invalid(name, f"expected an integer from {least} to {most}")
        return int(text)

    def moment(self, name: str) -> float | None:
        """Unix time in seconds, see `parse_moment`."""
        text = self.text(name)
        if text is None:
            return None
        try:
            return parse_moment(text, time.time(), "past")
        except ValueError as error:
            raise _invalid(name, str(error)) from None

    def texts(self, name: str) -> tuple[str, ...] | None:
        """All values, whether the parameter is repeated or has several with commas."""
        if name not in self._values:
            return None
        texts = [text for value in self._values[name] for text in value.split(",")]
        if len(texts) > _MAX_VALUES or not all(0 < len(text) <= 100 for text in texts):
            raise _invalid(name, f"expected 1 to {_MAX_VALUES} names of up to 100 characters")
        return tuple(texts)


def _invalid(name: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid value for '{name}': {expected}.", param=name)
