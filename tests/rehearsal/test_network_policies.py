"""Packet filters made of NetworkPolicies."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest

from tests.rehearsal.network_policies import Endpoint, ruleset

PEER = Endpoint(IPv4Address("10.0.0.1"), {"app": "m"})
OTHER = Endpoint(IPv4Address("10.0.0.2"), {"app": "x"})
ABROAD = Endpoint(IPv4Address("10.0.0.3"), {"app": "m"}, "monitoring")


def policy(selector: dict[str, Any], *allowed: dict[str, Any]) -> dict[str, Any]:
    return {"spec": {"podSelector": selector, "ingress": list(allowed)}}


def rules(*policies: dict[str, Any], labels: dict[str, str] | None = None) -> str:
    return ruleset(labels or {"app": "m"}, {"serve": 8000, "metrics": 8080}, policies, [PEER, OTHER, ABROAD])


def test_a_pod_that_no_policy_selects_is_open() -> None:
    assert "policy accept;" in rules(policy({"matchLabels": {"app": "other"}}))


def test_a_selected_pod_takes_nothing_but_what_is_allowed() -> None:
    closed = rules(policy({}))
    assert "policy drop;" in closed
    assert "saddr" not in closed
    assert "dport" not in closed


def test_a_port_by_its_name_is_open_to_everybody() -> None:
    assert "\n    tcp dport { 8000 } accept\n" in rules(policy({}, {"ports": [{"port": "serve"}]}))


def test_pods_are_those_of_the_same_namespace_unless_another_is_named() -> None:
    own = {"from": [{"podSelector": {"matchLabels": {"app": "m"}}}]}
    abroad = {
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "ports": [{"port": "metrics"}],
    }
    told = rules(policy({}, own, abroad))
    assert "\n    ip saddr { 10.0.0.1 } accept\n" in told
    assert "\n    ip saddr { 10.0.0.3 } tcp dport { 8080 } accept\n" in told


def test_rules_for_peers_that_are_not_there_let_nobody_in() -> None:
    assert "ip saddr { 0.0.0.0 }" in rules(policy({}, {"from": [{"podSelector": {"matchLabels": {"app": "none"}}}]}))


def test_expressions_select_by_a_label() -> None:
    workers = {"matchExpressions": [{"key": "group", "operator": "NotIn", "values": ["head"]}]}
    assert "policy drop;" in rules(policy(workers), labels={"group": "meter"})
    assert "policy accept;" in rules(policy(workers), labels={"group": "head"})
    with pytest.raises(ValueError, match="no such operator"):
        rules(policy({"matchExpressions": [{"key": "group", "operator": "Exists", "values": []}]}))
