"""Clients that stream all the while, through the proxies of several hosts, and check each answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from tests.rehearsal.pods import Pod
from tests.streaming import Streamed, StreamFailed, stream

__all__ = ["Load", "Request"]

_WORDS = ["river", "stone", "light", "engine", "cloud", "paper", "winter", "bridge", "signal", "garden"]
_BACK_OFF_S = 0.5


@dataclass
class Request:
    """One, as its client saw it; times are of the event loop, in seconds."""

    pod: str
    """Whose proxy it went through."""
    begun: float
    completion_id: str = ""
    """Once something of it has come."""
    received_tokens: int = 0
    ended: float | None = None
    error: str | None = None


class Load:
    """A number of clients, each with one stream after the other."""

    def __init__(
        self, client: Callable[[Pod], httpx.AsyncClient], pods: Callable[[], list[Pod]], model: str, tokens: int
    ) -> None:
        """`pods` tells those whose proxies take requests now, of which each client has one."""
        source = random.Random(1)
        self._prompts = [" ".join(source.choices(_WORDS, k=source.randint(3, 40))) for _ in range(32)]
        self._client = client
        self._pods = pods
        self._model = model
        self.tokens = tokens
        self._right: list[str] = []
        self._clients: list[asyncio.Task[None]] = []
        self._leaving: list[asyncio.Event] = []
        self.requests: list[Request] = []

    async def learn(self) -> None:
        """What the answers are when nothing happens."""
        async with self._client(self._pods()[0]) as client:
            answers = await asyncio.gather(*(self._stream(client, prompt) for prompt in self._prompts))
        self._right = [answer.text for answer in answers]

    async def resize(self, clients: int) -> None:
        """Those that leave finish their streams first."""
        while len(self._clients) < clients:
            leaving = asyncio.Event()
            number = len(self._clients)
            self._clients.append(asyncio.create_task(self._run(number, leaving)))
            self._leaving.append(leaving)
        for leaving in self._leaving[clients:]:
            leaving.set()
        await asyncio.gather(*self._clients[clients:])
        del self._clients[clients:], self._leaving[clients:]

    async def stop(self) -> None:
        """At once; streams that are open break."""
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    def open(self) -> list[Request]:
        return [request for request in self.requests if request.ended is None]

    async def streaming(self) -> list[Request]:
        """The open ones, once most are in the middle of their streams."""
        async with asyncio.timeout(60.0):
            while True:
                begun = [request for request in self.open() if 0.1 < request.received_tokens / self.tokens < 0.8]
                if len(begun) > 0.8 * len(self._clients):
                    return begun
                await asyncio.sleep(0.02)

    async def until_finished(self, requests: list[Request], limit_s: float = 180.0) -> None:
        async with asyncio.timeout(limit_s):
            while any(request.ended is None for request in requests):  # noqa: ASYNC110  # many, of which the last counts
                await asyncio.sleep(0.1)

    async def rounds(self, number: int = 1) -> None:
        """Until every client has finished so many streams that began later than now."""
        for _ in range(number):
            await self.until_finished(self.open())

    async def _run(self, number: int, leaving: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        turn = number
        while not leaving.is_set():
            turn += 1
            pods = self._pods()
            pod = pods[number % len(pods)]
            prompt = turn % len(self._prompts)
            request = Request(pod.name, loop.time())
            self.requests.append(request)
            try:
                async with self._client(pod) as client:
                    answer = await self._stream(client, self._prompts[prompt], request)
                if (answer.text, answer.completion_tokens) != (self._right[prompt], self.tokens):
                    request.error = f"wrong answer: {answer}"
            except (httpx.HTTPError, StreamFailed) as error:
                request.error = f"{type(error).__name__}: {error}"
            request.ended = loop.time()
            if request.error is not None:
                await asyncio.sleep(_BACK_OFF_S)  # as clients do

    async def _stream(self, client: httpx.AsyncClient, prompt: str, request: Request | None = None) -> Streamed:
        def arrived(chunk: dict[str, Any]) -> None:
            if request is not None:
                request.completion_id = chunk["id"]
                request.received_tokens = chunk["usage"]["completion_tokens"]

        return await stream(
            client,
            arrived,
            model=self._model,
            prompt=prompt,
            max_tokens=self.tokens,
            temperature=0,
            ignore_eos=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
