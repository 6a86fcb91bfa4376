"""LangChain's `OpenAI` completion client works with Millstream unchanged and gets what vLLM's own server tells."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

from tests.clients.conftest import MODEL, Server
from tests.conformance.answers import assert_equal_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPT = "The capital of France is"
PROMPTS = [PROMPT, "Water boils at", "Once upon a time", "def fibonacci(n):", "日本の首都は"]

Connect = Callable[..., Any]


@pytest.fixture
async def connect(client_packages: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connect]:
    """Makes clients with the options of `langchain_openai.OpenAI` and closes their connections at the end."""
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    langchain_openai = importlib.import_module("langchain_openai")
    clients = []

    def connect(server: Server, **options: Any) -> Any:
        defaults = {"model": MODEL, "temperature": 0, "max_tokens": 8, "max_retries": 0}
        account = {"base_url": server.base_url, "api_key": server.key}
        client = langchain_openai.OpenAI(**(account | defaults | options))
        clients.append(client)
        return client

    yield connect
    for client in clients:
        client.client._client.close()
        await client.async_client._client.close()


def test_it_completes_as_on_vllms_own_server(connect: Connect, millstream: Server, reference: Server) -> None:
    answer = connect(millstream).invoke(PROMPT)
    assert answer.startswith(" Paris")
    assert answer == connect(reference).invoke(PROMPT)
    assert connect(millstream).invoke(PROMPT, stop=["\n", "."]) == " Paris"


async def test_it_streams_the_same_text(connect: Connect, millstream: Server) -> None:
    client = connect(millstream)
    whole = client.invoke(PROMPT)
    chunks = list(client.stream(PROMPT))
    assert "".join(chunks) == whole
    assert len(chunks) > 1
    assert "".join([chunk async for chunk in client.astream(PROMPT)]) == whole


async def test_batches_are_answered_in_order(connect: Connect, millstream: Server, reference: Server) -> None:
    client = connect(millstream)
    expected = connect(reference).generate(PROMPTS)
    texts = [generation.text for [generation] in expected.generations]
    assert client.batch(PROMPTS) == texts
    assert await client.abatch(PROMPTS) == texts


async def test_generate_tells_finish_reasons_and_usage_of_all_prompts(
    connect: Connect, millstream: Server, reference: Server
) -> None:
    """More prompts than one request of LangChain's takes, so it adds up the usage of two."""
    prompts = [f"{number} plus {number} is" for number in range(21)]
    expected = connect(reference, max_tokens=1).generate(prompts)
    client = connect(millstream, max_tokens=1)
    for result in (client.generate(prompts), await client.agenerate(prompts)):
        assert result.generations == expected.generations
        assert result.llm_output["token_usage"] == expected.llm_output["token_usage"]


def test_logprobs_equal_those_of_vllms_own_server(connect: Connect, millstream: Server, reference: Server) -> None:
    results = [connect(server, logprobs=2).generate([PROMPT, PROMPTS[4]]) for server in (millstream, reference)]
    for [told], [expected] in zip(results[0].generations, results[1].generations, strict=True):
        assert told.text == expected.text
        assert_equal_logprobs(told.generation_info["logprobs"], expected.generation_info["logprobs"])


async def test_a_streaming_client_puts_text_logprobs_and_finish_reason_together_again(
    connect: Connect, millstream: Server
) -> None:
    [[whole]] = connect(millstream, logprobs=1).generate([PROMPT]).generations
    streaming = connect(
        millstream, logprobs=1, streaming=True, model_kwargs={"stream_options": {"include_usage": True}}
    )
    for result in (streaming.generate([PROMPT]), await streaming.agenerate([PROMPT])):
        [[streamed]] = result.generations
        assert streamed.text == whole.text
        assert streamed.generation_info["finish_reason"] == "length"
        logprobs = streamed.generation_info["logprobs"]
        assert logprobs["tokens"] == whole.generation_info["logprobs"]["tokens"]
        assert logprobs["text_offset"] == whole.generation_info["logprobs"]["text_offset"]
        assert logprobs["token_logprobs"] == pytest.approx(
            whole.generation_info["logprobs"]["token_logprobs"], abs=1e-3
        )


def test_n_and_best_of_give_the_best_candidates(connect: Connect, millstream: Server) -> None:
    options = {"temperature": 1, "seed": 7, "max_tokens": 4}
    every = connect(millstream, **options, n=3, logprobs=0).generate(PROMPTS[:2])
    best = connect(millstream, **options, n=2, best_of=3).generate(PROMPTS[:2])

    def likelihood(generation: Any) -> float:
        logprobs: list[float] = generation.generation_info["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    expected = [sorted(candidates, key=likelihood, reverse=True)[:2] for candidates in every.generations]
    assert [[each.text for each in of] for of in best.generations] == [[each.text for each in of] for of in expected]
    # All three candidates of both prompts count.
    assert best.llm_output["token_usage"] == {"prompt_tokens": 8, "completion_tokens": 24, "total_tokens": 32}


def test_sampling_options_arrive(connect: Connect, millstream: Server, reference: Server) -> None:
    greedy = connect(millstream).invoke(PROMPT)
    assert connect(millstream, temperature=1, extra_body={"top_k": 1}).invoke(PROMPT) == greedy
    without_paris = {"logit_bias": {"7042": -100}}
    biased = connect(millstream, **without_paris).invoke(PROMPT)
    assert not biased.startswith(" Paris")
    assert biased == connect(reference, **without_paris).invoke(PROMPT)


@pytest.mark.parametrize(
    ("options", "exception", "code"),
    [
        ({"api_key": "sk-wrong"}, openai.AuthenticationError, "invalid_api_key"),
        ({"model": "gpt-3.5-turbo-instruct"}, openai.NotFoundError, "model_not_found"),
        ({"max_tokens": 2048}, openai.BadRequestError, "context_length_exceeded"),
    ],
    ids=["key", "model", "context"],
)
def test_errors_are_openais_exceptions(
    connect: Connect, millstream: Server, options: dict[str, Any], exception: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(exception) as caught:
        connect(millstream, **options).invoke(PROMPT)
    assert caught.value.code == code
