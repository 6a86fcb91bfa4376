"""One test per kind of bad input of ../shared/completions.md: how it is answered, and that nothing is left behind.

After each, no engine runs or holds anything, and a good request succeeds.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from starlette.types import Message

from tests.conformance.faces import D2, D3, Face, assert_completion, assert_error, assert_invalid
from tests.conformance.raw_http import STALLS, RawAnswer, connected, head_of, read_answer, request_of, round_trip
from tests.conftest import RunningCluster, eventually
from tests.deployments.ingress.memory_gateway import AUTHORIZED, events, gateway
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120), pytest.mark.usefixtures("stalled_uploads", "nothing_left")]

MODEL = "sim-a"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 2}
HUGE = 10**30
LAST_TOKEN = 49151
CONTEXT = 2048
BODY_LIMIT = 8 * 2**20
TEXT = json.dumps(BODY)


@pytest.fixture
async def nothing_left(http: httpx.AsyncClient, simulated_cluster: RunningCluster) -> AsyncIterator[None]:
    """After the test: the engines are free again, and the next request is served."""
    yield

    async def free() -> bool:
        loads = [load for load in (await http.get("/admin/v1/replicas")).json()["data"] if load["model"] == MODEL]
        assert len(loads) == 3
        return all(load["running"] == load["waiting"] == load["waiting_prefill_tokens"] == 0 for load in loads)

    await eventually(free, 10.0, every_s=0.02)
    answer = await http.post("/v1/completions", json=BODY)
    assert assert_completion(answer, MODEL)["usage"]["completion_tokens"] == 2


async def until_free(cluster: RunningCluster, limit_s: float = 10.0) -> None:
    async def free() -> bool:
        loads = await cluster.loads(MODEL)
        assert len(loads) == 3
        return all(load["running"] == load["waiting"] == load["waiting_prefill_tokens"] == 0 for load in loads)

    await eventually(free, limit_s, every_s=0.02)


# --- what is refused -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An invalid body and what is told of it."""

    body: dict[str, Any] | str | bytes
    param: str | None = None
    code: str | None = None


def with_literal(name: str, literal: str) -> str:
    """BODY with a value that Python's json would not write."""
    fields = {**{key: json.dumps(value) for key, value in BODY.items()}, name: literal}
    return "{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}"


def each(names: list[str], *literals: str) -> list[Case]:
    """Every parameter with every literal."""
    return [Case(with_literal(name, literal), name) for name in names for literal in literals]


def values(name: str, *values: Any, code: str | None = None) -> list[Case]:
    """One parameter with every value, streamed or not."""
    return [
        Case({**BODY, name: value, "stream": streamed}, name, code) for value in values for streamed in (False, True)
    ]


def texts(*texts: str | bytes) -> list[Case]:
    """Bodies that are wrong as a whole."""
    return [Case(text) for text in texts]


def everywhere(*noises: bytes) -> list[Case]:
    """In a value and in keys."""
    places = (b"capital", b"model", b"max_tokens")
    return texts(*(TEXT.encode().replace(place, place + noise) for place in places for noise in noises))


COUNTS = ["max_tokens", "n", "best_of", "logprobs", "min_tokens", "prompt_logprobs", "stream_interval"]
INTEGERS = [*COUNTS, "seed", "top_k", "truncate_prompt_tokens", "priority"]
REALS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
NUMBERS = [*INTEGERS, *REALS]
NESTED = "[" * 10_000 + "]" * 10_000
TOO_LONG = ["word " * 5000, "a" * 20_000]
TOO_MANY = [[504] * (CONTEXT + 1), [504] * (CONTEXT - 1), ["x", "word " * 5000], [[1], [504] * 3000]]

