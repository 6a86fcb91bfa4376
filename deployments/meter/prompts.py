"""The prompts of a request as token ids that fit into its model's context, or why they do not."""

from __future__ import annotations

from deployments.contracts import AdmissionRefused, AdmissionRequest, PromptOptions
from deployments.meter.catalogue import CatalogueEntry
from deployments.meter.errors import TokenOutOfVocabulary

__all__ = ["encode_prompts"]


async def encode_prompts(entry: CatalogueEntry, request: AdmissionRequest) -> list[list[int]] | AdmissionRefused:
    """One list per prompt, none empty, each with room for `max_tokens`.

    Raises MeterBusy when too many long prompts wait, TokenizerUnavailable when the model's files are unusable.
    """
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
    return token_ids


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
