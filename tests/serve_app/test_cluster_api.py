"""The cluster's HTTP API as the command line uses it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import httpx
import pytest

from serve_app.cluster_api import ClusterApi, ClusterApiError, token_times


@contextmanager
def api(answer: Callable[[httpx.Request], httpx.Response]) -> Iterator[ClusterApi]:
    with closing(ClusterApi("http://cluster", "key", transport=httpx.MockTransport(answer))) as opened:
        yield opened


def event(index: int, *token_ids: int) -> bytes:
    return b'data: {"choices":[{"index":%d,"text":"x","token_ids":%s}]}\n\n' % (index, str(list(token_ids)).encode())


def test_tokens_arrive_with_the_piece_that_completes_their_event() -> None:
    first, second = event(0, 1), event(1, 2, 3)
    pieces = [
        (0.1, b": keep-alive\n\n" + first[:20]),
        (0.2, first[20:] + second),
        (0.3, event(0, 4) + b"data: [DONE]\n\n"),
    ]
    assert token_times(pieces, 2) == [[0.2, 0.3], [0.2, 0.2]]


def test_an_error_within_a_stream_is_told() -> None:
    with pytest.raises(ClusterApiError, match="too late"):
        token_times([(0.1, event(0, 1)), (0.2, b'data: {"error":{"message":"too late"}}\n\n')], 1)


def test_a_completion_is_greedy_and_as_long_as_asked() -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, request.headers["authorization"], json.loads(request.content)))
        return httpx.Response(200, content=event(0, 5) + event(1, 6) + event(1, 7) + event(0, 8) + b"data: [DONE]\n\n")

    with api(answer) as cluster:
        times = cluster.complete("m", [[1, 2], [3]], 2)
        assert [len(each) for each in times] == [2, 2]
        assert all(0 < first <= second for first, second in times)
        with pytest.raises(ClusterApiError, match="ended before its 3 tokens"):
            cluster.complete("m", [[1, 2], [3]], 3)
    path, key, body = asked[0]
    assert (path, key) == ("/v1/completions", "Bearer key")
    assert body == {
        "model": "m",
        "prompt": [[1, 2], [3]],
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def test_what_is_asked_is_answered() -> None:
    answers = {
        "/admin/v1/replicas": {"data": [{"id": "r"}]},
        "/v1/models": {
            "data": [
                {"id": "m", "max_model_len": 10, "parent": None},
                {"id": "alias", "max_model_len": 10, "parent": "m"},
            ]
        },
        "/tokenize": {"tokens": [1, 2]},
    }
    with api(lambda request: httpx.Response(200, json=answers[request.url.path])) as cluster:
        assert cluster.replicas() == [{"id": "r"}]
        assert cluster.context_lengths() == {"m": 10}
        assert cluster.tokenize("m", "x") == [1, 2]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (httpx.Response(503, json={"error": {"message": "busy"}}), "answered 503: busy"),
        (httpx.Response(502, text="<html>"), "answered 502: <html>"),
    ],
)
def test_a_refusal_is_told_in_the_clusters_words(answer: httpx.Response, told: str) -> None:
    with api(lambda _: answer) as cluster:
        with pytest.raises(ClusterApiError, match=f"/v1/models {told}"):
            cluster.context_lengths()
        with pytest.raises(ClusterApiError, match=f"/v1/completions {told}"):
            cluster.complete("m", [[1]], 1)


def test_a_cluster_that_does_not_answer_is_told() -> None:
    def unreachable(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with api(unreachable) as cluster:
        with pytest.raises(ClusterApiError, match="does not answer: ConnectError"):
            cluster.replicas()
        with pytest.raises(ClusterApiError, match="does not answer: ConnectError"):
            cluster.complete("m", [[1]], 1)
