"""What can go wrong in the meter, apart from a refused admission, which is an answer
(contracts.AdmissionRefused).

All of these cross a process boundary inside a Ray Serve call, so each must survive pickling: an exception
passes all it was made with to `super().__init__` and writes its words in `__str__`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "AdminKeyError",
    "LedgerBusy",
    "LedgerUnavailable",
    "MeterBusy",
    "MeterClosed",
    "MeterError",
    "TokenOutOfVocabulary",
    "TokenizerUnavailable",
]


class MeterError(Exception):
    """The base of everything the meter raises on purpose."""


class MeterBusy(MeterError):
    """A bounded queue or table is full. Nothing was changed; worth another try once others are done."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(what, limit)
        self.what = what
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.what}: full at {self.limit}"


class MeterClosed(MeterError):
    """The meter is stopping; what it did not confirm is for its successor."""


class LedgerBusy(MeterBusy):
    """The ledger has too many uncommitted settlements. The caller keeps its own and sends them again."""


class LedgerUnavailable(MeterError):
    """The database did not do what it was asked. Settlements may or may not be in it: send them again."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"ledger unavailable: {self.reason}"


class TokenizerUnavailable(MeterError):
    """The tokenizer of a listed model could not be read."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(folder, reason)
        self.folder = folder
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.folder}: expected a tokenizer.json that the tokenizers library can read: {self.reason}"


class TokenOutOfVocabulary(MeterError):
    """A prompt of token ids holds one that the model does not know."""

    def __init__(self, token_id: int, vocabulary_size: int) -> None:
        super().__init__(token_id, vocabulary_size)
        self.token_id = token_id
        self.vocabulary_size = vocabulary_size

    def __str__(self) -> str:
        return f"Token id {self.token_id} is out of vocabulary: expected 0 <= id < {self.vocabulary_size}."


class AdminKeyError(MeterError):
    """The admin key cannot be used as it is; the message says what to do."""
