"""The manifests: they are valid to the last key, say the same each time, and open nothing that should be closed."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from copy import deepcopy
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.config import ClusterConfig
from serve_app.config_reading import load_cluster_config
from serve_app.kubernetes import as_stream, check_for_kubernetes, render_folder
from serve_app.kubernetes.yaml_text import yaml_text
from serve_app.running_cluster import ClusterNotFound, RunningCluster, database_of_cluster, find_cluster
from tests.serve_app.kubernetes.clusters import cluster, model
from tests.serve_app.kubernetes.crd_schema import strict_schema

ROOT = Path(__file__).parents[3]
CRDS = ROOT / ".." / "shared" / "k8s" / "crds"
OVERLAYS = sorted(path.parent for path in ROOT.glob("k8s/overlays/*/cluster.yaml"))
KUBERNETES_VERSION = "1.37"

Manifest = dict[str, Any]


def full_cluster() -> ClusterConfig:
    """With everything that can be rendered."""
    return cluster(
        model("a", resources={"cpus": 1.0, "gpus": 1.0, "accelerator": "H100"}, replicas={"min": 3, "max": 5}),
        model("b", resources={"cpus": 1.0, "gpus": 0.5}, replicas={"min": 0, "max": 4}),
        model("c", resources={"cpus": 1.0, "gpus": 0.0}, engine={"kind": "simulated"}, drain_timeout_s=900.0),
        cluster={"name": "full", "http": {"port": 8123}},
        ingress={"replicas": {"min": 2, "max": 4}},
        meter={"database": "env://LEDGER", "replicas": 2},
        kubernetes={
            "redis_address": "redis:6379",
            "tls": True,
            "image_pull_secret": "registry",
            "accelerators": {"H100": {"b": "2", "a": "1"}},
            "storage": {"models": {"size": "1Ti", "storage_class": "shared"}},
            "secrets": {"database": "postgres"},
        },
    )


class Rendered:
    """What a configuration gives, rendered and read once: who changes something changes a copy."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config

    @cached_property
    def stream(self) -> str:
        assert check_for_kubernetes("cluster.yaml", self.config) == []
        return as_stream(self.config)

    @cached_property
    def manifests(self) -> list[Manifest]:
        return list(yaml.safe_load_all(self.stream))

    def of_kind(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    @property
    def ray_cluster(self) -> dict[str, Any]:
        [service] = self.of_kind("RayService")
        described: dict[str, Any] = service["spec"]["rayClusterConfig"]
        return described

    @property
    def templates(self) -> dict[str, dict[str, Any]]:
        """Pod templates by group."""
        return {
            "head": self.ray_cluster["headGroupSpec"]["template"],
            **{group["groupName"]: group["template"] for group in self.ray_cluster["workerGroupSpecs"]},
        }


RENDERED = {
    "full": Rendered(full_cluster()),
    "least": Rendered(cluster(cluster={"proxy": "ray"}, kubernetes={"monitoring_namespace": None})),
    **{overlay.name: Rendered(load_cluster_config(overlay / "cluster.yaml", {})) for overlay in OVERLAYS},
}


@pytest.fixture(params=RENDERED)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return RENDERED[str(request.param)]


def variables(template: dict[str, Any]) -> dict[str, Any]:
    [container] = template["spec"]["containers"]
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


@cache
def crd_validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(strict_schema(CRDS / "ray.io_rayservices.yaml", "v1"))


# --- valid ------------------------------------------------------------------------------------------------------


def test_the_ray_service_has_no_field_that_kuberay_does_not_know(rendered: Rendered) -> None:
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's CRDs are not at {CRDS}")
    [service] = deepcopy(rendered.of_kind("RayService"))
    crd_validator().validate(service)
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="'replica' was unexpected"):
        crd_validator().validate(service)


def test_everything_else_has_no_field_that_kubernetes_does_not_know(rendered: Rendered) -> None:
    checked = {
        manifest["kind"]: kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
        for manifest in rendered.manifests
        if manifest["kind"] not in ("RayService", "PodMonitor")
    }
    assert checked.keys() >= {"ServiceAccount", "Service", "NetworkPolicy", "PersistentVolumeClaim"}


def test_the_pod_templates_make_valid_pods(rendered: Rendered) -> None:
    for template in rendered.templates.values():
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, KUBERNETES_VERSION, strict=True)


def test_serve_takes_its_configuration(rendered: Rendered) -> None:
    [service] = rendered.of_kind("RayService")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert [each.name for each in schema.applications] == [
        "gateway",
        *(f"model-{m.name}" for m in rendered.config.models),
    ]
    assert (schema.http_options.host, schema.http_options.port) == ("0.0.0.0", rendered.config.cluster.http.port)


