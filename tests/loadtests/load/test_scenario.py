"""Scenarios say what is wrong with them, and their arrivals are what they say."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from loadtests.load.prompts import Lengths, words
from loadtests.load.scenario import ScenarioError, arrivals, load_scenario, scenario_files

CLOSED = "description: d\nclosed: {stages: [{users: 2, seconds: 10}]}\n"
REQUESTS = "requests: [{prompt_tokens: {min: 1, max: 2}, max_tokens: {min: 1, max: 2}}]\n"


def written(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", [file.stem for file in scenario_files()])
def test_every_scenario_that_comes_along_is_valid(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.seconds > 0
    assert len(scenario.description) < 110, "one line in the list"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected keys such as description"),
        ("a: [", "mine.yaml"),
        (CLOSED, "requests belong to closed and open"),
        ("description: d\n" + REQUESTS, "exactly one of closed, open and trace is needed, not none"),
        (CLOSED + "open: {stages: [{rate_per_s: 1, seconds: 1}]}\n" + REQUESTS, "not closed and open"),
        (CLOSED + REQUESTS + "usres: 3\n", "usres: Extra inputs are not permitted"),
        (CLOSED + REQUESTS.replace("min: 1", "min: 5"), "requests.0.prompt_tokens: Value error, min 5 is above max 2"),
        (CLOSED.replace("seconds: 10", "seconds: 0") + REQUESTS, "closed.stages.0.seconds: Input should be greater"),
    ],
)
def test_a_wrong_scenario_is_told_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ScenarioError) as error:
        load_scenario(written(tmp_path, text))
    assert said in str(error.value)


def test_an_unknown_scenario_is_told_which_there_are() -> None:
    with pytest.raises(ScenarioError, match=r"no scenario 'chta'\. There are burst, chat, "):
        load_scenario("chta")


def test_poisson_arrivals_have_their_rate_and_its_spread(tmp_path: Path) -> None:
    text = (
        "description: d\nopen: {stages: [{rate_per_s: 50, seconds: 100}, {rate_per_s: 5, seconds: 100}]}\n" + REQUESTS
    )
    scenario = load_scenario(written(tmp_path, text))
    times = [arrival.at_s for arrival in arrivals(scenario, seed=3)]
    assert times == sorted(times)
    assert times == [arrival.at_s for arrival in arrivals(scenario, seed=3)]
    assert times != [arrival.at_s for arrival in arrivals(scenario, seed=4)]
    early = [at_s for at_s in times if at_s < 100]
    assert 4650 < len(early) < 5350  # five standard deviations
    assert 390 < len(times) - len(early) < 610
    gaps = [after - before for before, after in pairwise(early)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.1)  # as of an exponential distribution


def test_a_trace_is_followed(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("at_s,prompt_tokens,max_tokens\n1.0,10,20\n3.0,30,40\n")
    scenario = load_scenario(written(tmp_path, "description: d\ntrace: {file: t.csv, speed: 2}\n"))
    told = [(at_s, kind.prompt_tokens.max, kind.max_tokens.min) for at_s, kind in arrivals(scenario, seed=1)]
    assert told == [(0.5, 10, 20), (1.5, 30, 40)]
    assert [arrival.at_s for arrival in arrivals(scenario.scaled(15.0), seed=1)] == pytest.approx([5.0, 15.0])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("at,tokens\n1,2\n", r"t\.csv: there is no column 'at_s'"),
        ("at_s,prompt_tokens,max_tokens\n1,1,1\nsoon,1,1\n", r"t\.csv, line 3: could not convert .*'soon'"),
        ("at_s,prompt_tokens,max_tokens\n1,2\n", r"t\.csv, line 2: "),
        ("at_s,prompt_tokens,max_tokens\n-1,1,1\n", r"t\.csv, line 2: .* is out of range"),
        ("at_s,prompt_tokens,max_tokens\n1,0,1\n", r"t\.csv, line 2: .* is out of range"),
        ("at_s,prompt_tokens,max_tokens\nnan,1,1\n", r"t\.csv, line 2: .* is out of range"),
        ("at_s,prompt_tokens,max_tokens\n", r"t\.csv: there is not a single arrival"),
        (None, r"t\.csv: No such file"),
    ],
)
def test_a_trace_that_cannot_be_followed_is_told_what_is_wrong(tmp_path: Path, rows: str | None, said: str) -> None:
    if rows is not None:
        (tmp_path / "t.csv").write_text(rows)
    with pytest.raises(ScenarioError, match=f"(?s){said}.*columns at_s, prompt_tokens and max_tokens"):
        load_scenario(written(tmp_path, "description: d\ntrace: {file: t.csv}\n"))


def test_a_trace_out_of_order_is_followed_by_time(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("at_s,prompt_tokens,max_tokens\n3.0,30,40\n1.0,10,20\n")
    scenario = load_scenario(written(tmp_path, "description: d\ntrace: {file: t.csv}\n"))
    assert [arrival.at_s for arrival in arrivals(scenario, seed=1)] == [1.0, 3.0]
    assert scenario.seconds == 3.0


def test_a_long_run_has_a_coarser_timeline_rather_than_a_longer_one() -> None:
    assert load_scenario("chat").interval_s == 1
    assert load_scenario("soak").interval_s == 12


def test_scaling_keeps_the_shape() -> None:
    chat = load_scenario("chat")
    short = chat.scaled(6.0)
    assert short.closed is not None
    assert chat.closed is not None
    assert short.seconds == pytest.approx(6.0)
    assert [stage.users for stage in short.closed.stages] == [stage.users for stage in chat.closed.stages]


def test_lengths_follow_the_servers_own_count() -> None:
    lengths = Lengths.of(short_tokens=66, long_tokens=326)  # 1.3 tokens a word and one for the beginning
    assert lengths.words(131) == 100
    assert lengths.words(1) == 1
    assert len(words(lengths.words(131), random.Random(1)).split()) == 100
    with pytest.raises(ValueError, match="counts 9 tokens for 50 words and 9 for 250"):
        Lengths.of(9, 9)
