"""What clients made for other servers send with every request. None of it has an effect: the first of them change
nothing without what they belong to, the others are refused unless they have the value that changes nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from deployments.ingress.api.parameter_types import NotServed, Source
from deployments.ingress.http.json_body import Body

__all__ = ["ForeignParameters"]

_OPENAI = Source("OpenAI")
_WEBUI = Source("text-generation-webui")
_LLAMA_CPP = Source("llama.cpp")


class ForeignParameters(Body):
    mirostat_tau: Annotated[float | None, _LLAMA_CPP] = None
    """Of no effect without `mirostat`, which is not served."""
    mirostat_eta: Annotated[float | None, _LLAMA_CPP] = None
    """Of no effect without `mirostat`, which is not served."""
    xtc_threshold: Annotated[float | None, _WEBUI] = None
    """Of no effect without `xtc_probability`, which is not served."""
    dry_base: Annotated[float | None, _WEBUI] = None
    """Of no effect without `dry_multiplier`, which is not served."""
    dry_allowed_length: Annotated[float | None, _WEBUI] = None
    """Of no effect without `dry_multiplier`, which is not served."""
    dry_penalty_last_n: Annotated[float | None, _LLAMA_CPP] = None
    """Of no effect without `dry_multiplier`, which is not served."""
    smoothing_curve: Annotated[float | None, _WEBUI] = None
    """Of no effect without `smoothing_factor`, which is not served."""
    dynatemp_low: Annotated[float | None, _WEBUI] = None
    """Of no effect without `dynamic_temperature`, which is not served."""
    dynatemp_high: Annotated[float | None, _WEBUI] = None
    """Of no effect without `dynamic_temperature`, which is not served."""
    dynatemp_exponent: Annotated[float | None, _WEBUI] = None
    """Of no effect without `dynamic_temperature`, which is not served."""
    cache_prompt: Annotated[bool | None, _LLAMA_CPP] = None
    """Of no effect: the engine keeps prompts as the operator has set."""
    metadata: Annotated[dict[str, str] | None, Field(max_length=16), _OPENAI] = None
    """Of no effect: nothing of a request is kept."""
    service_tier: Annotated[Literal["auto", "default"] | None, _OPENAI] = None
    """Of no effect: there is one tier."""
    early_stopping: Annotated[
        bool | None, NotServed("it belongs to beam search, which is not supported", neutral=False), _WEBUI
    ] = None
    num_beams: Annotated[
        int | None, NotServed("beam search is not supported; use n and best_of", neutral=1), _WEBUI
    ] = None
    do_sample: Annotated[bool | None, NotServed("use temperature 0", neutral=True), _WEBUI] = None
    max_new_tokens: Annotated[None, NotServed("use max_tokens"), _WEBUI] = None
    auto_max_new_tokens: Annotated[bool | None, NotServed("use max_tokens", neutral=False), _WEBUI] = None
    max_tokens_second: Annotated[int | None, NotServed("tokens per second are not throttled", neutral=0), _WEBUI] = None
    min_length: Annotated[int | None, NotServed("use min_tokens", neutral=0), _WEBUI] = None
    typical_p: Annotated[float | None, NotServed("the engines have no typical sampling", neutral=1.0), _WEBUI] = None
    tfs: Annotated[float | None, NotServed("the engines have no tail-free sampling", neutral=1.0), _WEBUI] = None
    tfs_z: Annotated[float | None, NotServed("the engines have no tail-free sampling", neutral=1.0), _LLAMA_CPP] = None
    top_a: Annotated[float | None, NotServed("the engines have no top-a sampling; use min_p", neutral=0.0), _WEBUI] = (
        None
    )
    top_n_sigma: Annotated[float | None, NotServed("the engines have no top-n-sigma sampling", neutral=0.0), _WEBUI] = (
        None
    )
    epsilon_cutoff: Annotated[
        float | None, NotServed("the engines have no epsilon cutoff; use min_p", neutral=0.0), _WEBUI
    ] = None
    eta_cutoff: Annotated[float | None, NotServed("the engines have no eta cutoff; use min_p", neutral=0.0), _WEBUI] = (
        None
    )
    smoothing_factor: Annotated[
        float | None, NotServed("the engines have no quadratic sampling", neutral=0.0), _WEBUI
    ] = None
    dynamic_temperature: Annotated[
        bool | None, NotServed("the temperature is the same for all tokens", neutral=False), _WEBUI
    ] = None
    dynatemp_range: Annotated[
        float | None, NotServed("the temperature is the same for all tokens", neutral=0.0), _LLAMA_CPP
    ] = None
    temperature_last: Annotated[bool | None, NotServed("the order of the samplers is fixed", neutral=False), _WEBUI] = (
        None
    )
    sampler_priority: Annotated[str | None, NotServed("the order of the samplers is fixed", neutral=""), _WEBUI] = None
    xtc_probability: Annotated[
        float | None, NotServed("the engines cannot exclude top choices", neutral=0.0), _WEBUI
    ] = None
    dry_multiplier: Annotated[
        float | None,
        NotServed("the engines have no DRY; use repetition_penalty or repetition_detection", neutral=0.0),
        _WEBUI,
    ] = None
    repeat_penalty: Annotated[float | None, NotServed("use repetition_penalty", neutral=1.0), _LLAMA_CPP] = None
    encoder_repetition_penalty: Annotated[
        float | None, NotServed("the engines do not favour the tokens of the prompt", neutral=1.0), _WEBUI
    ] = None
    no_repeat_ngram_size: Annotated[
        int | None, NotServed("the engines do not ban n-grams; use repetition_detection", neutral=0), _WEBUI
    ] = None
    penalty_alpha: Annotated[float | None, NotServed("the engines have no contrastive search", neutral=0.0), _WEBUI] = (
        None
    )
    guidance_scale: Annotated[
        float | None, NotServed("the engines have no classifier-free guidance", neutral=1.0), _WEBUI
    ] = None
    negative_prompt: Annotated[
        str | None, NotServed("the engines have no classifier-free guidance", neutral=""), _WEBUI
    ] = None
    mirostat: Annotated[int | None, NotServed("the engines have no Mirostat", neutral=0), _LLAMA_CPP] = None
    mirostat_mode: Annotated[int | None, NotServed("the engines have no Mirostat", neutral=0), _WEBUI] = None
    add_bos_token: Annotated[bool | None, NotServed("use add_special_tokens", neutral=True), _WEBUI] = None
    ban_eos_token: Annotated[bool | None, NotServed("use ignore_eos", neutral=False), _WEBUI] = None
    custom_token_bans: Annotated[str | None, NotServed("use bad_words or logit_bias", neutral=""), _WEBUI] = None
    banned_strings: Annotated[str | None, NotServed("use bad_words", neutral=""), _WEBUI] = None
    stopping_strings: Annotated[str | None, NotServed("use stop", neutral=""), _WEBUI] = None
    grammar_string: Annotated[str | None, NotServed("use structured_outputs with grammar", neutral=""), _WEBUI] = None
    grammar: Annotated[str | None, NotServed("use structured_outputs with grammar", neutral=""), _LLAMA_CPP] = None
    json_schema: Annotated[None, NotServed("use response_format or structured_outputs"), _LLAMA_CPP] = None
    truncation_length: Annotated[int | None, NotServed("use truncate_prompt_tokens", neutral=0), _WEBUI] = None
    n_predict: Annotated[int | None, NotServed("use max_tokens", neutral=-1), _LLAMA_CPP] = None
    n_probs: Annotated[int | None, NotServed("use logprobs", neutral=0), _LLAMA_CPP] = None
    n_keep: Annotated[int | None, NotServed("use truncate_prompt_tokens", neutral=0), _LLAMA_CPP] = None
    id_slot: Annotated[int | None, NotServed("requests have no slots", neutral=-1), _LLAMA_CPP] = None
    timings_per_token: Annotated[bool | None, NotServed("times are not told", neutral=False), _LLAMA_CPP] = None
    store: Annotated[bool | None, NotServed("nothing of a request is kept", neutral=False), _OPENAI] = None
    repetition_penalty_range: Annotated[
        int | None, NotServed("repetition_penalty is over all tokens", neutral=0), _WEBUI
    ] = None
    repeat_last_n: Annotated[int | None, NotServed("repetition_penalty is over all tokens", neutral=-1), _LLAMA_CPP] = (
        None
    )
