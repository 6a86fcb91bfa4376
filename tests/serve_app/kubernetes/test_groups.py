"""Worker groups: how many pods of which size a cluster.yaml asks for."""

from __future__ import annotations

import pytest

from serve_app.config import ClusterConfig
from serve_app.kubernetes.groups import WorkerGroup, engine_group_name, ingress_cpus, worker_groups
from tests.serve_app.kubernetes.clusters import cluster, model


def groups(config: ClusterConfig) -> dict[str, WorkerGroup]:
    return {group.name: group for group in worker_groups(config)}


def test_gateway_and_meter_have_groups_of_their_own() -> None:
    assert list(groups(cluster())) == ["gateway", "meter", "engine-1-gpu"]


@pytest.mark.parametrize(
    ("replicas", "cpus", "pods", "pod_cpus", "reserved"),
    [
        ((1, 1), 0.25, (1, 1), 2, 0.25),
        ((1, 1), 1.0, (1, 1), 2, 1.0),
        ((2, 2), 0.25, (2, 3), 1, 1.0),  # two on one node would both be lost with it
        ((2, 6), 1.0, (2, 7), 1, 1.0),
        ((3, 3), 0.5, (3, 4), 1, 1.0),
        ((4, 8), 0.5, (2, 5), 1, 0.5),
        ((8, 8), 0.5, (2, 3), 2, 0.5),
        ((2, 2), 0.0, (2, 3), 1, 1.0),
    ],
)
def test_gateway_pods_hold_all_ingress_replicas_and_one_that_starts_meanwhile_but_none_holds_all(
    replicas: tuple[int, int], cpus: float, pods: tuple[int, int], pod_cpus: int, reserved: float
) -> None:
    fewest, most = replicas
    config = cluster(ingress={"replicas": {"min": fewest, "max": most}, "resources": {"cpus": cpus}})
    gateway = groups(config)["gateway"]
    assert (gateway.min_pods, gateway.max_pods, gateway.cpus, ingress_cpus(config)) == (*pods, pod_cpus, reserved)
    in_a_pod = gateway.cpus / ingress_cpus(config)
    assert gateway.min_pods * in_a_pod >= fewest
    assert gateway.max_pods * in_a_pod >= most + 1
    assert fewest == 1 or in_a_pod < fewest


def test_all_meters_are_in_one_pod_with_room_for_their_successors() -> None:
    meters = {"database": "env://D", "replicas": 3, "resources": {"cpus": 0.5}}
    assert groups(cluster(meter=meters))["meter"] == WorkerGroup("meter", "meter", 1, 1, cpus=3)


def test_models_share_a_group_when_type_and_number_of_gpus_agree() -> None:
    h100 = {"cpus": 4.0, "gpus": 1.0, "accelerator": "H100"}
    config = cluster(
        model("a", resources=h100, replicas={"min": 1, "max": 4}),
        model("b", resources={**h100, "cpus": 6.0}, replicas={"min": 2, "max": 3}),
        model("c", resources={**h100, "gpus": 4.0}, engine={"kind": "simulated"}),
        model("d", resources={**h100, "accelerator": "A100-80G"}),
        model("e", resources={"cpus": 1.0, "gpus": 0.0}),
    )
    assert worker_groups(config)[2:] == [
        WorkerGroup("engine-1-h100", "engine", 3, 7, cpus=6, gpus=1, accelerator="H100"),
        WorkerGroup("engine-4-h100", "engine", 1, 1, cpus=4, gpus=4, accelerator="H100"),
        WorkerGroup("engine-1-a100-80g", "engine", 1, 1, cpus=4, gpus=1, accelerator="A100-80G"),
        WorkerGroup("engine-cpu", "engine", 1, 1, cpus=1),
    ]
    assert [engine_group_name(each) for each in config.models] == [
        "engine-1-h100",
        "engine-1-h100",
        "engine-4-h100",
        "engine-1-a100-80g",
        "engine-cpu",
    ]


def test_replicas_that_share_a_gpu_share_a_pod() -> None:
    config = cluster(model(resources={"cpus": 1.0, "gpus": 0.5}, replicas={"min": 1, "max": 5}))
    assert groups(config)["engine-1-gpu"] == WorkerGroup("engine-1-gpu", "engine", 1, 3, cpus=2, gpus=1)


def test_a_model_added_at_the_end_leaves_the_groups_before_in_their_places() -> None:
    """KubeRay adds groups to a running cluster only behind all others."""
    before = cluster(model("a", resources={"cpus": 1.0, "gpus": 4.0}, engine={"kind": "simulated"}))
    after = cluster(
        model("a", resources={"cpus": 1.0, "gpus": 4.0}, engine={"kind": "simulated"}),
        model("b", resources={"cpus": 1.0, "gpus": 1.0}),
    )
    assert worker_groups(after)[:-1] == worker_groups(before)
