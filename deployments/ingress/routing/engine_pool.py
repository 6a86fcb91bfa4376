"""The replicas of one model as this ingress sees them: who gets a generation, and what happens when one is lost.

Replicas are chosen by the load that their step streams report; serve_app/planning/pool_simulation.py does the same in
virtual time. Free of Ray: membership comes from outside (`replicas_changed`), and replicas are reached through
`ReplicaTransport`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from deployments.contracts import DurationHistogram, PoolCounters, Settlement
from deployments.ingress.errors import GivenUp, ModelNotReady, NotResumable, Overloaded
from deployments.ingress.inference.generation import Generation, GenerationStream
from deployments.ingress.inference.write_scheduler import WriteScheduler
from deployments.ingress.routing.replica_stream import ReplicaStream, ReplicaTransport
from deployments.scaling.ingress_demand import ModelDemand
from deployments.settlement.request_usage import RequestUsage

__all__ = ["EnginePool", "PoolLimits", "least_loaded"]

log = structlog.get_logger()

_CANDIDATES = 8
"""Replicas that are looked at for a generation, drawn at random where there are more: the least loaded of eight is
nearly as good as that of all (the power of two choices), and costs the same however many replicas there are."""
_FIRST_TOKENS, _FIRST_TOKENS_S = 256, 5.0
"""First-token times that count as those of now: the last ones, no older than that."""
_FIRST_TOKEN_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0)
_INTER_TOKEN_BOUNDS_S = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Of the histograms. Objectives are met at a bound (k8s/monitoring/rules.yaml)."""


def least_loaded(streams: Iterable[ReplicaStream]) -> ReplicaStream:
    """The replica with the fewest sequences, then the fewest tokens waiting to be prefilled, then the most free KV.

    Raises ValueError when there is none.
    """
    return min(
        streams,
        key=lambda stream: (
            stream.sequences,
            stream.load.waiting_prefill_tokens,
            -stream.load.kv_blocks_free,
        ),
    )


@dataclass(frozen=True)
class PoolLimits:
    hold_timeout_s: float
    """How long a new generation waits while no replica is live."""
    resume_timeout_s: float
    """The same for a generation that lost its replica."""
    drain_timeout_s: float
    """How long a leaving replica may finish what it has."""
    max_held: int
    """New generations that wait for a replica, at most. Those that lost theirs were let in before and do not count."""
    max_held_tokens: int = 1_000_000
    """Their prompt tokens, at most."""
    cold_start_timeout_s: float | None = None
    """How long a new generation waits for a pool that was scaled to zero; None where there is always a replica."""


