"""What was used, over HTTP: `/v1/usage` for every caller, of its own key, and `/v1/organization/usage/completions` for
the admin key, which is OpenAI's Usage API, so that dashboards made for it work here.

The source of the latter's parameters and shapes is OpenAI's API reference; its projects are our teams.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.contracts import KeyInfo, UsageDimension, UsageQuery, UsageRow
from deployments.ingress.api.keys import require_admin
from deployments.ingress.errors import InvalidRequest
from deployments.ingress.http.query_parameters import QueryParameters
from deployments.resources import BUCKETS_S, parse_grouping, usage_card
from deployments.time_parsing import END_OF_TIME_AT

__all__ = ["GROUPS", "OWN_GROUPS", "WIDTHS", "usage_routes"]

Usage = Callable[[UsageQuery], Awaitable[list[UsageRow]]]

OWN_GROUPS: Final = ("model", "day", "hour", "dialect", "status")
GROUPS: Final[dict[str, UsageDimension]] = {"project_id": "team", "api_key_id": "key", "model": "model"}

_DEFAULT_RANGE_S: Final = 30 * 86_400
_MAX_BUCKETS: Final = 10_000


class _Width(NamedTuple):
    seconds: int
    default_limit: int
    max_limit: int


WIDTHS: Final = {"1m": _Width(60, 60, 1440), "1h": _Width(3600, 24, 168), "1d": _Width(86_400, 7, 31)}
_NOT_SERVED: Final = {
    "user_ids": "usage is not recorded by user; filter by api_key_ids or project_ids",
    "batch": "there are no batches",
}


def usage_routes(usage: Usage, caller: Callable[[Request], Awaitable[KeyInfo]]) -> list[Route]:
    """`usage` and `caller` raise ApiError, as the routes do."""

    async def own(request: Request) -> Response:
        key = await caller(request)
        query = QueryParameters(request.query_params, ("since", "until", "by"))
        try:
            grouping = parse_grouping(query.texts("by") or (), OWN_GROUPS)
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
                f"Invalid value for 'since': expected at most {_MAX_BUCKETS} {_name(grouping.width_s)}s before "
                "'until'.",
                param="since",
            )
        rows = await usage(UsageQuery(since, until, grouping.width_s, grouping.by, key_ids=(key.key_id,)))
        return _json(
            {
                "object": "list",
                "key_id": key.key_id,
                "since": int(since),
                "until": math.ceil(until),
                "data": [usage_card(row, grouping) for row in rows],
            }
        )

    async def organization(request: Request) -> Response:
        await require_admin(caller, request)
        page = _Page.of(request)
        rows = [] if page.begins_at >= page.ends_at else await usage(page.query())
        return _json(page.answer(rows))

    return [Route("/v1/usage", own), Route("/v1/organization/usage/completions", organization)]


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
        width = WIDTHS.get(query.text("bucket_width") or "1d")
        if width is None:
            raise InvalidRequest(
                f"Invalid value for 'bucket_width': expected one of {', '.join(WIDTHS)}.", param="bucket_width"
            )
        groups = tuple(dict.fromkeys(query.texts("group_by") or ()))
        for group in groups:
            if group not in GROUPS:
                raise InvalidRequest(
                    f"Invalid value for 'group_by': got {group!r}, expected some of {', '.join(GROUPS)}.",
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
        by = tuple(GROUPS[group] for group in self.groups)
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


def _json(content: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
