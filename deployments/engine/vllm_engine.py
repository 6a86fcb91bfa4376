"""The real engine: vLLM's AsyncLLM behind the engine contract.

Token ids go in and token ids come out (`SamplingParams(detokenize=False)`), so that GPU nodes do GPU work. vLLM is
imported when the engine starts, because importing it takes seconds and reads the environment set just before.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from deployments.contracts import EngineLoad, FinishReason, PositionLogprobs, RepetitionDetection, Sampling
from deployments.engine.engine import Deliver, EngineQueueFull, EngineUnhealthy
from deployments.engine.settings import VllmSettings
from deployments.engine.step_times import StepTimes

__all__ = ["VllmEngine"]

log = structlog.get_logger()


_MANY_TOKEN_IDS = 512
_EVERYTHING_ASKED = (
    Sampling(max_tokens=2, grammar="start: /(?s:.*)/"),  # which every output has
    Sampling(max_tokens=2, temperature=0.0, logprobs=1, prompt_logprobs=1),
    Sampling(max_tokens=2, logprob_token_ids=(0, 1)),
    Sampling(max_tokens=2, seed=1, top_k=2, top_p=0.9, min_p=0.1, logit_bias={0: 1.0}, allowed_token_ids=(0, 1)),
    Sampling(
        max_tokens=2,
        min_tokens=1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        repetition_penalty=1.1,
        stop_token_ids=(0,),
        bad_words=("a",),
        repetition_detection=RepetitionDetection(2, 1, 2),
    ),
)
"""Together they ask for whatever the steps of a generation may do beside the model's own work."""


