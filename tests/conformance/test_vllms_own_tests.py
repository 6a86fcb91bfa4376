"""What vLLM's own tests find wrong here they find wrong with vLLM's own server too, but for what is documented."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.conformance.vllms_own_tests import SOURCE, outcomes
from tests.conftest import RunningCluster

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

DOCUMENTED: dict[str, str] = {}
"""Tests that fail here only, and where docs/api.md says why."""


async def test_none_of_vllms_own_tests_fails_here_only(
    vllm_cluster: RunningCluster, vllm_reference: str, smollm2: Path
) -> None:
    if SOURCE not in os.environ:
        pytest.skip(f"{SOURCE} names no folder with vLLM's source: vllms_own_tests.py says how to get it")
    source = Path(os.environ[SOURCE])
    here = await asyncio.to_thread(outcomes, source, vllm_cluster.url, vllm_cluster.key, smollm2)
    there = await asyncio.to_thread(outcomes, source, vllm_reference, "none", smollm2)
    assert here.keys() == there.keys()
    assert len(here) > 20
    only_here = {test: why for test, why in here.items() if why is not None and there[test] is None}
    assert only_here.keys() == DOCUMENTED.keys(), only_here
