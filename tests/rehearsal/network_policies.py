"""What a network plugin does: NetworkPolicies as the packet filter of each pod.

Every packet to a pod that some policy selects is dropped, unless one of those policies lets its source in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

__all__ = ["Endpoint", "ruleset"]


@dataclass(frozen=True)
class Endpoint:
    """Who has an address: a pod of the cluster, or of another namespace."""

    address: IPv4Address
    labels: Mapping[str, str]
    namespace: str | None = None
    """None in the cluster's own."""


def ruleset(
    labels: Mapping[str, str], ports: Mapping[str, int], policies: Iterable[dict[str, Any]], endpoints: list[Endpoint]
) -> str:
    """For `nft -f`, in the network namespace of a pod with these labels and named ports."""
    rules: list[str] = []
    selected = False
    for policy in policies:
        if not _selects(policy["spec"]["podSelector"], labels):
            continue
        selected = True
        for allowed in policy["spec"].get("ingress", []):
            rules.append(" ".join([*_from(allowed, endpoints), *_to(allowed, ports), "accept"]))
    lines = [
        f"type filter hook input priority 0; policy {'drop' if selected else 'accept'};",
        "iif lo accept",
        "ct state established,related accept",
        *rules,
    ]
    body = "\n".join(f"    {line}" for line in lines)
    return (
        f"table inet policies\ndelete table inet policies\ntable inet policies {{\n  chain input {{\n{body}\n  }}\n}}\n"
    )


def _from(allowed: dict[str, Any], endpoints: list[Endpoint]) -> list[str]:
    if "from" not in allowed:
        return []
    sources = {str(each.address) for peer in allowed["from"] for each in endpoints if _is_peer(peer, each)}
    # A set must have an element: this one is of nobody.
    return ["ip saddr", "{", ", ".join(sorted(sources) or ["0.0.0.0"]), "}"]


def _to(allowed: dict[str, Any], ports: Mapping[str, int]) -> list[str]:
    if "ports" not in allowed:
        return []
    numbers = [str(port) for each in allowed["ports"] if (port := ports.get(each["port"])) is not None]
    return ["tcp dport", "{", ", ".join(numbers or ["0"]), "}"]


def _is_peer(peer: dict[str, Any], endpoint: Endpoint) -> bool:
    if "namespaceSelector" in peer:
        namespace = {"kubernetes.io/metadata.name": endpoint.namespace or ""}
        if not _selects(peer["namespaceSelector"], namespace):
            return False
    elif endpoint.namespace is not None:
        return False
    return _selects(peer.get("podSelector", {}), endpoint.labels)


def _selects(selector: dict[str, Any], labels: Mapping[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items()
    return wanted <= labels.items() and all(_meets(labels, **each) for each in selector.get("matchExpressions", []))


def _meets(labels: Mapping[str, str], key: str, operator: str, values: list[str]) -> bool:
    if operator not in ("In", "NotIn"):
        raise ValueError(f"no such operator here: {operator}")
    return (labels.get(key) in values) == (operator == "In")
