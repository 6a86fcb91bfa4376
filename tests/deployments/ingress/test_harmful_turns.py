"""No turn of the ingress's loop takes long for one request, admitted or refused: the whole ingress in one process, with
the meter and the engines on the same loop, so that their turns count as well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.contracts import AdmissionRefused, AdmissionRequest, Admitted
from deployments.ingress.app import IngressSettings, build_app
from tests.deployments.ingress.memory_gateway import Exchange, Gateway, gateway, meter_client_of
from tests.faults.harmful_requests import BODY_LIMIT_BYTES, EXAMPLES
from tests.loop_turns import LoopTurns, assert_short, loop_turns

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

_TIME_LIMIT_S = 5.0
"""Then the client leaves."""

MB = 2**20
_WORD = "hello "

Fields = dict[str, Any]

ADMITTED: dict[str, Callable[[], Fields]] = {
    "1,024 choices": lambda: {"prompt": [[1, 2, 3]] * 8, "n": 128, "max_tokens": 4},
    "1,024 choices as a stream": lambda: {"prompt": [[1, 2, 3]] * 8, "n": 128, "max_tokens": 4, "stream": True},
    "1,024 prompts": lambda: {"prompt": [_WORD] * 1024, "max_tokens": 2},
    "1,024 prompts of 127 ids": lambda: {"prompt": [[1] * 127] * 1024, "max_tokens": 2},
    "8 prompts of 2,000 ids for 128 choices": lambda: {"prompt": [[1] * 2000] * 8, "n": 128, "max_tokens": 1},
    "best of 128": lambda: {"prompt": [1] * 1000, "best_of": 128, "max_tokens": 8},
    "long completions": lambda: {"n": 128, "max_tokens": 1000, "ignore_eos": True},
    "1,024 biased tokens for 128 choices": lambda: {
        "logit_bias": {f"{number % 28:0{1 + number // 28}d}"[:9]: 1 for number in range(28)},
        "n": 128,
        "max_tokens": 1,
    },
    "128 stop tokens": lambda: {"stop_token_ids": [1] * 128, "n": 128, "max_tokens": 4},
}
SOMETIMES_ADMITTED: dict[str, Callable[[], Fields]] = {
    **EXAMPLES,
    "a schema of 8 MB": lambda: {"guided_json": {"enum": ["x" * 20] * (8 * MB // 25)}},
    "a schema as a text of 8 MB": lambda: {"guided_json": json.dumps({"enum": ["x" * 20] * (6 * MB // 25)})},
    "a schema of 20,000 levels": lambda: {"guided_json": '{"allOf":[' * 20_000 + '{"type":"string"}' + "]}" * 20_000},
    "a schema for 128 choices": lambda: {"guided_json": {"enum": ["x" * 20] * (MB // 25)}, "n": 128},
    "a regex of 8 MB": lambda: {"guided_regex": "(a|b)*" * (8 * MB // 6)},
    "a grammar of 8 MB": lambda: {"guided_grammar": 'root ::= "' + "a" * (8 * MB) + '"'},
    "700,000 labels": lambda: {"guided_choice": ["x" * 8] * (8 * MB // 12)},
    "20,000 labels for 128 choices": lambda: {"guided_choice": [f"{n:020d}" for n in range(20_000)], "n": 128},
    "structural tags": lambda: {
        "response_format": {
            "type": "structural_tag",
            "structures": [{"begin": f"<{n}>", "schema": {}, "end": "</f>"} for n in range(150_000)],
            "triggers": ["<"],
        }
    },
    "128 bad words of 60 kB": lambda: {"bad_words": ["x" * 60_000] * 128, "n": 128},
    "4 stops of 2 MB for 128 choices": lambda: {"stop": ["ab" * (MB - 100)] * 4, "n": 128, "max_tokens": 64},
    "a text of 8 MB": lambda: {"prompt": "x" * (8 * MB - 200)},
    "a text of 2 MB for 128 choices": lambda: {"prompt": _WORD * (2 * MB // 6), "n": 128},
    "1,024 texts of 8 kB": lambda: {"prompt": [_WORD * 1300] * 1024},
    "a million ids": lambda: {"prompt": [1] * 4_000_000},
    "1,024 lists of 3,900 ids": lambda: {"prompt": [[1] * 3900] * 1024},
    "a million lists": lambda: {"prompt": [[1]] * 1_600_000},
    "a million allowed tokens for 128 choices": lambda: {"allowed_token_ids": [1] * 4_000_000, "n": 128},
    "extra arguments of 8 MB for 128 choices": lambda: {"vllm_xargs": {"k": "x" * (8 * MB - 300)}, "n": 128},
    "a list of extra arguments": lambda: {"vllm_xargs": {"k": [0] * 2_500_000}, "n": 128},
    "a user of 8 MB": lambda: {"user": "u" * (8 * MB - 300), "n": 128},
    "a suffix of 8 MB": lambda: {"suffix": "u" * (8 * MB - 300)},
    "a salt of 8 MB": lambda: {"cache_salt": "u" * (8 * MB - 300)},
    "700,000 unknown parameters": lambda: {f"k{number}": 1 for number in range(600_000)},
    "700,000 biased tokens": lambda: {"logit_bias": {str(number): 1 for number in range(600_000)}},
}
BROKEN: dict[str, bytes] = {
    "deep arrays": b'{"model":"m","prompt":' + b"[" * (4 * MB) + b"]" * (4 * MB - 100) + b"}",
    "deep objects": b'{"a":' * MB + b"1" + b"}" * MB,
    "many digits": b'{"model":"m","prompt":"a","seed":' + b"9" * (8 * MB - 100) + b"}",
    "escapes": b'{"model":"m","prompt":"' + b"\\u00e9" * (8 * MB // 6 - 100) + b'"}',
    "surrogates": b'{"model":"m","prompt":"' + b"\\ud800" * (8 * MB // 6 - 100) + b'"}',
    "keys again and again": b'{"model":"m","prompt":"a",' + b'"seed":1,' * (8 * MB // 9 - 100) + b'"n":1}',
    "spaces": b" " * (8 * MB - 10) + b"{}",
    "floats": b'{"model":"m","prompt":[' + b"1e9," * (2 * MB - 100) + b"1]}",
    "mixed prompts": b'{"model":"m","prompt":[' + b'"a",' * (2 * MB - 100) + b"1]}",
    "wrong at the end": b'{"model":"m","prompt":[' + b"[0]," * (2 * MB - 100) + b"[]]}",
}


@pytest.fixture(scope="module")
async def gate(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """With the limit of bodies that clusters have."""
    folder: Path = tmp_path_factory.mktemp("gateway")
    async with gateway(folder, replicas=2) as gate:
        gate.meter.answer = _admitted
        meter = meter_client_of(gate.meter, gate.folder, "large")
        await meter.start()
        gate.app = build_app(gate.catalog, meter, IngressSettings(BODY_LIMIT_BYTES, 15.0))
        yield gate
        await meter.close()


def _admitted(request: AdmissionRequest) -> Admitted | AdmissionRefused:
    """As a meter of this model answers, but for what it costs to tokenize: that is not the ingress's."""
    if max(map(len, request.prompts)) > 2048:
        return AdmissionRefused("context_length_exceeded", "too long", param="prompt")
    return Admitted([prompt if isinstance(prompt, list) else [1] * len(prompt) for prompt in request.prompts])