class VllmEngine:
    """One AsyncLLM with its engine core in child processes."""

    def __init__(
        self, settings: VllmSettings, model: Path, *, served_model_name: str, max_waiting: int, stall_timeout_s: float
    ) -> None:
        """`model`: the prepared folder; `served_model_name` labels vLLM's metrics."""
        self.max_num_seqs = settings.max_num_seqs
        self.step_times = StepTimes()
        self._settings = settings
        self._model = model
        self._served_model_name = served_model_name
        self._max_generations = settings.max_num_seqs + max_waiting
        self._stall_timeout_s = stall_timeout_s
        self.on_death: Callable[[], None] = lambda: None
        self._death_told = False
        self._engine: Any = None
        self._gauge: Any = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._prefill_tokens: dict[str, int] = {}
        self._costly = asyncio.Lock()

    async def start(self) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a local folder
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self._settings.kv_cache_gib))
        # Replicas that share a machine must not all bind their threads to the same cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import AsyncEngineArgs, AsyncLLMEngine
        from vllm.config import StructuredOutputsConfig
        from vllm.platforms import current_platform

        from deployments.engine._vllm_cpu_worker import worker_class
        from deployments.engine._vllm_executor import executor_for
        from deployments.engine._vllm_stats import EngineGauge, stat_loggers

        settings = self._settings
        if settings.enforce_eager and current_platform.is_cpu():
            # Nor what vLLM compiles beside the model, for log probabilities: a CPU image has no compiler.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        arguments = AsyncEngineArgs(
            model=str(self._model),
            served_model_name=self._served_model_name,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
            distributed_executor_backend=executor_for(settings.tensor_parallel_size * settings.pipeline_parallel_size),
            worker_cls=worker_class(),
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enforce_eager=settings.enforce_eager,
            enable_prefix_caching=settings.enable_prefix_caching,
            scheduling_policy=settings.scheduling_policy,
            # The ingress checks constraints with llguidance and hands on its grammars (ingress/constraints/grammar.py).
            # Left to itself vLLM chooses by the first request, and holds later ones by what that happened to be.
            structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
            disable_log_stats=True,
        )
        gauge = EngineGauge(self.step_times)
        loggers = stat_loggers(gauge)
        # Loads weights and waits for child processes; the event loop must go on answering Serve meanwhile.
        self._engine = await asyncio.to_thread(AsyncLLMEngine.from_engine_args, arguments, stat_loggers=loggers)
        await self._warm_up()
        self._gauge = gauge

    def submit(
        self, key: str, token_ids: list[int], sampling: Sampling, deliver: Deliver, *, resumed: bool = False
    ) -> None:
        if len(self._tasks) >= self._max_generations and not resumed:
            raise EngineQueueFull(f"{len(self._prefill_tokens)} generations wait already")
        if not self._tasks and self._gauge is not None:
            self._gauge.work_begins()
        self._prefill_tokens[key] = len(token_ids)
        task = asyncio.create_task(self._generate(key, token_ids, sampling, deliver), name=f"generate-{key}")
        self._tasks[key] = task

    def abort(self, key: str) -> None:
        task = self._tasks.pop(key, None)
        if task is not None:
            self._prefill_tokens.pop(key, None)
            task.cancel()  # AsyncLLM.generate aborts the request when it is cancelled

    def load(self) -> EngineLoad:
        waiting = len(self._prefill_tokens)
        return EngineLoad(
            running=len(self._tasks) - waiting,
            waiting=waiting,
            waiting_prefill_tokens=sum(self._prefill_tokens.values()),
            kv_blocks_free=self._gauge.blocks_free if self._gauge else 0,
            kv_blocks_total=self._gauge.blocks_total if self._gauge else 0,
            kv_block_tokens=self._gauge.block_tokens if self._gauge else 0,
        )

    async def check_health(self) -> None:
        if self._engine is None:
            return
        if self._engine.errored:
            raise EngineUnhealthy("vLLM's engine core has died")
        try:
            # `is_sleeping` is answered by the engine core between two steps: a busy core answers within a step, a
            # hung one never, while AsyncLLM.check_health only knows whether the core's process has ended.
            async with asyncio.timeout(self._stall_timeout_s):
                await self._engine.is_sleeping()
        except TimeoutError:
            raise EngineUnhealthy(f"vLLM's engine core gave no answer for {self._stall_timeout_s:g} s") from None
        except Exception as error:  # it died after the look at `errored`
            raise EngineUnhealthy("vLLM's engine core has died") from error

    async def shutdown(self) -> None:
        aborted = list(self._tasks.values())
        for key in list(self._tasks):
            self.abort(key)
        if aborted:  # each sends its abort before the engine goes away beneath it
            await asyncio.wait(aborted, timeout=1.0)
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await asyncio.to_thread(engine.shutdown)

    async def _warm_up(self) -> None:
        """Do now what vLLM would do at the first request that asks for it, in a step that others wait for: compile what
        counts ranks for log probabilities (half a minute on a machine that has never done it), import what compiles
        grammars, and read the tokenizer's vocabulary for it."""
        for alone in _EVERYTHING_ASKED:
            await self._generated_at_once([alone])
        await self._generated_at_once(_EVERYTHING_ASKED)  # steps of several are compiled for themselves

    async def _generated_at_once(self, samplings: Sequence[Sampling]) -> None:
        from vllm.inputs import tokens_input

        async def generated(number: int, sampling: Sampling) -> None:
            prompt = tokens_input([0, 1, 0])
            async for _ in self._engine.generate(prompt, _sampling_params(sampling), request_id=f"warm-up-{number}"):
                pass

        async with asyncio.TaskGroup() as group:
            for number, sampling in enumerate(samplings):
                group.create_task(generated(number, sampling))

    def _tell_death(self) -> None:
        if not self._death_told:  # every generation notices it
            self._death_told = True
            self.on_death()

    async def _generate(self, key: str, token_ids: list[int], sampling: Sampling, deliver: Deliver) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        finished = False
        try:
            if sampling.bad_words or len(sampling.allowed_token_ids or ()) > _MANY_TOKEN_IDS:
                # vLLM takes milliseconds to tokenize or copy these: one choice in each turn of the event loop.
                async with self._costly:
                    await asyncio.sleep(0)
            outputs = self._engine.generate(
                tokens_input(token_ids, cache_salt=sampling.cache_salt),
                _sampling_params(sampling),
                request_id=key,
                priority=sampling.priority,
            )
            async for output in outputs:
                choice = output.outputs[0]
                finish_reason: FinishReason | None = None
                if output.finished:
                    finished = True
                    finish_reason = _finish_reason(choice.finish_reason, choice.stop_reason, bool(choice.token_ids))
                    self._tasks.pop(key, None)
                first = self._prefill_tokens.pop(key, None) is not None
                deliver(
                    list(choice.token_ids),
                    finish_reason,
                    cached_tokens=(output.num_cached_tokens or 0) if first else 0,
                    logprobs=choice.logprobs and [_position(likely) for likely in choice.logprobs if likely],
                    # Told once; later outputs have an empty list.
                    prompt_logprobs=_positions(output.prompt_logprobs) if output.prompt_logprobs else None,
                )
        except Exception as error:
            if not self._engine or self._engine.errored:
                self._tell_death()  # not this generation failed but the whole engine: it resumes on another replica
                return
            if isinstance(error, VLLMClientError):
                log.info("generation refused", generation=key, reason=str(error))
                deliver([], "refused", message=_reason(error), param=_parameter(error))
                return
            log.exception("generation failed", generation=key)
            if not finished:
                deliver([], "failed", message=type(error).__name__)
        finally:
            self._tasks.pop(key, None)
            self._prefill_tokens.pop(key, None)


