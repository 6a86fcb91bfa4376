"""What was used, over HTTP: `/v1/usage` for every caller, of its own key, and `/v1/organization/usage/completions` for
the admin key, which is OpenAI's Usage API, so that dashboards made for it work here.

The source of the latter's parameters and shapes is OpenAI's API reference; its projects are our teams.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final, Literal, NamedTuple

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from deployments.contracts import UsageDimension, UsageQuery, UsageRow
from deployments.ingress.api.description.answers import Answer, Count
from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.description.json_schemas import Json
from deployments.ingress.api.description.operations import (
    ADMIN_SECURITY,
    ANY_WITH_KEY,
    answered,
    json_content,
    operation,
    parameter,
)
from deployments.ingress.api.description.tables import query_table
from deployments.ingress.api.services import Admin, Caller, ServicesOf
from deployments.ingress.errors import InvalidRequest
from deployments.ingress.http.json_response import json_response
from deployments.ingress.http.query_parameters import QueryParameters
from deployments.resources import BUCKETS_S, parse_grouping, usage_card
from deployments.time_parsing import END_OF_TIME_AT

__all__ = ["USAGE"]

_OWN_GROUPS: Final = ("model", "day", "hour", "dialect", "status")
_GROUPS: Final[dict[str, UsageDimension]] = {"project_id": "team", "api_key_id": "key", "model": "model"}

_DEFAULT_RANGE_S: Final = 30 * 86_400
_MAX_BUCKETS: Final = 10_000


class _Width(NamedTuple):
    seconds: int
    default_limit: int
    max_limit: int


_WIDTHS: Final = {"1m": _Width(60, 60, 1440), "1h": _Width(3600, 24, 168), "1d": _Width(86_400, 7, 31)}
_NOT_SERVED: Final = {
    "user_ids": "usage is not recorded by user; filter by api_key_ids or project_ids",
    "batch": "there are no batches",
}


class UsageOfGroup(Answer):
    object: Literal["usage"]
    begins_at: int = 0
    """Of the day or hour, with `by=day` or `by=hour`: Unix time in seconds."""
    model: str = ""
    """With `by=model`."""
    dialect: str = ""
    """With `by=dialect`."""
    status: str = ""
    """With `by=status`: how the requests ended."""
    requests: Count
    prompt_tokens: Count
    cached_tokens: Count
    """Those of the prompt tokens that were found in the prefix cache."""
    completion_tokens: Count
    total_tokens: Count
    cost: float
    """In the currency of the models' prices."""


class UsageList(Answer):
    object: Literal["list"]
    key_id: str
    since: int
    """Unix time in seconds."""
    until: int
    data: list[UsageOfGroup]
    """Groups without requests are left out."""


class UsageResult(Answer):
    object: Literal["organization.usage.completions.result"]
    input_tokens: Count
    """Prompt tokens, cached ones included."""
    output_tokens: Count
    input_cached_tokens: Count
    input_audio_tokens: Literal[0]
    output_audio_tokens: Literal[0]
    num_model_requests: Count
    project_id: str | None
    """The team, with `group_by=project_id`; null for keys without one."""
    user_id: None
    api_key_id: str | None
    """With `group_by=api_key_id`."""
    model: str | None
    """With `group_by=model`."""
    batch: None


class UsageBucket(Answer):
    object: Literal["bucket"]
    start_time: int
    """Unix time in seconds."""
    end_time: int
    results: list[UsageResult]
    """One per group; none of a bucket without requests."""


class UsagePage(Answer):
    """OpenAI's shape."""

    object: Literal["page"]
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None
    """The `page` of the next request."""


_MOMENT: Final = "A date such as `2027-01-31`, in UTC, a time in ISO 8601, a Unix time, or a duration back such as `7d`"
_INSTANT: Final[Json] = {"type": "integer", "minimum": 0, "exclusiveMaximum": END_OF_TIME_AT}
_PAGE_LIMITS: Final = "; ".join(
    f"with {name} {width.default_limit} by default, {width.max_limit} at most" for name, width in _WIDTHS.items()
)

_router = APIRouter()


def _texts(name: str, description: str, values: Json | None = None) -> Json:
    return parameter(name, description, {"type": "array", "items": values or {"type": "string"}, "maxItems": 100})


