"""A load test's client, on real connections: what it times, what it counts, and what it holds against an answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loadtests.load.completions import Completed, Failed, Request, complete
from loadtests.load.endpoint import Endpoint, Unusable
from loadtests.load.token_metrics import TokenMetrics

DONE = "data: [DONE]\n\n"
BREAK = ""
"""In an answer: the connection ends here."""
PLAIN = {"model", "prompt", "max_tokens", "n", "stream", "stream_options"}


def event(text: str | None = None, tokens: int | None = None, index: int = 0) -> str:
    choices = [] if text is None else [{"index": index, "text": text}]
    usage = None if tokens is None else {"prompt_tokens": 7, "completion_tokens": tokens}
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n"


Pieces = Sequence[str | threading.Event]
"""Of a body, each written apart, an event once it is set."""

Answer = tuple[int, Pieces]
"""Status and body."""


class Server:
    """Answers each request with what `answer` makes of its body, and the list of models with one, named `first`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []

    def ask(self, metrics: TokenMetrics | None = None, **fields: Any) -> Completed:
        endpoint = Endpoint(self.url, "key")
        client = endpoint.client()
        request = Request(**{"model": "m", "prompt": "p", "prompt_tokens": 6, "max_tokens": 2, **fields})
        try:
            to = TokenMetrics() if metrics is None else metrics
            return complete(client, endpoint.completions_path, endpoint.headers, request, to)
        finally:
            client.close()


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send([json.dumps({"data": [{"id": "first"}]})], 200)

        def do_POST(self) -> None:
            server.paths.append(self.path)
            server.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status, pieces = answer(server.asked[-1])
            self.send(pieces, status)

        def send(self, pieces: Pieces, status: int) -> None:
            self.send_response(status)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for piece in pieces:
                if isinstance(piece, threading.Event):
                    assert piece.wait(10.0)
                    continue
                if piece is BREAK:
                    self.close_connection = True
                    return
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece.encode()), piece.encode()))
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server = Server(f"http://127.0.0.1:{listener.server_port}")
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


@contextmanager
def always(pieces: Pieces, status: int = 200) -> Iterator[Server]:
    with serving(lambda _asked: (status, pieces)) as server:
        yield server


STREAM = [": keep-alive\n\n", event("one ", 1), event("", 1), event("two", 2), event(tokens=2), DONE]


def test_a_stream_is_timed_and_counted() -> None:
    metrics = TokenMetrics()
    with always(STREAM) as server:
        done = server.ask(metrics)
    assert (done.text, done.prompt_tokens, done.completion_tokens, done.counted_on_the_way) == ("one two", 7, 2, True)
    assert server.asked[0]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert (metrics.requests, metrics.failed, metrics.first_token_s.count) == (1, 0, 1)
    assert metrics.between_tokens_s.count + metrics.bunched == 1
    assert (metrics.asked_prompt_tokens, metrics.prompt_tokens, metrics.completion_tokens) == (6, 7, 2)
    assert sum(each.tokens for each in metrics.timeline.values()) == 2
    assert sum(each.begun - each.ended for each in metrics.timeline.values()) == 0


def test_texts_that_come_in_one_read_are_one_arrival() -> None:
    metrics = TokenMetrics()
    with always(["".join(STREAM)]) as server:
        server.ask(metrics)
    assert (metrics.first_token_s.count, metrics.between_tokens_s.count, metrics.bunched) == (1, 0, 1)
    assert metrics.bunched_percent == 100


def test_texts_that_come_apart_are_as_many_arrivals() -> None:
    read = threading.Event()

    class Watched(TokenMetrics):
        def first_token(self, now: float, seconds: float) -> None:
            super().first_token(now, seconds)
            read.set()

    metrics = Watched()
    with always([event("a"), read, event("b"), event(tokens=2), DONE]) as server:
        server.ask(metrics)
    assert (metrics.between_tokens_s.count, metrics.bunched) == (1, 0)


def test_choices_do_not_shorten_the_time_between_each_others_tokens() -> None:
    metrics = TokenMetrics()
    pieces = [event("a", index=0), event("b", index=1), event(tokens=2), DONE]
    with always(pieces) as server:
        server.ask(metrics, max_tokens=1, n=2)
    assert (metrics.between_tokens_s.count, metrics.bunched) == (0, 0)


@pytest.mark.parametrize("ending", ["\r\n\r\n", "\n\n", "\r\n\n"])
def test_a_server_may_end_its_lines_in_any_way(ending: str) -> None:
    with always([piece.replace("\n\n", ending) for piece in STREAM]) as server:
        assert server.ask().text == "one two"


def test_usage_may_come_with_the_last_text() -> None:
    with always([event("a"), event("b", 2), DONE]) as server:
        done = server.ask()
    assert (done.text, done.completion_tokens) == ("ab", 2)


