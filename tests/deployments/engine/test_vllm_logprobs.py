"""What vLLM's two forms of log probabilities become, which must be the same."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.logprobs")
from vllm.logprobs import append_logprobs_for_next_position, create_prompt_logprobs

from deployments.contracts import PositionLogprobs
from deployments.engine.vllm_engine import _position, _positions


def test_the_flat_form_of_a_prompt_tells_what_its_objects_tell() -> None:
    """No token twice: the one that is there may be among the likeliest, or not."""
    flat, objects = create_prompt_logprobs(True), create_prompt_logprobs(False)
    for token_ids, logprobs, rank in (
        ([7, 5, 6], [-3.0, -0.5, -1.0], 9),
        ([5, 5, 6], [-0.5, -0.5, -1.0], 1),
        ([6, 5, 6], [-1.0, -0.5, -1.0], 2),
    ):
        for form in (flat, objects):
            append_logprobs_for_next_position(form, token_ids, logprobs, [None] * 3, rank, 2)
    told = _positions(flat)
    assert told == [likely and _position(likely) for likely in objects]
    assert told == [
        None,
        PositionLogprobs((7, 5, 6), (-3.0, -0.5, -1.0), (9, 1, 2)),
        PositionLogprobs((5, 6), (-0.5, -1.0), (1, 2)),
        PositionLogprobs((6, 5), (-1.0, -0.5), (2, 1)),
    ]
