"""The meter: admits requests, in tokens, and accounts for what they used. Free of Ray and HTTP.

Tokenizing and reserving are one step, so that every later limit is exact and holds before any engine works.
The ledger alone decides what was used; reservations only say what may still be.

Coupled with deployments/ingress/meter_client.py through contracts.AdmissionRequest and contracts.Settlement.
"""

from __future__ import annotations

from collections.abc import Iterable

from deployments.contracts import AdmissionRefused, AdmissionRequest, Admitted, KeyInfo, PromptOptions, Settlement
from deployments.meter.catalogue import Catalogue, MeteredModel
from deployments.meter.errors import TokenOutOfVocabulary
from deployments.meter.keys import Authenticator
from deployments.meter.ledger import Ledger
from deployments.meter.reservations import Reservation, Reservations
from deployments.meter.worker_threads import WorkerThreads

__all__ = ["Meter"]


class Meter:
    """All methods run on one event loop; none holds it for longer than a short prompt takes to encode."""

    def __init__(
        self,
        ledger: Ledger,
        keys: Authenticator,
        *,
        reservations: Reservations | None = None,
        tokenizer_threads: int = 2,
        max_waiting_prompts: int = 256,
    ) -> None:
        """`max_waiting_prompts` bounds the requests whose long prompts wait for one of `tokenizer_threads`."""
        self._ledger = ledger
        self._keys = keys
        self._reservations = Reservations() if reservations is None else reservations
        self._threads = WorkerThreads("tokenizer", threads=tokenizer_threads, max_waiting=max_waiting_prompts)
        self._catalogue = Catalogue(self._threads)

    def set_models(self, models: Iterable[MeteredModel]) -> None:
        """Admits requests for exactly these models from now on. Requests that are being admitted go on."""
        self._catalogue.set_models(models)

    def authenticate(self, digest: bytes) -> KeyInfo | None:
        """Whose key has this SHA-256; None for nobody's."""
        return self._keys.authenticate(digest)

    async def admit(self, request: AdmissionRequest) -> Admitted | AdmissionRefused:
        """Tokenizes, checks and reserves; the reservation lasts until the request is settled.

        Asking again for the same request is safe. Raises MeterBusy when too much waits, TokenizerUnavailable
        when the model's files are unusable.
        """
        entry = self._catalogue.find(request.model)
        if entry is None:
            return AdmissionRefused("model_not_found", f"The model `{request.model}` does not exist.", param="model")
        max_model_len, options = entry.model.max_model_len, request.options
        prompts = request.prompts
        keep = options.truncate_prompt_tokens
        if keep == -1:
            keep = max(1, max_model_len - request.max_tokens)
        if keep is not None:
            prompts = [_truncated(prompt, keep, options) if isinstance(prompt, list) else prompt for prompt in prompts]
        # Before their ids are looked at: megabytes of them would hold the event loop.
        for prompt in prompts:
            if isinstance(prompt, list) and len(prompt) + request.max_tokens > max_model_len:
                return _context_exceeded(max_model_len, len(prompt), request.max_tokens)
        try:
            token_ids = await entry.tokenizer.encode(prompts, add_special_tokens=options.add_special_tokens)
        except TokenOutOfVocabulary as error:
            return AdmissionRefused("token_out_of_vocabulary", str(error), param="prompt")
        if keep is not None:
            token_ids = [_truncated(ids, keep, options) for ids in token_ids]
        lengths = [len(ids) for ids in token_ids]
        if not all(lengths):
            return AdmissionRefused(
                "empty_prompt",
                "The prompt is empty: expected at least one token in each prompt.",
                param="prompt",
            )
        if max(lengths) + request.max_tokens > max_model_len:
            return _context_exceeded(max_model_len, max(lengths), request.max_tokens)
        self._reservations.reserve(
            request.request_id,
            Reservation(
                key_id=request.key_id,
                model=request.model,
                prompt_tokens=sum(lengths),
                completion_tokens=len(lengths) * request.choices * request.max_tokens,
            ),
        )
        return Admitted(token_ids)

    async def settle(self, settlements: list[Settlement]) -> None:
        """Returns once all are durable in the ledger; then their reservations are gone. Raises as Ledger.record."""
        await self._ledger.record(settlements)
        for settlement in settlements:
            self._reservations.release(settlement.request_id)

    @property
    def open_reservations(self) -> int:
        """Requests admitted and not yet settled."""
        return len(self._reservations)

    async def check_reachable(self) -> None:
        """Raises LedgerUnavailable unless the ledger's database answers."""
        await self._ledger.check_reachable()

    @property
    def closed(self) -> bool:
        return self._ledger.closed

    async def close(self) -> None:
        """Stops tokenizing, writes the settlements that wait, closes the ledger. Safe twice."""
        self._threads.close()
        await self._ledger.close()


def _truncated(token_ids: list[int], keep: int, options: PromptOptions) -> list[int]:
    return token_ids[:keep] if options.truncation_side == "right" else token_ids[-keep:]


def _context_exceeded(max_model_len: int, prompt_tokens: int, max_tokens: int) -> AdmissionRefused:
    """In the words that OpenAI used for its completions models, which clients search for."""
    return AdmissionRefused(
        "context_length_exceeded",
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt; {max_tokens} for the "
        "completion). Please reduce the prompt or max_tokens.",
        param="prompt",
    )
