"""vLLM's own tests of its completion endpoint, run against any server: adapted in URL, key and model, and nothing else.

They are in vLLM's source distribution, not in its wheels, and are not copied here. `.venv/bin/pip download
--no-deps --no-binary vllm --no-build-isolation --no-clean vllm==VERSION` fetches it, fails to build it and leaves it
unpacked below the folder for temporary files; MILLSTREAM_VLLM_SOURCE names that folder.

    MILLSTREAM_VLLM_SOURCE=… .venv/bin/python -m tests.conformance.vllms_own_tests URL KEY TOKENIZER
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

__all__ = ["SOURCE", "outcomes"]

SOURCE = "MILLSTREAM_VLLM_SOURCE"
"""Environment variable: the folder of vLLM's unpacked source distribution."""

MODEL = "smollm2-135m"

_FOLDER = "tests/entrypoints/openai"
_FILES = (
    "completion/test_completion.py",
    "completion/test_prompt_validation.py",
    "completion/test_token_in_token_out.py",
    "test_return_token_ids.py",
    "test_return_tokens_as_ids.py",
    "test_chunked_prompt.py",
)
_SELECTED = " and ".join(
    f"not {word}" for word in ("chat", "prompt_embeds", "sampling_params", "routed_experts", "responses_api")
)
_MODELS = re.compile(r'"(facebook/opt-125m|openai-community/gpt2|Qwen/[^"]+|HuggingFaceH4/[^"]+)"')

_UTILS = '''"""Stands for vLLM's, which starts a server for each module: this one is there already."""

import os

import openai


class RemoteOpenAIServer:
    def __init__(self, *_arguments, **_options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def url_for(self, *parts):
        return "/".join([os.environ["TESTED_URL"], *parts])

    def get_async_client(self, **options):
        return openai.AsyncOpenAI(
            base_url=os.environ["TESTED_URL"] + "/v1",
            api_key=os.environ["TESTED_KEY"],
            max_retries=0,
            **{"timeout": 120, **options},
        )
'''
_CONFTEST = '''"""The model is known to its server by a name; its tokenizer is a folder."""

import os

import pytest
import vllm.model_executor.model_loader.weight_utils as weights
import vllm.tokenizers

_get_tokenizer = vllm.tokenizers.get_tokenizer


def get_tokenizer(tokenizer_name, **options):
    return _get_tokenizer(os.environ["TESTED_TOKENIZER"], **options)


vllm.tokenizers.get_tokenizer = get_tokenizer
weights.download_weights_from_hf = lambda model, **_options: model


@pytest.fixture(scope="session")
def qwen3_lora_files():
    return "none"
'''


def outcomes(source: Path, url: str, key: str, tokenizer: Path, limit_s: float = 600.0) -> dict[str, str | None]:
    """By test, what it said of its failure; None where it passed. Tests that need no server, or chats, are left out."""
    with tempfile.TemporaryDirectory(prefix="vllms-tests-") as name:
        folder = Path(name)
        _adapt(source, folder)
        report = folder / "report.xml"
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(folder / "pytest.ini")),
            *("--rootdir", str(folder), f"--junitxml={report}", "-k", _SELECTED),
        ]
        return _run(command, folder, report, url, key, tokenizer, limit_s)


def _adapt(source: Path, folder: Path) -> None:
    (folder / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\ntimeout = 300\n")
    (folder / "conftest.py").write_text(_CONFTEST)
    for file in _FILES:
        target = folder / _FOLDER / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_MODELS.sub(f'"{MODEL}"', (source / _FOLDER / file).read_text()))
    for package in {parent for file in _FILES for parent in (folder / _FOLDER / file).parents}:
        if package != folder and package.is_relative_to(folder):
            (package / "__init__.py").touch()
    (folder / "tests" / "utils.py").write_text(_UTILS)


def _run(
    command: list[str], folder: Path, report: Path, url: str, key: str, tokenizer: Path, limit_s: float
) -> dict[str, str | None]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "TESTED_URL": url,
        "TESTED_KEY": key,
        "TESTED_TOKENIZER": str(tokenizer),
    }
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
    )
    if not report.exists():
        raise AssertionError(f"vLLM's tests did not run:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    found: dict[str, str | None] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        told = [each.get("message") or each.text or "" for kind in ("failure", "error") for each in case.iter(kind)]
        found[f"{case.get('classname', '').removeprefix('tests.entrypoints.openai.')}.{case.get('name')}"] = (
            told[0][:500] if told else None
        )
    if not found:
        raise AssertionError(f"none of vLLM's tests was found:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    return found


if __name__ == "__main__":
    _url, _key, _tokenizer = sys.argv[1:]
    _tested = outcomes(Path(os.environ[SOURCE]), _url, _key, Path(_tokenizer))
    for test, why in sorted(_tested.items()):
        print("passed" if why is None else "FAILED", test, "" if why is None else f"\n    {why}")
