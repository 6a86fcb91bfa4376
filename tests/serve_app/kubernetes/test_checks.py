"""What Kubernetes cannot do is refused, with the key, what stands there and what to write instead."""

from __future__ import annotations

import re
from typing import Any

import pytest

from serve_app.kubernetes import check_for_kubernetes
from tests.serve_app.kubernetes.clusters import cluster, model

H100 = {"cpus": 1.0, "gpus": 1.0, "accelerator": "H100"}
VLLM = {"kind": "vllm", "max_model_len": 2048}


def test_what_kubernetes_can_run_is_not_refused() -> None:
    config = cluster(
        model("a", resources=H100, replicas={"min": 1, "max": 9}),
        model("b", source="/var/lib/millstream/models/tuned"),
        kubernetes={"redis_address": "redis:6379", "accelerators": {"H100": {"gpu": "h100"}}},
    )
    assert check_for_kubernetes("cluster.yaml", config) == []


@pytest.mark.parametrize(
    ("sections", "changes", "told"),
    [
        (
            {},
            {
                "engine": {**VLLM, "tensor_parallel_size": 8, "pipeline_parallel_size": 2},
                "resources": {"cpus": 1.0, "gpus": 16.0},
            },
            r"models\[0\].resources.gpus: got 16, expected at most 8, which is kubernetes.gpus_per_node: .* one node",
        ),
        (
            {},
            {"replicas": {"min": 1, "max": 2}},
            r"kubernetes.redis_address: got nothing, expected host:port of a Redis, .* pods of engine-1-gpu: .* head",
        ),
        (
            {"ingress": {"replicas": {"min": 2, "max": 2}}},
            {},
            r"kubernetes.redis_address: got nothing, .* several pods of gateway",
        ),
        (
            {"meter": {"database": "sqlite:////ledger.db"}},
            {},
            r"meter.database: got sqlite:////ledger.db, expected sqlite:///\${MILLSTREAM_HOME}/ledger.db, .* the "
            r"meter's volume, or env://MILLSTREAM_DATABASE, a PostgreSQL .* the Secret millstream-database",
        ),
        (
            {"meter": {"database": "postgresql://user:swordfish@host/ledger"}},
            {},
            r"meter.database: got postgresql://…, expected env://MILLSTREAM_DATABASE, .* Secret millstream-",
        ),
        ({}, {"engine": {"kind": "vllm"}}, r"models\[0\].engine.max_model_len: got nothing, expected a number"),
        (
            {},
            {"resources": {"cpus": 1.0, "gpus": 0.0}},
            r"models\[0\].engine.enforce_eager: got false, expected true .* without GPUs: .* compiler",
        ),
        ({}, {"source": "/home/me/model"}, r"models\[0\].source: got /home/me/model, expected a hub id, or a folder b"),
        (
            {"kubernetes": {"accelerators": {"A100": {"gpu": "a100"}}}},
            {"resources": H100},
            r"models\[0\].resources.accelerator: got H100, expected node labels .* which has A100",
        ),
        (
            {"kubernetes": {"accelerators": {"A" * 60: {"gpu": "a"}}}},
            {"resources": {**H100, "accelerator": "A" * 60}},
            r"models\[0\].resources.accelerator: got A+, expected .* at most 54 .* group of its pods, engine-1-a{60}",
        ),
        (
            {},
            {"resources": {**H100, "gpus": 0.0}, "engine": {**VLLM, "enforce_eager": True}},
            r"models\[0\].resources.accelerator: got H100, expected null for a replica without GPUs",
        ),
        ({"cluster": {"name": "7b"}}, {}, r"cluster.name: got 7b, expected a name that begins with a letter"),
        ({"cluster": {"name": "m" * 48}}, {}, r"cluster.name: got m+, expected .* at most 47 characters"),
        ({"cluster": {"http": {"port": 8265}}}, {}, r"cluster.http.port: got 8265, expected a port .* does not use"),
        ({"cluster": {"http": {"port": 18000}}}, {}, r"cluster.http.port: got 18000, .* use: 6379, .* 10001 to 19999"),
        ({"cluster": {"http": {"port": 9101}}}, {}, r"cluster.http.port: got 9101, expected a port .* does not use"),
        ({"cluster": {"http": {"port": 31000}}}, {}, r"cluster.http.port: got 31000, .* use: .* 30000 to 31000"),
        ({"cluster": {"http": {"port": 80}}}, {}, r"cluster.http.port: got 80, expected a port from 1024"),
        (
            {"ingress": {"resources": {"cpus": 2.0}}, "kubernetes": {"redis_address": "redis:6379"}},
            {},
            r"kubernetes.gateway_cpus: got 2, expected at least 4, twice ingress.resources.cpus",
        ),
    ],
)
def test_what_it_cannot_is_told(sections: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    [problem] = check_for_kubernetes("cluster.yaml", cluster(model(**changes), **sections))
    assert re.match(rf"cluster.yaml: {told}", str(problem))
    assert "swordfish" not in str(problem)


def test_a_group_label_of_63_characters_is_taken() -> None:
    name = "A" * 54
    config = cluster(model(resources={**H100, "accelerator": name}), kubernetes={"accelerators": {name: {"gpu": "a"}}})
    assert check_for_kubernetes("cluster.yaml", config) == []


def test_all_problems_are_told_at_once() -> None:
    config = cluster(
        model("a", engine={"kind": "vllm"}, replicas={"min": 2, "max": 2}),
        model("b", source="/elsewhere"),
        meter={"database": "sqlite:////ledger.db"},
    )
    assert [problem.key for problem in check_for_kubernetes("cluster.yaml", config)] == [
        "meter.database",
        "kubernetes.redis_address",
        "models[0].engine.max_model_len",
        "models[1].source",
    ]
