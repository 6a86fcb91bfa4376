"""Keys and teams over HTTP, for the admin key: `/admin/v1/keys` and `/admin/v1/teams`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.contracts import (
    AdministrationAnswer,
    AdministrationCommand,
    CreateKey,
    GetKey,
    KeyChanges,
    KeyDraft,
    KeyInfo,
    Limits,
    ListKeys,
    ListTeams,
    RemoveTeam,
    RevokeKey,
    RotateKey,
    SetTeam,
    UpdateKey,
)
from deployments.ingress.errors import Conflict, InvalidRequest, ObjectNotFound, PermissionDenied
from deployments.ingress.http.json_body import Body, parsed_body
from deployments.ingress.http.query_parameters import QueryParameters
from deployments.meter.keys.key_values import LARGEST_LIMIT, MAX_LABELS, MAX_MODELS, MAX_TEXT, TEAM_NAME
from deployments.resources import key_card, team_card
from deployments.time_parsing import END_OF_TIME_AT

__all__ = [
    "CreateKeyRequest",
    "LimitsRequest",
    "TeamRequest",
    "UpdateKeyRequest",
    "administration_routes",
    "require_admin",
]

Handler = Callable[[Request], Awaitable[Response]]

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


async def require_admin(caller: Callable[[Request], Awaitable[KeyInfo]], request: Request) -> None:
    """Raises PermissionDenied, and what `caller` raises."""
    if not (await caller(request)).admin:
        raise PermissionDenied("This needs the admin key.")


def administration_routes(
    administer: Callable[[AdministrationCommand], Awaitable[AdministrationAnswer]],
    caller: Callable[[Request], Awaitable[KeyInfo]],
    read_body: Callable[[Request], Awaitable[bytes]],
) -> list[Route]:
    """`caller` and `read_body` raise ApiError, as the routes do."""

    async def carried_out(command: AdministrationCommand) -> AdministrationAnswer:
        answer = await administer(command)
        if answer.error is None:
            return answer
        match answer.error.code:
            case "not_found":
                raise ObjectNotFound(answer.error.message)
            case "conflict":
                raise Conflict(answer.error.message)
            case "invalid":
                raise InvalidRequest(answer.error.message, param=answer.error.param)

    async def about_key(command: AdministrationCommand, status: int = 200) -> Response:
        answer = await carried_out(command)
        return _json(key_card(answer.keys[0], answer.secret), status)

    async def list_keys(request: Request) -> Response:
        query = QueryParameters(request.query_params, ("team", "include_revoked"))
        command = ListKeys(query.text("team"), query.flag("include_revoked") or False)
        return _list([key_card(record) for record in (await carried_out(command)).keys])

    async def create_key(request: Request) -> Response:
        body = await parsed_body(await read_body(request), CreateKeyRequest)
        draft = KeyDraft(
            name=body.name,
            owner=body.owner,
            team=body.team,
            labels=body.labels or {},
            models=None if body.models is None else tuple(body.models),
            limits=_limits(body.limits),
            expires_at=body.expires_at,
        )
        return await about_key(CreateKey(draft), 201)

    async def get_key(request: Request) -> Response:
        return await about_key(GetKey(request.path_params["key_id"]))

    async def update_key(request: Request) -> Response:
        body = await parsed_body(await read_body(request), UpdateKeyRequest)
        return await about_key(UpdateKey(request.path_params["key_id"], _changes(body)))

    async def rotate_key(request: Request) -> Response:
        return await about_key(RotateKey(request.path_params["key_id"]))

    async def revoke_key(request: Request) -> Response:
        return await about_key(RevokeKey(request.path_params["key_id"]))

    async def list_teams(_request: Request) -> Response:
        return _list([team_card(record) for record in (await carried_out(ListTeams())).teams])

    async def set_team(request: Request) -> Response:
        body = await parsed_body(await read_body(request), TeamRequest)
        answer = await carried_out(SetTeam(request.path_params["name"], _limits(body.limits)))
        return _json(team_card(answer.teams[0]))

    async def remove_team(request: Request) -> Response:
        answer = await carried_out(RemoveTeam(request.path_params["name"]))
        return _json(team_card(answer.teams[0]) | {"deleted": True})

    def resource(path: str, **handlers: Handler) -> Route:
        async def handle(request: Request) -> Response:
            await require_admin(caller, request)
            return await handlers["GET" if request.method == "HEAD" else request.method](request)

        return Route(path, handle, methods=list(handlers))

    return [
        resource("/admin/v1/keys", GET=list_keys, POST=create_key),
        resource("/admin/v1/keys/{key_id}", GET=get_key, PATCH=update_key, DELETE=revoke_key),
        resource("/admin/v1/keys/{key_id}/rotate", POST=rotate_key),
        resource("/admin/v1/teams", GET=list_teams),
        resource("/admin/v1/teams/{name}", PUT=set_team, DELETE=remove_team),
    ]


def _limits(body: LimitsRequest | None) -> Limits:
    return Limits() if body is None else Limits(**body.model_dump())


def _changes(body: UpdateKeyRequest) -> KeyChanges:
    changes = body.model_dump(exclude_unset=True)
    if "labels" in changes:
        changes["labels"] = changes["labels"] or {}
    if changes.get("models") is not None:
        changes["models"] = tuple(changes["models"])
    if "limits" in changes and changes["limits"] is None:
        changes["limits"] = dict.fromkeys(Limits.__struct_fields__)
    return KeyChanges(**changes)


def _list(cards: list[dict[str, Any]]) -> Response:
    return _json({"object": "list", "data": cards})


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
