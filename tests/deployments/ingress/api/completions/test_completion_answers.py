"""What completions answer beyond text, whole and streamed alike: log probabilities, echo, scoring, best_of, token ids,
reasons; and what of a request the model or its engine cannot do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from deployments.contracts import (
    AdmissionRefused,
    AdmissionRequest,
    Admitted,
    FinishReason,
    PositionLogprobs,
    PromptOptions,
    Sampling,
)
from deployments.engine.engine import Deliver
from deployments.engine.simulated_engine import SimulatedEngine
from deployments.engine.simulator import SimulatedOutput, Simulator
from deployments.ingress.api.completions import completion
from deployments.ingress.app import IngressSettings, build_app
from deployments.ingress.inference import request as inference_request
from deployments.ingress.routing.catalog import FillInTheMiddle
from tests.deployments.ingress.letter_tokenizer import LETTERS, VOCABULARY_TOKENS
from tests.deployments.ingress.memory_gateway import AUTHORIZED, BODY_LIMIT_BYTES, Gateway, gateway, meter_client_of
from tests.deployments.ingress.memory_replicas import LIMITS, SETTINGS, MemoryLine, MemoryReplica
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet

STEP_S = SETTINGS.step_s
BUNCH = 5
"""Tokens in one message of a replica whose messages come seldom."""


@pytest.fixture(params=["whole", "streamed", "whole, in bunches", "streamed, in bunches"])
def streamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each test runs in all these ways: the answer must be the same."""
    way: str = request.param
    if "bunches" in way:
        monkeypatch.setattr(MemoryReplica, "_send", _send_seldom)
    return way.startswith("streamed")


async def _send_seldom(self: MemoryReplica, stream_id: str, line: MemoryLine) -> None:
    async for message in self._replica.steps(stream_id):
        line.messages.put_nowait(message)
        await asyncio.sleep(BUNCH * STEP_S)
    line.messages.put_nowait(None)


# --- what is expected ----------------------------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) + 1 for letter in text]


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(LETTERS[token_id - 1] for token_id in token_ids)


class Generated(NamedTuple):
    """What an engine that nothing happens to makes of a prompt."""

    token_ids: list[int]
    positions: list[PositionLogprobs]
    prompt_positions: list[PositionLogprobs | None]

    @property
    def text(self) -> str:
        return text_of(self.token_ids)


def generated(prompt: str, max_tokens: int = 16, *, logprobs: int = 0, **sampling: Any) -> Generated:
    simulator = Simulator(SETTINGS)
    sampling = {"logprobs": logprobs, "prompt_logprobs": logprobs, **sampling}
    simulator.submit("only", ids(prompt), Sampling(max_tokens=max_tokens, **sampling))
    outputs: list[SimulatedOutput] = []
    while not simulator.idle:
        outputs += simulator.step().outputs
    return Generated(
        [output.token_id for output in outputs],
        [output.logprobs for output in outputs if output.logprobs],
        outputs[0].prompt_logprobs or [],
    )


def scored(prompt: str, *, logprobs: int = 0) -> Generated:
    return generated(prompt, 1, logprobs=logprobs)._replace(token_ids=[], positions=[])


def legacy(text: str, positions: Sequence[PositionLogprobs | None], top: int | None = 0) -> dict[str, Any]:
    """OpenAI's logprobs of letters that all are one token."""
    return {
        "text_offset": list(range(len(text))),
        "token_logprobs": [position and position.logprobs[0] for position in positions],
        "tokens": list(text),
        "top_logprobs": [
            position
            and {
                text_of([token_id]): logprob
                for token_id, logprob in list(zip(position.token_ids, position.logprobs, strict=True))[
                    : None if top is None else top + 1
                ]
            }
            for position in positions
        ],
    }


def prompt_logprobs(made: Generated) -> list[dict[str, Any] | None]:
    """vLLM's form of the same."""
    return [
        None
        if position is None
        else {
            str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": text_of([token_id])}
            for token_id, logprob, rank in zip(position.token_ids, position.logprobs, position.ranks, strict=True)
        }
        for position in made.prompt_positions
    ]


def echoed(prompt: str, made: Generated, streamed: bool, top: int = 0) -> dict[str, Any]:
    """What an echo with log probabilities tells; as in vLLM, prompt_logprobs are among it in an answer as a whole."""
    fields = {"logprobs": legacy(prompt + made.text, [*made.prompt_positions, *made.positions], top)}
    return fields if streamed else fields | {"prompt_logprobs": prompt_logprobs(made)}


def choice(text: str, index: int = 0, **fields: Any) -> dict[str, Any]:
    """What was not asked for is null, as in vLLM."""
    extras = {"stop_reason": None, "token_ids": None, "prompt_token_ids": None, "prompt_logprobs": None}
    return {"index": index, "text": text, "logprobs": None, "finish_reason": "length", **extras, **fields}


# --- what is answered ----------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    choices: list[dict[str, Any]]
    usage: dict[str, Any]

    @property
    def tokens(self) -> tuple[int, int]:
        return self.usage["prompt_tokens"], self.usage["completion_tokens"]