def test_an_answer_in_one_piece_is_counted() -> None:
    metrics = TokenMetrics()
    answer = {"choices": [{"text": "ab"}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    with always([json.dumps(answer)]) as server:
        assert server.ask(metrics, stream=False).completion_tokens == 2
    assert (metrics.completion_tokens, metrics.first_token_s.count) == (2, 0)
    assert "stream" not in server.asked[0]


@pytest.mark.parametrize(
    ("pieces", "status", "reason"),
    [
        ([event("a"), event(tokens=2)], 200, "the stream ended without [DONE]"),
        ([event("a"), BREAK], 200, "the stream broke off"),
        ([event("a"), DONE], 200, "the stream told no usage"),
        ([event("a"), event(tokens=1), DONE], 200, "fewer tokens than were asked for"),
        ([event("a"), event(tokens=3), DONE], 200, "more tokens than were asked for"),
        ([event("a", 1), event(tokens=2), DONE], 200, "the chunks' count of tokens is not that of the usage"),
        ([event("a", 2), event("b", 1), event(tokens=2), DONE], 200, "the chunks' count of tokens went down"),
        (['data: {"error": {"code": "overloaded"}}\n\n'], 200, "error in the stream: overloaded"),
        (['data: {"choices": [{"delta": {}}]}\n\n'], 200, "a chunk is none of OpenAI's"),
        (["data: oops\n\n"], 200, "a chunk is none of OpenAI's"),
        (['{"error": {"type": "rate_limit_exceeded"}}'], 429, "429: rate_limit_exceeded"),
        (["<html>"], 502, "502: no OpenAI error"),
    ],
)
def test_what_is_wrong_with_an_answer_is_counted_by_its_reason(pieces: list[str], status: int, reason: str) -> None:
    metrics = TokenMetrics()
    with always(pieces, status) as server, pytest.raises(Failed) as failed:
        server.ask(metrics)
    assert str(failed.value) == reason
    assert metrics.errors == {reason: 1}
    assert (metrics.requests, metrics.completion_tokens) == (1, 0)
    assert sum(each.begun - each.ended for each in metrics.timeline.values()) == 0


def test_fewer_tokens_are_right_where_the_model_may_stop() -> None:
    with always([event("a"), event(tokens=1), DONE]) as server:
        server.ask(exact_tokens=False)
    with always([event("a"), event(tokens=3), DONE]) as server, pytest.raises(Failed, match="more tokens"):
        server.ask(exact_tokens=False)


# --- getting to know a server -----------------------------------------------------------------------------------------


def tokenizing(refused: set[str], counts: bool) -> Callable[[dict[str, Any]], Answer]:
    """Three tokens for two words and one more, and 400 for what is `refused`; chunks tell tokens where it `counts`."""

    def answer(asked: dict[str, Any]) -> Answer:
        if refused & (set(asked) | set(asked["stream_options"])):
            return 400, ["{}"]
        usage = {"prompt_tokens": 3 * len(asked["prompt"].split()) // 2 + 1, "completion_tokens": 1}
        chunk = {"choices": [{"index": 0, "text": "a"}], "usage": usage if counts else None}
        return 200, [f"data: {json.dumps(each)}\n\n" for each in (chunk, {"choices": [], "usage": usage})] + [DONE]

    return answer


@pytest.mark.parametrize(
    ("refused", "counts", "exact_tokens", "continuous_usage"),
    [
        (set(), True, True, True),
        (set(), False, True, False),
        ({"continuous_usage_stats"}, False, True, False),
        ({"continuous_usage_stats", "ignore_eos"}, False, False, False),
    ],
)
def test_what_a_server_refuses_is_left_out(
    refused: set[str], counts: bool, exact_tokens: bool, continuous_usage: bool
) -> None:
    with serving(tokenizing(refused, counts)) as server:
        served = Endpoint(server.url, "").explore("", exact_tokens=True)
    assert served.model == "first"
    assert (served.exact_tokens, served.continuous_usage) == (exact_tokens, continuous_usage)
    assert served.lengths.per_word == pytest.approx(1.5)
    assert served.lengths.words(151) == 100
    assert not refused & set(server.asked[-1])


def test_the_endpoint_asks_for_no_more_than_openai_knows_where_the_scenario_does_not() -> None:
    with serving(tokenizing({"continuous_usage_stats"}, counts=False)) as server:
        Endpoint(server.url, "").explore("m", exact_tokens=False)
    assert set(server.asked[-1]) <= PLAIN


@pytest.mark.parametrize("base", ["", "/", "/v1", "/v1/", "/gateway", "/gateway/v1"])
def test_the_url_may_be_that_of_openais_clients(base: str) -> None:
    with serving(tokenizing(set(), counts=True)) as server:
        Endpoint(server.url + base, "").explore("m", exact_tokens=True)
    expected = "/gateway/v1/completions" if "gateway" in base else "/v1/completions"
    assert set(server.paths) == {expected}


def test_a_server_that_does_not_serve_is_told_with_its_reason() -> None:
    missing = ['{"error": {"code": "model_not_found"}}']
    with always(missing, 404) as server, pytest.raises(Unusable) as unusable:
        Endpoint(server.url, "").explore("m", exact_tokens=True)
    assert str(unusable.value).endswith("does not serve the model m at /v1/completions: 404: model_not_found")
    with pytest.raises(Unusable, match=r"does not serve a model .*refused"):
        Endpoint(server.url, "").explore("", exact_tokens=True)
