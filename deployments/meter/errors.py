"""What can go wrong in the meter.

They cross to other processes by the name of their class (deployments/meter/remote/meter_connection.py), and when a call
through Serve ends with one, pickled: an exception passes all it was made with to `super().__init__` and writes its
words in `__str__`.
"""

from __future__ import annotations

from pathlib import Path

from deployments.contracts import AdmissionRefusalCode, AdmissionRefused, RateLimits

__all__ = [
    "AdminKeyError",
    "InvalidValue",
    "KeyNotFound",
    "KeyRevoked",
    "LedgerBusy",
    "LedgerUnavailable",
    "MeterBusy",
    "MeterClosed",
    "MeterError",
    "NotAdmitted",
    "OwnerBusy",
    "PromptTooLong",
    "TeamNotFound",
    "TokenOutOfVocabulary",
    "TokenizerUnavailable",
]


class MeterError(Exception):
    """The base of everything the meter raises on purpose."""


class NotAdmitted(MeterError):
    """A request is refused. Crosses to other processes as `refusal`, which is an answer (service.py)."""

    def __init__(
        self,
        code: AdmissionRefusalCode,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        rate_limits: RateLimits | None = None,
    ) -> None:
        super().__init__(code, message)
        self.refusal = AdmissionRefused(code, message, param, retry_after_s, rate_limits)

    def __str__(self) -> str:
        return f"{self.refusal.code}: {self.refusal.message}"


class MeterBusy(MeterError):
    """A bounded queue or table is full. Nothing was changed; worth another try once others are done."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(what, limit)
        self.what = what
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.what}: full at {self.limit}"


class OwnerBusy(MeterBusy):
    """What one key or team may have in a queue is there already. Others go on; it is worth another try later."""

    def __init__(self, what: str, limit: int, retry_after_s: float) -> None:
        MeterError.__init__(self, what, limit, retry_after_s)
        self.what = what
        self.limit = limit
        self.retry_after_s = retry_after_s


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


class PromptTooLong(MeterError):
    """A text makes more tokens than there is room for."""

    def __init__(self, tokens: int, exact: bool) -> None:
        super().__init__(tokens, exact)
        self.tokens = tokens
        self.exact = exact
        """False when it makes at least so many: it was not tokenized."""

    def __str__(self) -> str:
        return f"{'' if self.exact else 'at least '}{self.tokens} tokens"


class TextTooLong(MeterError):
    """A text that is to be cut makes more tokens than can be looked at."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(tokens, limit)
        self.tokens = tokens
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"The text makes {self.tokens} tokens; at most {self.limit} are cut down by truncate_prompt_tokens. Send "
            "the part of it that is to be kept."
        )


class AdminKeyError(MeterError):
    """The admin key cannot be used as it is; the message says what to do."""


class InvalidValue(MeterError):
    """A key or a team cannot be made or changed like this."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        """`field` such as `limits.tokens_per_day`."""
        super().__init__(field, value, expected)
        self.field = field
        self.value = value
        self.expected = expected

    def __str__(self) -> str:
        shown = repr(self.value)
        return f"{self.field}: got {shown if len(shown) <= 100 else f'{shown[:100]}…'}, expected {self.expected}"


class KeyNotFound(MeterError):
    def __init__(self, key_id: str) -> None:
        super().__init__(key_id)
        self.key_id = key_id

    def __str__(self) -> str:
        return f"There is no key {self.key_id}."


class KeyRevoked(MeterError):
    """What is revoked stays so and as it was."""

    def __init__(self, key_id: str) -> None:
        super().__init__(key_id)
        self.key_id = key_id

    def __str__(self) -> str:
        return f"The key {self.key_id} is revoked for good; make a new one."


class TeamNotFound(MeterError):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"There are no limits of a team {self.name}."
