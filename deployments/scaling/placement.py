"""Why a replica has no place, in words: what it needs on one node against what the nodes have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["unschedulable_reason"]


def unschedulable_reason(
    needs: Mapping[str, float], nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]
) -> str | None:
    """None if a replica that reserves `needs` has a place as far as can be told.

    Amounts by Ray's name of the resource, such as CPU, GPU or `accelerator_type:H100`: of each of the `nodes` in all,
    and `free` over all of them.
    """
    needs = {name: amount for name, amount in needs.items() if amount > 0}
    told = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
    if not any(all(node.get(name, 0.0) >= amount for name, amount in needs.items()) for node in nodes):
        return f"it needs {told} on one node, and the nodes have {_described(needs, nodes)}"
    short = [name for name, amount in needs.items() if free.get(name, 0.0) + 1e-9 < amount]
    if short:
        left = " and ".join(f"{free.get(name, 0.0):g} {name}" for name in short)
        return f"it needs {told}, and {left} is free in the cluster"
    return None


def _described(needs: Iterable[str], nodes: Sequence[Mapping[str, float]]) -> str:
    kinds: dict[str, int] = {}
    for node in nodes:
        kind = " and ".join(f"{node.get(name, 0.0):g} {name}" for name in needs)
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(kind if count == 1 else f"{count} times {kind}" for kind, count in kinds.items()) or "nothing"