KINDS: dict[str, list[Case]] = {
    "negative numbers": each([*COUNTS, *REALS, "top_k", "truncate_prompt_tokens"], "-3", "-2147483649"),
    "zero": each(["n", "best_of", "repetition_penalty", "stream_interval", "truncate_prompt_tokens"], "0"),
    "huge numbers": each(NUMBERS, str(HUGE), str(-HUGE), "9" * 4000, "1" + "0" * 400 + ".5", "1e308", "-1e308"),
    "fractional numbers": each(INTEGERS, "0.5", "1.5", "1.0", "2e0"),
    "strings for numbers": each(NUMBERS, '"1"', '""', '"one"', '"0x1"'),
    "other types for numbers": each(NUMBERS, "true", "false", "[]", "[1]", "{}"),
    "NaN and Infinity": each(NUMBERS, "NaN", "Infinity", "-Infinity", "1e400", "-1e999"),
    "numbers that are not JSON's": [
        Case(with_literal("temperature", literal))
        for literal in ("nan", "inf", "-", "+1", ".5", "1.", "01", "1e", "0x10", "1_000", "--1")
    ],
    "null for what is required": [*values("prompt", None), Case({**BODY, "model": None}, "model")],
    "an empty prompt": values("prompt", "", code="empty_prompt"),
    "empty prompts among others": values("prompt", [""], ["x", ""], ["", ""], code="empty_prompt"),
    "empty arrays": values("prompt", [], [[]], [[], []], [[1], []], [[[]]]),
    "mixed arrays": values(
        "prompt", ["x", 1], [1, "x"], [[1], "x"], ["x", [1]], [1, [1]], [[1], 1], [[1], ["x"]], [["x"]], [[[1]]]
    ),
    "no prompt at all": values("prompt", 1, 0.5, True, {}, {"text": "x"}, [None], [True], [0.5], [1.0], [{}], [[None]]),
    "token ids out of the vocabulary": values(
        "prompt",
        *(shape for token in (LAST_TOKEN + 1, 2**31 - 1) for shape in ([token], [1, token, 2], [[1], [token]])),
        code="token_out_of_vocabulary",
    ),
    "token ids that no vocabulary has": values(
        "prompt", *(shape for token in (-1, -(2**31), 2**31, 2**63, HUGE) for shape in ([token], [1, token], [[token]]))
    ),
    "other token ids out of the vocabulary": [
        Case({**BODY, "logprobs": 1, name: value}, name)
        for name, value in (
            ("stop_token_ids", [LAST_TOKEN + 1]),
            ("allowed_token_ids", [1, LAST_TOKEN + 1]),
            ("logprob_token_ids", [LAST_TOKEN + 1, 1]),
            ("logit_bias", {str(LAST_TOKEN + 1): 1}),
        )
    ],
    "a prompt longer than the context": values("prompt", *TOO_LONG, code="context_length_exceeded"),
    "several prompts, or tokens, longer than the context": values("prompt", *TOO_MANY, code="context_length_exceeded"),
    "max_tokens beyond the context": values(
        "max_tokens", CONTEXT, CONTEXT + 1, 100_000, 2**31 - 1, code="context_length_exceeded"
    ),
    "more stop strings than any dialect takes": values("stop", ["x"] * 65, ["x"] * 1000),
    "an empty stop string": values("stop", "", [""], ["x", ""], ["", "x"]),
    "no stop string": values("stop", 1, True, {}, [1], [None], [["x"]], ["x", 1]),
    "more logprobs than any dialect takes": values("logprobs", 21, 100),
    "n 0 and 10,000": values("n", 0, 129, 10_000),
    "best_of below n": [
        Case({**BODY, "n": n, "best_of": best_of}, "best_of") for n, best_of in ((2, 1), (3, 2), (128, 127))
    ],
    "duplicate keys, the last of them wrong": [
        Case(f'{TEXT[:-1]},"{name}":{json.dumps(BODY.get(name, 1))},"{name}":{{}}}}', name)
        for name in ("model", "prompt", "max_tokens", "stream", "n")
    ],
    "invalid UTF-8": everywhere(
        b"\xff", b"\xe2\x82", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", "é".encode("latin-1")
    ),
    "other encodings": texts(*map(TEXT.encode, ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037"))),
    "lone surrogates": everywhere(
        *(
            escape.encode()
            for escape in (r"\ud800", r"\udc00", r"\ud800x", r"\ud800A", r"\udc00\ud800", r"\ud83d\ud83d")
        )
    ),
    "raw NUL": everywhere(b"\x00") + texts(TEXT.encode() + b"\x00", b"\x00" + TEXT.encode(), b"\x00" * 1000),
    "deeply nested arrays": texts("[" * 100_000, "[" * 100_000 + "]" * 100_000),
    "deeply nested objects": texts('{"a":' * 100_000, '{"a":' * 5000 + "1" + "}" * 5000),
    "deeply nested values": texts(*(with_literal(name, NESTED) for name in ("prompt", "stop", "guided_json", "x"))),
    "truncated JSON": texts(*(TEXT[:end] for end in range(len(TEXT)))),
    "no single object": texts(
        *(" ", "null", "true", "1", '"x"', "[]", "[{}]", f"[{TEXT}]", f"{TEXT}{TEXT}", f"{TEXT},", f"{TEXT}x")
    ),
    "almost JSON": texts(
        f"{TEXT[:-1]},}}", TEXT.replace('"', "'"), TEXT.replace('"model"', "model"), f"// x\n{TEXT}", f"data={TEXT}"
    ),
}


@pytest.mark.parametrize("face", [D3, D2], ids=["D3", "D2"])
@pytest.mark.parametrize("kind", KINDS)
async def test_bad_input_is_refused_by_name(http: httpx.AsyncClient, face: Face, kind: str) -> None:
    """One dialect of each shape of error; the others share their code."""
    headers = {"content-type": "application/json"}
    bodies = [json.dumps(case.body) if isinstance(case.body, dict) else case.body for case in KINDS[kind]]
    answers = await asyncio.gather(*(http.post(face.path, content=body, headers=headers) for body in bodies))
    for case, answer in zip(KINDS[kind], answers, strict=True):
        code = case.code
        if face is D2 and isinstance(case.body, dict) and not isinstance(case.body["prompt"], str):
            code = None  # it takes a text only
        param = "prompt" if code == "context_length_exceeded" else case.param
        try:
            assert_invalid(answer, face, param, code)
        except AssertionError as error:
            error.add_note(f"for {str(case.body)[:300]}")
            raise


@pytest.mark.parametrize("kind", [name for name, cases in KINDS.items() if cases[0].code == "context_length_exceeded"])
async def test_what_does_not_fit_into_the_context_is_told_in_numbers(http: httpx.AsyncClient, kind: str) -> None:
    for case in KINDS[kind]:
        message = assert_error(
            await http.post("/v1/completions", json=case.body), 400, "context_length_exceeded", "prompt"
        )
        told = list(map(int, re.findall(r"\d+", message)))
        assert told[0] == CONTEXT
        assert told[1] > CONTEXT
        assert told[1] == told[2] + told[3]


@pytest.mark.parametrize("prompt", ["word " * 500_000, [504] * 130_000], ids=["text", "token ids"])
async def test_megabytes_of_prompt_are_refused_and_hold_up_nobody(http: httpx.AsyncClient, prompt: Any) -> None:
    answer, *others = await asyncio.gather(
        http.post("/v1/completions", json={**BODY, "prompt": prompt}),
        *(http.post("/v1/completions", json=BODY) for _ in range(4)),
    )
    assert_error(answer, 400, "context_length_exceeded", "prompt")
    assert [other.status_code for other in others] == [200] * 4


# --- what is not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS)
async def test_null_for_a_number_is_its_default(http: httpx.AsyncClient, name: str) -> None:
    answer = await http.post("/v1/completions", json={**BODY, name: None})
    assert assert_completion(answer, MODEL)["usage"]["completion_tokens"] == (16 if name == "max_tokens" else 2)


@pytest.mark.parametrize("name", [*REALS[:-1], "max_tokens", "logprobs", "min_tokens", "seed", "top_k", "priority"])
async def test_zero_where_it_is_a_value(http: httpx.AsyncClient, name: str) -> None:
    answer = await http.post("/v1/completions", json={**BODY, name: 0})
    assert assert_completion(answer, MODEL)["usage"]["completion_tokens"] == (0 if name == "max_tokens" else 2)


@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("logit_bias", '{"1":%s}'),
        ("prompt", "[%s]"),
        ("vllm_xargs", '{"a":%s}'),
        ("stop_token_ids", "[%s]"),
        ("guided_json", '{"minimum":%s}'),
        ("structured_outputs", '{"json":{"minimum":%s}}'),
        ("response_format", '{"type":"json_schema","json_schema":{"name":"n","schema":{"minimum":%s}}}'),
        ("response_format", '{"type":"structural_tag","format":{"a":%s}}'),
    ],
)
async def test_nan_and_infinity_inside_of_values(http: httpx.AsyncClient, name: str, around: str) -> None:
    for literal in ("NaN", "Infinity", "-Infinity"):
        content = with_literal(name, around % literal)
        answer = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].partition(".")[0] == name


