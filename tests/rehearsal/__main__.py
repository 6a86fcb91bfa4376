"""The rehearsal: the rendered RayService on hosts of its own, and what may happen to it.

    python -m tests.rehearsal [--short | --vllm] [--only b --only e] [--tls] [--logs FOLDER]

Needs root, for namespaces. Everything that it makes is in namespaces of its own (network, mounts, processes), on a file
system in memory, so that nothing is left, however it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.conftest import ROOT
from tests.rehearsal.cluster import rehearsed_cluster
from tests.rehearsal.load import Load
from tests.rehearsal.manifests import rendered
from tests.rehearsal.network import command
from tests.rehearsal.scenarios import SCENARIOS, Rehearsal, Scenario, Violated, engine_host_killed, ledger_audited

_INSIDE = "MILLSTREAM_REHEARSAL_INSIDE"
_FOLDER = Path("/mnt/rehearsal")
"""In a mount namespace of its own."""
_SHORT = ("a", "b", "h")


@dataclass(frozen=True)
class Plan:
    config: Path
    streams: int
    tokens: int
    """Of each stream."""
    scenarios: Sequence[Scenario]
    short: bool = False
    tls: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the rendered RayService on hosts of its own, and break them.")
    parser.add_argument("--short", action="store_true", help=f"scenarios {', '.join(_SHORT)} only, with less waiting")
    parser.add_argument("--only", action="append", choices=sorted(SCENARIOS), help="this scenario; may be repeated")
    parser.add_argument("--vllm", action="store_true", help="real vLLM on two engine hosts, of which one is killed")
    parser.add_argument("--tls", action="store_true", help="with TLS between pods")
    parser.add_argument("--logs", type=Path, help="an absent folder that gets the pods' logs")
    options = parser.parse_args()
    if _INSIDE not in os.environ:
        if os.geteuid() != 0:
            parser.error("needs root: it makes network namespaces")
        os.environ[_INSIDE] = "1"
        namespaces = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        os.execvp("unshare", ["unshare", *namespaces, "--", sys.executable, "-m", "tests.rehearsal", *sys.argv[1:]])
    # A shell's background jobs are started deaf to Ctrl-C; PostgreSQL hears it all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # This is the first process of its namespace: with it, all others end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command("mount", "-t", "tmpfs", "tmpfs", str(_FOLDER.parent))
    _FOLDER.mkdir()
    folder = ROOT / "tests" / "rehearsal"
    if options.vllm:
        plan = Plan(folder / "vllm.yaml", 8, 60, [engine_host_killed], tls=options.tls)
    else:
        chosen = options.only or (_SHORT if options.short else sorted(SCENARIOS))
        plan = Plan(folder / "cluster.yaml", 32, 120, [SCENARIOS[name] for name in chosen], options.short, options.tls)
    try:
        asyncio.run(_rehearse(plan))
    except* Violated as violations:
        print(*violations.exceptions, sep="\n", file=sys.stderr)
        sys.exit(1)
    except* KeyboardInterrupt:
        sys.exit(130)
    finally:
        if options.logs is not None:
            shutil.copytree(_FOLDER / "pods", options.logs, symlinks=True, ignore=_no_logs)


async def _rehearse(plan: Plan) -> None:
    begun = time.monotonic()
    config = yaml.safe_load(plan.config.read_text())
    config["kubernetes"]["tls"] = plan.tls
    file = _FOLDER / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    async with rehearsed_cluster(rendered(file), _FOLDER) as cluster:
        _say(begun, f"pods: {', '.join(cluster.operator.pods)}")
        await cluster.until_ready(gateways=2)
        _say(begun, "ready")
        load = Load(cluster.client, lambda: cluster.endpoints, config["models"][0]["name"], plan.tokens)
        await load.learn()
        rehearsal = Rehearsal(cluster, load, config, _FOLDER, plan.short)
        await load.resize(plan.streams)
        try:
            for scenario in (*plan.scenarios, ledger_audited):
                _say(begun, f"{scenario.__doc__}")
                _say(begun, f"    {await scenario(rehearsal)}")
        finally:
            await load.stop()
    _say(begun, "all ended")


def _say(begun: float, line: str) -> None:
    print(f"[{time.monotonic() - begun:4.0f} s] {line}", flush=True)


def _no_logs(folder: str, names: list[str]) -> list[str]:
    """Sockets and the containers' views of files."""
    return [name for name in names if name in ("tmp", "var-lib", "sockets")]


if __name__ == "__main__":
    main()
