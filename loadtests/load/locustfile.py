"""Load on an OpenAI-compatible completions endpoint, by scenario.

    locust -f loadtests/load/locustfile.py --host http://127.0.0.1:8000 --scenario chat [--model NAME] [--headless]

with the key in MILLSTREAM_KEY or --key. Works against any server with /v1/completions, with the web interface (whose
tab Tokens shows the token metrics), headless, and distributed (--master, --worker, --processes). `make load` starts
what is needed around it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import gevent
import msgspec
from flask import Response, request
from locust import events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

sys.path.insert(0, str(Path(__file__).parents[2]))  # locust puts only this folder there

from loadtests.load.completions import Failed
from loadtests.load.endpoint import Endpoint
from loadtests.load.report import Report, Sample, write_report
from loadtests.load.scenario import ScenarioError
from loadtests.load.token_metrics import TokenMetrics
from loadtests.load.users import CompletionsUser, ScenarioShape, run

__all__ = ["CompletionsUser", "ScenarioShape"]


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--scenario", default="chat", help="one of loadtests/scenarios/, or a .yaml file")
    parser.add_argument("--model", default="", help="to ask for; else the first of /v1/models")
    parser.add_argument("--key", env_var="MILLSTREAM_KEY", default="", is_secret=True, help="API key")
    parser.add_argument("--seconds", type=float, default=0.0, help="stretch or shorten the scenario to so long")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and lengths")
    only_here: dict[str, Any] = {"include_in_web_ui": False}
    parser.add_argument("--insecure", action="store_true", help="take any TLS certificate", **only_here)
    parser.add_argument("--report", default="", help="write FILE.html and FILE.json at the end", **only_here)


@events.init.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    try:
        run.scenario(environment.parsed_options)
    except ScenarioError as error:
        sys.exit(str(error))
    if environment.runner is not None:
        environment.runner.register_message("share", _take_share)
    if environment.web_ui is not None:
        _add_token_tab(environment)


@events.test_start.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    run.begin(environment)
    if isinstance(environment.runner, MasterRunner):
        workers = list(environment.runner.clients)
        for number, worker in enumerate(workers):
            environment.runner.send_message("share", [number, len(workers)], client_id=worker)
    elif not isinstance(environment.runner, WorkerRunner):
        run.share_known.set()
    if run.endpoint is not None and not isinstance(environment.runner, WorkerRunner):
        gevent.spawn(_sample, environment, run.endpoint, run.samples)


def _take_share(msg: Any, **_: Any) -> None:
    run.share = tuple(msg.data)
    run.share_known.set()


# --- all processes together -------------------------------------------------------------------------------------------


@events.report_to_master.add_listener
def _report(data: dict[str, Any], **_: Any) -> None:
    data["token_metrics"] = msgspec.msgpack.encode(run.metrics.take())


@events.worker_report.add_listener
def _collect(data: dict[str, Any], **_: Any) -> None:
    run.metrics.merge(msgspec.msgpack.decode(data["token_metrics"], type=TokenMetrics))


def _sample(environment: Environment, endpoint: Endpoint, samples: list[Sample]) -> None:
    """In each interval what the cluster says of its replicas, where it is Millstream and the key may ask."""
    client = endpoint.client(timeout_s=10.0)
    while samples is run.samples and environment.runner.state not in ("stopped", "cleanup"):
        try:
            samples.append(Sample.of(time.time(), endpoint.get(client, "/admin/v1/replicas")["data"]))
        except Failed:
            break  # nothing that it tells, or not to this key
        except (OSError, HTTPException, ValueError, LookupError, TypeError):
            pass  # the next may answer: it is no part of the load
        gevent.sleep(run.metrics.interval_s)
    client.close()


@events.quitting.add_listener
def _end(environment: Environment, **_: Any) -> None:
    if isinstance(environment.runner, WorkerRunner):
        return
    metrics = run.metrics
    if run.served is None:
        print(run.refused or "Nothing was run.")
        environment.process_exit_code = 1 if run.refused else 0
        return
    scenario = run.scenario(environment.parsed_options)
    if environment.parsed_options.report:
        report = Report(
            scenario=scenario.name,
            description=scenario.description,
            host=environment.host,
            served=run.served,
            metrics=metrics,
            samples=run.samples,
            generator_busy=environment.runner.cpu_warning_emitted or environment.runner.worker_cpu_warning_emitted,
        )
        write_report(report, Path(environment.parsed_options.report))
    bound = scenario.allowed_failures_percent
    if metrics.failed_percent > bound:
        print(f"{metrics.failed_percent:.1f}% of {metrics.requests} requests failed; {bound:g}% are allowed.")
        for reason, count in sorted(metrics.errors.items(), key=lambda each: -each[1]):
            print(f"  {count:6} {reason}")
    elif not metrics.requests:
        print("Not a single request ended.")
    environment.process_exit_code = int(metrics.failed_percent > bound or not metrics.requests)


# --- the web interface ------------------------------------------------------------------------------------------------


def _rows() -> Iterator[dict[str, str]]:
    for name, value in run.metrics.summary().items():
        yield {"name": name, "safe_name": name, "value": f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"}


def _add_token_tab(environment: Environment) -> None:
    """A tab with the token metrics, fed by what the page polls: locust's documented way, on its own page."""
    web = environment.web_ui
    structure = [{"key": "name", "title": "Metric"}, {"key": "value", "title": "Value"}]
    web.template_args |= {
        "extended_tabs": [{"title": "Tokens", "key": "tokens"}],
        "extended_tables": [{"key": "tokens", "structure": structure}],
    }

    @web.app.after_request
    def with_tokens(response: Response) -> Response:
        if request.path.endswith("/stats/requests") and response.json is not None:
            tokens = {"key": "tokens", "data": list(_rows())}
            response.set_data(json.dumps({**response.json, "extended_stats": [tokens]}))
        return response