@pytest.mark.parametrize(
    ("one", "other", "tokens"),
    [('"max_tokens":1', '"max_tokens":3', 3), ('"max_tokens":"x"', '"max_tokens":1', 1), ('"n":0', '"n":1', 2)],
)
async def test_of_duplicate_keys_the_last_counts(http: httpx.AsyncClient, one: str, other: str, tokens: int) -> None:
    text = f"{TEXT[:-1]},{one},{other}}}"
    answer = await http.post("/v1/completions", content=text, headers={"content-type": "application/json"})
    assert assert_completion(answer, MODEL)["usage"]["completion_tokens"] == tokens


async def test_a_pair_of_surrogates_is_a_character(http: httpx.AsyncClient) -> None:
    text = TEXT.replace("capital", r"\ud83c\udf89")[:-1] + ',"echo":true}'
    answer = await http.post("/v1/completions", content=text, headers={"content-type": "application/json"})
    assert assert_completion(answer, MODEL)["choices"][0]["text"].startswith("The \U0001f389 of France is")


async def test_an_escaped_nul_is_a_character(http: httpx.AsyncClient) -> None:
    body = {**BODY, "prompt": "a\x00b\x00", "echo": True, "stop": ["\x00never"], "user": "\x00"}
    [choice] = assert_completion(await http.post("/v1/completions", json=body), MODEL)["choices"]
    assert choice["text"].startswith("a\x00b\x00")
    response = await http.post("/v1/completions", json={**BODY, "model": "sim-a\x00"})
    assert_error(response, 404, "model_not_found", "model")