def test_the_pod_monitor_names_a_port_that_all_pods_have() -> None:
    [monitor] = RENDERED["full"].of_kind("PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    labels = monitor["spec"]["selector"]["matchLabels"].items()
    for template in RENDERED["full"].templates.values():
        assert labels <= template["metadata"]["labels"].items()
        assert endpoint["port"] in {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    assert RENDERED["least"].of_kind("PodMonitor") == []


def test_the_example_of_the_documentation_can_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    _, section = text.split("## What to set in cluster.yaml\n", 1)
    lines = itertools.takewhile(lambda line: not line or line.startswith("    "), section.splitlines())
    (tmp_path / "cluster.yaml").write_text(textwrap.dedent("\n".join(lines)))
    config = load_cluster_config(tmp_path / "cluster.yaml", {})
    assert "engine-4-h100" in Rendered(config).templates


# --- the same each time -----------------------------------------------------------------------------------------


def test_the_same_configuration_gives_the_same_bytes(rendered: Rendered) -> None:
    again = ClusterConfig.model_validate(rendered.config.model_dump())
    assert as_stream(again) == rendered.stream
    assert render_folder(again) == render_folder(rendered.config)


def test_every_file_says_what_it_is(rendered: Rendered) -> None:
    for text in render_folder(rendered.config).files.values():
        comment, header, *_ = text.splitlines()
        assert comment.startswith("# ")
        assert header.startswith("# ")
        assert "# Rendered by `millstream render kubernetes`: change cluster.yaml and render anew.\n" in text


def test_a_folder_holds_what_the_stream_does(rendered: Rendered) -> None:
    files = dict(render_folder(rendered.config).files)
    listed = yaml.safe_load(files.pop("kustomization.yaml"))["resources"]
    assert listed == list(files)
    assert "---\n".join(files[name] for name in listed) == rendered.stream


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: str(path.name))
def test_the_manifests_in_k8s_are_what_their_cluster_yaml_says(overlay: Path) -> None:
    rendered = render_folder(RENDERED[overlay.name].config, Path("../../base"))
    for folder, files in ((overlay, rendered.files), (ROOT / "k8s" / "base", rendered.base)):
        there = {file.name: file.read_text() for file in folder.iterdir() if file.name != "cluster.yaml"}
        assert there == files, f"render {folder} anew, as {overlay}/cluster.yaml says"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: str(path.name))
def test_kustomize_builds_each_overlay(overlay: Path) -> None:
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("kubectl is not installed")
    built = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert in_any_order(yaml.safe_load_all(built.stdout)) == in_any_order(RENDERED[overlay.name].manifests)


def in_any_order(manifests: Iterable[Manifest]) -> list[str]:
    return sorted(json.dumps(manifest, sort_keys=True) for manifest in manifests)


# --- pods and replicas ------------------------------------------------------------------------------------------


def test_every_replica_is_bound_to_a_group_whose_pods_can_hold_it(rendered: Rendered) -> None:
    [service] = rendered.of_kind("RayService")
    groups = {group["groupName"]: group for group in rendered.ray_cluster["workerGroupSpecs"]}
    bound = set()
    for application in yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]:
        for deployment in application["deployments"]:
            options = deployment["ray_actor_options"]
            [name] = options["label_selector"].values()
            group = groups[name]
            assert options["label_selector"] == group["labels"]
            assert options["label_selector"].items() <= group["template"]["metadata"]["labels"].items()
            assert int(group["rayStartParams"]["num-cpus"]) >= options["num_cpus"]
            assert int(group["rayStartParams"].get("num-gpus", 0)) >= options.get("num_gpus", 0)
            assert "accelerator_type" not in yaml_text(deployment)
            bound.add(name)
    assert bound == groups.keys()


