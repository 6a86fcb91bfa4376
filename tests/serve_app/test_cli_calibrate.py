"""`millstream calibrate`: what it prints where, and what it refuses."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from serve_app.cli import app
from serve_app.planning.model_pool import read_engine
from serve_app.running_cluster import RunningCluster
from tests.serve_app.calibration.synthetic_cluster import SyntheticCluster


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SyntheticCluster:
    cluster = SyntheticCluster(2, models=("a", "b"))
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))
    command = import_module("serve_app.cli.calibrate")  # as an attribute of the package it is the function
    found = RunningCluster("c", "http://c", "http://c", "http://d", "token")
    monkeypatch.setattr(command, "find_cluster", lambda *_: found)
    monkeypatch.setattr(command, "ClusterApi", lambda _url, _key: cluster)
    return cluster


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    result = calibrate(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr.strip()


@pytest.mark.usefixtures("cluster")
def test_the_engine_goes_to_standard_output_and_progress_does_not(tmp_path: Path) -> None:
    result = calibrate("--model", "a", "--max-sequences", 4)
    assert result.exit_code == 0
    assert result.stdout.startswith("# a with 2 replicas, measured by millstream calibrate on ")
    assert result.stderr.startswith("a: 5 rounds, replicas in rotation: 2\nround 1: ")
    file = tmp_path / "engine.yaml"
    file.write_text(result.stdout)
    assert read_engine(file).step_s == pytest.approx(0.02)


@pytest.mark.usefixtures("cluster")
def test_the_engine_is_written_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "engine.yaml"
    result = calibrate("--model", "b", "--output", file)
    assert (result.exit_code, result.stdout) == (0, "")
    assert read_engine(file).step_s_per_sequence == pytest.approx(0.003)


@pytest.mark.usefixtures("cluster")
def test_one_of_several_models_is_named() -> None:
    assert refusal() == "--model: expected one of a, b"
    assert refusal("--model", "c") == "--model: got 'c', expected one of a, b"


def test_the_only_model_need_not_be_named(cluster: SyntheticCluster) -> None:
    cluster.cards = cluster.cards[:1]
    assert calibrate().stdout.startswith("# a with 1 replica,")


def test_what_goes_wrong_is_told_in_a_line(cluster: SyntheticCluster) -> None:
    cluster.refusal = "the cluster does not answer"
    assert refusal("--model", "a").splitlines()[-1] == "the cluster does not answer"
    cluster.cards = []
    assert refusal("--model", "a") == "the cluster serves no model yet: see millstream status"


def test_a_poor_fit_is_warned_of(cluster: SyntheticCluster) -> None:
    cluster.attention_s = 1e-6
    result = calibrate("--model", "a", "--max-sequences", 4)
    assert result.exit_code == 0
    assert "warning: A poor fit" in result.stderr
    assert "# A poor fit" in result.stdout


def test_without_a_cluster_it_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))
    assert refusal() == f"No cluster runs under {tmp_path}. Start one with: millstream up cluster.yaml"
