"""Keys and teams over HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.contracts import Limits
from tests.deployments.ingress.memory_administration import USER, administration

KEYS, TEAMS = "/admin/v1/keys", "/admin/v1/teams"
NO_LIMITS = dict.fromkeys(Limits.__struct_fields__)


def assert_error(response: httpx.Response, status: int, param: str | None = None, words: str = "") -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


async def test_a_key_is_made_and_its_secret_told_once(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        expires_at = int(time.time()) + 1000
        body = {
            "name": "chat",
            "owner": "ana",
            "team": "research",
            "labels": {"stage": "prod"},
            "models": ["m"],
            "limits": {"requests_per_minute": 60, "money_per_day": 0.5},
            "expires_at": expires_at,
        }
        response = await admin.client.post(KEYS, json=body)
        assert response.status_code == 201
        made = response.json()
        secret = made.pop("key")
        assert secret.startswith("sk-ms-")
        assert made.pop("prefix") == secret[:12]
        assert abs(made.pop("created_at") - time.time()) < 60
        key_id = made.pop("id")
        limits = NO_LIMITS | {"requests_per_minute": 60, "money_per_day": 0.5}
        assert made == {**body, "object": "key", "limits": limits, "revoked_at": None}
        shown = (await admin.client.get(f"{KEYS}/{key_id}")).json()
        assert "key" not in shown
        assert shown.items() >= made.items()
        listed = (await admin.client.get(KEYS)).json()
        assert listed == {"object": "list", "data": [shown]}


async def test_a_key_needs_nothing_but_a_name(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        made = (await admin.client.post(KEYS, json={"name": "k", "labels": None, "limits": None})).json()
        assert (made["labels"], made["limits"], made["models"], made["expires_at"]) == ({}, NO_LIMITS, None, None)


async def test_a_change_touches_what_it_names(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        body = {"name": "k", "team": "t", "labels": {"a": "b"}, "models": ["m"], "limits": {"concurrency": 2}}
        made = (await admin.client.post(KEYS, json=body)).json()
        del made["key"]
        url = f"{KEYS}/{made['id']}"
        response = await admin.client.patch(url, json={"limits": {"tokens_per_day": 9}})
        assert response.status_code == 200
        after = made | {"limits": made["limits"] | {"tokens_per_day": 9}}
        assert response.json() == after
        response = await admin.client.patch(url, json={"limits": {"concurrency": None}, "name": "new", "team": None})
        after |= {"limits": after["limits"] | {"concurrency": None}, "name": "new", "team": None}
        assert response.json() == after
        response = await admin.client.patch(url, json={"limits": None, "models": None, "labels": None})
        assert response.json() == after | {"limits": NO_LIMITS, "models": None, "labels": {}}
        assert (await admin.client.patch(url, json={})).json() == response.json()


async def test_a_key_is_rotated_and_revoked(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        made = (await admin.client.post(KEYS, json={"name": "k"})).json()
        url = f"{KEYS}/{made['id']}"
        rotated = (await admin.client.post(f"{url}/rotate")).json()
        assert rotated["id"] == made["id"]
        assert rotated["key"] != made["key"]
        revoked = (await admin.client.delete(url)).json()
        assert revoked["revoked_at"] is not None
        assert "key" not in revoked
        assert (await admin.client.delete(url)).json() == revoked
        assert_error(await admin.client.post(f"{url}/rotate"), 409, words="revoked")
        assert_error(await admin.client.patch(url, json={"name": "n"}), 409, words="revoked")
        assert (await admin.client.get(KEYS)).json()["data"] == []
        assert (await admin.client.get(KEYS, params={"include_revoked": "true"})).json()["data"] == [revoked]


async def test_keys_are_listed_by_team(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        for name, team in (("a", "x"), ("b", "y"), ("c", None)):
            await admin.client.post(KEYS, json={"name": name, "team": team})
        listed = (await admin.client.get(KEYS, params={"team": "y"})).json()["data"]
        assert [key["name"] for key in listed] == ["b"]


async def test_teams_are_set_listed_and_removed(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        response = await admin.client.put(f"{TEAMS}/research", json={"limits": {"tokens_per_day": 5}})
        assert response.status_code == 200
        team = response.json()
        assert (team["object"], team["name"], team["limits"]["tokens_per_day"]) == ("team", "research", 5)
        assert (await admin.client.get(TEAMS)).json() == {"object": "list", "data": [team]}
        replaced = (await admin.client.put(f"{TEAMS}/research", json={"limits": {"concurrency": 1}})).json()
        assert replaced["limits"] == NO_LIMITS | {"concurrency": 1}
        assert (await admin.client.delete(f"{TEAMS}/research")).json() == replaced | {"deleted": True}
        assert_error(await admin.client.delete(f"{TEAMS}/research"), 404)
        assert_error(await admin.client.put(f"{TEAMS}/a b", json={}), 400, "name", "A-Z")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": 1}, "name"),
        ({"name": None}, "name"),
        ({"name": "k", "limit": {}}, "limit"),
        ({"name": "k", "limits": {"tokens_per_week": 1}}, "limits.tokens_per_week"),
        ({"name": "k", "limits": {"tokens_per_day": 0}}, "limits.tokens_per_day"),
        ({"name": "k", "limits": {"tokens_per_day": 1.0}}, "limits.tokens_per_day"),
        ({"name": "k", "limits": {"tokens_per_day": 10**400}}, "limits.tokens_per_day"),
        ({"name": "k", "limits": {"money_per_day": 0}}, "limits.money_per_day"),
        ({"name": "k", "models": []}, "models"),
        ({"name": "k", "models": [""]}, "models.0"),
        ({"name": "k", "team": "a/b"}, "team"),
        ({"name": "k", "labels": {"a": 1}}, "labels.a"),
        ({"name": "k", "expires_at": 1}, "expires_at"),
        ({"name": "k", "expires_at": 10**400}, "expires_at"),
        ({"name": "k", "expires_at": "2027-01-01"}, "expires_at"),
    ],
)
async def test_wrong_bodies_are_refused_by_name(tmp_path: Path, body: dict[str, Any], param: str) -> None:
    async with administration(tmp_path) as admin:
        assert_error(await admin.client.post(KEYS, json=body), 400, param)
        made = (await admin.client.post(KEYS, json={"name": "k"})).json()
        changes = {name: value for name, value in body.items() if value != "k"}
        if changes:
            assert_error(await admin.client.patch(f"{KEYS}/{made['id']}", json=changes), 400, param)
        assert len((await admin.client.get(KEYS)).json()["data"]) == 1


@pytest.mark.parametrize("query", ["teams=x", "include_revoked=yes", "team=a&team=b", "include_revoked="])
async def test_wrong_queries_are_refused_by_name(tmp_path: Path, query: str) -> None:
    async with administration(tmp_path) as admin:
        assert_error(await admin.client.get(f"{KEYS}?{query}"), 400, query.partition("=")[0])


async def test_what_is_not_there_is_404(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        for method, path in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate")):
            response = await admin.client.request(method, f"{KEYS}/key-none{path}", json={})
            assert_error(response, 404, words="key-none")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", KEYS), ("POST", KEYS), ("GET", f"{KEYS}/k"), ("PATCH", f"{KEYS}/k"), ("DELETE", f"{KEYS}/k")),
        *(("POST", f"{KEYS}/k/rotate"), ("GET", TEAMS), ("PUT", f"{TEAMS}/t"), ("DELETE", f"{TEAMS}/t")),
    ],
)
async def test_only_the_admin_key_administers(tmp_path: Path, method: str, path: str) -> None:
    async with administration(tmp_path) as admin:
        response = await admin.client.request(method, path, json={"name": "k"}, headers=USER)
        assert_error(response, 403, words="admin key")
        assert admin.store.changes(0).revision == 0


async def test_other_methods_are_told_which_there_are(tmp_path: Path) -> None:
    async with administration(tmp_path) as admin:
        response = await admin.client.put(KEYS, json={})
        assert response.status_code == 405
        assert {method.strip() for method in response.headers["allow"].split(",")} == {"GET", "HEAD", "POST"}
        assert (await admin.client.head(KEYS)).status_code == 200
