"""Load on an OpenAI-compatible completions endpoint, by scenario.

    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 --scenario chat --model smollm2-135m [--headless]

with the key in MILLSTREAM_KEY or --key. Works against any server with /v1/completions, with the web interface (whose
page /extend shows the token metrics, too), headless, and distributed (--master, --worker, --processes). `make load`
starts what is needed around it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import msgspec
from flask import Blueprint, Response, render_template, request
from gevent.event import Event
from gevent.pool import Pool
from geventhttpclient import HTTPClient
from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

sys.path.insert(0, str(Path(__file__).parents[1]))  # locust puts only this folder there

from loadtests.completions import Completed, Request, complete
from loadtests.load_report import Report, Sample, write_report
from loadtests.prompts import CALIBRATION_WORDS, Lengths, words
from loadtests.scenario import Kind, Scenario, ScenarioError, arrivals, load_scenario
from loadtests.token_metrics import TokenMetrics

_PATH = "/v1/completions"
_TIMEOUT_S = 600.0


class _Run:
    """What all users of this process share."""

    scenario: Scenario
    """Known once the options are."""
    lengths: Lengths
    """Known once the server has been asked."""

    def __init__(self) -> None:
        self.metrics = TokenMetrics()
        """On a worker since its last report; elsewhere all."""
        self.samples: list[Sample] = []
        self.share = (0, 1)
        """Of the arrivals of an open loop: which, of how many."""
        self.share_known = Event()


_run = _Run()


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--scenario", default="chat", help="one of loadtests/scenarios/, or a .yaml file")
    parser.add_argument("--model", default="sim-a", help="to ask for")
    parser.add_argument("--key", env_var="MILLSTREAM_KEY", default="", is_secret=True, help="API key")
    parser.add_argument("--seconds", type=float, help="stretch or shorten the scenario to so long")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and lengths")
    parser.add_argument("--report", default="", help="write FILE.html and FILE.json at the end")


@events.init.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    try:
        _run.scenario = load_scenario(options.scenario).scaled(options.seconds)
    except ScenarioError as error:
        sys.exit(str(error))
    if environment.runner is not None:
        environment.runner.register_message("share", _take_share)
    if environment.web_ui is not None:
        _extend_web_ui(environment)


@events.test_start.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    _run.metrics = TokenMetrics()
    _run.samples = []
    if not isinstance(environment.runner, MasterRunner):
        _run.lengths = _calibrate(environment)
    if isinstance(environment.runner, MasterRunner):
        workers = list(environment.runner.clients)
        for number, worker in enumerate(workers):
            environment.runner.send_message("share", [number, len(workers)], client_id=worker)
    elif not isinstance(environment.runner, WorkerRunner):
        _run.share_known.set()
    if not isinstance(environment.runner, WorkerRunner):
        gevent.spawn(_sample, environment)


def _take_share(msg: Any, **_: Any) -> None:
    _run.share = tuple(msg.data)
    _run.share_known.set()


# --- the users --------------------------------------------------------------------------------------------------------


class CompletionsUser(User):  # type: ignore[misc]  # untyped
    """In a closed loop a client, which makes one request after another; in an open loop a process's source of them."""

    def on_start(self) -> None:
        self._source = random.Random(random.Random(self.environment.parsed_options.seed).random() + id(self))
        self._client = _client(self.environment, 1)

    def on_stop(self) -> None:
        self._client.close()

    @task
    def work(self) -> None:
        if _run.scenario.closed is not None:
            self._converse(self._client, _run.scenario.kind(self._source), self._source, _run.scenario.closed.think_s)
        else:
            self._send_as_they_come()
            raise StopUser

    def _send_as_they_come(self) -> None:
        scenario, seed = _run.scenario, self.environment.parsed_options.seed
        _run.share_known.wait()
        number, of = _run.share
        pool = Pool(scenario.max_open)
        client = _client(self.environment, scenario.max_open)
        begun = time.perf_counter()
        for index, arrival in enumerate(arrivals(scenario, seed)):
            if index % of != number:
                continue
            gevent.sleep(max(0.0, begun + arrival.at_s - time.perf_counter()))
            if pool.free_count():
                pool.spawn(self._converse, client, arrival.kind, random.Random(seed * 1_000_003 + index), 0.0)
            else:
                reason = f"not sent: {scenario.max_open} were under way"
                _run.metrics.fail(time.time(), reason)
                self._fire("POST", 0.0, 0, RuntimeError(reason))
        pool.join()
        client.close()

    def _converse(self, client: HTTPClient, kind: Kind, source: random.Random, think_s: float) -> None:
        """One request for each turn of a conversation."""
        options = self.environment.parsed_options
        said = ""
        tokens = 0
        if kind.shared_prefix_tokens:
            prefix = random.Random(source.randrange(kind.prefixes))
            said = words(_run.lengths.words(kind.shared_prefix_tokens), prefix)
            tokens = kind.shared_prefix_tokens
        for _turn in range(kind.turns):
            new = kind.prompt_tokens.draw(source)
            said = f"{said} {words(_run.lengths.words(new), source)}".strip()
            tokens += new
            asked = Request(
                *(options.model, said, tokens, kind.max_tokens.draw(source), kind.n, kind.stream),
                exact_tokens=_run.scenario.exact_tokens,
            )
            done = self._ask(client, asked)
            if done is None:
                return
            said += done.text
            tokens = done.prompt_tokens + done.completion_tokens // kind.n
            gevent.sleep(think_s)

    def _ask(self, client: HTTPClient, asked: Request) -> Completed | None:
        begun = time.perf_counter()
        try:
            done = complete(client, _PATH, _headers(self.environment), asked, _run.metrics)
        except Exception as error:  # locust's way: counted and shown, whatever it is
            self._fire("POST", time.perf_counter() - begun, 0, error)
            return None
        self._fire("POST", done.seconds, done.bytes)
        if done.first_token_s is not None:
            self._fire("first token", done.first_token_s)
        if done.between_tokens_s is not None:
            self._fire("between tokens", done.between_tokens_s)
        return done

    def _fire(self, kind: str, seconds: float, size: int = 0, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=_PATH,
            response_time=1000 * seconds,
            response_length=size,
            exception=error,
            context={},
        )