async def answer(gate: Gateway, streamed: bool, **fields: Any) -> Answer:
    """The choices in one shape, however they came."""
    if not streamed:
        response = await gate.complete(**fields)
        assert response.status_code == 200, response.text
        body = response.json()
        return Answer(body["choices"], body["usage"])
    *chunks, last, done = await gate.stream(stream_options={"include_usage": True}, **fields)
    assert (last["choices"], done) == ([], "[DONE]")
    pieces: dict[int, list[dict[str, Any]]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            pieces.setdefault(piece["index"], []).append(piece)
    return Answer([joined(pieces[index]) for index in sorted(pieces)], last["usage"])


def joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The pieces of one streamed choice, as a client puts them together."""
    first, *others = pieces
    assert first.keys() | {"prompt_logprobs"} == choice("").keys()
    whole = dict(first, prompt_logprobs=None)  # which are not streamed
    for piece in others:
        assert whole["finish_reason"] is None, "something after the end"
        assert (piece["logprobs"] is None) == (whole["logprobs"] is None)
        assert piece.keys() == first.keys()
        assert piece["prompt_token_ids"] is None
        assert (piece["token_ids"] is None) == (first["token_ids"] is None)
        whole["text"] += piece["text"]
        for name, values in (piece["logprobs"] or {}).items():
            whole["logprobs"][name] += values
        if piece["token_ids"]:
            whole["token_ids"] += piece["token_ids"]
        whole["finish_reason"] = piece["finish_reason"]
        whole["stop_reason"] = piece["stop_reason"]
    return whole


async def settled(gate: Gateway) -> tuple[str, int, int, int]:
    settlement = await gate.settlement()
    return settlement.status, settlement.prompt_tokens, settlement.completion_tokens, settlement.account.choices


def assert_refused(response: httpx.Response, param: str | None, words: str, status: int = 400) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


async def change_model(gate: Gateway, **fields: Any) -> None:
    entry = gate.catalog.find("m").entry
    await gate.catalog.replace([entry.model_copy(update=fields)])


# --- log probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [0, 1, 5])
@in_virtual_time
async def test_log_probabilities_of_what_is_generated(tmp_path: Path, streamed: bool, logprobs: int) -> None:
    made = generated("hello", 20, logprobs=logprobs)
    async with gateway(tmp_path) as gate:
        answered = await answer(gate, streamed, max_tokens=20, logprobs=logprobs)
        assert answered.choices == [choice(made.text, logprobs=legacy(made.text, made.positions, logprobs))]
        assert answered.tokens == (5, 20)


@in_virtual_time
async def test_log_probabilities_of_chosen_tokens(tmp_path: Path, streamed: bool) -> None:
    made = generated("hello", 4, logprob_token_ids=(2, 3, 4, 5, 6, 7, 8))
    async with gateway(tmp_path) as gate:
        fields = {"max_tokens": 4, "logprobs": 0, "logprob_token_ids": [2, 3, 4, 5, 6, 7, 8]}
        answered = await answer(gate, streamed, **fields)
        assert answered.choices == [choice(made.text, logprobs=legacy(made.text, made.positions, None))]


@in_virtual_time
async def test_tokens_by_their_ids(tmp_path: Path, streamed: bool) -> None:
    made = generated("ab", 3, logprobs=1)
    names = [f"token_id:{token_id}" for token_id in [2, 3, *made.token_ids]]
    async with gateway(tmp_path) as gate:
        fields = {"prompt": "ab", "max_tokens": 3, "logprobs": 1, "echo": True, "return_tokens_as_token_ids": True}
        [told] = (await answer(gate, streamed, **fields)).choices
        assert told["text"] == "ab" + made.text
        assert told["logprobs"]["tokens"] == names
        assert told["logprobs"]["text_offset"] == [len("".join(names[:place])) for place in range(5)]
        assert all(
            name in (top or {name: 0}) for name, top in zip(names, told["logprobs"]["top_logprobs"], strict=True)
        )


@in_virtual_time
async def test_choices_of_several_prompts_come_in_order_with_their_log_probabilities(
    tmp_path: Path, streamed: bool
) -> None:
    made = [generated(prompt, 7, logprobs=2, seed=seed) for prompt in ("ab", "xyz") for seed in (3, 4, 5)]
    assert len({each.text for each in made}) == 6
    async with gateway(tmp_path, replicas=3) as gate:
        fields = {"prompt": ["ab", "xyz"], "n": 3, "seed": 3, "max_tokens": 7, "logprobs": 2}
        answered = await answer(gate, streamed, **fields)
        assert answered.choices == [
            choice(each.text, index, logprobs=legacy(each.text, each.positions, 2)) for index, each in enumerate(made)
        ]
        assert answered.tokens == (5, 42)
        assert await settled(gate) == ("finished", 5, 42, 6)


@in_virtual_time
async def test_what_is_impossible_is_told_in_numbers_that_json_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    def impossible(_self: Simulator, _state: int, token: int, _likeliest: int, _others: Any = ()) -> PositionLogprobs:
        return PositionLogprobs((token,), (-float("inf"),), (27,))

    monkeypatch.setattr(Simulator, "_logprobs", impossible)
    async with gateway(tmp_path) as gate:
        [told] = (await answer(gate, streamed, max_tokens=2, logprobs=0, echo=True)).choices
        assert told["logprobs"]["token_logprobs"] == [None, *[-9999.0] * 6]


# --- echo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hello", ["hello"]),
        (["ab", "xyz"], ["ab", "xyz"]),
        (ids("hello"), ["hello"]),
        ([ids("ab"), ids("c")], ["ab", "c"]),
    ],
)
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@in_virtual_time
async def test_an_echo_and_its_log_probabilities(
    tmp_path: Path, streamed: bool, prompt: Any, texts: list[str], logprobs: int | None
) -> None:
    expected: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        made = generated(text, 9, logprobs=logprobs or 0)
        told = {} if logprobs is None else echoed(text, made, streamed, logprobs)
        expected.append(choice(text + made.text, index, **told))
    async with gateway(tmp_path) as gate:
        answered = await answer(gate, streamed, prompt=prompt, max_tokens=9, echo=True, logprobs=logprobs)
        assert answered.choices == expected
        assert answered.tokens == (sum(map(len, texts)), 9 * len(texts))


@in_virtual_time
async def test_every_choice_of_a_prompt_has_the_echo(tmp_path: Path, streamed: bool) -> None:
    made = [generated("hello", 3, logprobs=1, seed=seed) for seed in (1, 2)]
    async with gateway(tmp_path, replicas=2) as gate:
        answered = await answer(gate, streamed, n=2, seed=1, max_tokens=3, echo=True, logprobs=1)
        assert answered.choices == [
            choice("hello" + each.text, index, **echoed("hello", each, streamed, 1)) for index, each in enumerate(made)
        ]


@in_virtual_time
async def test_a_stop_string_in_the_prompt_ends_nothing(tmp_path: Path, streamed: bool) -> None:
    made = generated("hello", 30)
    assert "z" in made.text
    end = made.text.index("z")
    used = made._replace(token_ids=made.token_ids[: end + 1], positions=made.positions[: end + 1])
    async with gateway(tmp_path) as gate:
        answered = await answer(gate, streamed, max_tokens=30, echo=True, logprobs=0, stop=["ell", "o", "z"])
        told = echoed("hello", used, streamed)
        assert answered.choices == [choice("hello" + made.text[:end], finish_reason="stop", stop_reason="z", **told)]


@in_virtual_time
async def test_an_echo_shows_what_is_left_of_a_prompt_that_was_cut(tmp_path: Path, streamed: bool) -> None:
    def cut(request: AdmissionRequest) -> Admitted | AdmissionRefused:
        assert request.options == PromptOptions(truncate_prompt_tokens=3, truncation_side="left")
        return Admitted([ids("hello")[-3:]])

    made = generated("llo", 4, logprobs=0)
    async with gateway(tmp_path) as gate:
        gate.meter.answer = cut
        fields = {"truncate_prompt_tokens": 3, "truncation_side": "left", "echo": True, "max_tokens": 4, "logprobs": 0}
        answered = await answer(gate, streamed, **fields)
        assert answered.choices == [choice("llo" + made.text, **echoed("llo", made, streamed))]
        assert answered.tokens == (3, 4)


# --- scoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [["hello", "ab"], [ids("hello"), ids("ab")]])
@in_virtual_time
async def test_a_prompt_is_scored_without_a_token_generated(tmp_path: Path, streamed: bool, prompt: Any) -> None:
    async with gateway(tmp_path) as gate:
        answered = await answer(gate, streamed, prompt=prompt, max_tokens=0, echo=True, logprobs=2)
        assert answered.choices == [
            choice(text, index, **echoed(text, scored(text, logprobs=2), streamed, 2))
            for index, text in enumerate(["hello", "ab"])
        ]
        assert answered.tokens == (7, 0)
        assert [s.sampling.max_tokens for s in gate.replicas["r0"].submissions] == [1, 1]
        assert gate.meter.admissions[0].max_tokens == 1
        assert await settled(gate) == ("finished", 7, 0, 2)
        assert gate.sequences == 0


@pytest.mark.parametrize(("echo", "text"), [(False, ""), (True, "hello")])
@in_virtual_time
async def test_no_tokens_without_log_probabilities(tmp_path: Path, streamed: bool, echo: bool, text: str) -> None:
    async with gateway(tmp_path) as gate:
        answered = await answer(gate, streamed, max_tokens=0, echo=echo, return_token_ids=True)
        assert answered.choices == [choice(text, token_ids=[], prompt_token_ids=ids("hello"))]
        assert answered.tokens == (5, 0)


@in_virtual_time
async def test_log_probabilities_of_no_tokens(tmp_path: Path, streamed: bool) -> None:
    async with gateway(tmp_path) as gate:
        answered = await answer(gate, streamed, max_tokens=0, logprobs=2, n=2)
        assert answered.choices == [choice("", index, logprobs=legacy("", [])) for index in range(2)]
        assert answered.tokens == (5, 0)


@in_virtual_time
async def test_a_client_that_leaves_while_its_prompt_is_scored_pays_no_completion(tmp_path: Path) -> None:
    async with gateway(tmp_path, settings=replace(SETTINGS, step_s=1.0)) as gate:
        exchange = gate.request(max_tokens=0, echo=True, logprobs=0)
        await asyncio.sleep(0.5)
        exchange.hang_up()
        await exchange.task
        assert await settled(gate) == ("cancelled", 5, 0, 1)


@pytest.mark.parametrize("stream", [True, False])
@in_virtual_time
async def test_scoring_ends_when_the_engine_ends_without_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    submit = SimulatedEngine.submit

    def without_a_token(
        self: SimulatedEngine, key: str, token_ids: list[int], sampling: Sampling, deliver: Deliver, **more: Any
    ) -> None:
        submit(self, key, token_ids, sampling, lambda *_, **__: deliver([], "stop"), **more)

    monkeypatch.setattr(SimulatedEngine, "submit", without_a_token)
    async with gateway(tmp_path) as gate:
        scored = await answer(gate, stream, prompt="abc", max_tokens=0, echo=True, logprobs=1)
        assert await settled(gate) == ("finished", 3, 0, 1)
    [choice] = scored.choices
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, None, None]


@in_virtual_time
async def test_what_is_made_to_score_a_prompt_is_not_paid_when_another_prompt_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are told by one message, the refusal first."""
    submit = SimulatedEngine.submit

    def first_refused(
        self: SimulatedEngine, key: str, token_ids: list[int], sampling: Sampling, deliver: Deliver, **more: Any
    ) -> None:
        def refusing(token_ids: list[int], finish_reason: FinishReason | None, **told: Any) -> None:
            deliver([], "refused", message="No.")

        submit(self, key, token_ids, sampling, refusing if token_ids == ids("ab") else deliver, **more)

    monkeypatch.setattr(SimulatedEngine, "submit", first_refused)
    async with gateway(tmp_path) as gate:
        assert_refused(await gate.complete(prompt=["ab", "xyz"], max_tokens=0, echo=True, logprobs=0), None, "No.")
        assert await settled(gate) == ("failed", 0, 0, 2)


# --- best_of -------------------------------------------------------------------------------------------------------


def _by_token(_self: Simulator, _state: int, token: int, _likeliest: int, _others: Any = ()) -> PositionLogprobs:
    """The earlier in the alphabet, the likelier."""
    return PositionLogprobs((token,), (-0.1 * token,), (1,))


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("way", ["each token a message", "in bunches"])
@in_virtual_time
async def test_the_likeliest_candidates_per_token_are_answered_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logprobs: int | None, way: str
) -> None:
    monkeypatch.setattr(Simulator, "_logprobs", _by_token)
    if way == "in bunches":
        monkeypatch.setattr(MemoryReplica, "_send", _send_seldom)
    candidates = [
        [generated(prompt, 40, seed=seed, stop_token_ids=(9,)) for seed in range(11, 16)] for prompt in ("ab", "xyz")
    ]

    def total(each: Generated) -> float:
        return sum(position.logprobs[0] for position in each.positions)

    expected: list[dict[str, Any]] = []
    for each in candidates:
        ranked = sorted(each, key=lambda made: total(made) / len(made.token_ids), reverse=True)
        assert ranked[:2] != sorted(each, key=total, reverse=True)[:2]  # longer ones would lose
        assert ranked[:2] != each[:2]
        for made in ranked[:2]:
            end: dict[str, Any] = {"finish_reason": "length", "stop_reason": None}
            shown = made.text
            if made.token_ids[-1] == 9:
                shown, end = made.text[:-1], {"finish_reason": "stop", "stop_reason": 9}
            told = None if logprobs is None else legacy(made.text, made.positions)
            expected.append(choice(shown, len(expected), logprobs=told, **end))
    all_tokens = sum(len(made.token_ids) for each in candidates for made in each)
    async with gateway(tmp_path, replicas=2) as gate:
        fields = {"prompt": ["ab", "xyz"], "n": 2, "best_of": 5, "seed": 11, "max_tokens": 40, "stop_token_ids": [9]}
        answered = await answer(gate, streamed=False, logprobs=logprobs, **fields)
        assert answered.choices == expected
        assert answered.tokens == (5, all_tokens)
        assert gate.meter.admissions[0].choices == 5
        assert await settled(gate) == ("finished", 5, all_tokens, 10)


