"""The comparison's load generator counts rightly whatever the pieces an answer arrives in, and its tables say so."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtests.comparison.load import Endpoint, Outcome, load
from loadtests.comparison.measure import Figures, Level, measure, percentile
from loadtests.comparison.report import tables, write_section
from serve_app.ray_node import RayNode
from tests.conftest import RunningCluster

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(of: str) -> bytes:
    return event({"choices": [{"index": 0, "text": of, "finish_reason": None}], "usage": None})


def usage(tokens: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens}})


def chunked(*bodies: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in (*bodies, b""))


Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def pieces(*data: bytes) -> Answer:
    """Written apart, with the client's turn in between."""

    async def write(writer: asyncio.StreamWriter) -> None:
        for piece in data:
            writer.write(piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    return write


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Endpoint]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                assert json.loads(await reader.readexactly(length))["stream"] is True
                await answer(writer)
        except asyncio.IncompleteReadError:
            pass  # the client has left
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Endpoint(f"http://127.0.0.1:{port}/v1/completions", "m", "key")


async def outcome_of(answer: Answer, *, max_tokens: int, requests: int = 1, streams: int = 1) -> Outcome:
    async with serving(answer) as endpoint:
        return await load(endpoint, streams=streams, max_tokens=max_tokens, requests=requests)


async def test_an_answer_counts_the_same_wherever_it_is_cut() -> None:
    answer = HEAD + chunked(text("one"), text(' "text": "two'), text(""), usage(2) + DONE)
    for cut in range(1, len(answer), 7):
        outcome = await outcome_of(pieces(answer[:cut], answer[cut:]), max_tokens=2)
        assert (outcome.requests, outcome.tokens, outcome.errors) == (1, 2, {}), cut
        assert len(outcome.first_token_s) == 1


async def test_tokens_that_come_in_one_read_are_bunched() -> None:
    together = await outcome_of(pieces(HEAD + chunked(text("a"), text("b"), text("c"), usage(3), DONE)), max_tokens=3)
    assert (together.bunched_tokens, len(together.gaps_s)) == (3, 0)


async def test_tokens_that_share_a_chunk_are_bunched() -> None:
    shared = await outcome_of(pieces(HEAD + chunked(text("a b c"), usage(3), DONE)), max_tokens=3)
    assert shared.bunched_tokens == 3  # not the 4 of the bound


async def test_tokens_that_come_apart_are_not_bunched() -> None:
    go_on = asyncio.Event()

    async def apart(writer: asyncio.StreamWriter) -> None:
        for token in ("a", "b", "c"):
            body = text(token)
            writer.write((HEAD if token == "a" else b"") + b"%x\r\n%b\r\n" % (len(body), body))
            await asyncio.sleep(0.05)  # apart is what is tested
        writer.write(chunked(usage(3), DONE))
        go_on.set()

    outcome = await outcome_of(apart, max_tokens=3)
    assert go_on.is_set()
    assert (outcome.bunched_tokens, len(outcome.gaps_s)) == (0, 2)
    assert all(0.03 < gap < 1.0 for gap in outcome.gaps_s)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (HEAD + chunked(text("a"), usage(2)), "ended without [DONE]"),
        (HEAD + chunked(text("a"), usage(1), DONE), "1 tokens by usage, 2 asked for"),
        (HEAD + chunked(text("a"), DONE), "None tokens by usage, 2 asked for"),
        (HEAD + chunked(text("a"), event({"error": {"code": "overloaded"}})), "error event"),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy", "503 b'busy'"),
    ],
)
async def test_what_goes_wrong_is_counted_by_its_reason(answer: bytes, reason: str) -> None:
    outcome = await outcome_of(pieces(answer), max_tokens=2, requests=3)
    assert (outcome.requests, outcome.tokens, outcome.errors.total()) == (0, 0, 3)
    assert all(told.startswith(reason) for told in outcome.errors)


async def test_a_connection_that_breaks_is_counted_and_made_anew() -> None:
    async def breaks(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"5\r\ndata:")
        writer.close()

    outcome = await outcome_of(breaks, max_tokens=2, requests=3)
    assert outcome.errors.total() == 3
    assert all("connection lost" in told for told in outcome.errors)