class EnginePool:
    """Places generations on replicas and moves them when a replica is lost."""

    def __init__(
        self,
        model: str,
        connect: Callable[[str], ReplicaTransport],
        *,
        ingress_id: str,
        limits: PoolLimits,
        writes: WriteScheduler,
        checkpoint: Callable[[str, Settlement], None],
    ) -> None:
        """`writes` is that of the process. `checkpoint(meter, settlement)` keeps what a request has used on replicas
        that are lost, should this process be lost before it settles the request."""
        self.model = model
        self.limits = limits
        self.writes = writes
        self._connect = connect
        self._ingress_id = ingress_id
        self._checkpoint = checkpoint
        self._open_requests: dict[str, list[Generation]] = {}
        """Those that are not settled."""
        self._streams: dict[str, ReplicaStream] = {}
        self._accepting: list[ReplicaStream] | None = None
        """Those of them that take generations; None when that has to be found out again."""
        self._listed: frozenset[str] = frozenset()
        self._became_live = asyncio.Event()
        self._suspects: deque[tuple[float, Generation]] = deque()
        """Those that wait to be tried, each until an event-loop time. Bounded by the open requests."""
        self._trials: dict[ReplicaStream, Generation] = {}
        """The one that each replica tries now."""
        self._held = self._held_tokens = 0
        self._held_since: float | None = None
        """Event-loop time at which the present holding began."""
        self._cold_start_s = 0.0
        """How long the last one took, or how long the last new replica says that it took to start; 0 if unknown."""
        self._counters = PoolCounters(
            model, DurationHistogram.empty(_FIRST_TOKEN_BOUNDS_S), DurationHistogram.empty(_INTER_TOKEN_BOUNDS_S)
        )
        self.inter_token = self._counters.inter_tokens.observe
        """A request has more tokens, so many seconds after those before."""
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=_FIRST_TOKENS)
        """When the last ones came, and how long after their requests."""
        self._retired = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        """Whether a generation would be taken now: by a replica, or to be held while a pool at zero gets one."""
        return bool(self._accepting_streams()) or self._asleep

    @property
    def cold(self) -> bool:
        """It may be scaled to zero, and no replica takes generations now."""
        return self.limits.cold_start_timeout_s is not None and not self._accepting_streams()

    @property
    def _asleep(self) -> bool:
        return self.cold and not self._listed

    def first_token(self, first_token_s: float) -> None:
        """A request has its first token, so long after its arrival."""
        self._counters.first_tokens.observe(first_token_s)
        self._first_tokens.append((asyncio.get_running_loop().time(), first_token_s))

    def demand(self) -> ModelDemand:
        """What engine replicas cannot tell of the load."""
        since = asyncio.get_running_loop().time() - _FIRST_TOKENS_S
        late = [first_token_s for at, first_token_s in self._first_tokens if at >= since]
        return ModelDemand(self._held, self._held_tokens, sum(late) / len(late) if late else 0.0)

    def counters(self) -> PoolCounters:
        """For Prometheus."""
        self._counters.held = self._held
        self._counters.suspects = len(self._trials) + len(self._suspects)
        return self._counters

    def cards(self) -> list[dict[str, Any]]:
        """Each replica and its load, for operators."""
        return [
            {
                "id": stream.replica_id,
                "model": self.model,
                "in_rotation": stream.accepting,
                "draining": stream.draining,
                **msgspec.structs.asdict(stream.load),
            }
            for stream in self._streams.values()
        ]

    def replicas_changed(self, replica_ids: frozenset[str]) -> None:
        """Follow the pool: open a stream to each new replica, drain those that leave."""
        if self._retired:
            replica_ids = frozenset()
        self._listed = replica_ids
        for replica_id in replica_ids - self._streams.keys():
            self._open(replica_id)
        for replica_id in self._streams.keys() - replica_ids:
            stream = self._streams[replica_id]
            if not stream.draining:
                self._accepting = None
                stream.draining = True  # now, not when the task runs: the next change may come before
                self._own(self._drain(stream), f"drain-{replica_id}")

    def start(self, generations: list[Generation]) -> None:
        """Place the generations of a new request; everything else, failure included, comes through their mailbox."""
        self._open_requests[generations[0].request_id] = generations
        hold_timeout_s = self.limits.hold_timeout_s
        if self.limits.cold_start_timeout_s is not None and self._asleep:
            hold_timeout_s = self.limits.cold_start_timeout_s
        self._place(generations, hold_timeout_s)

    def abort(self, generations: Iterable[Generation]) -> None:
        """End generations that nobody wants any more; frees the engines without waiting for them."""
        numbers: dict[GenerationStream, list[int]] = {}
        for generation in generations:
            if not generation.ended:
                generation.ended = True
                if generation.placement is not None:
                    numbers.setdefault(generation.placement.stream, []).append(generation.placement.number)
        for stream, doomed in numbers.items():
            stream.abort(doomed)

    def release(self, request_id: str) -> None:
        """It is settled: where its generations ran last, nobody needs to be able to settle it any more."""
        generations = self._open_requests.pop(request_id, [])
        for stream in {each.placement.stream for each in generations if each.placement is not None}:
            stream.release(request_id)

    def retire(self) -> None:
        """The model is served no more: what runs may finish, within the drain limit."""
        self._retired = True
        self.replicas_changed(frozenset())

    @property
    def empty(self) -> bool:
        """Whether a retired pool has let go of all replicas."""
        return not self._streams

    def check_silence(self, now: float) -> None:
        for stream in self._streams.values():
            stream.check_silence(now)
        while self._suspects and self._suspects[0][0] <= now:
            self._fail([self._suspects.popleft()[1]], self._not_ready())

    async def close(self) -> None:
        """Close every stream; what still runs on the replicas is aborted by them."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --- internals ---------------------------------------------------------------------------------------------------

    def _open(self, replica_id: str) -> None:
        stream = ReplicaStream(
            replica_id,
            self._connect(replica_id),
            name=f"{self._ingress_id}/{self.model}/{replica_id}",
            on_live=lambda: self._on_live(stream),
            on_lost=lambda generations, suspects: self._on_lost(stream, generations, suspects),
            on_refused=lambda generations: self._on_refused(stream, generations),
            on_message=self._on_message,
        )
        self._streams[replica_id] = stream
        self._own(stream.run(), f"stream-{replica_id}")

    def _accepting_streams(self) -> list[ReplicaStream]:
        if self._accepting is None:
            self._accepting = [stream for stream in self._streams.values() if stream.accepting]
        return self._accepting

    def _on_live(self, stream: ReplicaStream) -> None:
        self._accepting = None
        held_s = 0.0 if self._held_since is None else asyncio.get_running_loop().time() - self._held_since
        self._cold_start_s = held_s or stream.load.start_up_s or self._cold_start_s
        self._became_live.set()
        self._became_live = asyncio.Event()
        asyncio.get_running_loop().call_soon(self._try_suspects)  # behind what was held

    def _on_message(self) -> None:
        if self._suspects or self._trials:
            self._try_suspects()

    def _on_lost(self, stream: ReplicaStream, generations: list[Generation], suspects: frozenset[Generation]) -> None:
        """What ran there goes on elsewhere. What may be why the replica died or stalled does so alone, once: it must
        not take the replica of others with it as well."""
        self._accepting = None
        trial = self._trials.pop(stream, None)
        for request in list(self._open_requests.values()):
            if any(each.placement is not None and each.placement.stream is stream for each in request):
                self._note_use(request)
        moving: list[Generation] = []
        deadline = asyncio.get_running_loop().time() + self.limits.resume_timeout_s
        for generation in generations:
            generation.lost()
            if not generation.resumable:
                log.warning("generation cannot go on exactly", request_id=generation.request_id)
                self._counters.not_resumable += 1
                generation.fail(NotResumable())
            elif generation is trial and generation in suspects:
                log.error("generation given up", request_id=generation.request_id, resumes=generation.resumes)
                self._counters.given_up += 1
                generation.fail(GivenUp())
            elif generation in suspects:
                self._suspects.append((deadline, generation))
            else:
                moving.append(generation)
        self._counters.resumes += sum(not generation.ended for generation in generations)
        if moving:
            self._place(moving, self.limits.resume_timeout_s)
        self._try_suspects()

    def _try_suspects(self) -> None:
        """Each replica tries one at a time, until its first token; and none on which the first step of a generation
        that has lost a replica before is still under way."""
        for stream, tried in list(self._trials.items()):
            if tried.proven or tried.ended:
                del self._trials[stream]
        while self._suspects:
            if self._suspects[0][1].ended:
                self._suspects.popleft()
                continue
            free = [
                stream
                for stream in self._accepting_streams()
                if stream not in self._trials
                and not any(each.resumes and not each.proven for each in stream.generations.values())
            ]
            if not free:
                return
            stream, (_, suspect) = least_loaded(free), self._suspects.popleft()
            self._trials[stream] = suspect
            stream.submit([suspect])

    def _on_refused(self, stream: ReplicaStream, generations: list[Generation]) -> None:
        for generation in generations:  # one by one: each may have been refused elsewhere as well
            generation.refused(stream)
            self._place([generation], self.limits.hold_timeout_s)

    def _note_use(self, request: list[Generation]) -> None:
        account = request[0].account
        use = RequestUsage(
            account,
            request[0].meter,
            {each.candidate: len(each.tokens) for each in request if each.tokens},
            cached_tokens=min(sum(each.cached_tokens for each in request), account.prompt_tokens),
            resumed=sum(each.resumes for each in request),
        )
        if use.tokens:
            self._checkpoint(use.meter, use.settlement(time.time()))

    def _place(self, generations: list[Generation], hold_timeout_s: float) -> None:
        """On replicas that have not refused the first of them, or hold them until there is a replica."""
        live = self._accepting_streams()
        if not live:
            deadline = asyncio.get_running_loop().time() + hold_timeout_s
            self._own(self._hold(generations, deadline), "hold")
            return
        if self._trials:
            live = [stream for stream in live if stream not in self._trials] or live
        full = generations[0].refused_by
        candidates = [stream for stream in live if stream not in full] if full else live
        if not candidates:
            self._fail(generations, self._overloaded(live))
            return
        if len(candidates) > (drawn := max(_CANDIDATES, 2 * len(generations))):
            candidates = random.sample(candidates, drawn)
        if len(generations) == 1 or len(candidates) == 1:
            least_loaded(candidates).submit(generations)
            return
        ahead = {stream: stream.sequences for stream in candidates}
        groups: dict[ReplicaStream, list[Generation]] = {}
        for generation in generations:
            stream = min(candidates, key=ahead.__getitem__)
            ahead[stream] += 1
            groups.setdefault(stream, []).append(generation)
        for stream, group in groups.items():
            stream.submit(group)

    async def _hold(self, generations: list[Generation], deadline: float) -> None:
        while not self._accepting_streams():
            new = [generation for generation in generations if not (generation.resumes or generation.ended)]
            if not await self._wait_for_replica(len(new), sum(len(each.prompt) for each in new), deadline):
                self._fail(generations, self._not_ready())
                return
        if wanted := [generation for generation in generations if not generation.ended]:
            self._place(wanted, 0.0)

    async def _wait_for_replica(self, new: int, tokens: int, deadline: float) -> bool:
        limits = self.limits
        if new and (self._held + new > limits.max_held or self._held_tokens + tokens > limits.max_held_tokens):
            return False
        if self._held_since is None:
            self._held_since = asyncio.get_running_loop().time()
        self._held += new
        self._held_tokens += tokens
        try:
            async with asyncio.timeout_at(deadline):
                await self._became_live.wait()
        except TimeoutError:
            return False
        else:
            return True
        finally:
            self._held -= new
            self._held_tokens -= tokens
            if not self._held:
                self._held_since = None

    async def _drain(self, stream: ReplicaStream) -> None:
        await stream.drain(self.limits.drain_timeout_s)
        del self._streams[stream.replica_id]
        self._accepting = None
        if stream.replica_id in self._listed:  # again, since the drain began
            self._open(stream.replica_id)

    def _fail(self, generations: list[Generation], error: Overloaded | ModelNotReady) -> None:
        for generation in generations:
            generation.fail(error)

    def _overloaded(self, streams: list[ReplicaStream]) -> Overloaded:
        waiting = sum(stream.load.waiting for stream in streams)
        per_s = sum(stream.load.finished_per_s for stream in streams)
        # When half of what waits has been served there is room again; without a measured rate, try again soon.
        retry_after_s = waiting / 2 / per_s if per_s else 1.0
        return Overloaded(
            f"The model {self.model} has no free capacity. Retry after the seconds in Retry-After.",
            retry_after_s=min(max(retry_after_s, 1.0), 60.0),
        )

    def _not_ready(self) -> ModelNotReady:
        waited_s = 0.0 if self._held_since is None else asyncio.get_running_loop().time() - self._held_since
        # What is left of a start that takes as long as the last; a quarter of it when that has passed already.
        left_s = max(self._cold_start_s - waited_s, self._cold_start_s / 4) if self._cold_start_s else 10.0
        return ModelNotReady(
            f"No replica of the model {self.model} is up. Retry after the seconds in Retry-After.",
            retry_after_s=max(left_s, 1.0),
        )

    def _own(self, work: Coroutine[Any, Any, None], name: str) -> None:
        # In a context of its own: when a client leaves, Serve cancels the calls made in its request's context, and
        # these would be among them, be it the abort that frees the engine.
        task = asyncio.create_task(work, name=f"{self.model}-{name}", context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task failed", task=task.get_name(), exc_info=error)
