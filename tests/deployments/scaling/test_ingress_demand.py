"""What ingress replicas report for scaling, by name and back."""

from __future__ import annotations

from deployments.scaling.ingress_demand import LAG, ModelDemand, demand_values, model_demands

A, B = ModelDemand(held=2, held_tokens=300, first_token_s=0.5), ModelDemand(first_token_s=1.5)


def test_what_one_replica_reports_is_read_as_it_was() -> None:
    values = demand_values({"model-a": A, "qwen2.5": B}, lag_s=0.25)
    assert values[LAG] == 0.25
    assert all(isinstance(value, int | float) for value in values.values())
    assert model_demands([values]) == {"model-a": A, "qwen2.5": B}


def test_over_replicas_held_requests_add_up_and_the_slowest_first_tokens_count() -> None:
    replicas = [demand_values({"a": A}, 0.0), demand_values({"a": B, "b": B}, 0.0)]
    assert model_demands(replicas) == {"a": ModelDemand(2, 300, 1.5), "b": B}


def test_nothing_is_asked_for_without_reports() -> None:
    assert model_demands([]) == {}
    assert model_demands([demand_values({}, 0.1)]) == {}