@_router.get(
    "/v1/usage",
    openapi_extra=operation(
        "Tell what the key has used",
        "usage",
        answered("The usage of the key that asks.", json_content("UsageList")),
        *ANY_WITH_KEY,
        400,
        description="Counts requests by when they arrived, in whole hours.",
        parameters=[
            parameter("since", f"{_MOMENT}; 30 days before `until` by default.", {"type": "string"}),
            parameter("until", f"{_MOMENT}; now by default.", {"type": "string"}),
            _texts("by", "What to sum it by, repeated or with commas.", {"enum": list(_OWN_GROUPS)}),
        ],
    ),
)
async def own_usage(request: Request, services: ServicesOf, key: Caller) -> Response:
    query = QueryParameters(request.query_params, ("since", "until", "by"))
    try:
        grouping = parse_grouping(query.texts("by") or (), _OWN_GROUPS)
    except ValueError as error:
        raise InvalidRequest(f"Invalid value for 'by': {error}.", param="by") from None
    since, until = query.moment("since"), query.moment("until")
    if until is None:
        until = time.time()
    if since is None:
        since = max(0.0, until - _DEFAULT_RANGE_S)
    if since >= until:
        raise InvalidRequest("Invalid value for 'since': expected a time before 'until'.", param="since")
    if grouping.width_s is not None and (until - since) / grouping.width_s > _MAX_BUCKETS:
        raise InvalidRequest(
            f"Invalid value for 'since': expected at most {_MAX_BUCKETS} {_name(grouping.width_s)}s before 'until'.",
            param="since",
        )
    rows = await services.meter.usage(UsageQuery(since, until, grouping.width_s, grouping.by, key_ids=(key.key_id,)))
    answer = {
        "object": "list",
        "key_id": key.key_id,
        "since": int(since),
        "until": math.ceil(until),
        "data": [usage_card(row, grouping) for row in rows],
    }
    return json_response(msgspec.json.encode(answer))


@_router.get(
    "/v1/organization/usage/completions",
    openapi_extra=operation(
        "Tell what all keys have used",
        "organizationUsage",
        answered("A page of buckets, the oldest first.", json_content("UsagePage")),
        *ANY_WITH_KEY,
        *(400, 403),
        description="OpenAI's Usage API; projects are teams.",
        parameters=[
            parameter(
                "start_time",
                "Unix time in seconds; the first bucket is the one that it is in.",
                _INSTANT,
                required=True,
            ),
            parameter("end_time", "Unix time in seconds, exclusive; now by default.", _INSTANT),
            parameter("bucket_width", "Of each bucket.", {"enum": list(_WIDTHS), "default": "1d"}),
            _texts("group_by", "What to sum each bucket by, repeated or with commas.", {"enum": list(_GROUPS)}),
            _texts("api_key_ids", "Only of these keys, by id."),
            _texts("project_ids", "Only of these teams."),
            _texts("models", "Only of these models."),
            parameter("limit", f"Buckets on a page: {_PAGE_LIMITS}.", {"type": "integer", "minimum": 1}),
            parameter("page", "The `next_page` of the page before.", {"type": "string"}),
        ],
        security=ADMIN_SECURITY,
    ),
)
async def organization_usage(request: Request, services: ServicesOf, _key: Admin) -> Response:
    page = _Page.of(request)
    rows = [] if page.begins_at >= page.ends_at else await services.meter.usage(page.query())
    return json_response(msgspec.json.encode(page.answer(rows)))


