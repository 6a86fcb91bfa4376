"""cluster.yaml: what it may say. How it is read is in config_reading.py."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
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
from pydantic_core import InitErrorDetails, PydanticCustomError

from deployments.engine.model_source import SOURCE_FORMS, source_kind
from deployments.engine.settings import EngineSettings, VllmSettings
from deployments.section import Section, unexpected
from serve_app.kubernetes_config import KubernetesConfig, dns_label

__all__ = [
    "INGRESS_DRAIN_S",
    "SHUTDOWN_MARGIN_S",
    "ClusterConfig",
    "ClusterSection",
    "HttpConfig",
    "IngressConfig",
    "Location",
    "MeterConfig",
    "ModelConfig",
    "ModelResources",
    "PoolSize",
    "Price",
    "ProcessResources",
    "ReplicaRange",
    "ledger_url",
    "millstream_home",
]

INGRESS_DRAIN_S: Final = 600.0
"""How long a leaving ingress may finish its streams, unless requests have a limit of their own."""
SHUTDOWN_MARGIN_S: Final = 10.0
"""What Serve gives a leaving replica beyond its own limit."""

Location = tuple[str | int, ...]
"""Keys and list indexes from the top of the file, such as ("models", 0, "price")."""


def millstream_home(environ: Mapping[str, str]) -> Path:
    """The absolute folder of all state: `MILLSTREAM_HOME`, or `~/.millstream` when it is unset or empty."""
    return Path(environ.get("MILLSTREAM_HOME") or "~/.millstream").expanduser().absolute()


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

    name: Annotated[str, AfterValidator(dns_label)] = "millstream"
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


def ledger_url(home: Path) -> str:
    return f"sqlite:///{home}/ledger.db"


class MeterConfig(Section):
    """The processes that tokenize, know the keys and keep the ledger."""

    database: str = Field(default_factory=lambda: ledger_url(millstream_home(os.environ)))
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
