"""Keys and teams over HTTP, for the admin key: `/admin/v1/keys` and `/admin/v1/teams`."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from deployments.contracts import (
    AdministrationAnswer,
    AdministrationCommand,
    CreateKey,
    GetKey,
    KeyChanges,
    KeyDraft,
    Limits,
    ListKeys,
    ListTeams,
    RemoveTeam,
    RevokeKey,
    RotateKey,
    SetTeam,
    UpdateKey,
)
from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.description.operations import (
    ADMIN_SECURITY,
    ANY_WITH_KEY,
    READING_A_BODY,
    answered,
    json_content,
    operation,
    parameter,
    posted,
)
from deployments.ingress.api.description.tables import parameter_table
from deployments.ingress.api.keys.bodies import (
    CreateKeyRequest,
    IssuedKey,
    Key,
    KeyList,
    LimitsRequest,
    Team,
    TeamDeleted,
    TeamList,
    TeamRequest,
    UpdateKeyRequest,
)
from deployments.ingress.api.services import Admin, RequestBody, Services, ServicesOf
from deployments.ingress.errors import Conflict, InvalidRequest, ObjectNotFound
from deployments.ingress.http.json_body import parsed_body
from deployments.ingress.http.json_response import json_response
from deployments.ingress.http.query_parameters import QueryParameters
from deployments.meter.keys.key_values import TEAM_NAME
from deployments.resources import key_card, team_card

__all__ = ["KEYS"]


_router = APIRouter()
_ADMIN: Final = (*ANY_WITH_KEY, 403)
_WITH_BODY: Final = (*_ADMIN, 400, *READING_A_BODY)
_KEY_ID: Final = [parameter("key_id", "", {"type": "string"}, required=True, place="path")]
_NAME: Final = [parameter("name", "", {"type": "string", "pattern": f"^{TEAM_NAME}$"}, required=True, place="path")]
_KEY: Final = answered("It.", json_content("Key"))
_ISSUED: Final = answered("It, and the key itself.", json_content("IssuedKey"))
_administered = partial(operation, security=ADMIN_SECURITY)


@_router.get(
    "/admin/v1/keys",
    openapi_extra=_administered(
        "List the keys",
        "listKeys",
        answered("The oldest first.", json_content("KeyList")),
        *_ADMIN,
        400,
        parameters=[
            parameter("team", "Only of this team.", {"type": "string"}),
            parameter("include_revoked", "With those that are revoked.", {"type": "boolean"}),
        ],
    ),
)
async def list_keys(request: Request, services: ServicesOf, _key: Admin) -> Response:
    query = QueryParameters(request.query_params, ("team", "include_revoked"))
    command = ListKeys(query.text("team"), query.flag("include_revoked") or False)
    return _list([key_card(record) for record in (await _carried_out(services, command)).keys])


@_router.post(
    "/admin/v1/keys",
    openapi_extra=_administered(
        "Make a key",
        "createKey",
        _ISSUED,
        *_WITH_BODY,
        success=201,
        requestBody=posted(
            "CreateKeyRequest",
            {
                "name": "chat",
                "team": "research",
                "limits": {"requests_per_minute": 60, "tokens_per_day": 1_000_000},
            },
        ),
    ),
)
async def create_key(services: ServicesOf, _key: Admin, body: RequestBody) -> Response:
    asked = await parsed_body(body, CreateKeyRequest)
    draft = KeyDraft(
        name=asked.name,
        owner=asked.owner,
        team=asked.team,
        labels=asked.labels or {},
        models=None if asked.models is None else tuple(asked.models),
        limits=_limits(asked.limits),
        expires_at=asked.expires_at,
    )
    return await _about_key(services, CreateKey(draft), 201)


@_router.get(
    "/admin/v1/keys/{key_id}",
    openapi_extra=_administered("Get a key", "getKey", _KEY, *_ADMIN, 404, parameters=_KEY_ID),
)
async def get_key(key_id: str, services: ServicesOf, _key: Admin) -> Response:
    return await _about_key(services, GetKey(key_id))


@_router.patch(
    "/admin/v1/keys/{key_id}",
    openapi_extra=_administered(
        "Change a key",
        "updateKey",
        _KEY,
        *_WITH_BODY,
        *(404, 409),
        parameters=_KEY_ID,
        requestBody=posted("UpdateKeyRequest", {"limits": {"tokens_per_day": None, "concurrency": 4}}),
    ),
)
async def update_key(key_id: str, services: ServicesOf, _key: Admin, body: RequestBody) -> Response:
    return await _about_key(services, UpdateKey(key_id, _changes(await parsed_body(body, UpdateKeyRequest))))


@_router.delete(
    "/admin/v1/keys/{key_id}",
    openapi_extra=_administered(
        "Revoke a key",
        "revokeKey",
        _KEY,
        *_ADMIN,
        404,
        parameters=_KEY_ID,
        description="It is refused after 5 seconds at most.",
    ),
)
async def revoke_key(key_id: str, services: ServicesOf, _key: Admin) -> Response:
    return await _about_key(services, RevokeKey(key_id))


@_router.post(
    "/admin/v1/keys/{key_id}/rotate",
    openapi_extra=_administered(
        "Give a key another secret",
        "rotateKey",
        _ISSUED,
        *_ADMIN,
        *(404, 409),
        parameters=_KEY_ID,
        description="The old one is refused after 5 seconds at most.",
    ),
)
async def rotate_key(key_id: str, services: ServicesOf, _key: Admin) -> Response:
    return await _about_key(services, RotateKey(key_id))


@_router.get(
    "/admin/v1/teams",
    openapi_extra=_administered("List the teams", "listTeams", answered("By name.", json_content("TeamList")), *_ADMIN),
)
async def list_teams(services: ServicesOf, _key: Admin) -> Response:
    return _list([team_card(record) for record in (await _carried_out(services, ListTeams())).teams])


@_router.put(
    "/admin/v1/teams/{name}",
    openapi_extra=_administered(
        "Set the limits of a team",
        "setTeam",
        answered("It.", json_content("Team")),
        *_WITH_BODY,
        404,
        parameters=_NAME,
        requestBody=posted("TeamRequest", {"limits": {"money_per_month": 500}}),
        description="All of them: those that are left out are lifted.",
    ),
)
async def set_team(name: str, services: ServicesOf, _key: Admin, body: RequestBody) -> Response:
    asked = await parsed_body(body, TeamRequest)
    answer = await _carried_out(services, SetTeam(name, _limits(asked.limits)))
    return json_response(msgspec.json.encode(team_card(answer.teams[0])))


@_router.delete(
    "/admin/v1/teams/{name}",
    openapi_extra=_administered(
        "Lift the limits of a team",
        "removeTeam",
        answered("As it was.", json_content("TeamDeleted")),
        *_ADMIN,
        *(400, 404),
        parameters=_NAME,
        description="Its keys stay, with its name.",
    ),
)
async def remove_team(name: str, services: ServicesOf, _key: Admin) -> Response:
    answer = await _carried_out(services, RemoveTeam(name))
    return json_response(msgspec.json.encode(team_card(answer.teams[0]) | {"deleted": True}))


async def _about_key(services: Services, command: AdministrationCommand, status: int = 200) -> Response:
    answer = await _carried_out(services, command)
    return json_response(msgspec.json.encode(key_card(answer.keys[0], answer.secret)), status)


async def _carried_out(services: Services, command: AdministrationCommand) -> AdministrationAnswer:
    """Raises ObjectNotFound, Conflict, InvalidRequest."""
    answer = await services.meter.administer(command)
    if answer.error is None:
        return answer
    match answer.error.code:
        case "not_found":
            raise ObjectNotFound(answer.error.message)
        case "conflict":
            raise Conflict(answer.error.message)
        case "invalid":
            raise InvalidRequest(answer.error.message, param=answer.error.param)


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
    return json_response(msgspec.json.encode({"object": "list", "data": cards}))


_KEYS_REFERENCE: Final = """\
## Keys and teams