class _Page(NamedTuple):
    """Buckets from `begins_at` to before `ends_at`, multiples of `width_s`."""

    begins_at: int
    ends_at: int
    has_more: bool
    width_s: int
    groups: tuple[str, ...]
    key_ids: tuple[str, ...] | None
    teams: tuple[str, ...] | None
    models: tuple[str, ...] | None

    @classmethod
    def of(cls, request: Request) -> _Page:
        """Raises InvalidRequest."""
        query = QueryParameters(
            request.query_params,
            (
                *("start_time", "end_time", "bucket_width", "group_by", "api_key_ids", "project_ids", "models"),
                *("limit", "page"),
            ),
            _NOT_SERVED,
        )
        start = query.integer("start_time", 0, END_OF_TIME_AT - 1)
        if start is None:
            raise InvalidRequest("Missing required parameter: 'start_time'.", param="start_time")
        end = query.integer("end_time", 0, END_OF_TIME_AT - 1)
        if end is not None and end <= start:
            raise InvalidRequest("Invalid value for 'end_time': expected a time after 'start_time'.", param="end_time")
        width = _WIDTHS.get(query.text("bucket_width") or "1d")
        if width is None:
            raise InvalidRequest(
                f"Invalid value for 'bucket_width': expected one of {', '.join(_WIDTHS)}.", param="bucket_width"
            )
        groups = tuple(dict.fromkeys(query.texts("group_by") or ()))
        for group in groups:
            if group not in _GROUPS:
                raise InvalidRequest(
                    f"Invalid value for 'group_by': got {group!r}, expected some of {', '.join(_GROUPS)}.",
                    param="group_by",
                )
        limit = query.integer("limit", 1, width.max_limit) or width.default_limit
        begins_at = start // width.seconds * width.seconds
        last_at = math.ceil((time.time() if end is None else end) / width.seconds) * width.seconds
        if (cursor := query.text("page")) is not None:
            begins_at = _cursor(cursor, begins_at, last_at, width.seconds)
        ends_at = min(begins_at + limit * width.seconds, last_at)
        return cls(
            begins_at,
            ends_at,
            ends_at < last_at,
            width.seconds,
            groups,
            query.texts("api_key_ids"),
            query.texts("project_ids"),
            query.texts("models"),
        )

    def query(self) -> UsageQuery:
        by = tuple(_GROUPS[group] for group in self.groups)
        return UsageQuery(self.begins_at, self.ends_at, self.width_s, by, self.key_ids, self.teams, self.models)

    def answer(self, rows: list[UsageRow]) -> dict[str, Any]:
        results: dict[int | None, list[dict[str, Any]]] = {}
        for row in rows:
            results.setdefault(row.begins_at, []).append(_result(row))
        return {
            "object": "page",
            "data": [
                {
                    "object": "bucket",
                    "start_time": begins_at,
                    "end_time": begins_at + self.width_s,
                    "results": results.get(begins_at, []),
                }
                for begins_at in range(self.begins_at, self.ends_at, self.width_s)
            ],
            "has_more": self.has_more,
            "next_page": f"page_{self.ends_at}" if self.has_more else None,
        }


def _cursor(text: str, first_at: int, last_at: int, width_s: int) -> int:
    """Where the page begins. Raises InvalidRequest."""
    number = text.removeprefix("page_")
    begins_at = int(number) if number.isascii() and number.isdigit() and len(number) < 20 else -1
    if not first_at <= begins_at < last_at or begins_at % width_s:
        raise InvalidRequest(
            "Invalid value for 'page': expected the next_page of the answer to the same request.", param="page"
        )
    return begins_at


def _result(row: UsageRow) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": row.prompt_tokens,
        "output_tokens": row.completion_tokens,
        "input_cached_tokens": row.cached_tokens,
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
        "num_model_requests": row.requests,
        "project_id": row.team or None,
        "user_id": None,
        "api_key_id": row.key,
        "model": row.model,
        "batch": None,
    }


def _name(width_s: int) -> str:
    return next(name for name, each in BUCKETS_S.items() if each == width_s)


_OWN_REFERENCE: Final = """\
## Usage

`GET /v1/usage` tells what the key that asks has used:
"""
_ORGANIZATION_REFERENCE: Final = """\
`GET /v1/organization/usage/completions` is OpenAI's Usage API, for dashboards made for it; projects are teams. Answers
are pages of buckets, which begin at whole minutes, hours or days in UTC:
"""


def _reference() -> str:
    queries = {path: operation["parameters"] for path, _, operation in USAGE.operations()}
    return "\n".join(
        [
            _OWN_REFERENCE,
            query_table(queries["/v1/usage"]),
            _ORGANIZATION_REFERENCE,
            query_table(queries["/v1/organization/usage/completions"]),
        ]
    )


USAGE: Final = Endpoint("usage", "What was used, as the ledger has it.", _router, (UsageList, UsagePage), _reference)
