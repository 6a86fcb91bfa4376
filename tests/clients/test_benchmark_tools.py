"""Tools that others measure servers with work with Millstream unchanged: every request is answered, and counted alike.

Each once with MILLSTREAM_THOROUGH=1. vLLM's is part of vLLM; the others are taken where PATH has them
(`pipx install guidellm aiperf`), since their packages contradict those of Millstream.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import THOROUGH, RunningCluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not THOROUGH, reason="half a minute each: MILLSTREAM_THOROUGH=1"),
]
REQUESTS = 12
VLLM_BENCH_SERVE = """\
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""`vllm bench serve`, which vLLM's build for CPUs cannot start: it looks for a distribution of the name `vllm`."""
INPUT_TOKENS, OUTPUT_TOKENS = 64, 32


def _run(cluster: RunningCluster, folder: Path, *command: str) -> None:
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OPENAI_API_KEY": cluster.key},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _tool(name: str) -> str:
    if (path := shutil.which(name)) is None:
        pytest.skip(f"{name} is not on PATH: pipx install {name}")
    return path


def test_vllms_own_benchmark_works_with_its_defaults(
    simulated_cluster: RunningCluster, smollm2: Path, tmp_path: Path
) -> None:
    _run(
        simulated_cluster,
        tmp_path,
        *(sys.executable, "-c", VLLM_BENCH_SERVE, "--model", "sim-a", "--tokenizer", str(smollm2)),
        *("--base-url", f"http://127.0.0.1:{simulated_cluster.port}", "--num-prompts", str(REQUESTS)),
        *("--save-result", "--result-filename", "result.json"),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (REQUESTS, 0)


def test_guidellm_counts_every_request_and_token(
    simulated_cluster: RunningCluster, smollm2: Path, tmp_path: Path
) -> None:
    target = f"http://127.0.0.1:{simulated_cluster.port}"
    _run(
        simulated_cluster,
        tmp_path,
        *(_tool("guidellm"), "run", "--disable-progress", "--profile", "kind=concurrent,streams=4"),
        "--backend",
        f"kind=openai_http,target={target},api_key={simulated_cluster.key},model=sim-a,request_format=/v1/completions",
        *("--constraint", f"kind=max_requests,count={REQUESTS}", "--tokenizer", f"kind=hf_auto,model={smollm2}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={INPUT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
    )
    [benchmark] = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (REQUESTS, 0)
    assert {each["output_tokens"] for each in requests["successful"]} == {OUTPUT_TOKENS}


def test_aiperf_counts_every_request_and_the_tokens_of_prompts(
    simulated_cluster: RunningCluster, smollm2: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer").symlink_to(smollm2)  # it takes an absolute path for a name on the hub
    _run(
        simulated_cluster,
        tmp_path,
        *(_tool("aiperf"), "profile", "--model", "sim-a", "--url", f"http://127.0.0.1:{simulated_cluster.port}"),
        *("--endpoint-type", "completions", "--streaming", "--api-key", simulated_cluster.key, "--ui-type", "none"),
        *("--tokenizer", "./tokenizer", "--concurrency", "4", "--request-count", str(REQUESTS)),
        *("--synthetic-input-tokens-mean", str(INPUT_TOKENS), "--output-tokens-mean", str(OUTPUT_TOKENS)),
    )
    [export] = tmp_path.glob("artifacts/*/profile_export.jsonl")
    records = [json.loads(line) for line in export.read_text().splitlines()]
    assert [each.get("error") for each in records] == [None] * REQUESTS
    assert {each["metrics"]["usage_prompt_tokens_diff_pct"]["value"] for each in records} == {0.0}
