"""What watches event loops, in the tests' own process and in those of their clusters."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["probe_environment"]


def probe_environment(home: Path) -> dict[str, str]:
    """With which the processes of a cluster can be watched (tests/faults/loop_watch.py)."""
    folder = home / "loop-probe"
    folder.mkdir(exist_ok=True)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"MILLSTREAM_LOOP_PROBE": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