class ScenarioShape(LoadTestShape):  # type: ignore[misc]  # untyped
    """How many users there are at which time."""

    def tick(self) -> tuple[int, float] | None:
        scenario, at_s = _run.scenario, self.get_run_time()
        if scenario.closed is None:
            sources = max(1, self.runner.worker_count)
            return (sources, sources) if at_s < scenario.seconds + 1.0 else None
        for stage in scenario.closed.stages:
            if at_s < stage.seconds:
                return stage.users, max(1.0, float(stage.users))
            at_s -= stage.seconds
        return None


def _client(environment: Environment, concurrency: int) -> HTTPClient:
    return HTTPClient.from_url(
        environment.host, concurrency=concurrency, network_timeout=_TIMEOUT_S, connection_timeout=30.0, insecure=True
    )


def _headers(environment: Environment) -> dict[str, str]:
    return {"content-type": "application/json", "authorization": f"Bearer {environment.parsed_options.key}"}


def _calibrate(environment: Environment) -> Lengths:
    """Ends the run with a clear word when the server does not answer."""
    options, scratch = environment.parsed_options, TokenMetrics()
    client = _client(environment, 1)
    try:
        counted = [
            complete(
                *(client, _PATH, _headers(environment)),
                Request(options.model, words(number, random.Random(number)), number, 1, exact_tokens=False),
                scratch,
            ).prompt_tokens
            for number in CALIBRATION_WORDS
        ]
        return Lengths.of(*counted)
    except Exception as error:
        sys.exit(f"{environment.host}{_PATH} does not serve the model {options.model}: {error!r}")
    finally:
        client.close()


# --- all processes together -------------------------------------------------------------------------------------------


@events.report_to_master.add_listener
def _report(data: dict[str, Any], **_: Any) -> None:
    data["token_metrics"] = msgspec.msgpack.encode(_run.metrics)
    _run.metrics = TokenMetrics()


@events.worker_report.add_listener
def _collect(data: dict[str, Any], **_: Any) -> None:
    _run.metrics.merge(msgspec.msgpack.decode(data["token_metrics"], type=TokenMetrics))


def _sample(environment: Environment) -> None:
    """Once a second what the cluster says of its replicas, where it is Millstream and the key may ask."""
    client = _client(environment, 1)
    while environment.runner is not None and environment.runner.state not in ("stopped", "cleanup"):
        try:
            response = client.get("/admin/v1/replicas", headers=_headers(environment))
            answer = response.read()
            if response.status_code != 200:
                return
            _run.samples.append(Sample.of(time.time(), json.loads(answer)["data"]))
        except (OSError, ValueError, KeyError):
            pass  # the next second may answer: it is no part of the load
        gevent.sleep(1.0)


@events.quitting.add_listener
def _end(environment: Environment, **_: Any) -> None:
    if isinstance(environment.runner, WorkerRunner):
        return
    options, metrics = environment.parsed_options, _run.metrics
    if options.report:
        report = Report(
            scenario=_run.scenario.name,
            description=_run.scenario.description,
            host=environment.host,
            model=options.model,
            metrics=metrics,
            samples=_run.samples,
        )
        write_report(report, Path(options.report))
    bound = _run.scenario.allowed_failures_percent
    if metrics.failed_percent > bound:
        print(f"{metrics.failed_percent:.1f}% of {metrics.requests} requests failed; {bound:g}% are allowed.")
        for reason, count in sorted(metrics.errors.items(), key=lambda each: -each[1]):
            print(f"  {count:6} {reason}")
        environment.process_exit_code = 1
    elif not metrics.requests:
        print("Not a single request ended.")
        environment.process_exit_code = 1
    else:
        environment.process_exit_code = 0


# --- the web interface ------------------------------------------------------------------------------------------------


def _rows() -> Iterator[dict[str, str]]:
    for name, value in _run.metrics.summary().items():
        yield {"name": name, "safe_name": name, "value": f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"}


def _extend_web_ui(environment: Environment) -> None:
    """A tab with the token metrics, on the page /extend: locust's documented way."""
    pages = Blueprint("tokens", "tokens")
    web = environment.web_ui

    @web.app.after_request
    def with_tokens(response: Response) -> Response:
        if request.path == "/stats/requests" and response.json is not None:
            tokens = {"key": "tokens", "data": list(_rows())}
            response.set_data(json.dumps({**response.json, "extended_stats": [tokens]}))
        return response

    @pages.route("/extend")
    def extended() -> str:
        web.update_template_args()
        structure = [{"key": "name", "title": "Metric"}, {"key": "value", "title": "Value"}]
        return render_template(
            "index.html",
            template_args={
                **web.template_args,
                "extended_tabs": [{"title": "Tokens", "key": "tokens"}],
                "extended_tables": [{"key": "tokens", "structure": structure}],
            },
        )

    web.app.register_blueprint(pages)
