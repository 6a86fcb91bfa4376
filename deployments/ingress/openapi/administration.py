"""Usage, keys and teams in the OpenAPI document."""

from __future__ import annotations

from typing import Any, Final

from deployments.ingress.api.keys import CreateKeyRequest, TeamRequest, UpdateKeyRequest
from deployments.ingress.api.usage import GROUPS, OWN_GROUPS, WIDTHS
from deployments.ingress.openapi.answers import ANY_WITH_KEY, READING_A_BODY, answered, json_content, operation, posted
from deployments.ingress.openapi.json_schemas import Json
from deployments.meter.keys.key_values import TEAM_NAME
from deployments.time_parsing import END_OF_TIME_AT

__all__ = ["ADMINISTRATION_BODIES", "ADMIN_SECURITY", "administration_paths"]

ADMINISTRATION_BODIES: Final = (CreateKeyRequest, UpdateKeyRequest, TeamRequest)

ADMIN_SECURITY: Final[list[Json]] = [{"AdminKey": []}]
_STATUSES: Final = (*ANY_WITH_KEY, 403)
_WITH_BODY: Final = (*_STATUSES, 400, *READING_A_BODY)
_MOMENT: Final = "A date such as `2027-01-31`, in UTC, a time in ISO 8601, a Unix time, or a duration back such as `7d`"


def administration_paths() -> Json:
    return {**_usage(), **_keys(), **_teams()}


def _admin(*arguments: Any, **more: Any) -> Json:
    return operation(*arguments, security=ADMIN_SECURITY, **more)


def _parameter(name: str, description: str, schema: Json, *, required: bool = False, place: str = "query") -> Json:
    return {"name": name, "in": place, "required": required, "description": description, "schema": schema}


def _texts(name: str, description: str, values: Json | None = None) -> Json:
    return _parameter(name, description, {"type": "array", "items": values or {"type": "string"}, "maxItems": 100})


def _usage() -> Json:
    instant: Json = {"type": "integer", "minimum": 0, "exclusiveMaximum": END_OF_TIME_AT}
    limits = "; ".join(f"with {name} {w.default_limit} by default, {w.max_limit} at most" for name, w in WIDTHS.items())
    return {
        "/v1/usage": {
            "get": operation(
                "usage",
                "Tell what the key has used",
                "usage",
                answered("The usage of the key that asks.", json_content("UsageList")),
                *ANY_WITH_KEY,
                400,
                description="Counts requests by when they arrived, in whole hours.",
                parameters=[
                    _parameter("since", f"{_MOMENT}; 30 days before `until` by default.", {"type": "string"}),
                    _parameter("until", f"{_MOMENT}; now by default.", {"type": "string"}),
                    _texts("by", "What to sum it by, repeated or with commas.", {"enum": list(OWN_GROUPS)}),
                ],
            )
        },
        "/v1/organization/usage/completions": {
            "get": _admin(
                "usage",
                "Tell what all keys have used",
                "organizationUsage",
                answered("A page of buckets, the oldest first.", json_content("UsagePage")),
                *_STATUSES,
                400,
                description="OpenAI's Usage API; projects are teams.",
                parameters=[
                    _parameter(
                        "start_time",
                        "Unix time in seconds; the first bucket is the one that it is in.",
                        instant,
                        required=True,
                    ),
                    _parameter("end_time", "Unix time in seconds, exclusive; now by default.", instant),
                    _parameter("bucket_width", "Of each bucket.", {"enum": list(WIDTHS), "default": "1d"}),
                    _texts("group_by", "What to sum each bucket by, repeated or with commas.", {"enum": list(GROUPS)}),
                    _texts("api_key_ids", "Only of these keys, by id."),
                    _texts("project_ids", "Only of these teams."),
                    _texts("models", "Only of these models."),
                    _parameter("limit", f"Buckets on a page: {limits}.", {"type": "integer", "minimum": 1}),
                    _parameter("page", "The `next_page` of the page before.", {"type": "string"}),
                ],
            )
        },
    }


def _keys() -> Json:
    key_id = [_parameter("key_id", "", {"type": "string"}, required=True, place="path")]
    key, issued = answered("It.", json_content("Key")), answered("It, and the key itself.", json_content("IssuedKey"))
    limits = {"requests_per_minute": 60, "tokens_per_day": 1_000_000}
    return {
        "/admin/v1/keys": {
            "get": _admin(
                "keys",
                "List the keys",
                "listKeys",
                answered("The oldest first.", json_content("KeyList")),
                *_STATUSES,
                400,
                parameters=[
                    _parameter("team", "Only of this team.", {"type": "string"}),
                    _parameter("include_revoked", "With those that are revoked.", {"type": "boolean"}),
                ],
            ),
            "post": _admin(
                "keys",
                "Make a key",
                "createKey",
                issued,
                *_WITH_BODY,
                success=201,
                requestBody=posted("CreateKeyRequest", {"name": "chat", "team": "research", "limits": limits}),
            ),
        },
        "/admin/v1/keys/{key_id}": {
            "get": _admin("keys", "Tell a key", "getKey", key, *_STATUSES, 404, parameters=key_id),
            "patch": _admin(
                "keys",
                "Change a key",
                "updateKey",
                key,
                *_WITH_BODY,
                *(404, 409),
                parameters=key_id,
                requestBody=posted("UpdateKeyRequest", {"limits": {"tokens_per_day": None, "concurrency": 4}}),
            ),
            "delete": _admin(
                "keys",
                "Revoke a key",
                "revokeKey",
                key,
                *_STATUSES,
                404,
                parameters=key_id,
                description="It is refused after 5 seconds at most.",
            ),
        },
        "/admin/v1/keys/{key_id}/rotate": {
            "post": _admin(
                "keys",
                "Give a key another secret",
                "rotateKey",
                issued,
                *_STATUSES,
                *(404, 409),
                parameters=key_id,
                description="The old one is refused after 5 seconds at most.",
            )
        },
    }


def _teams() -> Json:
    name = [
        _parameter("name", "", {"type": "string", "pattern": f"^{TEAM_NAME}$"}, required=True, place="path"),
    ]
    return {
        "/admin/v1/teams": {
            "get": _admin(
                "keys", "List the teams", "listTeams", answered("By name.", json_content("TeamList")), *_STATUSES
            )
        },
        "/admin/v1/teams/{name}": {
            "put": _admin(
                "keys",
                "Set the limits of a team",
                "setTeam",
                answered("It.", json_content("Team")),
                *_WITH_BODY,
                404,
                parameters=name,
                requestBody=posted("TeamRequest", {"limits": {"money_per_month": 500}}),
                description="All of them: those that are left out are lifted.",
            ),
            "delete": _admin(
                "keys",
                "Lift the limits of a team",
                "removeTeam",
                answered("As it was.", json_content("TeamDeleted")),
                *_STATUSES,
                *(400, 404),
                parameters=name,
                description="Its keys stay, with its name.",
            ),
        },
    }
