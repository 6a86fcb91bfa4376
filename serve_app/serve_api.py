"""The running Serve controller through Ray's REST API: what to run, what runs, and why so much of it.

No Ray driver is needed, so the command line answers in a fraction of a second.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import msgspec

from deployments.scaling.placement import unschedulable_reason
from deployments.scaling.scaling_board import DECISION_FILES, ShownDecision

__all__ = ["Application", "Resources", "ServeApi", "ServeApiError", "ServeReplica", "unplaced"]

_PATH = "/api/serve/applications/"
_NODES_PATH = "/api/v0/nodes"
_MOST_NODES = "10000"
"""As many as Ray lists at once."""
_LOGS_PATH = "/api/v0/logs"
"""Of Ray's state API, as `ray logs` uses it: names and texts of the files in a node's folder of logs."""


class ServeApiError(Exception):
    """The controller gave no answer, or refused what it was asked."""


class ServeReplica(NamedTuple):
    replica_id: str
    state: str
    """STARTING, RUNNING, STOPPING, …: Serve's words."""
    node_ip: str
    pid: int | None


class Application(NamedTuple):
    name: str
    status: str
    """NOT_STARTED, DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED or DELETING."""
    message: str
    deployments: dict[str, list[ServeReplica]]
    messages: dict[str, str]
    """Serve's words on each deployment, empty where there is nothing to say."""
    wanted: dict[str, int]
    """Replicas that each deployment should have."""
    needs: dict[str, dict[str, float]]
    """What a replica of each deployment reserves, by Ray's name of the resource."""

    @property
    def reasons(self) -> list[str]:
        """What Serve says of the application and its deployments, without Python's tracebacks."""
        messages = [_without_traceback(message) for message in (self.message, *self.messages.values())]
        return [message for message in dict.fromkeys(messages) if message]


class Resources(NamedTuple):
    """Amounts by Ray's name of the resource."""

    nodes: list[dict[str, float]]
    """What each node has."""
    free: dict[str, float]
    """What is left, over all nodes."""


class ServeApi:
    def __init__(self, url: str, token: str) -> None:
        """`url` of Ray's dashboard; `token` is Ray's."""
        self._client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30.0, trust_env=False
        )

    def close(self) -> None:
        """Let go of its connections."""
        self._client.close()

    def wait_until_up(self, limit_s: float) -> None:
        """Raises ServeApiError when the API does not answer in time."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                self.applications()
            except ServeApiError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return

    def apply(self, config: dict[str, Any]) -> None:
        """Make Serve run exactly the applications of `config`; it goes on after this returns."""
        with self._errors():
            self._client.put(_PATH, json=config).raise_for_status()

    def applications(self) -> list[Application]:
        with self._errors():
            described = self._get(_PATH)
        return [_application(name, fields) for name, fields in described.get("applications", {}).items()]

    def resources(self, applications: list[Application]) -> Resources:
        """Those of the nodes, and what `applications`, all that run, have left of them."""
        with self._errors():
            listed = self._get(_NODES_PATH, limit=_MOST_NODES)["data"]["result"]["result"]
        nodes = [node["resources_total"] for node in listed if node["state"] == "ALIVE"]
        free = Counter[str]()
        for node in nodes:
            free.update(node)
        for application in applications:
            for deployment, replicas in application.deployments.items():
                placed = sum(bool(replica.node_ip) for replica in replicas)
                free.subtract({name: placed * amount for name, amount in application.needs[deployment].items()})
        return Resources(nodes, dict(free))

    def scaling_decisions(self) -> dict[str, ShownDecision]:
        """The latest word of each scaling policy, by application: of those that still decide."""
        with self._errors():
            node_id = self._get(_PATH)["controller_info"]["node_id"]
            listed = self._get(_LOGS_PATH, node_id=node_id, glob=f"serve/{DECISION_FILES}")["data"]["result"]
            texts = [
                self._client.get(f"{_LOGS_PATH}/file", params={"node_id": node_id, "filename": name})
                for names in listed.values()
                for name in names
            ]
            told = [msgspec.json.decode(text.raise_for_status().content, type=ShownDecision) for text in texts]
        now = time.time()
        return {decision.application: decision for decision in told if not decision.is_old(now)}

    def _get(self, path: str, **query: str) -> Any:
        return self._client.get(path, params=query).raise_for_status().json()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise ServeApiError(f"Ray Serve refused: {error.response.text[-2000:]}") from error
        except httpx.HTTPError as error:
            raise ServeApiError(f"Ray Serve's REST API does not answer: {error!r}") from error


def unplaced(application: Application, resources: Resources) -> list[str]:
    """Why replicas that Serve has not placed on a node have no place, in words."""
    told = []
    for deployment, replicas in application.deployments.items():
        waiting = sum(replica.state == "STARTING" and not replica.node_ip for replica in replicas)
        needs = {name: amount for name, amount in application.needs[deployment].items() if name in ("CPU", "GPU")}
        if waiting and (reason := unschedulable_reason(needs, *resources)):
            told.append(f"{waiting} of {application.wanted[deployment]} replicas have no place: {reason}")
    return told


def _without_traceback(message: str) -> str:
    """`message` up to its first traceback, and what the last one says."""
    head, *tracebacks = message.split("Traceback (most recent call last):")
    if not tracebacks:
        return head.strip()
    lines = tracebacks[-1].splitlines()
    last_frame = max((number for number, line in enumerate(lines) if line.startswith("  File ")), default=0)
    told = itertools.dropwhile(lambda line: not line or line.startswith(" "), lines[last_frame + 1 :])
    return "\n".join([head.strip(), *told]).strip()


def _application(name: str, fields: dict[str, Any]) -> Application:
    deployments = fields.get("deployments", {})
    return Application(
        name=name,
        status=fields["status"],
        message=fields.get("message", ""),
        deployments={
            deployment: [
                ServeReplica(replica["replica_id"], replica["state"], replica.get("node_ip") or "", replica.get("pid"))
                for replica in described.get("replicas", [])
            ]
            for deployment, described in deployments.items()
        },
        messages={deployment: described.get("message", "") for deployment, described in deployments.items()},
        wanted={deployment: described.get("target_num_replicas") or 0 for deployment, described in deployments.items()},
        needs={deployment: described.get("required_resources") or {} for deployment, described in deployments.items()},
    )
