"""cluster.yaml: what it may say (`ClusterConfig`) and how it is read (`load_cluster_config`).

The file is validated whole before anything starts, and every problem is told at once with file, line, key,
value and what was expected. Reading and schema stand in one module because they are one contract: the lines
come from the YAML nodes, the expectations and the nearest known keys from the schema.

Environment variables: `${NAME}` anywhere in a text value is replaced, `$$` stands for a dollar, a lone `$` is
left alone. A value that is `${NAME}` alone and unquoted is read by the rules of YAML again after its
replacement, so `port: ${PORT}` gives a number and `port: "${PORT}"` a text. Values are not expanded twice,
keys not at all. A missing variable is a problem like any other, except `MILLSTREAM_HOME`, which always has a
value (see `millstream_home`).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from deployments.engine.model_source import SOURCE_FORMS, source_kind
from deployments.engine.settings import EngineSettings, VllmSettings
from deployments.section import Section, unexpected

__all__ = [
    "INGRESS_DRAIN_S",
    "SHUTDOWN_MARGIN_S",
    "ClusterConfig",
    "ClusterSection",
    "ConfigError",
    "HttpConfig",
    "IngressConfig",
    "KubernetesConfig",
    "MeterConfig",
    "ModelConfig",
    "ModelResources",
    "PoolSize",
    "Price",
    "Problem",
    "ProcessResources",
    "ReplicaRange",
    "load_cluster_config",
    "millstream_home",
]

INGRESS_DRAIN_S: Final = 600.0
"""How long a leaving ingress may finish its streams, unless requests have a limit of their own."""
SHUTDOWN_MARGIN_S: Final = 10.0
"""What Serve gives a leaving replica beyond its own limit."""

Location = tuple[str | int, ...]
"""Keys and list indexes from the top of the file, such as ("models", 0, "price")."""


class Problem(NamedTuple):
    """One thing that is wrong with a file."""

    file: str
    line: int
    """1-based; 0 when the file could not be read at all."""
    key: str
    """Such as `models[0].engine.dtype`; empty for the file as a whole."""
    value: str
    """What stands there, as YAML would show it, shortened; `nothing` for a missing key."""
    expected: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        key = f"{self.key}: " if self.key else ""
        return f"{place}: {key}got {self.value}, expected {self.expected}"


class ConfigError(Exception):
    """A cluster.yaml that cannot be used; its text has one line per problem."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def millstream_home(environ: Mapping[str, str]) -> Path:
    """The absolute folder of all state: `MILLSTREAM_HOME`, or `~/.millstream` when it is unset or empty."""
    return Path(environ.get("MILLSTREAM_HOME") or "~/.millstream").expanduser().absolute()


# --- schema -------------------------------------------------------------------------------------------------


def _line_error(location: Location, value: object, error: PydanticCustomError) -> InitErrorDetails:
    return InitErrorDetails(type=error, loc=location, input=value)


