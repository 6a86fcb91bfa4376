"""Locust's users: clients that follow a scenario, in closed loops, or one source of arrivals for each process."""

from __future__ import annotations

import itertools
import logging
import random
import time
from argparse import Namespace

import gevent
from gevent.event import Event
from gevent.pool import Pool
from geventhttpclient import HTTPClient
from locust import LoadTestShape, User, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner

from loadtests.load.completions import Completed, Request, complete
from loadtests.load.endpoint import Endpoint, Served, Unusable
from loadtests.load.prompts import words
from loadtests.load.report import Sample
from loadtests.load.scenario import Kind, Scenario, ScenarioError, arrivals, load_scenario
from loadtests.load.token_metrics import TokenMetrics

__all__ = ["CompletionsUser", "Run", "ScenarioShape", "run"]

_PAUSE_AFTER_FAILURE_S = 1.0
"""Of a client in a closed loop: without one it would ask a server that is down thousands of times a second."""


class Run:
    """What all of this process share: one run of a scenario, and after `begin` the next."""

    def __init__(self) -> None:
        self.metrics = TokenMetrics()
        """On a worker since its last report; elsewhere all."""
        self.samples: list[Sample] = []
        self.endpoint: Endpoint | None = None
        self.served: Served | None = None
        """None while it cannot run."""
        self.share = (0, 1)
        """Of the arrivals of an open loop: which, of how many. The master tells its workers."""
        self.share_known = Event()
        self.users = itertools.count()
        self.refused = ""
        """Why it could not begin."""
        self._scenario: tuple[tuple[str, float], Scenario] | None = None

    def scenario(self, options: Namespace) -> Scenario:
        """Of the options, which the web interface may have changed. Raises ScenarioError."""
        wanted = (options.scenario, options.seconds)
        if self._scenario is None or self._scenario[0] != wanted:
            self._scenario = (wanted, load_scenario(options.scenario).scaled(options.seconds))
        return self._scenario[1]

    def begin(self, environment: Environment) -> None:
        """Get to know scenario and server; what is wrong with them ends the run, with the reason in `refused`."""
        options = environment.parsed_options
        self.samples, self.metrics = [], TokenMetrics()
        self.served, self.refused = None, ""
        self.users = itertools.count()
        try:
            scenario = self.scenario(options)
            self.metrics.interval_s = scenario.interval_s
            if not environment.host:
                raise Unusable("There is no --host, such as http://127.0.0.1:8000.")
            self.endpoint = Endpoint(environment.host, options.key, insecure=options.insecure)
            self.served = self.endpoint.explore(options.model, exact_tokens=scenario.exact_tokens)
        except (ScenarioError, Unusable) as error:
            self.refused = str(error)
            logging.error(error)
            environment.events.request.fire(
                request_type="START",
                name=f"scenario {options.scenario}",
                response_time=0.0,
                response_length=0,
                exception=error,
                context={},
            )


run = Run()


class CompletionsUser(User):  # type: ignore[misc]  # untyped
    """In a closed loop a client, which makes one request after another; in an open loop a process's source of them."""

    _client: HTTPClient | None = None

    def on_start(self) -> None:
        self._seed = self.environment.parsed_options.seed
        self._source = random.Random(f"{self._seed} {run.share[0]} {next(run.users)}")

    def on_stop(self) -> None:
        if self._client is not None:
            self._client.close()

    @task
    def work(self) -> None:
        if run.served is None or run.endpoint is None:
            raise StopUser
        self._endpoint, self._served = run.endpoint, run.served
        self._scenario = run.scenario(self.environment.parsed_options)
        closed = self._scenario.closed
        if closed is None:
            run.share_known.wait()
            self._send_as_they_come(*run.share)
            raise StopUser
        self._client = self._client or self._endpoint.client()
        whole = self._converse(self._client, self._scenario.kind(self._source), self._source, closed.think_s)
        if not whole:
            gevent.sleep(_PAUSE_AFTER_FAILURE_S)

    def _send_as_they_come(self, number: int, of: int) -> None:
        """Every `of`-th arrival, from the `number`-th on."""
        most = self._scenario.max_open
        pool = Pool(most)
        client = self._endpoint.client(most)
        begun = time.perf_counter()
        try:
            for index, arrival in enumerate(arrivals(self._scenario, self._seed)):
                if index % of != number:
                    continue
                gevent.sleep(max(0.0, begun + arrival.at_s - time.perf_counter()))
                run.metrics.late_s.add(time.perf_counter() - begun - arrival.at_s)
                if pool.free_count():
                    pool.spawn(self._converse, client, arrival.kind, random.Random(f"{self._seed} {index}"), 0.0)
                else:
                    reason = f"not sent: {most} were under way"
                    run.metrics.at(time.time()).begun += 1
                    run.metrics.fail(time.time(), reason)
                    self._fire("POST", 0.0, 0, RuntimeError(reason))
            pool.join()
        finally:
            pool.kill()
            client.close()

    def _converse(self, client: HTTPClient, kind: Kind, source: random.Random, think_s: float) -> bool:
        """One request for each turn of a conversation; whether all ended well."""
        said = ""
        tokens = 0
        if kind.shared_prefix_tokens:
            prefix = random.Random(source.randrange(kind.prefixes))
            said = words(self._served.lengths.words(kind.shared_prefix_tokens), prefix)
            tokens = kind.shared_prefix_tokens
        for _turn in range(kind.turns):
            new = kind.prompt_tokens.draw(source)
            said = f"{said} {words(self._served.lengths.words(new), source)}".strip()
            tokens += new
            asked = Request(
                *(self._served.model, said, tokens, kind.max_tokens.draw(source), kind.n, kind.stream),
                exact_tokens=self._served.exact_tokens,
                continuous_usage=self._served.continuous_usage,
            )
            done = self._ask(client, asked)
            if done is None:
                return False
            said += done.text
            tokens = done.prompt_tokens + done.completion_tokens // kind.n
            gevent.sleep(think_s)
        return True

    def _ask(self, client: HTTPClient, asked: Request) -> Completed | None:
        begun = time.perf_counter()
        try:
            done = complete(client, self._endpoint.completions_path, self._endpoint.headers, asked, run.metrics)
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
            name=self._endpoint.completions_path,
            response_time=1000 * seconds,
            response_length=size,
            exception=error,
            context={},
        )


class ScenarioShape(LoadTestShape):  # type: ignore[misc]  # untyped
    """How many users there are at which time."""

    _sources_at_s = 0.0
    """When the sources of an open loop were all there."""

    def tick(self) -> tuple[int, float] | None:
        if run.refused and self.runner.state in ("spawning", "running"):  # else it is the run before that was refused
            return None
        try:
            scenario = run.scenario(self.runner.environment.parsed_options)
        except ScenarioError:
            return 1, 1.0  # `begin` says why
        at_s = self.get_run_time()
        if scenario.closed is None:
            sources = max(1, self.runner.worker_count) if isinstance(self.runner, MasterRunner) else 1
            if self.runner.state != "running":  # workers may take long to start theirs
                self._sources_at_s = at_s
            return (sources, sources) if at_s - self._sources_at_s < scenario.seconds + 1.0 else None
        for stage in scenario.closed.stages:
            if at_s < stage.seconds:
                return stage.users, max(1.0, float(stage.users))
            at_s -= stage.seconds
        return None
