"""What choosing a replica and keeping books on it costs the ingress, by the number of replicas, without a network.

    python -m loadtests.benchmarks.routing_cost [--requests N]

Each replica answers in this process: it takes a submission and sends one step message that ends the generation. The
replicas themselves cost next to nothing, so what is measured is deployments/ingress/routing/engine_pool.py and
replica_stream.py. 64 requests are under way at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import structlog

from deployments.contracts import (
    Account,
    EngineCommands,
    EngineLoad,
    EngineStep,
    Sampling,
    Settlement,
    Submission,
    TokenDelta,
    pack,
    unpack,
)
from deployments.ingress.inference.generation import DeltaQueue, Generation
from deployments.ingress.inference.write_scheduler import WriteScheduler
from deployments.ingress.routing.engine_pool import EnginePool, PoolLimits

_REPLICAS: Final = (4, 64, 512)
_AT_ONCE: Final = 64


class _Replica:
    """Ends every generation with its first token."""

    def __init__(self) -> None:
        self._steps: asyncio.Queue[EngineStep] = asyncio.Queue(_AT_ONCE)
        self._sequence = 0
        self.submitted = 0

    @asynccontextmanager
    async def open(self, _stream: str) -> AsyncIterator[_Replica]:
        self._steps.put_nowait(EngineStep(0, EngineLoad(), []))
        yield self

    async def receive(self) -> bytes:
        return pack(await self._steps.get())

    def send(self, orders: bytes) -> None:
        submissions = [unpack(each, Submission) for each in unpack(orders, EngineCommands).submissions]
        if submissions:
            deltas = [TokenDelta(each.generation, [7], "length") for each in submissions]
            self._sequence += 1
            load = EngineLoad(running=len(deltas))
            self._steps.put_nowait(EngineStep(self._sequence, load, deltas, submissions[-1].generation))
            self.submitted += len(submissions)


def _unneeded(_meter: str, _settlement: Settlement) -> None:
    """No replica is lost here."""


async def _measure(number: int, requests: int) -> tuple[float, float]:
    """CPU seconds a request, and the share of requests of the busiest replica against the mean."""
    replicas = {f"r{index}": _Replica() for index in range(number)}
    limits = PoolLimits(hold_timeout_s=10.0, resume_timeout_s=10.0, drain_timeout_s=1.0, max_held=1000)
    writes = WriteScheduler()
    pool = EnginePool("m", replicas.__getitem__, ingress_id="i", limits=limits, writes=writes, checkpoint=_unneeded)
    pool.replicas_changed(frozenset(replicas))
    while sum(card["in_rotation"] for card in pool.cards()) < number:  # noqa: ASYNC110  # it depends on this loop alone
        await asyncio.sleep(0)
    numbers = iter(range(requests))

    async def client() -> None:
        for index in numbers:
            account = Account(f"cmpl-{index}", key_id="key", model="m", prompt_tokens=3, choices=1)
            mailbox = DeltaQueue(writes)
            pool.start([Generation(account, "Meter", 0, [1, 2, 3], Sampling(max_tokens=1), mailbox)])
            await mailbox.take()
            pool.release(account.request_id)

    begun = time.process_time()
    await asyncio.gather(*(client() for _ in range(_AT_ONCE)))
    cpu_s = time.process_time() - begun
    await pool.close()
    most = max(replica.submitted for replica in replicas.values())
    return cpu_s / requests, most / (requests / number)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    print("| replicas | CPU, µs a request | busiest replica against the mean |\n|---|---|---|")
    for number in _REPLICAS:
        cpu_s, imbalance = min(asyncio.run(_measure(number, options.requests)) for _ in range(3))
        print(f"| {number} | {cpu_s * 1e6:.0f} | {imbalance:.2f}x |")


if __name__ == "__main__":
    main()
