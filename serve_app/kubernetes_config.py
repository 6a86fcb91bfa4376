"""The part of cluster.yaml that is about Kubernetes: what it may say."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveInt

from deployments.section import Section, unexpected

__all__ = ["KubernetesConfig", "KubernetesSecrets", "Volume", "dns_label"]


def dns_label(name: str) -> str:
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
    operator_namespace: Annotated[str, AfterValidator(dns_label)] = "kuberay-system"
    """Where the KubeRay operator runs: it alone reaches Ray's dashboard from outside."""
    monitoring_namespace: Annotated[str, AfterValidator(dns_label)] | None = "monitoring"
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
