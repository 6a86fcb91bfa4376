"""How Serve ends an ingress replica; all else of it needs Serve (tests/cluster)."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest

from deployments.ingress.deployment import IngressDeployment


class Ended:
    def __init__(self) -> None:
        self.times = 0

    async def close(self) -> None:
        self.times += 1


def made(running: bool) -> tuple[Any, Ended]:
    ingress: Any = object.__new__(IngressDeployment)
    parts = Ended()
    ingress.__dict__ |= {"_settings": object(), "_running": running, "_catalog": parts, "_meter": parts, "_meters": []}
    return ingress, parts


@pytest.mark.parametrize(("running", "closed"), [(True, 2), (False, 0)])
async def test_serve_awaits_the_end_and_the_garbage_collector_leaves_nothing_to_await(
    running: bool, closed: int
) -> None:
    ingress, parts = made(running)
    await ingress.__del__()
    assert parts.times == closed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ingress.__del__() is None
        del ingress
        gc.collect()
    assert parts.times == closed


def test_one_whose_start_failed_ends_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ingress: Any = object.__new__(IngressDeployment)
        assert ingress.__del__() is None
