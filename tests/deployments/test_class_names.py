"""Nobody meets two classes of one name in deployments/."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"


def test_no_two_classes_have_one_name() -> None:
    where: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(DEPLOYMENTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(str(path.relative_to(DEPLOYMENTS)))
    assert len(where) > 300
    assert {name: places for name, places in where.items() if len(places) > 1} == {}
