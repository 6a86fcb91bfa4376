"""LiteLLM's `text_completion` works with Millstream unchanged: it gets what vLLM's own server tells, and errors become
its own exceptions."""

from __future__ import annotations

import importlib
from typing import Any

import httpx
import openai
import pytest

from tests.clients.conftest import MODEL, Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPT = "The capital of France is"
PROMPT_TOKENS = [504, 3575, 282, 4649, 314]  # SmolLM2's


@pytest.fixture(scope="module")
def litellm(client_packages: None) -> Any:
    """Imported late: it reads its environment then, and would fetch a table of prices from the network."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        environment.setenv("LITELLM_MODE", "PRODUCTION")  # reads no .env
        return importlib.import_module("litellm")


def _arguments(server: Server, **arguments: Any) -> dict[str, Any]:
    return {
        "model": f"text-completion-openai/{MODEL}",
        "api_base": server.base_url,
        "api_key": server.key,
        "temperature": 0,
        "max_tokens": 8,
        **arguments,
    }


def _usage(answer: Any) -> tuple[int, int, int]:
    return answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens


def test_it_completes_as_on_vllms_own_server(litellm: Any, millstream: Server, reference: Server) -> None:
    answer = litellm.text_completion(**_arguments(millstream, prompt=PROMPT))
    expected = litellm.text_completion(**_arguments(reference, prompt=PROMPT))
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [
        (choice.text, choice.finish_reason) for choice in expected.choices
    ]
    assert answer.choices[0].text.startswith(" Paris")
    assert _usage(answer) == _usage(expected) == (5, 8, 13)


@pytest.mark.parametrize(
    "prompt",
    [[PROMPT, "Water boils at"], PROMPT_TOKENS, [PROMPT_TOKENS, [504, 3575]]],
    ids=["strings", "tokens", "token arrays"],
)
def test_every_form_of_prompt_is_answered(litellm: Any, millstream: Server, reference: Server, prompt: Any) -> None:
    answer = litellm.text_completion(**_arguments(millstream, prompt=prompt))
    expected = litellm.text_completion(**_arguments(reference, prompt=prompt))
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (choice.index, choice.text) for choice in expected.choices
    ]
    assert _usage(answer) == _usage(expected)


def test_n_and_best_of_give_the_best_candidates(litellm: Any, millstream: Server) -> None:
    arguments = _arguments(millstream, prompt=[PROMPT, "Water boils at"], temperature=1, seed=7, max_tokens=4)
    every = litellm.text_completion(**arguments, n=3, logprobs=0).choices
    best = litellm.text_completion(**arguments, n=2, best_of=3)

    def likelihood(choice: Any) -> float:
        logprobs: list[float] = choice.logprobs.token_logprobs
        return sum(logprobs) / len(logprobs)

    expected = [choice.text for of in (every[:3], every[3:]) for choice in sorted(of, key=likelihood, reverse=True)[:2]]
    assert [choice.text for choice in best.choices] == expected
    assert _usage(best) == (8, 24, 32)  # all three candidates of both prompts count


def test_logprobs_with_echo_equal_those_of_vllms_own_server(
    litellm: Any, millstream: Server, reference: Server
) -> None:
    told, expected = (
        litellm.text_completion(**_arguments(server, prompt=PROMPT, logprobs=2, echo=True)).choices[0]
        for server in (millstream, reference)
    )
    assert told.text == expected.text
    assert told.logprobs.tokens == expected.logprobs.tokens
    assert told.logprobs.text_offset == expected.logprobs.text_offset
    assert told.logprobs.token_logprobs[0] is None
    assert told.logprobs.token_logprobs[1:] == pytest.approx(expected.logprobs.token_logprobs[1:], abs=1e-3)
    assert told.logprobs.top_logprobs[0] is None
    assert told.logprobs.top_logprobs[1:] == [
        pytest.approx(likely, abs=1e-3) for likely in expected.logprobs.top_logprobs[1:]
    ]


def test_it_streams_the_same_text_and_usage(litellm: Any, millstream: Server) -> None:
    whole = litellm.text_completion(**_arguments(millstream, prompt=PROMPT))
    chunks = list(
        litellm.text_completion(
            **_arguments(millstream, prompt=PROMPT, stream=True, stream_options={"include_usage": True})
        )
    )
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len([chunk for chunk in chunks if chunk.choices[0].text]) > 1
    assert _usage(chunks[-1]) == _usage(whole)


async def test_it_completes_and_streams_asynchronously(
    litellm: Any, millstream: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with httpx.AsyncClient(timeout=120.0) as session:
        # Its documented setting; otherwise LiteLLM makes a session for each call and closes none.
        monkeypatch.setattr(litellm, "aclient_session", session)
        answer = await litellm.atext_completion(**_arguments(millstream, prompt=PROMPT))
        stream = await litellm.atext_completion(**_arguments(millstream, prompt=PROMPT, stream=True))
        chunks = [chunk async for chunk in stream]
    assert answer.choices[0].text.startswith(" Paris")
    assert _usage(answer) == (5, 8, 13)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == answer.choices[0].text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("change", "exception"),
    [
        ({"api_key": "sk-wrong"}, "AuthenticationError"),
        ({"model": "text-completion-openai/gpt-3.5-turbo-instruct"}, "NotFoundError"),
        ({"prompt": "word " * 3000}, "ContextWindowExceededError"),
        ({"max_tokens": 2048}, "ContextWindowExceededError"),
        ({"temperature": 3}, "BadRequestError"),
    ],
    ids=["key", "model", "prompt too long", "max_tokens too large", "temperature"],
)
def test_errors_become_its_own_exceptions(
    litellm: Any, millstream: Server, change: dict[str, Any], exception: str, stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        list(litellm.text_completion(**(_arguments(millstream, prompt=PROMPT, stream=stream) | change)))
    assert type(caught.value) is getattr(litellm, exception)
