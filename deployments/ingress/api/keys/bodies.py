"""Keys, teams and their limits, as they are asked for and answered."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from deployments.ingress.api.description.answers import Answer
from deployments.ingress.http.json_body import Body
from deployments.meter.keys.key_values import LARGEST_LIMIT, MAX_LABELS, MAX_MODELS, MAX_TEXT, TEAM_NAME
from deployments.time_parsing import END_OF_TIME_AT

__all__ = [
    "CreateKeyRequest",
    "IssuedKey",
    "Key",
    "KeyList",
    "LimitsRequest",
    "Team",
    "TeamDeleted",
    "TeamList",
    "TeamRequest",
    "UpdateKeyRequest",
]

_Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
_Team = Annotated[str, Field(pattern=f"^{TEAM_NAME}$")]
_Labels = Annotated[dict[str, str], Field(max_length=MAX_LABELS)]
_Models = Annotated[list[_Text], Field(min_length=1, max_length=MAX_MODELS)]
_Count = Annotated[int, Field(ge=1, le=LARGEST_LIMIT)]
_Money = Annotated[float, Field(gt=0)]
_ExpiresAt = Annotated[int, Field(ge=0, lt=END_OF_TIME_AT)]


class LimitsRequest(Body):
    """Null sets no limit. Minutes slide, days and months are those of UTC, and tokens are prompt + completion."""

    requests_per_minute: _Count | None = None
    """Requests that are admitted in any 60 seconds."""
    tokens_per_minute: _Count | None = None
    """Tokens of the requests that are admitted in any 60 seconds."""
    concurrency: _Count | None = None
    """Requests at a time."""
    tokens_per_day: _Count | None = None
    """Tokens of a day."""
    tokens_per_month: _Count | None = None
    """Tokens of a month."""
    money_per_day: _Money | None = None
    """What the tokens of a day may cost, in the currency of the models' prices."""
    money_per_month: _Money | None = None
    """What the tokens of a month may cost."""


class CreateKeyRequest(Body):
    name: _Text
    """For people; need not be unique."""
    owner: _Text | None = None
    """Whom to ask about the key."""
    team: _Team | None = None
    """The team whose limits hold for it, too."""
    labels: _Labels | None = None
    """Names and values of your own."""
    models: _Models | None = None
    """The models that it may use; null allows all."""
    limits: LimitsRequest | None = None
    """What it may use."""
    expires_at: _ExpiresAt | None = None
    """Unix time in seconds, in the future, from which on it is refused; null for never."""


class UpdateKeyRequest(CreateKeyRequest):
    """What is left out stays as it is, each of the limits too; null takes a value away."""

    name: _Text = ""
    """For people; need not be unique."""


class TeamRequest(Body):
    limits: LimitsRequest = LimitsRequest()
    """What all keys of the team may use together."""


class LimitsInForce(Answer):
    """Null sets no limit."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrency: int | None
    tokens_per_day: int | None
    tokens_per_month: int | None
    money_per_day: float | None
    money_per_month: float | None


class Key(Answer):
    object: Literal["key"]
    id: str
    name: str
    prefix: str
    """The first characters of the key, to know it by."""
    owner: str | None
    team: str | None
    labels: dict[str, str]
    models: list[str] | None
    """Null allows all."""
    limits: LimitsInForce
    created_at: int
    """Unix time in seconds, as all of them."""
    expires_at: int | None
    revoked_at: int | None


class IssuedKey(Key):
    key: str
    """The key itself, which is not shown again."""


class KeyList(Answer):
    object: Literal["list"]
    data: list[Key]


class Team(Answer):
    object: Literal["team"]
    name: str
    limits: LimitsInForce
    created_at: int
    """Unix time in seconds."""


class TeamDeleted(Team):
    deleted: Literal[True]


class TeamList(Answer):
    object: Literal["list"]
    data: list[Team]
