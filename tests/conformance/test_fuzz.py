"""Whatever bytes come as a body: an answer in the dialect's shape, no harm done, no memory kept."""

from __future__ import annotations

import json
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conformance.leaks import assert_no_leak
from tests.conftest import THOROUGH, RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

CASES = 5_000 if THOROUGH else 1_500
PATHS = {
    "/v1/completions": "openai",
    "/openai/v1/completions": "openai",
    "/api/v1/compatibility/openai/v1/completions": "detail",
}
GOOD: dict[str, Any] = {"model": "sim-a", "prompt": "Once upon a time", "max_tokens": 2}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**40), max_value=10**40)
    | st.floats()
    | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(
    [
        *(
            "model",
            "prompt",
            "max_tokens",
            "temperature",
            "top_p",
            "n",
            "best_of",
            "stream",
            "stream_options",
            "logprobs",
        ),
        *("echo", "stop", "presence_penalty", "logit_bias", "seed", "user", "suffix", "top_k", "min_p", "min_tokens"),
        *("stop_token_ids", "prompt_logprobs", "truncate_prompt_tokens", "response_format", "structured_outputs"),
        *("allowed_token_ids", "bad_words", "priority", "cache_salt", "vllm_xargs", "repetition_detection", "nonsense"),
    ]
)
texts = st.one_of(
    st.builds(lambda changes: json.dumps({**GOOD, **changes}), st.dictionaries(names, json_values, max_size=3)),
    json_values.map(json.dumps),  # NaN and Infinity among them
    st.builds(lambda depth: '{"model":"sim-a","prompt":' + "[" * depth + "]" * depth + "}", st.integers(1, 100_000)),
    st.builds(lambda depth: '{"a":' * depth + "1" + "}" * depth, st.integers(1, 20_000)),
    st.builds(lambda digits: '{"model":"sim-a","prompt":"a","seed":' + "9" * digits + "}", st.integers(1, 10_000)),
    st.builds(
        lambda name, one, other: json.dumps(GOOD)[:-1] + f',"{name}":{json.dumps(one)},"{name}":{json.dumps(other)}}}',
        names,
        json_values,
        json_values,
    ),
)
bodies = st.one_of(
    texts.map(str.encode),
    st.builds(lambda text, end: text.encode()[:end], texts, st.integers(0, 200)),
    st.builds(
        lambda text, place, noise: text.encode()[:place] + noise + text.encode()[place:],
        texts,
        st.integers(0, 60),
        st.binary(min_size=1, max_size=6),
    ),
    st.binary(max_size=200),
    st.just(json.dumps(GOOD).encode().replace(b"Once", b"\\ud800")),
    st.just(json.dumps(GOOD).encode("utf-16")),
)


def _memory(cluster: RunningCluster) -> int:
    """Resident bytes of the ingress."""
    (ingress,) = cluster.replicas("gateway", "Ingress")
    resident: int = psutil.Process(ingress["pid"]).memory_info().rss
    return resident


def _engines(cluster: RunningCluster) -> set[str]:
    return {replica["id"] for model in ("sim-a", "sim-b") for replica in cluster.replicas(f"model-{model}")}


def test_any_bytes_get_an_answer(simulated_cluster: RunningCluster) -> None:
    cluster = simulated_cluster
    engines = _engines(cluster)
    statuses: dict[int, int] = {}
    memory: list[int] = []

    with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=60.0, trust_env=False) as client:

        def good() -> None:
            answer = client.post("/v1/completions", json=GOOD)
            assert answer.status_code == 200, answer.text

        @settings(
            max_examples=CASES,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(path=st.sampled_from(list(PATHS)), body=bodies)
        def answered(path: str, body: bytes) -> None:
            response = client.post(path, content=body, headers={"content-type": "application/json"})
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            if response.headers["content-type"].startswith("text/event-stream"):
                assert response.text.endswith("data: [DONE]\n\n") or '"error"' in response.text
            else:
                _assert_shape(response, PATHS[path])
            if sum(statuses.values()) % 100 == 0:
                good()
            if sum(statuses.values()) in (CASES // 5, CASES - 10):
                memory.append(_memory(cluster))

        answered()
        good()
    assert sum(statuses.values()) >= CASES
    assert {200, 400, 422} <= statuses.keys() <= {200, 400, 404, 422}, statuses
    assert _engines(cluster) == engines
    assert memory[1] < memory[0] * 1.1


def _assert_shape(response: httpx.Response, shape: str) -> None:
    answer = response.json()
    if response.status_code == 200:
        assert answer["object"] == "text_completion"
        return
    assert_no_leak(response.text)
    if shape == "detail" and response.status_code == 422:
        assert answer["detail"]
        assert all(set(each) == {"loc", "msg", "type"} for each in answer["detail"])
        return
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]