def _sampling_params(sampling: Sampling) -> Any:
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

    from deployments.engine._vllm_sampling import CheckedSamplingParams

    detection = sampling.repetition_detection
    return CheckedSamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        # Of a long prompt, a third of the time that objects for each token take, on the event loop.
        flat_logprobs=sampling.prompt_logprobs is not None,
        logprob_token_ids=None if sampling.logprob_token_ids is None else list(sampling.logprob_token_ids),
        logit_bias=sampling.logit_bias,
        allowed_token_ids=None if sampling.allowed_token_ids is None else list(sampling.allowed_token_ids),
        bad_words=list(sampling.bad_words),
        structured_outputs=None if sampling.grammar is None else StructuredOutputsParams(grammar=sampling.grammar),
        repetition_detection=None
        if detection is None
        else RepetitionDetectionParams(**msgspec.structs.asdict(detection)),
        stream_interval=sampling.stream_interval,
        extra_args=sampling.extra_args,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _position(likely: dict[int, Any]) -> PositionLogprobs:
    """From vLLM's `{token id: Logprob}`, the token that is there first."""
    return PositionLogprobs(
        tuple(likely), tuple([each.logprob for each in likely.values()]), tuple([each.rank for each in likely.values()])
    )


def _positions(told: Any) -> list[PositionLogprobs | None]:
    """From vLLM's FlatLogprobs of a prompt, which name a token twice where the one that is there is likely."""
    positions: list[PositionLogprobs | None] = []
    for begin, end in zip(told.start_indices, told.end_indices, strict=True):
        if begin == end:
            positions.append(None)
            continue
        token_ids, ranks = told.token_ids[begin:end], told.ranks[begin:end]
        logprobs = told.logprobs[begin:end]
        if token_ids[0] in token_ids[1:]:
            twice = token_ids.index(token_ids[0], 1)
            ranks[0] = ranks[twice]
            for each in (token_ids, ranks, logprobs):
                del each[twice]
        positions.append(PositionLogprobs(tuple(token_ids), tuple(logprobs), tuple(ranks)))
    return positions


def _parameter(error: Exception) -> str | None:
    """Of a request, that vLLM refuses: by its name in the API."""
    parameter: str | None = getattr(error, "parameter", None)
    return "vllm_xargs" if parameter == "extra_args" else parameter


_SOURCE_LOCATION = re.compile(r"\[[\d:]+\]\s*|\S*/\S+?:\d+:?\s*")


def _reason(error: Exception) -> str:
    """What vLLM says of a request it refuses, without the places in source code that grammar compilers put in."""
    return _SOURCE_LOCATION.sub("", str(error.args[0] if error.args else error))[:500]


def _finish_reason(reason: str | None, stop_reason: int | str | None, has_tokens: bool) -> FinishReason:
    """vLLM's word for the end of a generation in ours. Without stop strings `stop` means a token, the last: one of
    stop_token_ids, which it names, or the end of text."""
    match reason:
        case "length":
            return "length"
        case "stop" if has_tokens:
            return "end_of_text" if stop_reason is None else "stop_token"
        case "stop":
            return "stop"
        case "repetition":
            return "repetition"
        case _:
            return "failed"
