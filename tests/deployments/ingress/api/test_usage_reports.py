"""Usage over HTTP: of the caller's own key, and of all in the shape of OpenAI's Usage API."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest

from tests.deployments.ingress.memory_administration import USER, Administration, administration, record_hour

DAY_S, HOUR_S = 86_400, 3600
DAY = 20_000 * DAY_S
"""The beginning of one in the past."""
OWN, ALL = "/v1/usage", "/v1/organization/usage/completions"


def assert_error(response: httpx.Response, status: int, param: str | None, words: str = "") -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


# --- the caller's own ------------------------------------------------------------------------------------------------


async def own(admin: Administration, **params: Any) -> dict[str, Any]:
    response = await admin.client.get(OWN, params=params, headers=USER)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_a_key_sees_its_own_usage_and_no_other(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        record_hour(admin.engine, DAY, requests=2)
        record_hour(admin.engine, DAY, requests=7, key_id="key-other")
        answer = await own(admin, since=DAY, until=DAY + DAY_S)
        assert answer == {
            "object": "list",
            "key_id": "key-user",
            "since": DAY,
            "until": DAY + DAY_S,
            "data": [
                {
                    "object": "usage",
                    "requests": 2,
                    "prompt_tokens": 20,
                    "cached_tokens": 8,
                    "completion_tokens": 10,
                    "total_tokens": 30,
                    "cost": 1.0,
                }
            ],
        }


async def test_own_usage_by_model_and_day(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        for hour, model in ((DAY, "a"), (DAY + HOUR_S, "a"), (DAY, "b"), (DAY + DAY_S, "a")):
            record_hour(admin.engine, hour, model=model)
        answer = await own(admin, since="2024-10-04", until=DAY + 2 * DAY_S, by="model,day")
        assert [(row["begins_at"], row["model"], row["requests"]) for row in answer["data"]] == [
            (DAY, "a", 2),
            (DAY, "b", 1),
            (DAY + DAY_S, "a", 1),
        ]
        answer = await own(admin, since=DAY, until=DAY + 2 * HOUR_S, by=["hour", "status"])
        assert [(row["begins_at"], row["status"]) for row in answer["data"]] == [
            (DAY, "finished"),
            (DAY + HOUR_S, "finished"),
        ]


async def test_own_usage_is_of_the_last_thirty_days_by_default(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        now = int(time.time()) // HOUR_S * HOUR_S
        record_hour(admin.engine, now, requests=1)
        record_hour(admin.engine, now - 29 * DAY_S, requests=2)
        record_hour(admin.engine, now - 31 * DAY_S, requests=4)
        answer = await own(admin)
        assert [row["requests"] for row in answer["data"]] == [3]
        assert answer["until"] - answer["since"] - 30 * DAY_S in (0, 1)


@pytest.mark.parametrize(
    ("query", "param", "words"),
    [
        ("by=key", "by", "model, day"),
        ("by=day,hour", "by", "not both"),
        ("by=", "by", "names"),
        ("since=yesterday", "since", "2027-01-31"),
        ("since=-1", "since", "expected"),
        ("since=2024-13-01", "since", "expected"),
        ("since=100&until=100", "since", "before"),
        ("since=0&by=hour", "since", "10000 hours"),
        ("key_id=key-other", "key_id", "Unrecognized"),
    ],
)
async def test_wrong_queries_are_refused_by_name(tmp_path: Path, query: str, param: str, words: str) -> None:
    async with administration(tmp_path) as admin:
        assert_error(await admin.client.get(f"{OWN}?{query}", headers=USER), 400, param, words)


# --- everybody's -----------------------------------------------------------------------------------------------------


async def buckets(admin: Administration, **params: Any) -> dict[str, Any]:
    response = await admin.client.get(ALL, params=params)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_buckets_are_as_openai_has_them(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        record_hour(admin.engine, DAY, requests=2)
        record_hour(admin.engine, DAY + HOUR_S, key_id="key-other", requests=1)
        answer = await buckets(admin, start_time=DAY + 5, end_time=DAY + DAY_S + 1)
        assert answer == {
            "object": "page",
            "data": [
                {
                    "object": "bucket",
                    "start_time": DAY,
                    "end_time": DAY + DAY_S,
                    "results": [
                        {
                            "object": "organization.usage.completions.result",
                            "input_tokens": 30,
                            "output_tokens": 15,
                            "input_cached_tokens": 12,
                            "input_audio_tokens": 0,
                            "output_audio_tokens": 0,
                            "num_model_requests": 3,
                            "project_id": None,
                            "user_id": None,
                            "api_key_id": None,
                            "model": None,
                            "batch": None,
                        }
                    ],
                },
                {"object": "bucket", "start_time": DAY + DAY_S, "end_time": DAY + 2 * DAY_S, "results": []},
            ],
            "has_more": False,
            "next_page": None,
        }


@pytest.mark.parametrize("written", ["group_by=project_id,model", "group_by=project_id&group_by=model"])
async def test_usage_is_grouped_and_filtered(tmp_path: Path, written: str) -> None:
    async with administration(tmp_path) as admin:
        for team, model, key in (("x", "a", "1"), ("x", "a", "2"), ("x", "b", "1"), ("", "a", "3"), ("y", "a", "4")):
            record_hour(admin.engine, DAY, team=team, model=model, key_id=key)
        base = f"{ALL}?start_time={DAY}&end_time={DAY + 1}"
        [bucket] = (await admin.client.get(f"{base}&{written}")).json()["data"]
        groups = {(each["project_id"], each["model"]): each["num_model_requests"] for each in bucket["results"]}
        assert groups == {("x", "a"): 2, ("x", "b"): 1, (None, "a"): 1, ("y", "a"): 1}
        [bucket] = (
            await admin.client.get(f"{base}&group_by=api_key_id&project_ids=x,y&models[]=a&api_key_ids=1&api_key_ids=4")
        ).json()["data"]
        assert [each["api_key_id"] for each in bucket["results"]] == ["1", "4"]


@pytest.mark.parametrize(("width", "seconds", "default"), [("1m", 60, 60), ("1h", HOUR_S, 24), ("1d", DAY_S, 7)])
async def test_pages_follow_each_other_without_a_gap(tmp_path: Path, width: str, seconds: int, default: int) -> None:
    async with administration(tmp_path) as admin:
        count = 2 * default + 1
        query: dict[str, Any] = {"start_time": DAY, "end_time": DAY + count * seconds, "bucket_width": width}
        begun: list[int] = []
        sizes: list[int] = []
        while True:
            page = await buckets(admin, **query)
            begun += [bucket["start_time"] for bucket in page["data"]]
            sizes.append(len(page["data"]))
            if not page["has_more"]:
                break
            query["page"] = page["next_page"]
        assert page["next_page"] is None
        assert begun == list(range(DAY, DAY + count * seconds, seconds))
        assert sizes == [default, default, 1]


async def test_the_limit_is_of_buckets(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        page = await buckets(admin, start_time=DAY, end_time=DAY + 2 * DAY_S, bucket_width="1m", limit=1440)
        assert len(page["data"]) == 1440
        assert page["has_more"]
        page = await buckets(admin, start_time=DAY, end_time=DAY + 9 * DAY_S, limit=2)
        assert len(page["data"]) == 2


async def test_the_end_is_now_by_default(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        now = int(time.time())
        page = await buckets(admin, start_time=now - DAY_S)
        assert page["data"][-1]["start_time"] <= now + 1
        assert not page["has_more"]
        assert (await buckets(admin, start_time=now + 10 * DAY_S))["data"] == []


@pytest.mark.parametrize(
    ("query", "param", "words"),
    [
        ("", "start_time", "Missing"),
        ("start_time=x", "start_time", "integer"),
        ("start_time=2024-01-01", "start_time", "integer"),
        ("start_time=99999999999999", "start_time", "integer"),
        ("start_time=5&end_time=5", "end_time", "after"),
        ("start_time=5&bucket_width=2d", "bucket_width", "1m, 1h, 1d"),
        ("start_time=5&group_by=user_id", "group_by", "project_id, api_key_id, model"),
        ("start_time=5&group_by=batch", "group_by", "expected"),
        ("start_time=5&user_ids=u", "user_ids", "not recorded"),
        ("start_time=5&batch=true", "batch", "no batches"),
        ("start_time=5&limit=32", "limit", "1 to 31"),
        ("start_time=5&limit=0", "limit", "1 to 31"),
        ("start_time=5&bucket_width=1h&limit=169", "limit", "1 to 168"),
        ("start_time=5&page=page_7", "page", "next_page"),
        ("start_time=5&page=page_99999999999999", "page", "next_page"),
        ("start_time=5&page=page_x", "page", "next_page"),
        ("start_time=5&nope=1", "nope", "Unrecognized"),
    ],
)
async def test_wrong_parameters_are_refused_by_name(tmp_path: Path, query: str, param: str, words: str) -> None:
    async with administration(tmp_path) as admin:
        assert_error(await admin.client.get(f"{ALL}?{query}"), 400, param, words)


async def test_only_the_admin_key_sees_everybodys_usage(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        assert_error(await admin.client.get(f"{ALL}?start_time=5", headers=USER), 403, None, "admin key")


async def test_the_official_client_reads_it(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        record_hour(admin.engine, DAY, model="a", team="x", requests=2)
        record_hour(admin.engine, DAY, model="b", team="x", requests=3)
        transport = httpx2.ASGITransport(admin.app)
        async with openai.AsyncOpenAI(
            base_url="http://gateway/v1",
            api_key="none",
            admin_api_key="admin",
            http_client=openai.DefaultAsyncHttpxClient(transport=transport),
        ) as client:
            page = await client.admin.organization.usage.completions(
                start_time=DAY, end_time=DAY + 9 * DAY_S, group_by=["model", "project_id"], models=["a"], limit=1
            )
        [bucket] = page.data
        [result] = bucket.results
        assert result.object == "organization.usage.completions.result"
        assert (result.model, result.project_id, result.num_model_requests) == ("a", "x", 2)
        assert (page.has_more, page.next_page is None) == (True, False)
