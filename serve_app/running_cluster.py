"""Which cluster the command line speaks of, and how it is reached: the one that `millstream up` started under
MILLSTREAM_HOME, or, in a pod of a rendered cluster, that cluster.

The only place that knows of the two. The manifests (kubernetes/pods.py) set the variables below; the address of the
head's Service and Ray's token in the environment are KubeRay's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from serve_app.ray_node import RayNode

__all__ = [
    "DASHBOARD_PORT",
    "POD_CLUSTER",
    "POD_DATABASE",
    "POD_HTTP_PORT",
    "ClusterNotFound",
    "RunningCluster",
    "check_not_in_a_pod",
    "database_of_cluster",
    "find_cluster",
]

POD_CLUSTER: Final = "MILLSTREAM_POD_CLUSTER"
"""Name of the cluster, in all of its pods."""
POD_DATABASE: Final = "MILLSTREAM_POD_DATABASE"
"""`meter.database`, and the next one: in the meter's pod only, which alone has the database's URL and the admin key."""
POD_HTTP_PORT: Final = "MILLSTREAM_POD_HTTP_PORT"
DASHBOARD_PORT: Final = 8265
"""Of the head's dashboard on Kubernetes: KubeRay's default."""

_HEAD, _TOKEN = "FQ_RAY_IP", "RAY_AUTH_TOKEN"
"""Set by KubeRay in the containers of workers."""


class ClusterNotFound(Exception):
    """The command has no cluster to speak of here; the text says where or how it has one."""


class RunningCluster(NamedTuple):
    name: str
    clients_url: str
    """Where clients reach it, without a path."""
    http_url: str
    """Where this process does."""
    dashboard_url: str
    token: str
    """Ray's."""


def find_cluster(home: Path, environment: Mapping[str, str]) -> RunningCluster:
    """Raises ClusterNotFound."""
    if POD_CLUSTER in environment:
        _check_meter_pod(environment)
        name = environment[POD_CLUSTER]
        if missing := [variable for variable in (_HEAD, _TOKEN) if not environment.get(variable)]:
            raise ClusterNotFound(
                f"KubeRay has not set {' and '.join(missing)} in this container: expected 1.6 or later"
            )
        return RunningCluster(
            name=name,
            clients_url=f"http://{name}",  # the Service's
            http_url=f"http://127.0.0.1:{environment[POD_HTTP_PORT]}",
            dashboard_url=f"http://{environment[_HEAD]}:{DASHBOARD_PORT}",
            token=environment[_TOKEN],
        )
    node = RayNode.running(home)
    if node is None:
        raise ClusterNotFound(f"No cluster runs under {home}. Start one with: millstream up cluster.yaml")
    return RunningCluster(
        name=node.name,
        clients_url=f"http://{node.http_host}:{node.http_port}",
        http_url=node.http_url,
        dashboard_url=node.dashboard_url,
        token=node.token,
    )


def database_of_cluster(home: Path, environment: Mapping[str, str]) -> str:
    """`meter.database` of the pod's cluster; else what the last `millstream up` recorded, or its default.

    Raises ClusterNotFound.
    """
    if POD_CLUSTER in environment:
        _check_meter_pod(environment)
        return environment[POD_DATABASE]
    try:
        return (home / "run" / "database").read_text("utf-8").strip()
    except FileNotFoundError:
        return f"sqlite:///{home}/ledger.db"


def check_not_in_a_pod(environment: Mapping[str, str]) -> None:
    """For what only `millstream up` starts. Raises ClusterNotFound in a pod, whose cluster is KubeRay's."""
    if (name := environment.get(POD_CLUSTER)) is not None:
        raise ClusterNotFound(
            f"This is a pod of the cluster {name}, which KubeRay starts, changes and ends: render its cluster.yaml and "
            "use kubectl apply -k, or kubectl delete -k"
        )


def _check_meter_pod(environment: Mapping[str, str]) -> None:
    if POD_DATABASE not in environment:
        name = environment[POD_CLUSTER]
        raise ClusterNotFound(
            f"This pod of the cluster {name} has neither its database nor its admin key. The meter's has: kubectl exec "
            f"$(kubectl get pod -o name -l app.kubernetes.io/instance={name},millstream-group=meter) -- millstream …"
        )
