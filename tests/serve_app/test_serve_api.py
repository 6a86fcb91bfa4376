"""What Ray Serve's REST API tells, in the words that an operator gets."""

from __future__ import annotations

import json
import time
import traceback

import httpx
import msgspec
import pytest

from deployments.scaling.scaling_board import ShownDecision
from serve_app.serve_api import Application, ServeApi, ServeApiError, ServeReplica


def told(message: str, **deployments: str) -> list[str]:
    return Application("model-a", "DEPLOY_FAILED", message, {}, deployments, {}, {}).reasons


def trace_of(error: Exception) -> str:
    try:
        raise error
    except Exception:
        return traceback.format_exc()


def test_without_a_traceback_the_message_stays_as_it_is() -> None:
    assert told("  Deployment is waiting for CPUs.\nIt wants 4.\n") == ["Deployment is waiting for CPUs.\nIt wants 4."]


def test_of_a_traceback_only_the_error_is_told() -> None:
    trace = trace_of(ValueError("no such model"))
    assert "File" in trace
    assert told(f"Failed to start 3 times.\n\n{trace}") == ["Failed to start 3 times.\nValueError: no such model"]
    assert told(trace) == ["ValueError: no such model"]


def test_all_lines_of_the_error_are_told() -> None:
    assert told(trace_of(ValueError("first\n  second\n\nthird"))) == ["ValueError: first\n  second\n\nthird"]


def test_of_errors_that_caused_each_other_the_last_is_told() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise RuntimeError("outer") from error
    except RuntimeError:
        trace = traceback.format_exc()
    assert trace.count("Traceback (most recent call last):") == 2
    assert told(f"Failed.\n{trace}") == ["Failed.\nRuntimeError: outer"]


def test_rays_error_is_told_without_the_frames_of_the_replica() -> None:
    message = (
        "The deployment failed to start 3 times in a row. Error:\n"
        "Traceback (most recent call last):\n"
        '  File "/ray/serve/deployment_state.py", line 735, in check_ready\n'
        "    ) = ray.get(self._ready_obj_ref)\n"
        "        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^\n"
        "ray.exceptions.RayTaskError(RuntimeError): ray::ServeReplica:model-a:Engine.initialize() (pid=1)\n"
        '  File "/ray/serve/replica.py", line 995, in initialize\n'
        "    raise RuntimeError(traceback.format_exc()) from None\n"
        "RuntimeError: weights not found: ./none\n"
    )
    assert told(message) == [
        "The deployment failed to start 3 times in a row. Error:\nRuntimeError: weights not found: ./none"
    ]


def test_the_same_reason_is_told_once_and_none_is_told_for_silence() -> None:
    assert told("broken", Engine="broken", Root="") == ["broken"]
    assert told("", Engine="", Root="late") == ["late"]
    assert told("") == []


def api(
    monkeypatch: pytest.MonkeyPatch, answer: httpx.Response | httpx.HTTPError, seen: list[httpx.Request]
) -> ServeApi:
    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if isinstance(answer, httpx.HTTPError):
            raise answer
        return answer

    client = httpx.Client

    def connect(**options: object) -> httpx.Client:
        return client(transport=httpx.MockTransport(handle), **options)  # type: ignore[arg-type]

    monkeypatch.setattr("serve_app.serve_api.httpx.Client", connect)
    return ServeApi("http://127.0.0.1:8265", "token")


def test_applications_and_their_replicas_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    described = {
        "applications": {
            "model-a": {
                "status": "RUNNING",
                "deployments": {
                    "Engine": {
                        "message": "",
                        "target_num_replicas": 2,
                        "replicas": [
                            {"replica_id": "r0", "state": "RUNNING", "node_ip": "10.0.0.1", "pid": 7},
                            {"replica_id": "r1", "state": "STARTING", "node_ip": None},
                        ],
                    }
                },
            }
        }
    }
    seen: list[httpx.Request] = []
    [application] = api(monkeypatch, httpx.Response(200, json=described), seen).applications()
    assert (application.name, application.status, application.reasons) == ("model-a", "RUNNING", [])
    assert application.deployments == {
        "Engine": [ServeReplica("r0", "RUNNING", "10.0.0.1", 7), ServeReplica("r1", "STARTING", "", None)]
    }
    assert application.wanted == {"Engine": 2}
    assert str(seen[0].url) == "http://127.0.0.1:8265/api/serve/applications/"
    assert seen[0].headers["authorization"] == "Bearer token"


def test_a_configuration_is_put_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[httpx.Request] = []
    api(monkeypatch, httpx.Response(200), seen).apply({"applications": []})
    assert (seen[0].method, json.loads(seen[0].content)) == ("PUT", {"applications": []})


def test_decisions_that_are_still_made_are_read_from_the_controllers_node(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    decisions = {
        "serve/scaling-gateway.json": ShownDecision("gateway", 1, "no load", now),
        "serve/scaling-model-a.json": ShownDecision("model-a", 3, "prefill", now, now - 9, 2, "queue"),
        "serve/scaling-model-b.json": ShownDecision("model-b", 3, "prefill", now - 20),
    }

    def handle(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer token"
        query = request.url.params
        if request.url.path == "/api/serve/applications/":
            return httpx.Response(200, json={"controller_info": {"node_id": "head"}})
        assert query["node_id"] == "head"
        if request.url.path == "/api/v0/logs":
            assert query["glob"] == "serve/scaling-*.json"
            return httpx.Response(200, json={"data": {"result": {"internal": list(decisions)}}})
        assert request.url.path == "/api/v0/logs/file"
        return httpx.Response(200, content=msgspec.json.encode(decisions[query["filename"]]))

    client = httpx.Client

    def connect(**options: object) -> httpx.Client:
        return client(transport=httpx.MockTransport(handle), **options)  # type: ignore[arg-type]

    monkeypatch.setattr("serve_app.serve_api.httpx.Client", connect)
    told = ServeApi("http://127.0.0.1:8265", "token").scaling_decisions()
    assert told == {decision.application: decision for decision in list(decisions.values())[:2]}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (httpx.Response(400, text="route prefix taken"), "Ray Serve refused: route prefix taken"),
        (httpx.ConnectError("no route"), "does not answer: ConnectError"),
        (httpx.ReadTimeout("too slow"), "does not answer: ReadTimeout"),
    ],
    ids=["refused", "unreachable", "slow"],
)
def test_what_the_controller_refuses_or_does_not_answer_is_one_error(
    monkeypatch: pytest.MonkeyPatch, answer: httpx.Response | httpx.HTTPError, words: str
) -> None:
    controller = api(monkeypatch, answer, [])
    with pytest.raises(ServeApiError, match=words):
        controller.applications()
    with pytest.raises(ServeApiError, match=words):
        controller.apply({})


def test_what_is_free_is_what_nodes_have_less_what_placed_replicas_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"state": "ALIVE", "resources_total": {"CPU": 4.0, "GPU": 1.0}},
        {"state": "ALIVE", "resources_total": {"CPU": 2.0}},
        {"state": "DEAD", "resources_total": {"CPU": 64.0}},
    ]
    replicas = [ServeReplica("a", "RUNNING", "10.0.0.1", 7), ServeReplica("b", "STARTING", "", None)]
    application = Application("m", "DEPLOYING", "", {"Engine": replicas}, {}, {}, {"Engine": {"CPU": 1.5, "GPU": 1.0}})
    answer = httpx.Response(200, json={"data": {"result": {"result": nodes}}})
    assert api(monkeypatch, answer, []).resources([application]) == (
        [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}],
        {"CPU": 4.5, "GPU": 0.0},
    )
