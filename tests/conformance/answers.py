"""Answers of two servers in one shape, streamed or not, and what must be equal of them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

__all__ = ["answer_of", "assert_equal_answers", "assert_equal_logprobs"]

_TOLERANCE = 1e-3
"""Of log probabilities: the same weights in float32, batched differently."""


async def answer_of(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The completion for `body`: choices in order of their index, and usage. A stream's chunks are joined."""
    if not body.get("stream"):
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return {"choices": answer["choices"], "usage": answer["usage"]}
    choices: dict[int, dict[str, Any]] = {}
    usage: dict[str, Any] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    for event in events:
        chunk = json.loads(event)
        usage = chunk.get("usage") or usage
        for delta in chunk["choices"]:
            _join(choices.setdefault(delta["index"], {"index": delta["index"], "text": ""}), delta)
    return {"choices": [choices[index] for index in sorted(choices)], "usage": usage}


def _join(choice: dict[str, Any], delta: dict[str, Any]) -> None:
    choice["text"] += delta["text"]
    for field in ("finish_reason", "stop_reason", "prompt_token_ids"):
        if delta.get(field) is not None:
            choice[field] = delta[field]
    if delta.get("token_ids") is not None:
        choice["token_ids"] = choice.get("token_ids", []) + delta["token_ids"]
    if delta.get("logprobs") is not None:
        known = choice.setdefault("logprobs", {name: [] for name in delta["logprobs"]})
        for name, values in delta["logprobs"].items():
            known[name] += values


def assert_equal_answers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """`theirs` are of vLLM's own server, which writes null for what was not asked for."""
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [ours["usage"][name] for name in counts] == [theirs["usage"][name] for name in counts]
    assert len(ours["choices"]) == len(theirs["choices"])
    for our, their in zip(ours["choices"], theirs["choices"], strict=True):
        if their["finish_reason"] == "repetition":  # here it is only ever one of OpenAI's
            their["finish_reason"] = "stop"
        for field in ("index", "text", "finish_reason", "stop_reason", "token_ids", "prompt_token_ids"):
            assert our.get(field) == their.get(field), field
        assert_equal_logprobs(our.get("logprobs"), their.get("logprobs"))
        _assert_equal_prompt_logprobs(our.get("prompt_logprobs"), their.get("prompt_logprobs"))


def assert_equal_logprobs(our: dict[str, Any] | None, their: dict[str, Any] | None) -> None:
    """In the legacy format; `their` are of vLLM's own server."""
    assert (our is None) == (their is None)
    if our is None or their is None:
        return
    assert our["tokens"] == their["tokens"]
    assert our["text_offset"] == their["text_offset"]
    assert our["token_logprobs"] == pytest.approx(their["token_logprobs"], abs=_TOLERANCE)
    assert len(our["top_logprobs"]) == len(their["top_logprobs"])
    for our_top, their_top in zip(our["top_logprobs"], their["top_logprobs"], strict=True):
        if our_top is not None and their_top is not None and len(our_top) > len(their_top):
            # Tokens that read alike: there only the last of them is told, here all are, by their bytes.
            shared = {name: value for name, value in our_top.items() if not name.startswith(("bytes:", "token_id:"))}
            assert len(shared) < len(our_top)
            assert shared.keys() <= their_top.keys()
            for value in their_top.values():
                assert any(value == pytest.approx(our, abs=_TOLERANCE) for our in our_top.values())
            continue
        assert our_top == (None if their_top is None else pytest.approx(their_top, abs=_TOLERANCE))


def _assert_equal_prompt_logprobs(our: list[Any] | None, their: list[Any] | None) -> None:
    assert (our is None) == (their is None)
    for our_position, their_position in zip(our or (), their or (), strict=True):
        if our_position is None or their_position is None:
            assert our_position is their_position
            continue
        assert list(our_position) == list(their_position)
        for token_id, our_token in our_position.items():
            their_token = their_position[token_id]
            assert our_token["rank"] == their_token["rank"]
            assert our_token["decoded_token"] == their_token["decoded_token"]
            assert our_token["logprob"] == pytest.approx(their_token["logprob"], abs=_TOLERANCE)
