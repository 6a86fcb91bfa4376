"""Stop strings of one choice: finds them in streamed text and holds back what could become one.

The text is the one vLLM's check_stop_strings leaves. vLLM always holds back one character less than the
longest stop string has; here only a suffix that is the beginning of a stop string is held back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Scan", "StopStrings"]


class Scan(NamedTuple):
    text: str
    """May be sent now. When a stop string was found, it is the last text of the choice."""
    found: str | None
    """The stop string that ends the choice."""


class StopStrings:
    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        """`stops`: at least one, none empty. With `include_in_output` the text ends after the stop string."""
        self._stops = tuple(stops)
        self._beginning = re.compile("|".join(re.escape(stop[0]) for stop in stops))
        self._include_in_output = include_in_output
        self._tail = ""
        """The longest suffix of the text that is the beginning of a stop string; sent already if included."""

    def push(self, text: str, *, armed: bool = True) -> Scan:
        """Take new `text`. Not `armed`, a stop string that ends in it is text like any other (min_tokens)."""
        window = self._tail + text
        if self._beginning.search(window) is None:  # most tokens
            return Scan(window, None)
        known = len(self._tail)
        sent = known if self._include_in_output else 0
        if armed and text and (match := self._first_match(window, known)):
            begin, found = match
            end = begin + len(found) if self._include_in_output else begin
            self._tail = ""
            return Scan(window[sent:end], found)
        tail_start = self._tail_start(window)
        self._tail = window[tail_start:]
        return Scan(window[sent : None if self._include_in_output else tail_start], None)

    def flush(self) -> str:
        """What was held back, for the end of a stream in which no stop string was found."""
        tail, self._tail = self._tail, ""
        return "" if self._include_in_output else tail

    def _first_match(self, window: str, known: int) -> tuple[int, str] | None:
        """Begin of the stop string that ends first behind `known` characters; of several the first listed."""
        best: tuple[int, str] | None = None
        best_end = len(window) + 1
        for stop in self._stops:
            begin = window.find(stop, max(0, known - len(stop) + 1))
            if begin != -1 and begin + len(stop) < best_end:
                best, best_end = (begin, stop), begin + len(stop)
        return best

    def _tail_start(self, window: str) -> int:
        start = len(window)
        for stop in self._stops:
            begin = max(0, len(window) - len(stop) + 1)
            while (begin := window.find(stop[0], begin, start)) != -1:
                if stop.startswith(window[begin:]):
                    start = begin
                begin += 1
        return start