async def _turns_of(gate: Gateway, body: bytes) -> tuple[LoopTurns, int | None]:
    """Of one request until its answer is whole, or its client has left and nothing is left of it."""
    await asyncio.sleep(0.02)
    with loop_turns() as turns:
        await asyncio.sleep(0.02)
        exchange = Exchange(gate.app, body)
        try:
            async with asyncio.timeout(_TIME_LIMIT_S):
                await exchange.until(lambda: exchange.complete or exchange.task.done())
        except TimeoutError:
            exchange.hang_up()
        await asyncio.wait([exchange.task], timeout=30.0)
        async with asyncio.timeout(30.0):
            while gate.sequences:  # noqa: ASYNC110  # an engine tells nobody that it is idle
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
    return turns, exchange.status


async def _assert_short(gate: Gateway, body: bytes, statuses: set[int | None]) -> None:
    async def attempt() -> LoopTurns:
        turns, status = await _turns_of(gate, body)
        assert status in statuses
        return turns

    await assert_short(attempt)


def _body(fields: Fields) -> bytes:
    return json.dumps({"model": "m", "prompt": "hello", **fields}).encode()


@pytest.mark.parametrize("name", ADMITTED)
async def test_an_admitted_request_holds_no_loop(gate: Gateway, name: str) -> None:
    await _assert_short(gate, _body(ADMITTED[name]()), {200, None})


@pytest.mark.parametrize("name", SOMETIMES_ADMITTED)
async def test_a_dear_request_holds_no_loop_whether_it_is_admitted_or_refused(gate: Gateway, name: str) -> None:
    await _assert_short(gate, _body(SOMETIMES_ADMITTED[name]()), {200, 400, 413, None})


@pytest.mark.parametrize("name", BROKEN)
async def test_a_body_that_is_refused_holds_no_loop(gate: Gateway, name: str) -> None:
    await _assert_short(gate, BROKEN[name], {200, 400, 413})