@in_virtual_time
async def test_tokens_behind_a_stop_string_do_not_make_a_candidate_likelier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are on their way when the ingress finds the stop string."""
    monkeypatch.setattr(Simulator, "_logprobs", _by_token)
    monkeypatch.setattr(MemoryReplica, "_send", _send_seldom)
    seeds = range(20, 26)
    made = [generated("hello", 30, seed=seed) for seed in seeds]
    cut = [each.text.index("e") + 1 if "e" in each.text else 30 for each in made]

    def mean(number: int, tokens: int) -> float:
        return sum(position.logprobs[0] for position in made[number].positions[:tokens]) / tokens

    best = max(range(6), key=lambda number: mean(number, cut[number]))
    late = [-(-each // BUNCH) * BUNCH for each in cut]
    assert best != max(range(6), key=lambda number: mean(number, min(30, late[number])))
    async with gateway(tmp_path) as gate:
        answered = await answer(gate, False, best_of=6, seed=20, max_tokens=30, stop="e")
        assert answered.choices[0]["text"] == made[best].text.partition("e")[0]
        assert answered.tokens == (5, sum(cut))


@in_virtual_time
async def test_as_many_candidates_as_choices_stay_in_their_order(tmp_path: Path, streamed: bool) -> None:
    texts = [generated("hello", 5, seed=seed).text for seed in (7, 8)]
    async with gateway(tmp_path) as gate:
        fields: dict[str, Any] = {"n": 2, "seed": 7, "max_tokens": 5}
        if not streamed:
            fields["best_of"] = 2
        answered = await answer(gate, streamed, **fields)
        assert answered.choices == [choice(text, index) for index, text in enumerate(texts)]
        submitted = [(each.sampling.logprobs, len(each.siblings)) for each in gate.replicas["r0"].submissions]
        assert submitted == [(None, 1)]


@in_virtual_time
async def test_best_of_cannot_be_streamed(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        assert_refused(await gate.complete(best_of=2, stream=True), "best_of", "cannot be streamed")
        assert (await gate.complete(best_of=1, stream=True)).status_code == 200


# --- token ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("echo", [False, True])
@in_virtual_time
async def test_token_ids_of_prompt_and_completion(tmp_path: Path, streamed: bool, echo: bool) -> None:
    made = {(prompt, seed): generated(prompt, 8, seed=seed) for prompt in ("ab", "xyz") for seed in (1, 2)}
    async with gateway(tmp_path) as gate:
        fields = {"prompt": ["ab", "xyz"], "n": 2, "seed": 1, "max_tokens": 8, "echo": echo, "return_token_ids": True}
        answered = await answer(gate, streamed, **fields)
        assert answered.choices == [
            choice((prompt if echo else "") + each.text, index, token_ids=each.token_ids, prompt_token_ids=ids(prompt))
            for index, ((prompt, _), each) in enumerate(made.items())
        ]


@in_virtual_time
async def test_token_ids_come_with_the_token_that_ended_the_choice(tmp_path: Path, streamed: bool) -> None:
    made = generated("hello", 100, stop_token_ids=(5,))
    assert made.token_ids[-1] == 5
    async with gateway(tmp_path) as gate:
        fields = {"max_tokens": 100, "stop_token_ids": [5], "return_token_ids": True, "logprobs": 0}
        answered = await answer(gate, streamed, **fields)
        assert answered.choices == [
            choice(
                made.text[:-1],
                logprobs=legacy(made.text, made.positions),
                finish_reason="stop",
                stop_reason=5,
                token_ids=made.token_ids,
                prompt_token_ids=ids("hello"),
            )
        ]
        assert answered.tokens == (5, len(made.token_ids))


# --- prompt_logprobs -----------------------------------------------------------------------------------------------


@in_virtual_time
async def test_log_probabilities_of_the_prompt_in_vllms_form(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        answered = await answer(gate, streamed=False, prompt=["hello", "ab"], n=2, prompt_logprobs=3, max_tokens=2)
        expected = [prompt_logprobs(generated(prompt, logprobs=3)) for prompt in ("hello", "hello", "ab", "ab")]
        assert [told["prompt_logprobs"] for told in answered.choices] == expected
        assert [told["logprobs"] for told in answered.choices] == [None] * 4


@in_virtual_time
async def test_an_echo_tells_what_it_was_asked_for_though_prompt_logprobs_asks_for_more(tmp_path: Path) -> None:
    many, few = generated("hello", 3, logprobs=4), generated("hello", 3, logprobs=1)
    async with gateway(tmp_path) as gate:
        answered = await answer(gate, False, prompt_logprobs=4, logprobs=1, echo=True, max_tokens=3)
        told = echoed("hello", many._replace(positions=few.positions), streamed=False, top=1)
        assert answered.choices == [choice("hello" + few.text, **told)]


@in_virtual_time
async def test_prompts_whose_log_probabilities_are_told_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        prompt = "a" * 64
        cached = []
        for fields in ({}, {"prompt_logprobs": 0}, {"echo": True, "logprobs": 0}, {"echo": True}):
            usage = (await answer(gate, False, prompt=prompt, max_tokens=1, **fields)).usage
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached == [0, 0, 0, 63]


@in_virtual_time
async def test_prompt_logprobs_cannot_be_streamed(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        assert_refused(await gate.complete(prompt_logprobs=0, stream=True), "prompt_logprobs", "cannot be streamed")


# --- how a choice ended --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize("length", [1, 3])
@in_virtual_time
async def test_a_stop_string_cuts_tokens_and_log_probabilities_behind_the_token_that_completed_it(
    tmp_path: Path, streamed: bool, included: bool, length: int
) -> None:
    made = generated("hello", 60, logprobs=1)
    stop = made.text[21 : 21 + length]
    begin = made.text.index(stop)
    used = begin + length
    text = made.text[: used if included else begin]
    async with gateway(tmp_path) as gate:
        answered = await answer(
            gate,
            streamed,
            max_tokens=60,
            stop=["~", stop],
            logprobs=1,
            return_token_ids=True,
            include_stop_str_in_output=included,
        )
        assert answered.choices == [
            choice(
                text,
                logprobs=legacy(made.text[:used], made.positions[:used], 1),
                finish_reason="stop",
                stop_reason=stop,
                token_ids=made.token_ids[:used],
                prompt_token_ids=ids("hello"),
            )
        ]
        assert answered.tokens == (5, used)
        assert await settled(gate) == ("finished", 5, used, 1)
        assert gate.sequences == 0


@pytest.mark.parametrize(
    ("reason", "finish_reason", "stop_reason", "shown"),
    [
        ("length", "length", None, 6),
        ("end_of_text", "stop", None, 5),
        ("repetition", "stop", "repetition_detected", 6),
        ("stop", "stop", None, 6),
        ("stop_token", "stop", generated("hello").token_ids[5], 5),
    ],
)
@in_virtual_time
async def test_why_a_choice_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    streamed: bool,
    reason: FinishReason,
    finish_reason: str,
    stop_reason: int | str | None,
    shown: int,
) -> None:
    made = generated("hello")
    decode = Simulator._decode

    def ending(self: Simulator, sequence: Any) -> SimulatedOutput:
        output = decode(self, sequence)
        return output._replace(finish_reason=reason) if sequence.generated == 6 else output

    monkeypatch.setattr(Simulator, "_decode", ending)
    async with gateway(tmp_path) as gate:
        answered = await answer(gate, streamed)
        expected = choice(made.text[:shown], finish_reason=finish_reason, stop_reason=stop_reason)
        assert answered.choices == [expected]
        assert answered.tokens == (5, 6)


# --- what the engine refuses ---------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, *, after: int, param: str | None = "guided_grammar") -> None:
    """Make engines refuse every generation when it has got so many tokens."""
    submit = SimulatedEngine.submit

    def refusing(
        self: SimulatedEngine,
        key: str,
        token_ids: list[int],
        sampling: Sampling,
        deliver: Deliver,
        *,
        resumed: bool = False,
    ) -> None:
        tokens = 0

        def counting(token_ids: list[int], finish_reason: FinishReason | None, **told: Any) -> None:
            nonlocal tokens
            if tokens < after:
                tokens += len(token_ids)
                deliver(token_ids, finish_reason, **told)
            else:
                self.abort(key)
                deliver([], "refused", message="The grammar makes no sense.", param=param)

        if after:
            submit(self, key, token_ids, sampling, counting, resumed=resumed)
        else:
            counting([], None)

    monkeypatch.setattr(SimulatedEngine, "submit", refusing)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("param", ["guided_grammar", None])
@in_virtual_time
async def test_what_the_engine_refuses_at_once_is_400_and_names_the_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, param: str | None
) -> None:
    refuse(monkeypatch, after=0, param=param)
    async with gateway(tmp_path) as gate:
        assert_refused(await gate.complete(stream=stream, n=2), param, "The grammar makes no sense.")
        assert await settled(gate) == ("failed", 0, 0, 2)
        assert gate.sequences == 0


@in_virtual_time
async def test_what_the_engine_refuses_later_is_400_when_nothing_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, after=3)
    async with gateway(tmp_path) as gate:
        assert_refused(await gate.complete(), "guided_grammar", "The grammar makes no sense.")
        assert await settled(gate) == ("failed", 5, 3, 1)


@in_virtual_time
async def test_what_the_engine_refuses_later_is_an_event_in_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, after=3)
    async with gateway(tmp_path) as gate:
        *chunks, error = await gate.stream()
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == generated("hello", 3).text
        assert error == {
            "error": {
                "message": "The grammar makes no sense.",
                "type": "invalid_request_error",
                "param": "guided_grammar",
                "code": None,
            }
        }
        assert await settled(gate) == ("failed", 5, 3, 1)
        assert gate.sequences == 0


# --- what takes too long -------------------------------------------------------------------------------------------


@asynccontextmanager
async def with_deadline(gate: Gateway, deadline_s: float) -> AsyncIterator[Gateway]:
    """`gate` with an app that gives each request so long."""
    meter = meter_client_of(gate.meter, gate.folder, "timed")
    await meter.start()
    settings = IngressSettings(BODY_LIMIT_BYTES, keep_alive_s=15.0, request_timeout_s=deadline_s)
    app = build_app(gate.catalog, meter, settings)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://g", headers=AUTHORIZED, timeout=None) as client:
        yield replace(gate, app=app, client=client)
    await meter.close()


@in_virtual_time
async def test_a_request_beyond_the_deadline_is_504(tmp_path: Path) -> None:
    async with gateway(tmp_path) as plain, with_deadline(plain, 10.5 * STEP_S) as gate:
        response = await gate.complete(max_tokens=1000, n=2)
        assert response.status_code == 504
        error = response.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("server_error", "deadline_exceeded", None)
        assert "0.105 s" in error["message"]
        await quiet()
        assert gate.sequences == 0
        status, prompt_tokens, completion_tokens, choices = await settled(gate)
        assert (status, prompt_tokens, choices) == ("failed", 5, 2)
        assert completion_tokens == pytest.approx(20, abs=2)


@in_virtual_time
async def test_a_stream_that_has_begun_tells_the_deadline_as_an_event(tmp_path: Path) -> None:
    async with gateway(tmp_path) as plain, with_deadline(plain, 10.5 * STEP_S) as gate:
        *chunks, error = await gate.stream(max_tokens=1000)
        assert len(chunks) == pytest.approx(10, abs=1)
        assert error["error"]["code"] == "deadline_exceeded"
        await quiet()
        assert gate.sequences == 0
        assert await settled(gate) == ("failed", 5, len(chunks), 1)


@in_virtual_time
async def test_a_stream_that_has_not_begun_is_504_beyond_the_deadline(tmp_path: Path) -> None:
    async with (
        gateway(tmp_path, limits=replace(LIMITS, hold_timeout_s=100.0)) as plain,
        with_deadline(plain, 9.0) as gate,
    ):
        gate.pool.replicas_changed(frozenset())
        await quiet()
        response = await gate.complete(stream=True)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert await settled(gate) == ("failed", 0, 0, 1)


@in_virtual_time
async def test_a_request_within_the_deadline_does_not_notice_it(tmp_path: Path, streamed: bool) -> None:
    async with gateway(tmp_path) as plain, with_deadline(plain, 60 * STEP_S) as gate:
        answered = await answer(gate, streamed, max_tokens=50)
        assert answered.choices == [choice(generated("hello", 50).text)]


# --- what the model cannot do --------------------------------------------------------------------------------------

FILLING = FillInTheMiddle(prefix="p", suffix="s", middle="m")


@in_virtual_time
async def test_a_suffix_is_refused_where_the_model_has_no_infilling(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        assert_refused(await gate.complete(suffix="world"), "suffix", "cannot fill in text")
        assert_refused(await gate.complete(suffix=""), "suffix", "cannot fill in text")
        assert (await gate.complete(suffix=None)).status_code == 200
        await quiet()
        assert len(gate.meter.admissions) == 1


@pytest.mark.parametrize("echo", [False, True])
@in_virtual_time
async def test_a_gap_is_filled_where_the_model_can(tmp_path: Path, streamed: bool, echo: bool) -> None:
    async with gateway(tmp_path) as gate:
        await change_model(gate, infilling=FILLING)
        answered = await answer(gate, streamed, prompt=["hello", "ab"], suffix="world", max_tokens=4, echo=echo)
        assert gate.meter.admissions[0].prompts == ["phellosworldm", "pabsworldm"]
        assert answered.choices == [
            choice((prompt if echo else "") + generated(f"p{prompt}sworldm", 4).text, index)
            for index, prompt in enumerate(["hello", "ab"])
        ]
        assert answered.tokens == (13 + 10, 8)


@in_virtual_time
async def test_a_gap_between_token_ids_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        await change_model(gate, infilling=FILLING)
        for prompt in ([2, 3], [[2, 3], [4]]):
            assert_refused(await gate.complete(prompt=prompt, suffix="x"), "suffix", "prompt that is text")
        assert_refused(await gate.complete(suffix="x", echo=True, logprobs=0), "suffix", "echo and logprobs")
        await quiet()
        assert (gate.meter.admissions, gate.meter.settlements) == ([], [])


@in_virtual_time
async def test_a_priority_is_refused_where_requests_are_served_in_order(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        for priority in (1, -1):
            assert_refused(await gate.complete(priority=priority), "priority", "order of their arrival")
        for neutral in (0, None):
            assert (await gate.complete(priority=neutral)).status_code == 200
        await change_model(gate, priority_scheduling=True)
        assert (await gate.complete(priority=-5)).status_code == 200
        assert [s.sampling.priority for s in gate.replicas["r0"].submissions] == [0, 0, -5]


@pytest.mark.parametrize(
    ("param", "largest", "too_large"),
    [
        ("stop_token_ids", [VOCABULARY_TOKENS - 1], [1, VOCABULARY_TOKENS]),
        ("logit_bias", {str(VOCABULARY_TOKENS - 1): 1}, {"1": 1, str(VOCABULARY_TOKENS): 1}),
        ("allowed_token_ids", [VOCABULARY_TOKENS - 1], [1, VOCABULARY_TOKENS]),
        ("logprob_token_ids", [VOCABULARY_TOKENS - 1], [1, VOCABULARY_TOKENS]),
    ],
)
@in_virtual_time
async def test_token_ids_that_the_model_does_not_have_are_refused_by_name(
    tmp_path: Path, param: str, largest: Any, too_large: Any
) -> None:
    async with gateway(tmp_path) as gate:
        assert_refused(await gate.complete(logprobs=0, **{param: too_large}), param, f"Token id {VOCABULARY_TOKENS} ")
        await quiet()
        assert (gate.meter.admissions, gate.replicas["r0"].submissions) == ([], [])
        assert (await gate.complete(logprobs=0, **{param: largest})).status_code == 200
        beyond = {"999999999": 1} if param == "logit_bias" else [2**31 - 1]
        assert_refused(await gate.complete(logprobs=0, **{param: beyond}), param, "out of vocabulary")


# --- lost replicas -------------------------------------------------------------------------------------------------


async def lose_the_busy_replica(gate: Gateway) -> None:
    [busy] = [replica for replica in gate.replicas.values() if replica.submissions]
    busy.reachable = False
    busy.break_streams()


@pytest.mark.parametrize("lost_after_steps", [0.5, 1.5, 12.5])
@in_virtual_time
async def test_log_probabilities_are_whole_when_a_replica_is_lost(
    tmp_path: Path, streamed: bool, lost_after_steps: float
) -> None:
    made = generated("hello", 30, logprobs=2)
    async with gateway(tmp_path, replicas=2) as gate:
        fields = {"max_tokens": 30, "logprobs": 2, "echo": True, "return_token_ids": True}
        answering = asyncio.create_task(answer(gate, streamed, **fields))
        await asyncio.sleep(lost_after_steps * STEP_S)
        await lose_the_busy_replica(gate)
        answered = await answering
        assert answered.choices == [
            choice(
                "hello" + made.text,
                token_ids=made.token_ids,
                prompt_token_ids=ids("hello"),
                **echoed("hello", made, streamed, 2),
            )
        ]
        assert answered.tokens == (5, 30)
        settlement = await gate.settlement()
        assert (settlement.resumes, settlement.completion_tokens) == (1, 30)


@pytest.mark.parametrize(("lost_after_steps", "asked_again"), [(0.5, True), (12.5, False)])
@in_virtual_time
async def test_prompt_logprobs_are_told_once_when_a_replica_is_lost(
    tmp_path: Path, lost_after_steps: float, asked_again: bool
) -> None:
    made = generated("hello", 30, logprobs=1)
    async with gateway(tmp_path, replicas=2) as gate:
        answering = asyncio.create_task(answer(gate, False, max_tokens=30, prompt_logprobs=1))
        await asyncio.sleep(lost_after_steps * STEP_S)
        await lose_the_busy_replica(gate)
        assert (await answering).choices == [choice(made.text, prompt_logprobs=prompt_logprobs(made))]
        submissions = [s for replica in gate.replicas.values() for s in replica.submissions]
        [resumed] = [s for s in submissions if s.resumed]
        assert resumed.sampling.prompt_logprobs == (1 if asked_again else None)
        assert (len(resumed.token_ids) == 5) == asked_again


@in_virtual_time
async def test_a_prompt_is_scored_once_when_its_replica_is_lost(tmp_path: Path, streamed: bool) -> None:
    slow = replace(SETTINGS, step_s=1.0)
    async with gateway(tmp_path, replicas=2, settings=slow) as gate:
        answering = asyncio.create_task(answer(gate, streamed, max_tokens=0, echo=True, logprobs=0))
        await asyncio.sleep(0.5)
        await lose_the_busy_replica(gate)
        told = echoed("hello", scored("hello"), streamed)
        assert (await answering).choices == [choice("hello", **told)]
        assert await settled(gate) == ("finished", 5, 0, 1)


@in_virtual_time
async def test_candidates_are_ranked_over_all_their_tokens_when_a_replica_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Simulator, "_logprobs", _by_token)
    made = [generated("hello", 30, seed=seed) for seed in range(4)]
    best = max(made, key=lambda each: sum(position.logprobs[0] for position in each.positions))
    async with gateway(tmp_path, replicas=2) as gate:
        answering = asyncio.create_task(answer(gate, False, max_tokens=30, best_of=4, seed=0))
        await asyncio.sleep(12.5 * STEP_S)
        gate.replicas["r0"].reachable = False
        gate.replicas["r0"].break_streams()
        answered = await answering
        assert answered.choices == [choice(best.text)]
        assert answered.tokens == (5, 120)
        assert (await gate.settlement()).resumes == 2


# --- long prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 2}, {"echo": True, "logprobs": 2}], ids=["told", "echoed"])
@in_virtual_time
async def test_what_is_told_of_a_long_prompt_is_the_same_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """Written in many turns of the event loop, so that others get theirs."""
    body = {"prompt": ["hello" * 20, "xyz"], "max_tokens": 2, "n": 2, **fields}
    async with gateway(tmp_path) as gate:
        whole = await answer(gate, False, **body)
        monkeypatch.setattr(completion, "_ENTRIES_PER_TURN", 7)
        assert await answer(gate, False, **body) == whole
        if "echo" in fields:
            told = (await answer(gate, True, **body)).choices[0]["logprobs"]
            assert told == whole.choices[0]["logprobs"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt_logprobs": 3}, "prompt_logprobs", "A prompt of 25 tokens with 4 log probabilities for each has 100"),
        ({"echo": True, "logprobs": 3}, "logprobs", "expected at most 80 for one prompt"),
        ({"echo": True, "logprobs": 2, "n": 3}, "logprobs", "have 225 of them; expected at most 200"),
        ({"prompt_logprobs": 1, "prompt": ["hello" * 4] * 6}, "prompt_logprobs", "120 tokens of prompts with 2"),
    ],
)
@in_virtual_time
async def test_log_probabilities_of_prompts_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], param: str, words: str
) -> None:
    monkeypatch.setattr(inference_request, "_MAX_PROMPT_ENTRIES", 80)
    monkeypatch.setattr(inference_request, "_MAX_PROMPT_ENTRIES_OF_ALL", 200)
    async with gateway(tmp_path) as gate:
        response = await gate.complete(**{"prompt": "hello" * 5, "max_tokens": 1, **fields})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert words in error["message"]
        assert (await gate.complete(prompt="hello" * 5, max_tokens=1, prompt_logprobs=2)).status_code == 200