def test_the_head_runs_no_replica_and_takes_no_client() -> None:
    [service] = RENDERED["full"].of_kind("RayService")
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    assert RENDERED["full"].ray_cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_gpus_are_requested_where_replicas_have_them() -> None:
    requested = {
        name: template["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
        for name, template in RENDERED["multi-node"].templates.items()
    }
    assert requested == {"head": 0, "gateway": 0, "meter": 0, "engine-1-l40s": 1, "engine-4-h100": 4}
    h100 = RENDERED["multi-node"].templates["engine-4-h100"]["spec"]
    assert h100["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert h100["containers"][0]["resources"]["limits"]["memory"] == "128Gi"


def test_a_model_that_may_go_to_zero_keeps_no_pod() -> None:
    sizes = {
        group["groupName"]: (group["minReplicas"], group["maxReplicas"])
        for group in RENDERED["full"].ray_cluster["workerGroupSpecs"]
    }
    assert sizes["engine-1-gpu"] == (0, 2)


def test_an_upgrade_makes_no_second_cluster(rendered: Rendered) -> None:
    [service] = rendered.of_kind("RayService")
    assert service["spec"]["upgradeStrategy"] == {"type": "None"}


def test_only_clusters_that_scale_have_an_autoscaler() -> None:
    assert RENDERED["full"].ray_cluster["enableInTreeAutoscaling"] is True
    assert RENDERED["full"].ray_cluster["autoscalerOptions"]["version"] == "v2"
    assert RENDERED["least"].ray_cluster["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in RENDERED["least"].ray_cluster


def test_the_heads_state_outlives_it_where_a_redis_is_named() -> None:
    assert RENDERED["full"].ray_cluster["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "full-redis", "key": "password"}}},
    }
    assert "gcsFaultToleranceOptions" not in RENDERED["least"].ray_cluster


def test_all_pods_agree_on_how_serve_runs(rendered: Rendered) -> None:
    environments = [
        {name: value for name, value in variables(template).items() if name.startswith("RAY_SERVE_")}
        for template in rendered.templates.values()
    ]
    assert all(environment == environments[0] for environment in environments)
    assert environments[0]["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert ("RAY_SERVE_ENABLE_HA_PROXY" in environments[0]) == (rendered.config.cluster.proxy == "haproxy")


def test_pods_drain_before_they_end_and_have_the_time_for_it(rendered: Rendered) -> None:
    for name, template in rendered.templates.items():
        drain_s = int(variables(template)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert template["spec"]["terminationGracePeriodSeconds"] >= drain_s + 30
        if name not in ("head", "meter"):  # nobody can take their place meanwhile
            assert drain_s > rendered.config.longest_drain_s
    if rendered.config.cluster.proxy == "haproxy":
        hard_stop_s = variables(rendered.templates["gateway"])["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]
        assert int(hard_stop_s) == math.ceil(rendered.config.longest_drain_s)


def test_ray_reads_how_long_to_drain_from_the_environment() -> None:
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    told = subprocess.run(
        [sys.executable, "-c", f"from ray._private import ray_constants; print(ray_constants.{name})"],
        env={**os.environ, name: "123"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(told.stdout) == 123


def test_serves_answers_from_new_replicas_stay_out_of_the_object_store(rendered: Rendered) -> None:
    """Else no node is ever idle: none is given back, and each drains for as long as it may."""
    for template in rendered.templates.values():
        assert int(variables(template)["RAY_max_direct_call_object_size"]) >= 2**20


def test_only_the_one_meter_pod_mounts_the_meters_volume(rendered: Rendered) -> None:
    claims = {
        claim["metadata"]["name"]: claim["spec"]["accessModes"] for claim in rendered.of_kind("PersistentVolumeClaim")
    }
    name = rendered.config.cluster.name
    assert claims == {f"{name}-models": ["ReadWriteMany"], f"{name}-meter": ["ReadWriteOnce"]}
    mounting = {
        group: {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in template["spec"].get("volumes", [])
            if "persistentVolumeClaim" in volume
        }
        for group, template in rendered.templates.items()
    }
    assert [group for group, names in mounting.items() if f"{name}-meter" in names] == ["meter"]
    assert all(f"{name}-models" in names for group, names in mounting.items() if group != "head")
    [meter] = [group for group in rendered.ray_cluster["workerGroupSpecs"] if group["groupName"] == "meter"]
    assert (meter["minReplicas"], meter["maxReplicas"]) == (1, 1)


def test_budgets_let_one_pod_of_a_group_go_at_a_time(rendered: Rendered) -> None:
    sizes = {group["groupName"]: group["minReplicas"] for group in rendered.ray_cluster["workerGroupSpecs"]}
    kept = {
        budget["spec"]["selector"]["matchLabels"]["millstream-group"]: budget["spec"]["minAvailable"]
        for budget in rendered.of_kind("PodDisruptionBudget")
    }
    assert kept == {name: size - 1 for name, size in sizes.items() if size > 1}


# --- closed -----------------------------------------------------------------------------------------------------


def test_every_pod_is_restricted_as_pod_security_standards_say(rendered: Rendered) -> None:
    described = rendered.ray_cluster
    containers = [template["spec"]["containers"][0] for template in rendered.templates.values()]
    if described["enableInTreeAutoscaling"]:
        containers.append(described["autoscalerOptions"])
    for container in containers:
        own = {} if container is described.get("autoscalerOptions") else {"readOnlyRootFilesystem": True}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            **own,
        }
    for template in rendered.templates.values():
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] != 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any("hostPath" in volume for volume in template["spec"].get("volumes", []))


def test_no_container_but_the_autoscaler_has_a_token_of_kubernetes(rendered: Rendered) -> None:
    [account] = rendered.of_kind("ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    for template in rendered.templates.values():
        assert template["spec"]["automountServiceAccountToken"] is False
        for mount in template["spec"]["containers"][0].get("volumeMounts", []):
            assert mount["name"] != "autoscaler-account"
    if rendered.ray_cluster["enableInTreeAutoscaling"]:
        [mount] = rendered.ray_cluster["autoscalerOptions"]["volumeMounts"]
        assert mount["name"] in {volume["name"] for volume in rendered.templates["head"]["spec"]["volumes"]}


def test_secrets_are_named_and_go_to_the_pods_that_need_them_only() -> None:
    named = {
        group: {
            value["secretKeyRef"]["name"]
            for value in variables(template).values()
            if isinstance(value, dict) and "secretKeyRef" in value
        }
        for group, template in RENDERED["full"].templates.items()
    }
    assert named == {
        "head": set(),
        "gateway": set(),
        "meter": {"postgres", "full-admin-key"},
        "engine-1-h100": {"full-hub"},
        "engine-1-gpu": {"full-hub"},
        "engine-cpu": {"full-hub"},
    }
    assert variables(RENDERED["full"].templates["meter"])["LEDGER"]["secretKeyRef"]["key"] == "url"
    assert RENDERED["full"].ray_cluster["authOptions"] == {"mode": "token", "secretName": "full-ray-token"}


def test_tls_between_pods_is_left_to_kuberay_and_off_unless_it_is_asked_for() -> None:
    assert RENDERED["full"].ray_cluster["tlsOptions"] == {"enabled": True}
    assert "tlsOptions" not in RENDERED["least"].ray_cluster


def test_the_command_line_finds_the_cluster_in_the_meters_pod_alone(rendered: Rendered, tmp_path: Path) -> None:
    head, name = "cluster-head-svc.default.svc.cluster.local", rendered.config.cluster.name
    for group, template in rendered.templates.items():
        ports = {each["name"]: each["containerPort"] for each in template["spec"]["containers"][0]["ports"]}
        # As KubeRay adds to it: ray-operator/controllers/ray/common/pod.go, setContainerEnvVars.
        environment = (
            variables(template) | {"RAY_AUTH_TOKEN": "token"} | ({} if group == "head" else {"FQ_RAY_IP": head})
        )
        if group != "meter":
            for find in (find_cluster, database_of_cluster):
                with pytest.raises(ClusterNotFound, match=f"instance={name},millstream-group=meter"):
                    find(tmp_path, environment)
            continue
        found = find_cluster(tmp_path, environment)
        assert found == RunningCluster(
            name=name,
            clients_url=f"http://{name}",
            http_url=f"http://127.0.0.1:{ports['serve']}",
            dashboard_url=f"http://{head}:8265",
            token="token",
        )
        database = database_of_cluster(tmp_path, environment)
        assert database == rendered.config.meter.database
        assert environment[database.removeprefix("env://")]["secretKeyRef"]["key"] == "url"


def test_from_elsewhere_clients_reach_serve_and_nobody_but_the_operator_the_dashboard(rendered: Rendered) -> None:
    own = {"app.kubernetes.io/instance": rendered.config.cluster.name}
    reachable: dict[str, list[Any]] = {}
    for policy in rendered.of_kind("NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        assert own.items() <= policy["spec"]["podSelector"]["matchLabels"].items()
        for rule in policy["spec"]["ingress"]:
            for port in rule.get("ports", [{"port": "any"}]):
                reachable.setdefault(port["port"], []).append((policy["metadata"]["name"], rule.get("from")))
    name = rendered.config.cluster.name
    assert reachable.pop("any") == [(f"{name}-cluster", [{"podSelector": {"matchLabels": own}}])]
    [(dashboard, [operator])] = reachable.pop("dashboard")
    assert dashboard == f"{name}-operator"
    assert operator.keys() == {"namespaceSelector", "podSelector"}
    assert (f"{name}-clients", None) in reachable.pop("serve")
    for _, [prometheus] in reachable.pop("metrics", []):
        assert prometheus["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    assert reachable == {}


def test_clients_reach_the_gateways_pods_by_one_service(rendered: Rendered) -> None:
    [service] = rendered.of_kind("Service")
    chosen = service["spec"]["selector"].items()
    serving = [
        name for name, template in rendered.templates.items() if chosen <= template["metadata"]["labels"].items()
    ]
    assert serving == ["gateway"]
    [port] = service["spec"]["ports"]
    numbers = {
        each["name"]: each["containerPort"] for each in rendered.templates["gateway"]["spec"]["containers"][0]["ports"]
    }
    assert numbers[port["targetPort"]] == rendered.config.cluster.http.port
