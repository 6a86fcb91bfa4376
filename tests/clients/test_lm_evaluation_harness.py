"""EleutherAI's lm-evaluation-harness gives Millstream the scores that it gives vLLM's own server on its weights."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import MODEL, PACKAGES, Server
from tests.conftest import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TOLERANCE = 1e-3


async def _evaluate(server: Server, tokenizer: Path, caches: Path) -> Any:
    """What tests/clients/harness.py prints."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(PACKAGES),
        "OPENAI_API_KEY": server.key,
        "HF_HOME": str(caches),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1",
    }
    arguments = (f"{server.base_url}/completions", MODEL, str(tokenizer))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.clients.harness", *arguments),
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()[-5000:]
    return json.loads(output)


def _about(answer: Any) -> Any:
    """Log-likelihoods within the tolerance; texts and whether an answer is the greedy one as they are."""
    if isinstance(answer, list):
        return [_about(each) for each in answer]
    return pytest.approx(answer, abs=TOLERANCE) if isinstance(answer, float) else answer


@pytest.mark.usefixtures("client_packages")
async def test_the_harness_scores_as_on_vllms_own_server(
    millstream: Server, reference: Server, smollm2: Path, tmp_path: Path
) -> None:
    # Not at the same time: the reference has a higher priority than Ray's processes, which would get too little of two
    # cores to answer in time that they are alive.
    scored = await _evaluate(millstream, smollm2, tmp_path / "millstream")
    expected = await _evaluate(reference, smollm2, tmp_path / "reference")
    assert list(scored) == list(expected)
    for evaluation in expected:
        for task, samples in expected[evaluation]["samples"].items():
            answers = [sample["filtered_resps"] for sample in scored[evaluation]["samples"][task]]
            assert answers == [_about(sample["filtered_resps"]) for sample in samples], (evaluation, task)
        for task, metrics in expected[evaluation]["results"].items():
            for metric, value in metrics.items():
                # Accuracies are shares of at most twelve samples: within the tolerance they are equal.
                about = pytest.approx(value, rel=TOLERANCE) if isinstance(value, float) else value
                assert scored[evaluation]["results"][task][metric] == about, (evaluation, task, metric)
    multiple_choice = expected["token arrays, four requests at a time"]["results"]["millstream_multiple_choice"]
    assert 0.5 < multiple_choice["acc,none"] < 1
