"""No turn of a meter's loop takes long for the admission of one request, admitted or refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path

import pytest

from deployments.contracts import AdmissionRefused, AdmissionRequest, Admitted, PromptOptions, pack, unpack_admission
from deployments.meter.admission.model_catalog import MeteredModel
from deployments.meter.meter import Meter
from deployments.meter.service import MeterService
from tests.deployments.meter.running_meter import running_meter, settlement
from tests.deployments.meter.tiny_tokenizer import save_tiny_tokenizer
from tests.loop_turns import LoopTurns, assert_short, loop_turns

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MB = 2**20
_MILL = "the mill turns and the stream runs "
_NUMBERS = count()

PROMPTS: dict[str, Callable[[], list[str | list[int]]]] = {
    "words of 8 MB": lambda: [_MILL * (8 * MB // len(_MILL))],
    "one letter 2 million times": lambda: ["x" * (2 * MB)],
    "spaces": lambda: [" " * (2 * MB)],
    "characters of many bytes": lambda: ["水車" * (MB // 3)],
    "1,024 texts of 8 kB": lambda: [_MILL * 230 for _ in range(1024)],
    "1,024 short texts": lambda: [_MILL for _ in range(1024)],
    "a text as long as what is encoded in place": lambda: ["x" * 2048],
    "260,000 ids": lambda: [[5] * 260_000],
    "1,024 lists of 255 ids": lambda: [[5] * 255 for _ in range(1024)],
    "an id that nobody knows at the end": lambda: [[*([5] * 260_000), 2**31 - 1]],
    "a million ids": lambda: [[5] * 1_000_000],
}
CUT = PromptOptions(truncate_prompt_tokens=1, truncation_side="right")
CASES: dict[str, tuple[str, PromptOptions, str]] = {
    **{f"{name}, small context": ("small", PromptOptions(), name) for name in PROMPTS},
    **{f"{name}, no bound": ("roomy", PromptOptions(), name) for name in PROMPTS if not name.endswith("MB")},
    **{f"{name}, cut": ("small", CUT, name) for name in PROMPTS if "id" in name or "1,024" in name},
}
"""Words without a bound take minutes to encode, on their threads."""


@pytest.fixture(scope="module")
async def meter(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Meter]:
    """With a small context, and one without bounds."""
    folder: Path = tmp_path_factory.mktemp("turns")
    async with running_meter(folder) as meter:
        tokenizer = save_tiny_tokenizer(folder / "tiny")
        meter.set_models(
            [MeteredModel("small", tokenizer, max_model_len=2048), MeteredModel("roomy", tokenizer, 10_000_000)]
        )
        yield meter


async def _turns_of(meter: Meter, request: AdmissionRequest) -> tuple[LoopTurns, Admitted | AdmissionRefused]:
    """Of its admission, from bytes to bytes. What it reserved is given back."""
    packed = pack(request)
    service = MeterService(meter)
    with loop_turns() as turns:
        await asyncio.sleep(0.02)
        packed_answer = await service.answer("admit", packed)
        await asyncio.sleep(0.02)
    answer = unpack_admission(packed_answer)
    if isinstance(answer, Admitted):
        await meter.settle([settlement(request, answer)])
    return turns, answer


@pytest.mark.parametrize("case", CASES)
async def test_an_admission_holds_no_loop(meter: Meter, case: str) -> None:
    model, options, prompts = CASES[case]

    async def attempt() -> LoopTurns:
        request = AdmissionRequest(
            request_id=f"cmpl-{next(_NUMBERS)}",
            key_id="admin",
            model=model,
            prompts=PROMPTS[prompts](),
            max_tokens=1,
            choices=1,
            options=options,
        )
        turns, answer = await _turns_of(meter, request)
        assert isinstance(answer, Admitted) or answer.param == "prompt"
        return turns

    await assert_short(attempt)
