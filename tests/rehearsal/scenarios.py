"""What may happen to a cluster on several hosts, done to one, and what its clients noticed of it."""

from __future__ import annotations

import asyncio
import copy
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import sqlalchemy as sa
import yaml

from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.schema import REQUESTS
from serve_app.kubernetes.groups import GATEWAY_GROUP
from tests.conftest import eventually
from tests.rehearsal.cluster import SERVE_PORT, RehearsedCluster
from tests.rehearsal.load import Load, Request
from tests.rehearsal.manifests import DASHBOARD_PORT, GCS_PORT, HEAD_GROUP, rendered
from tests.rehearsal.network import listening_ports, reachable_from
from tests.rehearsal.pods import Pod

__all__ = [
    "SCENARIOS",
    "Rehearsal",
    "Scenario",
    "Violated",
    "engine_host_killed",
    "ledger_audited",
]

_STREAMS: Final = 32
_ENGINES: Final = "engine-cpu"
_CHANGE_LIMIT_S: Final = 240.0


class Violated(AssertionError):
    """The cluster did not do what it promises; the text says what."""


@dataclass
class Rehearsal:
    cluster: RehearsedCluster
    load: Load
    config: dict[str, Any]
    """The cluster.yaml that was applied at first."""
    folder: Path
    short: bool

    @property
    def model(self) -> str:
        name: str = self.config["models"][0]["name"]
        return name

    async def apply(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Render a changed cluster.yaml and apply it."""
        config = copy.deepcopy(self.config)
        change(config)
        file = self.folder / "changed.yaml"
        file.write_text(yaml.safe_dump(config))
        await self.cluster.operator.apply(await asyncio.to_thread(rendered, file))

    async def replicas(self) -> dict[str, str]:
        """State by id, of the engine replicas that Serve knows of."""
        return {
            replica.replica_id: replica.state
            for application in await asyncio.to_thread(self.cluster.operator.api.applications)
            if application.name == f"model-{self.model}"
            for replica in application.deployments.get("Engine", [])
        }

    async def running(self) -> set[str]:
        return {name for name, state in (await self.replicas()).items() if state == "RUNNING"}

    async def in_rotation(self) -> int:
        """Engine replicas to which a gateway gives requests."""
        async with self.cluster.client(self.cluster.gateways[0]) as client:
            response = await client.get("/admin/v1/replicas", timeout=5.0)
        response.raise_for_status()
        return sum(bool(each["in_rotation"]) for each in response.json()["data"] if each["model"] == self.model)

    async def until_in_rotation(self, replicas: int) -> float:
        async def there() -> bool:
            try:
                return await self.in_rotation() == replicas
            except httpx.HTTPError:
                return False

        return await eventually(there, _CHANGE_LIMIT_S, every_s=0.2)

    def failed_since(self, begun: float) -> int:
        """Checks that no request that was open then, or began later, failed; how many there were."""
        seen = [request for request in self.load.requests if request.ended is None or request.ended > begun]
        failed = [request for request in seen if request.error is not None]
        if failed:
            raise Violated(f"{len(failed)} of {len(seen)} requests failed: " + "; ".join(map(str, failed[:3])))
        return len(seen)

    def rows(self, requests: list[Request]) -> dict[str, int]:
        """Completion tokens in the ledger, by the id of the completion."""
        database = open_database(self.cluster.database_url)
        try:
            with database.connect() as connection:
                ids = [request.completion_id for request in requests if request.completion_id]
                chosen = sa.select(REQUESTS.c.id, REQUESTS.c.completion_tokens).where(REQUESTS.c.id.in_(ids))
                return {row.id: row.completion_tokens for row in connection.execute(chosen)}
        finally:
            database.dispose()

    def checked_rows(self, requests: list[Request]) -> dict[str, int]:
        """The same, of which none has fewer tokens than its client received, nor more than it asked for."""
        rows = self.rows(requests)
        for request in requests:
            if not request.received_tokens <= rows[request.completion_id] <= self.load.tokens:
                raise Violated(f"{request} has {rows[request.completion_id]} tokens in the ledger")
        return rows


def requests_logged(gateway: Pod) -> set[str]:
    """Those that the ingress of this pod has relayed to their end, by its log."""
    found: set[str] = set()
    for log in gateway.logs.glob("ray/session_2*/logs/serve/replica_gateway_Ingress_*.log"):
        found |= set(re.findall(r'"request": "(cmpl-[^"]+)"', log.read_text()))
    return found


def _now() -> float:
    return asyncio.get_running_loop().time()


async def head_killed(rehearsal: Rehearsal) -> str:
    """(a) The head's processes are killed and start again 30 s later."""
    down_s = 10.0 if rehearsal.short else 30.0
    before = await rehearsal.running()
    open_then = await rehearsal.load.streaming()
    begun = _now()
    async with rehearsal.cluster.operator.held_down(rehearsal.cluster.head):
        await asyncio.sleep(down_s)
    back = time.monotonic()
    await asyncio.to_thread(rehearsal.cluster.operator.api.wait_until_up, _CHANGE_LIMIT_S)

    async def recovered() -> bool:
        return await rehearsal.running() >= before

    await eventually(recovered, _CHANGE_LIMIT_S, every_s=0.5)
    back_s = time.monotonic() - back
    await rehearsal.load.rounds(2)
    seen = rehearsal.failed_since(begun)
    return (
        f"{len(open_then)} streams open, {seen} requests in all, 0 failed; "
        f"{down_s:.0f} s down, {back_s:.0f} s later the controller knew all replicas again, the same as before"
    )


async def engine_host_cut_off(rehearsal: Rehearsal) -> str:
    """(b) The link of an engine's host goes down."""
    cluster = rehearsal.cluster
    host = cluster.operator.of_group(_ENGINES)[0]
    open_then = await rehearsal.load.streaming()
    begun = _now()
    cluster.network.cut(host.address)
    noticed_s = await rehearsal.until_in_rotation(1)
    await rehearsal.load.rounds(2)
    rehearsal.failed_since(begun)
    slowest_s = max(request.ended - request.begun for request in open_then if request.ended is not None)
    cluster.network.mend(host.address)
    back_s = await rehearsal.until_in_rotation(2)
    await rehearsal.load.rounds(1)
    seen = rehearsal.failed_since(begun)
    return (
        f"{len(open_then)} streams open, {seen} requests in all, 0 failed; out of rotation after {noticed_s:.1f} s, "
        f"slowest stream {slowest_s:.1f} s, two replicas again {back_s:.0f} s after the link was up"
    )


async def engine_host_killed(rehearsal: Rehearsal) -> str:
    """All processes of an engine's host are killed in the middle of its streams."""
    cluster = rehearsal.cluster
    host = cluster.operator.of_group(_ENGINES)[0]
    open_then = await rehearsal.load.streaming()
    begun = _now()
    async with cluster.operator.held_down(host):
        await rehearsal.load.until_finished(open_then)
    slowest_s = max(request.ended - begun for request in open_then if request.ended is not None)
    back_s = await rehearsal.until_in_rotation(2)
    await rehearsal.load.rounds(1)
    seen = rehearsal.failed_since(begun)
    return (
        f"{len(open_then)} streams open, {seen} requests in all, 0 failed, all texts as without it; the last of these "
        f"ended {slowest_s:.1f} s later, two replicas again {back_s:.0f} s after the host was back"
    )


async def gateway_cut_off(rehearsal: Rehearsal) -> str:
    """(c) The link of one of two ingresses' hosts goes down: what it relays breaks, everything else goes on."""
    cluster = rehearsal.cluster
    host, other = cluster.gateways[1], cluster.gateways[0]
    open_then = await rehearsal.load.streaming()
    begun = _now()
    cluster.network.cut(host.address)
    cut_at = time.monotonic()
    await rehearsal.load.until_finished(open_then)
    broken = [request for request in open_then if request.error is not None]
    broken_s = max(request.ended - begun for request in broken if request.ended is not None)
    relayed_by_other = requests_logged(other)
    for request in broken:
        if request.pod != host.name and request.completion_id in relayed_by_other:
            raise Violated(f"{request} broke, though neither its proxy nor its ingress was cut off")

    async def settled() -> bool:
        rows = await asyncio.to_thread(rehearsal.rows, broken)
        return all(request.completion_id in rows for request in broken)

    await eventually(settled, _CHANGE_LIMIT_S, every_s=0.5)
    settled_s = time.monotonic() - cut_at
    by_engines = rehearsal.checked_rows(broken)
    through_other = [each for each in rehearsal.load.requests if each.begun > begun and each.pod == other.name]
    if late := [request for request in through_other if request.error is not None]:
        raise Violated(f"{len(late)} of {len(through_other)} later requests failed: {late[:3]}")
    cluster.network.mend(host.address)
    mended_at = time.monotonic()
    await cluster.until_ready(gateways=2)
    back_s = time.monotonic() - mended_at
    after = _now()
    await rehearsal.load.rounds(2)
    rehearsal.failed_since(after)
    corrected = sum(tokens != by_engines[name] for name, tokens in rehearsal.checked_rows(broken).items())
    return (
        f"{len(broken)} of {len(open_then)} open streams broke, the last {broken_s:.0f} s after the cut, all settled "
        f"within {settled_s:.0f} s, {corrected} of them by engines at first and by their ingress when it was back; of "
        f"{len(through_other)} later requests through the other gateway 0 failed; two gateways again {back_s:.0f} s "
        "after the link was up"
    )


async def setting_changed(rehearsal: Rehearsal) -> str:
    """(d) A changed setting of the model is rolled out."""
    replicas = len(await rehearsal.running())
    begun = _now()
    most = 0

    def change(config: dict[str, Any]) -> None:
        config["models"][0]["engine"]["max_num_seqs"] -= 1

    async def roll_out(edit: Callable[[dict[str, Any]], None]) -> float:
        before = await rehearsal.running()
        await rehearsal.apply(edit)

        async def rolled_out() -> bool:
            nonlocal most
            states = await rehearsal.replicas()
            most = max(most, sum(state in ("RUNNING", "STARTING") for state in states.values()))
            running = {name for name, state in states.items() if state == "RUNNING"}
            return len(running) == replicas == len(states) and not running & before

        return await eventually(rolled_out, _CHANGE_LIMIT_S, every_s=0.25)

    took_s = await roll_out(change)
    back_s = await roll_out(lambda config: None)
    await rehearsal.load.rounds(2)
    seen = rehearsal.failed_since(begun)
    if most > replicas + 1:
        raise Violated(f"{most} replicas ran or started at once, for {replicas}")
    return (
        f"{took_s:.0f} s, and {back_s:.0f} s back; at most {most} replicas for {replicas} ran or started at once; "
        f"{seen} requests, 0 failed"
    )


async def broken_model(rehearsal: Rehearsal) -> str:
    """(e) A model is added that cannot start."""
    begun = _now()
    before = await rehearsal.running()

    def change(config: dict[str, Any]) -> None:
        broken = copy.deepcopy(config["models"][0])
        broken |= {"name": "broken", "source": "/var/lib/millstream/models/absent", "replicas": {"min": 1, "max": 1}}
        config["models"].append(broken)

    await rehearsal.apply(change)
    said = ""

    async def told() -> bool:
        nonlocal said
        said = await rehearsal.cluster.meter.execute("millstream", "status")
        return "absent" in said

    told_s = await eventually(told, _CHANGE_LIMIT_S, every_s=1.0)
    await rehearsal.load.rounds(1)
    seen = rehearsal.failed_since(begun)
    if await rehearsal.running() != before:
        raise Violated("replicas of the other model were replaced")
    await rehearsal.apply(lambda config: None)
    reason = next(line.strip() for line in said.splitlines() if "absent" in line)
    return f"status says after {told_s:.0f} s: {reason!r}; {seen} requests of the other model, 0 failed, none replaced"


async def scaled(rehearsal: Rehearsal) -> str:
    """(f) From one engine replica to three and back, by load."""
    await rehearsal.load.resize(4)
    begun = _now()

    def change(config: dict[str, Any]) -> None:
        config["models"][0]["engine"]["max_num_seqs"] = 12
        config["models"][0]["replicas"] = {"min": 1, "max": 3, "scale_down_after_s": 10.0}

    await rehearsal.apply(change)
    times = []
    for clients, replicas in ((4, 1), (_STREAMS, 3), (4, 1)):
        await rehearsal.load.resize(clients)

        async def reached(replicas: int = replicas) -> bool:
            return len(await rehearsal.running()) == len(await rehearsal.replicas()) == replicas

        times.append(await eventually(reached, _CHANGE_LIMIT_S, every_s=0.25))
        await rehearsal.load.rounds(1)
    await rehearsal.load.resize(_STREAMS)
    seen = rehearsal.failed_since(begun)
    await rehearsal.apply(lambda config: None)
    await rehearsal.until_in_rotation(2)
    return f"1 to 3 in {times[1]:.0f} s, 3 to 1 in {times[2]:.0f} s; {seen} requests, 0 failed"


async def pods_evicted(rehearsal: Rehearsal) -> str:
    """(g) The nodes of an engine and of a gateway are emptied, one after the other: SIGTERM, and time to end."""
    cluster = rehearsal.cluster
    told = []
    for group in (_ENGINES, GATEWAY_GROUP):
        pod = cluster.operator.of_group(group)[0]
        open_then = await rehearsal.load.streaming()
        begun = _now()
        await cluster.operator.evict(pod)
        took_s = _now() - begun
        if took_s > pod.template.grace_s / 2:
            raise Violated(f"{pod.name} did not end by itself: it took {took_s:.0f} s")
        await cluster.until_ready(gateways=2)
        await rehearsal.until_in_rotation(2)
        await rehearsal.load.rounds(1)
        seen = rehearsal.failed_since(begun)
        told.append(f"{pod.name} ended in {took_s:.0f} s, {len(open_then)} streams open, {seen} requests, 0 failed")
    return "; ".join(told)


async def stranger_refused(rehearsal: Rehearsal) -> str:
    """(h) From a pod of another namespace, and without Ray's token."""
    cluster = rehearsal.cluster
    listening = {
        (str(pod.address), port): pod
        for pod in cluster.operator.pods.values()
        for port in listening_ports(pod.sandbox_pid)
    }
    async with cluster.stranger() as pid:
        reached = await asyncio.to_thread(reachable_from, pid, list(listening))
    inside = {address for address in reached if address[1] != SERVE_PORT or listening[address].group == HEAD_GROUP}
    if inside or not {(str(pod.address), SERVE_PORT) for pod in cluster.gateways} <= set(reached):
        raise Violated(f"a stranger reached {sorted(reached)}")
    head = str(cluster.head.address)
    answers = {}
    async with httpx.AsyncClient(base_url=f"http://{head}:{DASHBOARD_PORT}", trust_env=False) as client:
        answers["GET /api/serve/applications/"] = (await client.get("/api/serve/applications/")).status_code
        answers["POST /api/jobs/"] = (await client.post("/api/jobs/", json={"entrypoint": "true"})).status_code
        answers["PUT /api/serve/applications/"] = (await client.put("/api/serve/applications/", json={})).status_code
    if set(answers.values()) != {401}:
        raise Violated(f"without a token the dashboard answers {answers}")
    try:
        said = await cluster.meter.execute(
            "env", "RAY_AUTH_MODE=disabled", "ray", "status", "--address", f"{head}:{GCS_PORT}"
        )
    except RuntimeError as refused:
        if "UNAUTHENTICATED" not in str(refused) and "auth" not in str(refused).lower():
            raise Violated(f"GCS without a token: {refused}") from None
    else:
        raise Violated(f"GCS answers without a token: {said}")
    return (
        f"{len(listening)} ports listen on {len(cluster.operator.pods)} hosts: only port {SERVE_PORT} can be reached, "
        "not the head's; dashboard and job API answer 401 and GCS refuses without a token"
    )


async def ledger_audited(rehearsal: Rehearsal) -> str:
    """Every stream that a client saw whole is in the ledger once, with its tokens."""
    await rehearsal.load.resize(0)
    whole = [request for request in rehearsal.load.requests if request.error is None]

    async def settled() -> bool:
        return len(await asyncio.to_thread(rehearsal.rows, whole)) == len(whole)

    await eventually(settled, 60.0, every_s=0.5)
    rows = rehearsal.rows(whole)
    wrong = [request for request in whole if rows[request.completion_id] != request.received_tokens]
    if wrong:
        raise Violated(f"{len(wrong)} rows have other tokens than their clients: {wrong[:3]}")
    return f"{len(whole)} streams, {sum(rows.values())} tokens, none missing"


Scenario = Callable[[Rehearsal], Awaitable[str]]
"""Returns figures. Raises Violated."""

SCENARIOS: Final[dict[str, Scenario]] = {
    "a": head_killed,
    "b": engine_host_cut_off,
    "c": gateway_cut_off,
    "d": setting_changed,
    "e": broken_model,
    "f": scaled,
    "g": pods_evicted,
    "h": stranger_refused,
}
