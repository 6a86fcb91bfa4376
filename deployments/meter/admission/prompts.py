"""The prompts of a request as token ids that fit into its model's context, or why they do not."""

from __future__ import annotations

from typing import Final

from deployments.contracts import AdmissionRequest, owner_of
from deployments.meter.admission.model_catalog import CatalogueEntry
from deployments.meter.admission.tokenizer import Truncation
from deployments.meter.errors import NotAdmitted, OwnerBusy, PromptTooLong, TextTooLong, TokenOutOfVocabulary

__all__ = ["MAX_PROMPT_TOKENS", "encode_prompts"]

MAX_PROMPT_TOKENS: Final = 2**20
"""Over all prompts of a request, each counted once for every choice that is generated from it: engines keep, hash and
check them once for each."""


async def encode_prompts(entry: CatalogueEntry, request: AdmissionRequest) -> list[list[int]]:
    """One list per prompt, none empty, each with room for `max_tokens`.

    Raises NotAdmitted, MeterBusy when too many long prompts wait, TokenizerUnavailable when the model's files are
    unusable.
    """
    max_model_len, options = entry.model.max_model_len, request.options
    prompts = request.prompts
    room = max_model_len - request.max_tokens
    truncation = None
    if (keep := options.truncate_prompt_tokens) is not None:
        truncation = Truncation(max(1, room) if keep == -1 else keep, options.truncation_side)
        prompts = [truncation.cut(prompt) if isinstance(prompt, list) else prompt for prompt in prompts]
    # Before their ids are looked at: megabytes of them would hold the event loop.
    _check_multiplied(request, [len(prompt) for prompt in prompts if isinstance(prompt, list)])
    for prompt in prompts:
        if isinstance(prompt, list) and len(prompt) > room:
            raise _context_exceeded(max_model_len, len(prompt), request.max_tokens)
    try:
        token_ids = await entry.tokenizer.encode(
            prompts,
            add_special_tokens=options.add_special_tokens,
            truncation=truncation,
            at_most=max(0, min(room, MAX_PROMPT_TOKENS // request.choices)),
            owner=owner_of(request.key_id, request.team),
        )
    except TokenOutOfVocabulary as error:
        raise NotAdmitted("token_out_of_vocabulary", str(error), param="prompt") from None
    except PromptTooLong as long:
        if long.tokens <= room:
            _check_multiplied(request, [long.tokens])
        raise _context_exceeded(max_model_len, long.tokens, request.max_tokens, exact=long.exact) from None
    except TextTooLong as long_text:
        raise NotAdmitted("too_many_prompt_tokens", str(long_text), param="prompt") from None
    except OwnerBusy as busy:
        whose = "this key" if request.team is None else f"the team {request.team}"
        raise NotAdmitted(
            "rate_limit_exceeded",
            f"Too many long prompts of {whose} wait to be tokenized: {busy.limit} at most. Please send fewer at a "
            "time.",
            retry_after_s=busy.retry_after_s,
        ) from None
    lengths = [len(ids) for ids in token_ids]
    if not all(lengths):
        which = "The prompt" if len(lengths) == 1 else f"Prompt {lengths.index(0)}"
        raise NotAdmitted(
            "empty_prompt",
            f"{which} is empty; expected at least one token in each prompt.",
            param="prompt",
        )
    if max(lengths) > room:
        raise _context_exceeded(max_model_len, max(lengths), request.max_tokens)
    _check_multiplied(request, lengths)
    return token_ids


def _check_multiplied(request: AdmissionRequest, lengths: list[int]) -> None:
    tokens = sum(lengths) * request.choices
    if tokens > MAX_PROMPT_TOKENS:
        raise NotAdmitted(
            "too_many_prompt_tokens",
            f"{len(lengths)} prompts of {sum(lengths)} tokens, with {request.choices} choices generated for each, make "
            f"{tokens} prompt tokens; at most {MAX_PROMPT_TOKENS} in one request. Send fewer prompts at a time, or "
            "make n (or best_of) smaller.",
            param="n" if request.choices > 1 else "prompt",
        )


def _context_exceeded(max_model_len: int, prompt_tokens: int, max_tokens: int, *, exact: bool = True) -> NotAdmitted:
    """In the words that OpenAI used for its completions models, which clients search for."""
    least = "" if exact else "at least "
    return NotAdmitted(
        "context_length_exceeded",
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{least}{prompt_tokens + max_tokens} tokens ({least}{prompt_tokens} in the prompt; {max_tokens} for the "
        "completion). Please reduce the prompt or max_tokens.",
        param="prompt",
    )
