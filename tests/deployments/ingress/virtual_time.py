"""An event loop whose clock jumps to the next timer as soon as nothing else is left to do.

Heartbeats, time-outs and retries take their full length on the loop's clock and next to none of the test's. What
happens when is the same in every run, so a test may wait for a moment: all that comes before it has happened then.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

from deployments.ingress.inference.write_scheduler import WriteScheduler

__all__ = ["in_virtual_time", "quiet", "run_in_virtual_time", "write_scheduler"]

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_LIMIT_S = 3600.0
"""A test that runs for so long on the loop's clock waits for something that never happens."""


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.threads = 0
        """At work for the loop: time stands still for them."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.threads:
            return super().select(timeout if timeout == 0 else None)
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None or self.now_s > _LIMIT_S:
            raise AssertionError("the test waits for something that never happens")
        self.now_s += timeout
        return []


class _VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._jumping.threads += 1
        future.add_done_callback(self._thread_done)
        return future

    def _thread_done(self, _future: object) -> None:
        self._jumping.threads -= 1


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """The result of `main`. Fails when it leaves a task behind, or an error that nobody has seen."""
    unseen: list[dict[str, Any]] = []
    with ThreadPoolExecutor(2) as executor:
        loop = _VirtualTimeLoop()
        loop.set_default_executor(executor)
        loop.set_exception_handler(lambda _loop, context: unseen.append(context))
        try:
            result = loop.run_until_complete(main)
            for _ in range(5):  # what has just been cancelled may end
                loop.run_until_complete(asyncio.sleep(0))
            left = sorted(task.get_name() for task in asyncio.all_tasks(loop))
        finally:
            doomed = asyncio.all_tasks(loop)
            for task in doomed:
                task.cancel()
            if doomed:
                loop.run_until_complete(asyncio.wait(doomed))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
    assert left == [], "tasks left behind"
    assert unseen == [], "errors that nobody has seen"
    return result


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Makes an async test run on a loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_in_virtual_time(test(*args, **kwargs))

    return run


async def quiet() -> None:
    """Returns when everything that can happen now has happened."""
    await asyncio.sleep(1e-6)


def write_scheduler() -> WriteScheduler:
    """On the loop's clock, on which no round takes any time."""
    return WriteScheduler(lambda: asyncio.get_running_loop().time())
