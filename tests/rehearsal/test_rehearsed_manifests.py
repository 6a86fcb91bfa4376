"""What the rehearsal makes of rendered manifests is what KubeRay would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.rehearsal.manifests import HEAD_GROUP, Manifests, Secrets, rendered

SECRETS: Secrets = {
    "millstream-database": {"url": "postgresql://db"},
    "millstream-admin-key": {"key": "sk-admin"},
    "millstream-ray-token": {"auth_token": "token"},
    "millstream-redis": {"password": "secret"},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def manifests() -> Manifests:
    return rendered(ROOT / "tests" / "rehearsal" / "cluster.yaml")


def test_the_head_keeps_its_state_in_redis_and_has_the_autoscaler_beside_it(manifests: Manifests) -> None:
    head = manifests.head("head-0", SECRETS)
    ray, autoscaler = head.containers
    assert ray.arguments[:3] == ["/bin/bash", "-c", "--"]
    assert ray.arguments[3].startswith("ulimit -n 65536; ray start --head ")
    assert "RAY_USE_TLS" not in ray.environment
    for option in ("--num-cpus=0", "--no-monitor", "--block", "--redis-password=$REDIS_PASSWORD"):
        assert option in ray.arguments[3].split()
    assert ray.environment["RAY_REDIS_ADDRESS"] == "redis:6379"
    assert ray.environment["REDIS_PASSWORD"] == "secret"
    assert autoscaler.arguments[:2] == ["ray", "kuberay-autoscaler"]
    assert {ray.environment["RAY_AUTH_TOKEN"], autoscaler.environment["RAY_AUTH_TOKEN"]} == {"token"}
    assert head.group == HEAD_GROUP


def test_workers_find_the_head_by_its_name_and_carry_the_label_of_their_group(manifests: Manifests) -> None:
    for group in manifests.cluster["workerGroupSpecs"]:
        worker = manifests.worker(group, "worker-0", SECRETS)
        (container,) = worker.containers
        command = container.arguments[3]
        assert f"--address={manifests.head_service}:6379" in command.split()
        assert f"--labels=millstream-group={group['groupName']}" in command.split()
        assert re.search(r"--memory=\d{9,}( |$)", command)
        assert worker.labels["millstream-group"] == group["groupName"]
        assert worker.grace_s > float(container.environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])


def test_with_tls_each_container_has_certificates_and_the_variables_that_name_them(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "tests" / "rehearsal" / "cluster.yaml").read_text())
    config["kubernetes"]["tls"] = True
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config))
    manifests = rendered(tmp_path / "cluster.yaml")
    templates = [manifests.head("head-0", SECRETS)]
    templates += [manifests.worker(group, "worker-0", SECRETS) for group in manifests.cluster["workerGroupSpecs"]]
    for template in templates:
        for container in template.containers:
            assert container.environment["RAY_USE_TLS"] == "1"
            folder = Path(container.environment["RAY_TLS_SERVER_CERT"]).parent
            [mount] = [each for each in container.mounts if each["mountPath"] == str(folder)]
            assert "secret" in template.volumes[mount["name"]]


def test_secrets_are_where_they_are_needed_and_may_be_missing_where_they_are_optional(manifests: Manifests) -> None:
    by_group = {
        group["groupName"]: manifests.worker(group, "worker-0", SECRETS).containers[0].environment
        for group in manifests.cluster["workerGroupSpecs"]
    }
    assert by_group["meter"]["MILLSTREAM_DATABASE"] == "postgresql://db"
    assert "MILLSTREAM_DATABASE" not in by_group["gateway"]
    assert "HF_TOKEN" not in by_group["engine-cpu"]
