"""Rules and dashboard: sound by Prometheus' own tools, and about metrics that a running cluster really has."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.conftest import RunningCluster, eventually
from tests.prometheus import MONITORING, node_metrics_targets, prometheus_of

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="no Prometheus here: apt-get install prometheus",
)
_VLLM = "ray_vllm_"


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[str]:
    """As Grafana sends them with all models chosen."""
    variables = {"$__rate_interval": "20s", "$__range": "20s", "$model": ".*"}
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in variables.items():
                query = query.replace(name, value)
            yield query


def metrics_in(expressions: Iterator[str]) -> set[str]:
    """Names of metrics in PromQL: all of ours and of Ray's begin alike, and no label does."""
    names: set[str] = set()
    for expression in expressions:
        names |= set(re.findall(r"\b(?:[a-z]+:)?(?:millstream_|ray_)[\w:]+", expression))
    return names


def used_metrics() -> set[str]:
    return metrics_in(dashboard_queries()) | metrics_in(rule["expr"] for rule in rules())


async def samples_at(url: str, headers: dict[str, str] | None = None) -> list[Sample]:
    """Of one scrape."""
    async with httpx.AsyncClient(trust_env=False) as client:
        response = await client.get(url, headers=headers)
    assert response.status_code == 200, response.text
    return [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]


async def samples_at_nodes(cluster: RunningCluster) -> list[Sample]:
    """Of what Ray tells at each node."""
    told = await asyncio.gather(*(samples_at(f"http://{each}/metrics") for each in node_metrics_targets(cluster)))
    return [sample for samples in told for sample in samples]


class Traffic:
    """A little of everything that is counted: streams, a refusal, a wrong key."""

    def __init__(self, cluster: RunningCluster, model: str) -> None:
        self._url, self._model = cluster.url, model
        self._admin = cluster.headers
        created = cluster.millstream("keys", "create", "monitoring", "--requests-per-minute", "1", "--json")
        assert created.returncode == 0, created.stderr
        self._limited = {"Authorization": f"Bearer {json.loads(created.stdout)['key']}"}

    async def once(self) -> None:
        body = {"model": self._model, "prompt": "a little of everything", "max_tokens": 8, "stream": True}
        wrong = {"Authorization": "Bearer sk-wrong"}
        async with httpx.AsyncClient(base_url=self._url, timeout=60.0, trust_env=False) as client:
            for headers in (self._admin, self._limited, self._limited, wrong):
                await client.post("/v1/completions", json=body, headers=headers)


# --- by themselves ----------------------------------------------------------------------------------------------------


@needs_prometheus
@pytest.mark.parametrize(
    "command", [("check", "rules", "rules.yaml"), ("test", "rules", "rules_test.yaml")], ids=lambda each: each[0]
)
def test_promtool_is_content_with_the_rules(command: tuple[str, ...]) -> None:
    result = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_prometheus
def test_promtool_is_content_with_the_configuration() -> None:
    command = ["promtool", "check", "config", "--syntax-only", "prometheus.yaml"]
    result = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_operators_manifest_has_the_same_rules() -> None:
    manifest = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert manifest["spec"] == yaml.safe_load((MONITORING / "rules.yaml").read_text())


def test_every_alert_is_tested_and_documented() -> None:
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    assert {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]} == alerts
    documented = set(re.findall(r"^### (\w+)$", (MONITORING.parents[1] / "docs" / "operations.md").read_text(), re.M))
    assert documented == alerts
    for rule in rules():
        if "alert" in rule:
            assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in panels()
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_metric_is_documented() -> None:
    text = (MONITORING.parents[1] / "docs" / "monitoring.md").read_text()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    stems = {re.sub(r"_(bucket|count|sum)$", "", name) for name in used_metrics() - recorded}
    assert sorted(stem for stem in stems if f"`{stem}`" not in text) == []


# --- on a cluster -----------------------------------------------------------------------------------------------------


@pytest.mark.cluster
async def test_every_metric_of_rules_and_dashboard_is_one_that_the_cluster_has(
    simulated_cluster: RunningCluster,
) -> None:
    await Traffic(simulated_cluster, "sim-a").once()
    wanted = {name for name in used_metrics() if not name.startswith(_VLLM)}
    wanted -= {rule["record"] for rule in rules() if "record" in rule}
    assert len(wanted) > 20
    missing = wanted

    async def all_there() -> bool:
        nonlocal missing
        told = await samples_at(f"{simulated_cluster.url}/metrics", simulated_cluster.headers)
        told += await samples_at_nodes(simulated_cluster)
        missing = wanted - {sample.name for sample in told}
        return not missing

    try:
        await eventually(all_there, 40.0, every_s=1.0)
    except TimeoutError:
        pytest.fail(f"not there: {sorted(missing)}")


@pytest.mark.cluster
@pytest.mark.timeout(180)
@needs_prometheus
async def test_prometheus_scrapes_the_cluster_and_every_query_has_data(
    simulated_cluster: RunningCluster, tmp_path: Path
) -> None:
    traffic = Traffic(simulated_cluster, "sim-a")
    queries = [query for query in dashboard_queries() if _VLLM not in query]
    empty = queries
    async with prometheus_of(simulated_cluster, tmp_path) as prometheus:

        async def all_have_data() -> bool:
            nonlocal empty
            await traffic.once()
            empty = [query for query in queries if not await prometheus.query(query)]
            return not empty

        try:
            await eventually(all_have_data, 90.0, every_s=1.0)
        except TimeoutError:
            pytest.fail("without data: " + "\n".join(empty))
        evaluated = await prometheus.rules()
        assert [rule["name"] for rule in evaluated if rule["health"] != "ok"] == []
        firing = [rule["name"] for rule in evaluated if rule.get("state") == "firing"]
        assert "MillstreamNotScraped" not in firing
        up = await prometheus.query('up{job="millstream"}')
        assert [sample["value"][1] for sample in up] == ["1"]


@pytest.mark.vllm
@pytest.mark.timeout(600)
async def test_vllms_own_metrics_are_at_the_node(vllm_cluster: RunningCluster) -> None:
    async with vllm_cluster.client() as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
    await Traffic(vllm_cluster, model).once()
    wanted = {name for name in used_metrics() if name.startswith(_VLLM)} | {"ray_vllm_inter_token_latency_seconds_sum"}
    models: set[str] = set()

    async def all_there() -> bool:
        told = [sample for sample in await samples_at_nodes(vllm_cluster) if sample.name.startswith(_VLLM)]
        models.update(sample.labels["model_name"] for sample in told if "model_name" in sample.labels)
        return wanted <= {sample.name for sample in told}

    await eventually(all_there, 60.0, every_s=1.0)
    assert models == {model}