def _body_limit(value: object, parse: ValidatorFunctionWrapHandler) -> ByteSize:
    try:
        size = parse(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
    except (ValidationError, OverflowError):
        size = None
    if not isinstance(size, ByteSize) or not 2**10 <= size <= 2**26:
        raise unexpected("a size from 1KiB to 64MiB, such as 8MiB, 512KiB or a plain number of bytes")
    return size


def _dns_label(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise unexpected("a DNS label: a-z, 0-9 and, not at its ends, '-', up to 63 characters")
    return name


def _object_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name):
        raise unexpected("a name of Kubernetes: a-z, 0-9 and, not at its ends, '.' and '-', up to 253 characters")
    return name


def _quantity(memory: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(Mi|Gi|Ti)", memory, re.ASCII):
        raise unexpected("a whole number of Mi, Gi or Ti, such as 4Gi")
    return memory


_NAME_PART: Final = "[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"


def _model_name(name: str) -> str:
    """One slash at most, and no `~`, which stands for it in the names of applications (serve_app/applications.py)."""
    if len(name) > 96 or not re.fullmatch(f"({_NAME_PART}/)?{_NAME_PART}", name, re.ASCII):
        raise unexpected(
            "a model name as on the hub, NAME or OWNER/NAME of up to 96 characters, each of A-Z, a-z, 0-9 and, not at "
            "its ends, '.', '_' and '-'"
        )
    return name


def _hub_id(name: str) -> str:
    if source_kind(name) != "hub":
        raise unexpected("a hub id owner/name")
    return name


def _gpu_count(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise unexpected("a whole number of GPUs, or a fraction below 1 of one GPU")
    return gpus


def _cors_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    if origins != ("*",) and not all(re.fullmatch(r"https?://[a-z0-9.:\[\]-]+", origin) for origin in origins):
        raise unexpected('origins as browsers send them, such as https://chat.example.com without a path, or ["*"]')
    return origins


class HttpConfig(Section):
    """Where clients reach the cluster."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on. 0.0.0.0 opens it to the network: put TLS in front."""
    port: int = Field(default=8000, ge=1, le=65535)
    """1 to 65535."""


class ClusterSection(Section):
    """The cluster as a whole."""

    name: Annotated[str, AfterValidator(_dns_label)] = "millstream"
    """DNS label; names the Ray cluster and the Kubernetes objects."""
    http: HttpConfig = HttpConfig()
    proxy: Literal["haproxy", "ray"] = "haproxy"
    """`haproxy` relays several times more tokens per second; `ray` is Ray's own Python proxy, for platforms
    for which Ray ships no HAProxy."""
    cpus: PositiveInt | None = None
    """Logical CPUs that the Ray node on a laptop or in CI offers, >= 1; null takes the machine's count.
    Reservations are not enforced, so a test cluster may offer more than there are. Has no effect on
    Kubernetes."""


class ReplicaRange(Section):
    """How many replicas Ray Serve may run."""

    min: PositiveInt = 1
    """>= 1; kept running without load."""
    max: PositiveInt = Field(default_factory=lambda fields: fields.get("min", 1))
    """>= `min`, which is its default: a fixed number."""

    @field_validator("max")
    @classmethod
    def _not_below_min(cls, maximum: int, info: ValidationInfo) -> int:
        if maximum < (minimum := info.data.get("min", 1)):
            raise unexpected(f"at least {minimum}, the min beside it")
        return maximum


class PoolSize(ReplicaRange):
    """How many replicas a model may have, and what decides between `min` and `max` (docs/autoscaling.md)."""

    min: NonNegativeInt = 1
    """>= 0; kept running without load. 0 lets the model go when it is idle, and the next request wait for it."""
    max: PositiveInt = Field(default_factory=lambda fields: fields.get("min") or 1)
    """>= `min` and >= 1; `min` is its default: a fixed number."""
    target_first_token_s: PositiveFloat = 2.0
    """Seconds, > 0, that a request should wait for its first token at most; replicas are added to keep to it."""
    target_kv_use: float = Field(default=0.85, gt=0, le=1)
    """Share of the KV blocks, above 0 to 1, above which replicas are added."""
    scale_down_after_s: PositiveFloat = 120.0
    """Seconds, > 0, for which fewer replicas must have been enough before one leaves."""
    idle_to_zero_after_s: PositiveFloat = 600.0
    """Seconds, > 0, without a request after which the last replica leaves. Only with `min: 0`."""

    @property
    def fixed(self) -> bool:
        """Nothing is to be decided."""
        return self.min == self.max


class ProcessResources(Section):
    """What a replica without GPU reserves."""

    cpus: NonNegativeFloat = 0.25
    """CPUs for Ray's placement, >= 0; a fraction lets several replicas share one. No limit on use."""


class IngressConfig(Section):
    """The processes that speak HTTP with the clients."""

    replicas: ReplicaRange = ReplicaRange()
    request_body_limit: Annotated[ByteSize, WrapValidator(_body_limit)] = ByteSize(8 * 2**20)
    """Bytes of one request body, 1KiB to 64MiB; a larger one is answered 413 before it is read whole."""
    resources: ProcessResources = ProcessResources()
    keep_alive_s: PositiveFloat = 15.0
    """Seconds, > 0, between the SSE comments that keep an idle stream open; below the idle time-out of
    whatever proxy stands in front."""
    admission_timeout_s: PositiveFloat = 10.0
    """Seconds, > 0, that a request waits for the meter before it is answered 503; longer than a meter's
    restart."""
    request_timeout_s: PositiveFloat | None = None
    """Seconds, > 0, that a request may take, from admission to the last token, before it is answered 504, or its
    stream ends with an error; null lets it take as long as it does."""
    upload_timeout_s: PositiveFloat = 30.0
    """Seconds, > 0, that the body of a request may take to arrive whole, before it is answered 408."""
    write_timeout_s: PositiveFloat = 60.0
    """Seconds, > 0, that a client may leave its answer unread once all buffers on the way are full (several MB),
    before its generations are aborted and the connection is closed."""
    cors_origins: Annotated[tuple[str, ...], AfterValidator(_cors_origins)] = Field(default=(), strict=False)
    """Web pages whose scripts may call the cluster, as `https://host` or `http://host:port`, or `["*"]` for all;
    none by default. Keys in a web page are public: put a service of your own in between."""


def _ledger_url(home: Path) -> str:
    return f"sqlite:///{home}/ledger.db"


class MeterConfig(Section):
    """The processes that tokenize, know the keys and keep the ledger."""

    database: str = Field(default_factory=lambda: _ledger_url(millstream_home(os.environ)))
    """SQLAlchemy URL of keys and ledger: an SQLite file named by its absolute path, since the meter does not run in the
    folder of cluster.yaml, or `postgresql://user:password@host/name`. Or `env://NAME`: the meter's process finds such a
    URL in its environment variable NAME, so that a password is nowhere but there; Kubernetes sets it from a Secret, and
    has a file of SQLite in MILLSTREAM_HOME on the meter's volume. Default: sqlite:///${MILLSTREAM_HOME}/ledger.db.
    """
    replicas: int = Field(default=1, ge=1, le=64)
    """Meters, 1 to 64, among which teams and keys are divided; more than one needs PostgreSQL. Stop the cluster to
    change it. One admits and settles over a thousand requests per second (docs/performance.md)."""
    require_keys: bool = True
    """Refuse requests without a valid key. Without it everybody who reaches the port may use every model."""
    lost_after_s: float = Field(default=60.0, ge=15.0)
    """Seconds, >= 15, without a sign of life from an ingress, after which the requests that it had admitted and that no
    engine replica has settled are recorded as `lost`."""
    record_refusals: bool = False
    """Give refused requests a row in the ledger, too, of status `refused` and no tokens. A caller that is over its
    limit can then fill the disk."""
    resources: ProcessResources = ProcessResources()

    @field_validator("database")
    @classmethod
    def _known_database(cls, url: str) -> str:
        if not re.match(
            r"sqlite:////[^?]|postgresql(\+psycopg)?://[^/]*/[^/?]+|env://[A-Za-z_][A-Za-z0-9_]*$", url, re.ASCII
        ):
            raise unexpected(
                "sqlite:/// and the absolute path of a file, such as sqlite:///${MILLSTREAM_HOME}/ledger.db, "
                "postgresql://user:password@host/name, or env:// and the name of a variable that holds the URL"
            )
        return url

    @field_validator("replicas")
    @classmethod
    def _one_writer_of_a_file(cls, replicas: int, info: ValidationInfo) -> int:
        if replicas > 1 and info.data.get("database", "").startswith("sqlite"):
            raise unexpected("1 with SQLite; more meters share a PostgreSQL database, named by meter.database")
        return replicas


class ModelResources(Section):
    """What one replica of a model reserves."""

    cpus: NonNegativeFloat = 1.0
    """CPUs, >= 0."""
    gpus: Annotated[NonNegativeFloat, AfterValidator(_gpu_count)] = 0.0
    """GPUs, >= 0: a whole number, or a fraction below 1 to share one."""
    accelerator: str | None = Field(default=None, min_length=1)
    """Ray's name of the GPU type, such as H100; null takes any."""


class Price(Section):
    """Price per million tokens, in whatever currency the operator bills."""

    prompt: NonNegativeFloat = 0.0
    """>= 0."""
    completion: NonNegativeFloat = 0.0
    """>= 0."""


class FillInTheMiddleConfig(Section):
    """The special tokens, as text, by which a model is asked for what comes between a prompt and a `suffix`."""

    prefix: str = Field(min_length=1)
    """Stands before the prompt, such as `<|fim_prefix|>`."""
    suffix: str = Field(min_length=1)
    """Stands between the prompt and the suffix, such as `<|fim_suffix|>`."""
    middle: str = Field(min_length=1)
    """Stands behind the suffix, such as `<|fim_middle|>`."""


class ModelConfig(Section):
    """One model and the pool of replicas that serve it: the Serve application `model-<name>`."""

    name: Annotated[str, AfterValidator(_model_name)]
    """What clients write as `model`, such as qwen2.5 or Qwen/Qwen2.5-7B; unique. Answers, usage and metrics have it."""
    aliases: tuple[Annotated[str, AfterValidator(_model_name)], ...] = Field(default=(), strict=False, max_length=100)
    """More names that clients may write as `model`; unique as well. A key for one of a model's names may use them all.
    """
    source: str
    """Weights and tokenizer: `package://NAME`, a folder or a hub id `owner/name` (see engine/model_source.py). The
    path of a folder is relative to the folder of cluster.yaml, and absolute once loaded."""
    hub_id: Annotated[str, AfterValidator(_hub_id)] | None = None
    """The hub's name of the model, `owner/name`, which clients are told as `root` and load its tokenizer by. Of a
    `source` that is a hub id it is known."""
    engine: EngineSettings
    resources: ModelResources = ModelResources()
    replicas: PoolSize = PoolSize()
    price: Price = Price()
    infilling: FillInTheMiddleConfig | None = None
    """For models trained to fill in the middle; null refuses requests with a `suffix`."""
    max_waiting: NonNegativeInt = 512
    """Generations, >= 0, that a replica holds beyond those running before it refuses more with 503."""
    hold_timeout_s: PositiveFloat = 30.0
    """Seconds, > 0, that a request waits while no replica is up, before it is answered 503."""
    cold_start_timeout_s: PositiveFloat = 600.0
    """The same while the model is at zero replicas by itself (`replicas.min: 0`): longer than a replica's start."""
    max_held_tokens: PositiveInt = 1_000_000
    """Prompt tokens, >= 1, of the requests that wait so in one ingress; what comes beyond is answered 503 at once.
    Their number is bounded by `max_waiting`."""
    stall_timeout_s: PositiveFloat = 30.0
    """Seconds, > 0, after which an engine that has work and answers nothing is unhealthy and replaced."""
    drain_timeout_s: PositiveFloat = 60.0
    """Seconds, > 0, that a replica being removed may take to finish its generations."""

    @field_validator("source")
    @classmethod
    def _known_form(cls, source: str, info: ValidationInfo) -> str:
        kind = source_kind(source)
        if kind is None:
            raise unexpected(SOURCE_FORMS)
        if kind == "folder":
            base: Path = (info.context or {}).get("folder", Path.cwd())
            return os.path.abspath(base / Path(source).expanduser())
        return source

    @field_validator("resources")
    @classmethod
    def _one_gpu_per_shard(cls, resources: ModelResources, info: ValidationInfo) -> ModelResources:
        engine, gpus = info.data.get("engine"), resources.gpus
        if isinstance(engine, VllmSettings):
            shards = engine.tensor_parallel_size * engine.pipeline_parallel_size
            if gpus != shards and gpus > 0 and max(gpus, shards) > 1:
                wrong = unexpected(f"{shards}, tensor_parallel_size times pipeline_parallel_size of the engine")
                shown = int(gpus) if gpus.is_integer() else gpus
                raise ValidationError.from_exception_data("gpus", [_line_error(("gpus",), shown, wrong)])
        return resources


class PodMemory(Section):
    """Memory of the pods of each kind, request and limit, such as 4Gi or 512Mi."""

    head: Annotated[str, AfterValidator(_quantity)] = "4Gi"
    gateway: Annotated[str, AfterValidator(_quantity)] = "4Gi"
    meter: Annotated[str, AfterValidator(_quantity)] = "2Gi"
    engine: Annotated[str, AfterValidator(_quantity)] = "32Gi"
    """For each GPU of a pod; for the whole pod where it has none."""


class Volume(Section):
    """A PersistentVolumeClaim."""

    size: Annotated[str, AfterValidator(_quantity)]
    storage_class: str | None = Field(default=None, min_length=1)
    """null takes the cluster's default."""


class KubernetesStorage(Section):
    """What outlives pods, besides the database."""

    models: Volume = Volume(size="200Gi")
    """Weights and tokenizers, read by all pods and written by those of engines: of a class that mounts read-write on
    many nodes (ReadWriteMany)."""
    meter: Volume = Volume(size="10Gi")
    """The meter's journal and its spool of settlements, and keys and ledger where `meter.database` is a file of SQLite;
    mounted by one pod (ReadWriteOnce)."""


class KubernetesSecrets(Section):
    """Names of Secrets, which must exist; null stands for the name of the cluster, a dash, and what is said here."""

    database: Annotated[str, AfterValidator(_object_name)] | None = None
    """`database`: key `url`, the PostgreSQL URL of keys and ledger; needed with `meter.database: env://NAME` only."""
    admin_key: Annotated[str, AfterValidator(_object_name)] | None = None
    """`admin-key`: key `key`, the key that may make others."""
    ray_token: Annotated[str, AfterValidator(_object_name)] | None = None
    """`ray-token`: key `auth_token`, by which Ray's processes and the operator know each other."""
    redis: Annotated[str, AfterValidator(_object_name)] | None = None
    """`redis`: key `password`; needed with `redis_address` only."""
    hub: Annotated[str, AfterValidator(_object_name)] | None = None
    """`hub`: key `token`, for gated models of the Hugging Face hub; may be missing."""


class KubernetesConfig(Section):
    """What `millstream render kubernetes` must know of the Kubernetes cluster. Has no effect elsewhere."""

    cpu_image: str = Field(default="millstream-cpu:0.1.0", min_length=1)
    """Image of all pods without GPUs (k8s/Dockerfile)."""
    gpu_image: str = Field(default="millstream-gpu:0.1.0", min_length=1)
    """Image of the pods with GPUs (k8s/Dockerfile, with VARIANT=gpu)."""
    image_pull_secret: Annotated[str, AfterValidator(_object_name)] | None = None
    """Secret for a private registry; null pulls without."""
    operator_namespace: Annotated[str, AfterValidator(_dns_label)] = "kuberay-system"
    """Where the KubeRay operator runs: it alone reaches Ray's dashboard from outside."""
    monitoring_namespace: Annotated[str, AfterValidator(_dns_label)] | None = "monitoring"
    """Where Prometheus runs, which may scrape the pods; null renders no PodMonitor."""
    redis_address: str | None = Field(default=None, min_length=1)
    """`host:port` of the Redis that keeps the state of Ray's head, so that the cluster outlives it. null is for
    clusters whose groups have one pod each."""
    tls: bool = False
    """Encrypts what pods say to each other, Ray's processes and Millstream's own, with certificates on both sides that
    KubeRay has cert-manager make (docs/kubernetes.md, *TLS between pods*). Needs KubeRay 1.7 or later with the feature
    gate RayClusterMTLS, and cert-manager."""
    gateway_cpus: PositiveInt = 2
    """CPUs, at most, of each pod that runs ingress replicas, >= twice `ingress.resources.cpus`, so that a new one can
    start while an old one finishes its streams. Where `ingress.replicas` are two and more, pods are smaller: none holds
    all."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a node, >= 1: all GPUs of a replica are on one node."""
    accelerators: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Node labels by accelerator, as models name it in `resources.accelerator`, such as
    `H100: {nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}`."""
    memory: PodMemory = PodMemory()
    storage: KubernetesStorage = KubernetesStorage()
    secrets: KubernetesSecrets = KubernetesSecrets()


class ClusterConfig(Section):
    """The whole of cluster.yaml."""

    cluster: ClusterSection = ClusterSection()
    ingress: IngressConfig = IngressConfig()
    meter: MeterConfig = Field(default_factory=MeterConfig)
    models: tuple[ModelConfig, ...] = Field(strict=False)
    """At least one."""
    kubernetes: KubernetesConfig = KubernetesConfig()

    @property
    def longest_drain_s(self) -> float:
        """Seconds that the slowest leaving replica of the cluster may take to finish what it has."""
        ingress_s = self.ingress.request_timeout_s or INGRESS_DRAIN_S
        return max(ingress_s, *(model.drain_timeout_s for model in self.models)) + SHUTDOWN_MARGIN_S

    @field_validator("models", mode="wrap")
    @classmethod
    def _unique_names(cls, models: object, check: ValidatorFunctionWrapHandler) -> tuple[ModelConfig, ...]:
        """Wraps the check of each model, so that a repeated name is told together with all other problems."""
        if isinstance(models, list | tuple) and not models:
            raise unexpected("at least one model")
        repeated: list[InitErrorDetails] = []
        first: dict[str, tuple[Location, int]] = {}
        for index, model in enumerate(models if isinstance(models, list | tuple) else ()):
            for inner, name in _names_of(model):
                location = (index, *inner)
                earlier, of_model = first.setdefault(name, (location, index))
                if earlier != location:
                    wrong = unexpected(f"a name of its own (models[{of_model}] has this one)")
                    repeated.append(_line_error(location, name, wrong))
        try:
            checked: tuple[ModelConfig, ...] = check(models)
        except ValidationError as error:
            others = [
                _line_error(
                    each["loc"],
                    each["input"],
                    PydanticCustomError(each["type"], each["msg"], each.get("ctx")),
                )
                for each in error.errors(include_url=False)
            ]
            raise ValidationError.from_exception_data("models", others + repeated) from None
        if repeated:
            raise ValidationError.from_exception_data("models", repeated)
        return checked


def _names_of(model: object) -> Iterator[tuple[Location, str]]:
    """Where they stand in the model, and the names: its own and its aliases, as far as they are texts."""
    fields = model if isinstance(model, dict) else model.__dict__ if isinstance(model, ModelConfig) else {}
    aliases = fields.get("aliases", ())
    listed = enumerate(aliases if isinstance(aliases, list | tuple) else ())
    for location, name in ((("name",), fields.get("name")), *((("aliases", index), each) for index, each in listed)):
        if isinstance(name, str):
            yield location, name


# --- reading ------------------------------------------------------------------------------------------------


def load_cluster_config(path: Path, environ: Mapping[str, str] = os.environ) -> ClusterConfig:
    """Reads and checks `path`; `environ` fills in `${NAME}`. Raises ConfigError with every problem in it."""
    home = millstream_home(environ)
    document = _YamlDocument(str(path), {**environ, "MILLSTREAM_HOME": str(home)})
    raw = document.read(path)
    if isinstance(raw, dict) and isinstance(meter := raw.setdefault("meter", {}), dict):
        meter.setdefault("database", _ledger_url(home))
    try:
        config = ClusterConfig.model_validate(raw, context={"folder": path.absolute().parent})
    except ValidationError as error:
        for details in error.errors(include_url=False):
            location, value, expected = _in_our_words(details)
            match details["type"]:
                case "default_factory_not_called":
                    pass  # follows from the error of another key
                case "extra_forbidden":
                    document.refuse(location, value, expected)
                case _ if not document.has_refused(location):
                    document.refuse(location, value, expected)
    if document.problems:
        raise ConfigError(sorted(document.problems, key=lambda problem: problem.line))
    return config


class _Loader(yaml.SafeLoader):
    """SafeLoader that also takes 1e-3 for a number, as YAML 1.2 does and PyYAML does not.

    Its dates stay dates: a library that vLLM brings makes them text, for all users of SafeLoader, when it is imported.
    """

    yaml_constructors: ClassVar = {
        **yaml.SafeLoader.yaml_constructors,
        "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_timestamp,
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

_REFERENCE = re.compile(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# References go through the YAML parser in private-use characters, because inside {…} and […] YAML would take
# the braces of an unquoted ${NAME} for its own.
_DOLLAR, _OPEN, _CLOSE = "\ue000", "\ue001", "\ue002"
_HIDDEN_REFERENCE = re.compile(f"{_DOLLAR}|{_OPEN}([^{_CLOSE}]*){_CLOSE}")


def _hide_references(text: str) -> str:
    return _REFERENCE.sub(lambda found: f"{_OPEN}{found[1]}{_CLOSE}" if found[1] else _DOLLAR, text)


def _show_references(text: str) -> str:
    return text.replace(_DOLLAR, "$$").replace(_OPEN, "${").replace(_CLOSE, "}")


class _YamlDocument:
    """One YAML file as plain values, with the line of every key and all problems found in it so far."""

    def __init__(self, file: str, variables: Mapping[str, str]) -> None:
        self.problems: list[Problem] = []
        self._file = file
        self._variables = variables
        self._loader = _Loader("")
        self._lines: dict[Location, int] = {(): 1}
        self._refused: set[Location] = set()
        self._checked_nodes: set[yaml.MappingNode] = set()

    def read(self, path: Path) -> object:
        """The file's values; one that could not be made is in `problems` and stands as it was written.

        Raises ConfigError when there is nothing to go on with.
        """
        try:
            text = path.read_text("utf-8-sig")
            node = _Loader(_hide_references(text)).get_single_node()
            if node is None:
                raise self._unusable(1, "an empty file", f"a mapping with {_listing(ClusterConfig)}")
            return self._value(node, ())
        except OSError as error:
            raise self._unusable(0, error.strerror or "an error", "a file that can be read") from None
        except UnicodeDecodeError as error:
            raise self._unusable(0, f"byte {error.start}, which is not UTF-8", "a UTF-8 text") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise self._unusable(line, f"the character {chr(error.character)!r}", "printable text") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            found = ", ".join(filter(None, (error.context, error.problem)))
            raise self._unusable(line, f"broken YAML ({_show_references(found)})", "valid YAML") from None
        except RecursionError:
            raise self._unusable(1, "values nested without end", "a finite document") from None

    def refuse(self, location: Location, value: str, expected: str) -> None:
        """Notes a problem, with the line of `location` or of what is nearest around it."""
        self._refused.add(location)
        nearest = next(location[:n] for n in range(len(location), -1, -1) if location[:n] in self._lines)
        self.problems.append(Problem(self._file, self._lines[nearest], _dotted(location), value, expected))

    def has_refused(self, location: Location) -> bool:
        """Whether a problem at `location` or around it is known, of which others may be mere consequences."""
        return any(location[:depth] in self._refused for depth in range(len(location) + 1))

    def _unusable(self, line: int, value: str, expected: str) -> ConfigError:
        return ConfigError([*self.problems, Problem(self._file, line, "", value, expected)])

    def _value(self, node: yaml.Node, location: Location) -> object:
        match node:
            case yaml.MappingNode():
                return self._mapping(node, location)
            case yaml.ScalarNode():
                return self._scalar(node, location)
            case _:
                self._lines |= {(*location, i): item.start_mark.line + 1 for i, item in enumerate(node.value)}
                return [self._value(item, (*location, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, object]:
        if node not in self._checked_nodes:  # an alias comes here again, with its `<<` already flattened
            self._checked_nodes.add(node)
            self._refuse_bad_keys(node, location)
            self._loader.flatten_mapping(node)
        values: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = _show_references(key_node.value)
            inner = (*location, key)
            self._lines[inner] = key_node.start_mark.line + 1
            values[key] = self._value(value_node, inner)
        return values

    def _refuse_bad_keys(self, node: yaml.MappingNode, location: Location) -> None:
        first: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a mapping or list stands where a key must be", key_node.start_mark
                )
            key = _show_references(key_node.value)
            if key in first:
                expected = f"the key once (it stands on line {first[key]})"
                self.problems.append(Problem(self._file, line, _dotted((*location, key)), "the key again", expected))
            first.setdefault(key, line)

    def _scalar(self, node: yaml.ScalarNode, location: Location) -> object:
        text: str = node.value
        as_written = _show_references(text)
        if "${" in text:
            self.refuse(location, _shown(as_written), "${NAME} for a variable, or $$ for a dollar")
            return as_written
        missing = [name for name in _HIDDEN_REFERENCE.findall(text) if name and name not in self._variables]
        if missing:
            expected = f"the environment variable {' and '.join(missing)} to be set"
            self.refuse(location, _shown(as_written), expected)
            return as_written
        expanded = _HIDDEN_REFERENCE.sub(lambda found: self._variables[found[1]] if found[1] else "$", text)
        alone = node.style is None and _HIDDEN_REFERENCE.fullmatch(text) is not None and text != _DOLLAR
        tag = node.tag
        if alone:
            tag = self._loader.resolve(yaml.ScalarNode, expanded, (True, False))  # type: ignore[no-untyped-call]
        try:
            return self._loader.construct_object(
                yaml.ScalarNode(tag, expanded, node.start_mark, node.end_mark, node.style)
            )
        except (yaml.constructor.ConstructorError, ValueError) as error:
            reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
            self.refuse(location, _shown(expanded), f"a plain value ({reason})")
            return as_written


# --- pydantic's errors in our words -------------------------------------------------------------------------

_EXPECTATIONS: dict[str, str] = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "a whole number",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "missing": "a value: the key is required",
    "model_attributes_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "string_too_short": "a text that is not empty",
    "string_type": "a text (quote what YAML takes for something else)",
    "tuple_type": "a list",
    "unexpected": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "union_tag_not_found": "a value: the key is required",
}
"""Type of a pydantic error -> what was expected, formatted with the error's context."""


def _in_our_words(error: ErrorDetails) -> tuple[Location, str, str]:
    """Where in the file the error is, what stands there and what was expected."""
    kind, location = error["type"], error["loc"]
    in_file = location[:3] + location[4:] if location[2:3] == ("engine",) else location
    if kind == "extra_forbidden":
        return in_file, _shown(error["input"]), _known_keys(location)
    expected = _EXPECTATIONS.get(kind, error["msg"]).format_map(error.get("ctx", {}))
    match kind:
        case "missing":
            return in_file, "nothing", expected
        case "union_tag_not_found":
            return (*in_file, "kind"), "nothing", expected
        case "union_tag_invalid":
            return (*in_file, "kind"), _shown(error["input"]["kind"]), expected
        case _:
            return in_file, _shown(error["input"]), expected


def _known_keys(location: Location) -> str:
    """What was expected instead of the unknown key that ends `location`, a location as pydantic gives it."""
    sections: list[type[Section]] = [ClusterConfig]
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        owner = next((section for section in sections if part in section.model_fields), None)
        if owner is None:  # no key, but the `kind` by which pydantic chose one of the sections
            sections = [each for each in sections if part in get_args(each.model_fields["kind"].annotation)]
        else:
            sections = _sections_in(owner.model_fields[part].annotation)
    nearest = difflib.get_close_matches(str(location[-1]), sections[0].model_fields, n=1)
    expected = f"one of {_listing(sections[0])}"
    return f"{expected} (did you mean {nearest[0]}?)" if nearest else expected


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]


def _listing(section: type[BaseModel]) -> str:
    return f"the keys {', '.join(section.model_fields)}"


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _shown(value: object) -> str:
    """`value` as YAML would show it, on one line, at most 80 characters, without the password of a URL."""
    if isinstance(value, str | bool | None):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, dict | list):
        text = "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
    else:
        text = str(value)
    text = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", text)
    return text if len(text) <= 80 else f"{text[:79]}…"