@pytest.mark.parametrize("depth", [60, 120, 190])
async def test_json_nested_as_deeply_as_is_read_does_no_harm(http: httpx.AsyncClient, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    schema = '{"type":"object","properties":{"a":' * (depth // 2 - 1) + "{}" + "}}" * (depth // 2 - 1)
    headers = {"content-type": "application/json"}
    for name, literal, statuses in (
        ("prompt", nested, {400}),
        ("unheard_of", nested, {400}),
        ("vllm_xargs", '{"a":' + nested + "}", {400}),
        ("guided_json", schema, {200, 400}),
    ):
        answer = await http.post("/v1/completions", content=with_literal(name, literal), headers=headers)
        assert answer.status_code in statuses, answer.text
        if answer.status_code == 400:
            assert answer.json()["error"]["param"] == name


# --- bodies --------------------------------------------------------------------------------------------------------

TEN_MB = 10 * 2**20


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
@pytest.mark.parametrize("name", ["prompt", "user", "stop", "unheard_of"])
async def test_a_body_of_10_mb(http: httpx.AsyncClient, name: str, chunked: bool) -> None:
    content = json.dumps({**BODY, name: "x" * TEN_MB}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for begin in range(0, len(content), 2**16):
            yield content[begin : begin + 2**16]

    headers = {"content-type": "application/json"}
    response = await http.post("/v1/completions", content=pieces() if chunked else content, headers=headers)
    assert str(BODY_LIMIT) in assert_error(response, 413, None)


async def test_the_largest_body_there_may_be(http: httpx.AsyncClient) -> None:
    spare = BODY_LIMIT - len(json.dumps({**BODY, "prompt": ""}))
    for more, status in ((0, 400), (1, 413)):  # too long for any context, and for the server
        content = json.dumps({**BODY, "prompt": "x" * (spare + more)})
        answer = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status


@pytest.mark.parametrize(
    "given",
    [
        *(None, "", "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"),
        *("application/json-seq", "application/xml", "json", ";", "application/json, text/plain"),
    ],
)
async def test_a_wrong_content_type(http: httpx.AsyncClient, given: str | None) -> None:
    headers = {} if given is None else {"content-type": given}
    response = await http.post("/v1/completions", content=TEXT, headers=headers)
    assert "'application/json'" in assert_error(response, 415, None)


@pytest.mark.parametrize(
    "given", ["application/json", "Application/JSON", "application/json; charset=utf-8", "application/json;"]
)
async def test_a_right_content_type_in_other_words(http: httpx.AsyncClient, given: str) -> None:
    answer = await http.post("/v1/completions", content=TEXT, headers={"content-type": given})
    assert_completion(answer, MODEL)


# --- connections ---------------------------------------------------------------------------------------------------


async def running(cluster: RunningCluster) -> int:
    return sum(load["running"] + load["waiting"] for load in await cluster.loads(MODEL))


@pytest.mark.parametrize("stall", STALLS)
async def test_uploads_that_stall_hold_no_engine(
    simulated_cluster: RunningCluster, stalled_uploads: dict[str, asyncio.Task[RawAnswer]], stall: str
) -> None:
    """They are answered 408 in test_errors.py. Here their client gives up."""
    field, begin = STALLS[stall]
    async with connected(simulated_cluster) as (_, writer):
        writer.write(head_of(simulated_cluster, field) + begin)
        await writer.drain()
        assert await running(simulated_cluster) == 0
        async with simulated_cluster.client() as client:
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert stalled_uploads.keys() == STALLS.keys()


async def test_a_chunked_body_that_arrives(simulated_cluster: RunningCluster) -> None:
    content = TEXT.encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
    head = head_of(simulated_cluster, "Transfer-Encoding: chunked", "Connection: close")
    answer = await round_trip(simulated_cluster, head, chunks[:100], chunks[100:])
    assert answer.status == 200


async def test_a_body_that_is_longer_than_its_length(simulated_cluster: RunningCluster) -> None:
    async with connected(simulated_cluster) as (reader, writer), asyncio.timeout(20.0):
        writer.write(head_of(simulated_cluster, "Content-Length: 10") + TEXT.encode())
        answer = await read_answer(reader)
    assert answer.status == 400
    assert "not valid JSON" in answer.error["message"]


@asynccontextmanager
async def slow_reader(
    cluster: RunningCluster, **fields: Any
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Has sent its request, and reads no more than it is told to."""
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", cluster.port))
    async with connected(cluster, sock=narrow, limit=1024) as (reader, writer):
        writer.write(request_of(cluster, "Connection: close", **fields))
        await writer.drain()
        yield reader, writer


async def test_a_slow_reader_holds_no_engine_and_gets_everything(simulated_cluster: RunningCluster) -> None:
    fields = {"stream": True, "max_tokens": 500, "n": 2, "logprobs": 5}
    async with slow_reader(simulated_cluster, **fields) as (reader, _), asyncio.timeout(60.0):

        async def works() -> bool:
            return await running(simulated_cluster) == 2

        await eventually(works, 20.0, every_s=0.01)
        await until_free(simulated_cluster, 20.0)  # though nothing was read but what the socket took
        pieces = [await reader.read(512)]
        while pieces[-1]:
            pieces.append(await reader.read(512))
    body = b"".join(pieces)
    assert body.startswith(b"HTTP/1.1 200 ")
    assert body.count(b"data: [DONE]") == 1
    assert body.count(b'"finish_reason":"length"') == 2


async def test_a_slow_reader_that_leaves_frees_the_engine(simulated_cluster: RunningCluster) -> None:
    async with slow_reader(simulated_cluster, stream=True, max_tokens=2000) as (reader, _):
        assert await reader.read(512)
        assert await running(simulated_cluster) <= 1
    await until_free(simulated_cluster, 2.0)


@in_virtual_time
async def test_a_reader_that_stops_is_cut_off(tmp_path: Path) -> None:
    """In memory, where the 60 s take no time; under uvicorn it is in
    tests/deployments/ingress/http/test_connection.py."""
    async with gateway(tmp_path) as gate:
        room = asyncio.Semaphore(5)
        body = json.dumps({"model": "m", "prompt": "hello", "max_tokens": 2000, "stream": True}).encode()
        messages: list[Message] = [{"type": "http.request", "body": body}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        async def send(_message: Message) -> None:
            await room.acquire()

        headers = [(b"content-type", b"application/json")]
        headers += [(name.encode(), value.encode()) for name, value in AUTHORIZED.items()]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        begun_s = asyncio.get_running_loop().time()
        await gate.app({**scope, "http_version": "1.1", "scheme": "http", "server": ("x", 80)}, receive, send)
        assert asyncio.get_running_loop().time() - begun_s == pytest.approx(60.0, abs=1.0)
        await quiet()
        assert gate.sequences == 0
        assert (await gate.settlement()).status == "cancelled"


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
async def test_half_closed_while_the_engine_works(simulated_cluster: RunningCluster, streamed: bool) -> None:
    async def works() -> bool:
        return await running(simulated_cluster) > 0

    async with connected(simulated_cluster) as (reader, writer), asyncio.timeout(20.0):
        writer.write(request_of(simulated_cluster, max_tokens=2000, stream=streamed))
        await eventually(works, 10.0, every_s=0.01)
        writer.write_eof()
        await until_free(simulated_cluster, 2.0)
        assert b"[DONE]" not in await reader.read()


@pytest.mark.parametrize("sent", [0, 30, 200, -5], ids=["nothing", "half a line", "half a head", "half a body"])
async def test_half_closed_before_the_request_is_whole(simulated_cluster: RunningCluster, sent: int) -> None:
    data = request_of(simulated_cluster)
    async with connected(simulated_cluster) as (reader, writer), asyncio.timeout(20.0):
        writer.write(data[:sent])
        writer.write_eof()
        answer = await reader.read()
    assert not answer.startswith(b"HTTP/1.1 200")
    assert await running(simulated_cluster) == 0


async def test_a_reset_in_the_middle_of_a_stream(simulated_cluster: RunningCluster) -> None:
    reset = b"\x01\x00\x00\x00\x00\x00\x00\x00"
    async with connected(simulated_cluster) as (reader, writer), asyncio.timeout(20.0):
        writer.write(request_of(simulated_cluster, stream=True, max_tokens=2000))
        assert await reader.readuntil(b"\n\n")
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        writer.transport.abort()
    await until_free(simulated_cluster, 2.0)


async def test_many_bad_requests_at_once_do_not_disturb_a_stream(http: httpx.AsyncClient) -> None:
    undisturbed = await http.post("/v1/completions", json={**BODY, "max_tokens": 200})
    stream = asyncio.create_task(http.post("/v1/completions", json={**BODY, "max_tokens": 200, "stream": True}))
    bad = [{**BODY, "n": 0}, {**BODY, "prompt": "x" * 100_000}, {**BODY, "model": "x"}, {"prompt": [[]]}]
    answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bad * 25))
    assert [answer.status_code for answer in answers] == [400, 400, 404, 400] * 25
    *chunks, done = events((await stream).content)
    assert done == "[DONE]"
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == undisturbed.json()["choices"][0]["text"]