With the admin key, which is in `MILLSTREAM_HOME/admin.key`. A change acts after 5 seconds at most; a new key works at
once. Limits of a team hold for all its keys together, beside their own. `millstream keys` and `millstream teams` do the
same from the command line, on the database itself.

`POST /admin/v1/keys` answers 201 with the key and its secret, `key`, which is not shown again and not kept: only its
SHA-256 is.
"""
_LIMITS_REFERENCE: Final = """\
`limits`, of keys and teams. Null sets no limit; minutes slide, days and months are those of UTC, and tokens are
prompt + completion, with `max_tokens` of every choice until the request has ended:
"""
_CHANGES_REFERENCE: Final = """\
`PATCH /admin/v1/keys/{key_id}` takes the same, all of it optional. What is left out stays as it is, each of the limits
too, and null takes a value away. `DELETE` revokes the key for good, and `POST /admin/v1/keys/{key_id}/rotate` answers
the same key with another secret. `PUT /admin/v1/teams/{name}` takes `{"limits": {...}}`, all of them: those that are
left out are lifted. A team need not be made before its first key.
"""


def _reference() -> str:
    return "\n".join(
        [
            _KEYS_REFERENCE,
            parameter_table(CreateKeyRequest, source=False),
            _LIMITS_REFERENCE,
            parameter_table(LimitsRequest, source=False),
            _CHANGES_REFERENCE,
        ]
    )


KEYS: Final = Endpoint(
    "keys",
    "Keys, teams and their limits, with the admin key.",
    _router,
    (CreateKeyRequest, UpdateKeyRequest, TeamRequest, Key, IssuedKey, KeyList, Team, TeamDeleted, TeamList),
    _reference,
)
