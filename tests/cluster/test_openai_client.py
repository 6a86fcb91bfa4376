"""The official `openai` client against a cluster of simulated engines: answers, streams, and its own exceptions."""

from __future__ import annotations

import openai
import pytest

from tests.conftest import RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

PROMPT = "The capital of France is"


@pytest.fixture
def client(simulated_cluster: RunningCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{simulated_cluster.url}/v1", api_key=simulated_cluster.key, max_retries=0)


def test_it_completes(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="sim-a", prompt=PROMPT, max_tokens=12)
    assert completion.object == "text_completion"
    assert completion.choices[0].text
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 12)


def test_it_streams_the_same_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="sim-a", prompt=PROMPT, max_tokens=50)
    chunks = list(client.completions.create(model="sim-a", prompt=PROMPT, max_tokens=50, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_it_streams_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="sim-a", prompt=PROMPT, max_tokens=50, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 50
    assert chunks[-1].usage.total_tokens == 55
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_choices_are_ordered_by_prompt_then_n(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="sim-a", prompt=["one", "two", "three"], n=2, seed=7, max_tokens=5)
    assert [choice.index for choice in completion.choices] == list(range(6))
    single = client.completions.create(model="sim-a", prompt="two", n=2, seed=7, max_tokens=5)
    assert [choice.text for choice in completion.choices[2:4]] == [choice.text for choice in single.choices]
    assert completion.choices[0].text != completion.choices[1].text
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 30


def test_token_ids_are_a_prompt_and_echo_gives_their_text(client: openai.OpenAI) -> None:
    text = client.completions.create(model="sim-a", prompt=PROMPT, max_tokens=5, echo=True).choices[0].text
    assert text.startswith(PROMPT)
    # SmolLM2's tokens of PROMPT
    tokens = client.completions.create(model="sim-a", prompt=[504, 3575, 282, 4649, 314], max_tokens=5, echo=True)
    assert tokens.choices[0].text == text


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="sim-a", prompt=PROMPT, max_tokens=40).choices[0].text
    stop = whole[20:24]
    stopped = client.completions.create(model="sim-a", prompt=PROMPT, max_tokens=40, stop=stop)
    assert stopped.choices[0].text == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens < 40


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sim-a", "sim-b"]
    assert client.models.retrieve("sim-b").id == "sim-b"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("sim-c")


def test_a_bad_key_raises_authentication_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="sk-wrong").completions.create(model="sim-a", prompt="x")
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()


def test_an_unknown_model_raises_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"


def test_a_bad_parameter_raises_bad_request_and_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="sim-a", prompt="x", temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="sim-a", prompt="x", max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"


def test_every_answer_has_one_request_id(client: openai.OpenAI) -> None:
    answer = client.completions.with_raw_response.create(
        model="sim-a", prompt="x", max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert len(caught.value.response.headers.get_list("x-request-id")) == 1