async def test_a_refused_connection_is_counted() -> None:
    async with serving(pieces()) as endpoint:
        pass  # gone
    outcome = await load(endpoint, streams=2, max_tokens=2, requests=5)
    assert (outcome.requests, outcome.errors.total()) == (0, 5)
    assert all(told.startswith("no connection") for told in outcome.errors)


async def test_a_request_that_failed_leaves_no_times_behind() -> None:
    outcome = await outcome_of(pieces(HEAD + chunked(text("a"), usage(1))), max_tokens=1)
    assert (outcome.errors.total(), len(outcome.first_token_s), len(outcome.gaps_s)) == (1, 0, 0)


async def test_an_answer_that_does_not_end_fails_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.comparison.load._REQUEST_LIMIT_S", 0.1)
    outcome = await outcome_of(pieces(HEAD), max_tokens=1, requests=2)
    assert outcome.errors == {"not ended after 0.1 s": 2}


async def test_every_request_of_many_clients_counts() -> None:
    outcome = await outcome_of(
        pieces(HEAD + chunked(text("a"), usage(1), DONE)), max_tokens=1, requests=500, streams=20
    )
    assert (outcome.requests, outcome.tokens, len(outcome.first_token_s)) == (500, 500, 500)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, 0.0), ([3.0], 99, 3.0), ([1.0, 2.0, 3.0, 4.0], 50, 2.0), (range(1, 101), 99, 99.0)],
)
def test_percentiles_are_of_the_nearest_rank(values: Sequence[float], percent: float, expected: float) -> None:
    assert percentile(array("d", values), percent) == expected


@pytest.mark.cluster
async def test_a_running_cluster_is_measured(simulated_cluster: RunningCluster) -> None:
    node = RayNode.running(simulated_cluster.home)
    assert node is not None
    endpoint = Endpoint(f"{simulated_cluster.url}/v1/completions", "sim-a", simulated_cluster.key)
    figures = await measure(endpoint, node.cluster_id, Level("8", 8, 20, requests=40), seconds=1.0)
    assert (figures.requests, figures.errors) == (40, {})
    assert 0 < figures.first_token_ms <= figures.first_token_p99_ms < 5000
    assert 0 <= figures.bunched_percent <= 100
    assert figures.cpu_s_per_100k_tokens > 0
    assert figures.memory_mib > 500  # Ray's processes and the replicas


def run_of(**tokens_per_s: list[float]) -> dict[str, Any]:
    rows = [
        {
            "round": number + 1,
            "system": system,
            "level": "32",
            "figures": Figures(rate, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5, {})._asdict(),
        }
        for system, rates in tokens_per_s.items()
        for number, rate in enumerate(rates)
    ]
    at = {"cores": "2", "cpu": "c", "memory": "1 GiB", "python": "3", "ray": "2", "vllm": "0"}
    return {"engine": "vllm", "rounds": 3, "seconds": 1.0, "machine": at, "rows": rows}


def test_tables_have_medians_ratios_and_spread() -> None:
    lines = tables(run_of(Peer=[100.0, 200.0, 110.0], Millstream=[440.0, 330.0, 340.0])).splitlines()
    assert "| Millstream | 340 | 32% |" in lines
    assert "| Peer | 110 (3.09x) | 91% |" in lines
    assert lines.index("| Millstream | 340 | 32% |") < lines.index("| Peer | 110 (3.09x) | 91% |")


def test_the_section_is_replaced_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- comparison vllm: begin -->\nold\n<!-- comparison vllm: end -->\nafter\n")
    write_section(tmp_path, [run_of(Millstream=[1.0])])
    told = page.read_text()
    assert told.startswith("before\n<!-- comparison vllm: begin -->\n")
    assert told.endswith("<!-- comparison vllm: end -->\nafter\n")
    assert "old" not in told


def test_a_page_without_a_place_for_the_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "performance.md").write_text("nothing")
    with pytest.raises(SystemExit, match=r"performance\.md has no '<!-- comparison vllm: begin -->'"):
        write_section(tmp_path, [run_of(Millstream=[1.0])])
