"""Why a replica has no place."""

from __future__ import annotations

from deployments.scaling.placement import unschedulable_reason

SMALL, LARGE = {"CPU": 8.0}, {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}


def test_what_fits_is_not_spoken_of() -> None:
    assert unschedulable_reason({"CPU": 4, "GPU": 8}, [SMALL, LARGE], {"CPU": 72, "GPU": 8}) is None
    assert unschedulable_reason({"CPU": 0, "GPU": 0}, [SMALL], {}) is None


def test_more_than_any_node_has_is_told_with_what_there_is() -> None:
    told = unschedulable_reason({"CPU": 4, "GPU": 16}, [SMALL, SMALL, LARGE], {"CPU": 80, "GPU": 8})
    assert told == (
        "it needs 4 CPU and 16 GPU on one node, and the nodes have 2 times 8 CPU and 0 GPU, 64 CPU and 8 GPU"
    )


def test_needs_must_be_met_by_one_and_the_same_node() -> None:
    told = unschedulable_reason({"CPU": 4, "accelerator_type:L4": 0.001}, [SMALL, LARGE], {"CPU": 72})
    assert told is not None
    assert "accelerator_type:L4 on one node" in told


def test_what_others_use_is_told() -> None:
    assert unschedulable_reason({"GPU": 2}, [LARGE], {"CPU": 60, "GPU": 1}) == (
        "it needs 2 GPU, and 1 GPU is free in the cluster"
    )
    assert unschedulable_reason({"GPU": 2}, [LARGE], {}) == "it needs 2 GPU, and 0 GPU is free in the cluster"


def test_without_nodes_there_is_nothing() -> None:
    assert unschedulable_reason({"CPU": 1}, [], {}) == "it needs 1 CPU on one node, and the nodes have nothing"
