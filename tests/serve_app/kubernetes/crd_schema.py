"""KubeRay's CRDs as JSON schemas that refuse what the API server would drop without a word: unknown fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["strict_schema"]


def strict_schema(crd: Path, version: str) -> dict[str, Any]:
    """The schema of `version` in the CRD of that file."""
    described = yaml.load(crd.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [schema] = [each["schema"]["openAPIV3Schema"] for each in described["spec"]["versions"] if each["name"] == version]
    closed = _closed(schema)
    # The CRD leaves metadata to the API server.
    closed["properties"]["metadata"] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "labels": {"additionalProperties": {"type": "string"}}},
    }
    return closed


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    copy = dict(schema)
    if copy.get("x-kubernetes-int-or-string"):
        copy["type"] = ["integer", "string"]
    if "properties" in copy:
        copy["properties"] = {name: _closed(inner) for name, inner in copy["properties"].items()}
        if not copy.get("x-kubernetes-preserve-unknown-fields"):
            copy["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(copy.get(key), dict):
            copy[key] = _closed(copy[key])
    return copy
