"""Answers in a required form: what engines make is checked at its end, before the client is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.contracts import CheckedConstraint, ConstraintCheck, OutputCheck
from deployments.engine.simulator import SimulatedOutput, Simulator
from deployments.ingress.constraints.checker import ConstraintChecker
from deployments.ingress.errors import ServiceUnavailable
from tests.deployments.ingress.memory_gateway import Gateway, gateway
from tests.deployments.ingress.virtual_time import in_virtual_time


class Checker(ConstraintChecker):
    def __init__(
        self, *, conforming: bool = True, away: bool = False, refusal: CheckedConstraint | None = None
    ) -> None:
        super().__init__()
        self.answers = conforming
        self.away = away
        self.refusal = refusal
        self.checks: list[ConstraintCheck] = []
        self.outputs: list[OutputCheck] = []

    async def check(self, owner: str, check: ConstraintCheck) -> CheckedConstraint:
        self.checks.append(check)
        return self.refusal or CheckedConstraint("start: /.*/")

    async def conforming(self, owner: str, check: OutputCheck) -> list[bool]:
        self.outputs.append(check)
        if self.away:
            raise ServiceUnavailable("The constraint could not be checked in time.", retry_after_s=1.0)
        return [self.answers] * len(check.outputs)


def install(gate: Gateway, checker: Checker) -> Checker:
    gate.catalog.constraints = checker
    return checker


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends every text with its sixth token."""
    decode = Simulator._decode

    def ending(self: Simulator, sequence: object) -> SimulatedOutput:
        output = decode(self, sequence)  # type: ignore[arg-type]
        return output._replace(finish_reason="end_of_text") if output.finish_reason else output

    monkeypatch.setattr(Simulator, "_decode", ending)


@in_virtual_time
async def test_output_that_conforms_is_answered(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        checker = install(gate, Checker())
        response = await gate.complete(guided_regex=".*", max_tokens=6, n=2)
        assert response.status_code == 200
        assert len(checker.checks) == 1  # for all choices
        outputs = [output for check in checker.outputs for output in check.outputs]
        assert [(len(output.token_ids), output.ended) for output in outputs] == [(6, False)] * 2


@in_virtual_time
async def test_output_that_does_not_conform_is_an_error(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        install(gate, Checker(conforming=False))
        response = await gate.complete(guided_regex=".*", max_tokens=6)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("output_not_conforming", "guided_regex")
        assert "retry" not in error["message"].lower()
        settlement = await gate.settlement()
        assert settlement.status == "failed"


@in_virtual_time
async def test_a_stream_that_does_not_conform_ends_with_an_error_event(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        install(gate, Checker(conforming=False))
        *chunks, last = await gate.stream(guided_regex=".*", max_tokens=6)
        assert last["error"]["code"] == "output_not_conforming"
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


@in_virtual_time
async def test_the_end_of_text_is_no_part_of_what_is_checked(tmp_path: Path, ended: None) -> None:
    async with gateway(tmp_path) as gate:
        checker = install(gate, Checker())
        response = await gate.complete(guided_regex=".*", max_tokens=6)
        assert response.json()["choices"][0]["finish_reason"] == "stop"
        [check] = checker.outputs
        [output] = check.outputs
        assert (len(output.token_ids), output.ended) == (5, True)


@in_virtual_time
async def test_what_a_stop_string_cut_is_checked_as_a_beginning(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        checker = install(gate, Checker())
        whole = (await gate.complete(max_tokens=6)).json()["choices"][0]["text"]
        assert not checker.outputs
        response = await gate.complete(guided_regex=".*", max_tokens=6, stop=whole[2])
        assert response.json()["choices"][0]["finish_reason"] == "stop"
        [check] = checker.outputs
        assert not check.outputs[0].ended


@in_virtual_time
async def test_an_output_that_cannot_be_checked_is_not_answered(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        install(gate, Checker(away=True))
        assert (await gate.complete(guided_regex=".*", max_tokens=6)).status_code == 503


@in_virtual_time
async def test_a_constraint_that_is_refused_is_not_admitted(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        install(gate, Checker(refusal=CheckedConstraint(message="No text conforms to it.")))
        response = await gate.complete(structured_outputs={"regex": "("})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "structured_outputs.regex"
        assert "No text conforms to it." in response.json()["error"]["message"]
        assert not gate.meter.settlements
        install(gate, Checker(refusal=CheckedConstraint(message="No.", param="min_tokens")))
        assert (await gate.complete(guided_regex="a")).json()["error"]["param"] == "min_tokens"


@in_virtual_time
async def test_what_the_grammar_rejects_in_the_engine_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Simulator._decode

    def failing(self: Simulator, sequence: object) -> SimulatedOutput:
        return decode(self, sequence)._replace(finish_reason="failed")  # type: ignore[arg-type]

    monkeypatch.setattr(Simulator, "_decode", failing)
    async with gateway(tmp_path) as gate:
        install(gate, Checker())
        assert (await gate.complete(guided_regex="a")).json()["error"]["code"] == "output_not_conforming"
        assert (await gate.complete()).json()["error"]["code"] is None


@in_virtual_time
async def test_plain_requests_ask_nothing_of_the_checker(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        checker = install(gate, Checker())
        assert (await gate.complete(max_tokens=4)).status_code == 200
        assert not checker.checks
        assert not checker.outputs


@in_virtual_time
async def test_an_end_before_min_tokens_is_an_error(tmp_path: Path, ended: None) -> None:
    async with gateway(tmp_path) as gate:
        install(gate, Checker())
        for min_tokens, status in ((5, 200), (6, 400)):
            response = await gate.complete(guided_regex=".*", max_tokens=6, min_tokens=min_tokens)
            assert response.status_code == status
