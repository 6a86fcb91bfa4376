"""The body of a completion request: parsed, checked to the last key, and turned into what the engines take.

Names, defaults and ranges are those of OpenAI's Completions reference, and of vLLM 0.32's CompletionRequest for its
extras; docs/api.md and the OpenAPI document are made from the fields below. Dialects (dialects.py) narrow some of them.
"""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Final, Literal, Self, TypeVar

from pydantic import Field, model_validator

from deployments.contracts import Constraint, PromptOptions, RepetitionDetection, Sampling
from deployments.ingress.api.foreign_parameters import ForeignParameters
from deployments.ingress.api.parameter_types import (
    MAX_MODEL_NAME,
    AllowedTokenIds,
    BadWords,
    ExtraArguments,
    LogitBias,
    LogprobTokenIds,
    NotServed,
    Prompts,
    Source,
    Stops,
    StopTokenIds,
)
from deployments.ingress.constraints.constraint import (
    MAX_CONSTRAINT_BYTES,
    MAX_CONSTRAINT_BYTES_OF_ALL,
    ConstraintText,
    GivenConstraint,
    JsonSchemaOrText,
    Labels,
    ResponseFormat,
    StructuredOutputsOptions,
    json_constraint,
)
from deployments.ingress.errors import InvalidRequest
from deployments.ingress.http.json_body import INT32_MAX, MAX_PROMPTS, Body, parse_body
from deployments.ingress.inference.request import NO_SEED, InferenceRequest
from deployments.ingress.inference.text_stream import TextOptions

__all__ = ["CompletionRequest", "RepetitionDetectionOptions", "StreamOptions", "parse_completion_request"]

_MAX_GENERATIONS = MAX_PROMPTS
"""Prompts times the choices generated for each."""

_MAX_BAD_WORD_CHARACTERS: Final = 2048
"""vLLM tokenizes them for each choice, at 2 to 5 us a character."""
_MAX_REPEATED: Final = {"bad_words": 2048, "allowed_token_ids": 2**18, "logit_bias": 2**18}
"""Entries times choices: what the engine is told of each choice."""

_SMALLEST_TOP_P = 1e-9
"""Stands for 0, which OpenAI allows and vLLM does not: only the likeliest token is left."""

_OPENAI = Source("OpenAI")
_VLLM = Source("vLLM")
_OLDER_VLLM = Source("older vLLM")


class StreamOptions(Body):
    include_usage: Annotated[bool | None, _OPENAI] = False
    """One more chunk before `[DONE]` has the usage and no choices; all others have `usage: null`."""
    continuous_usage_stats: Annotated[bool | None, _VLLM] = False
    """With `include_usage`: every chunk has the usage of its choice so far."""
    include_obfuscation: Annotated[bool | None, _OPENAI] = False
    """Every chunk has a field `obfuscation` of random letters, which makes its length a multiple of 256 bytes. Who sees
    the sizes of encrypted packets cannot tell the lengths of the texts by them."""


class RepetitionDetectionOptions(Body):
    """Patterns are sequences of tokens."""

    max_pattern_size: int = Field(default=0, ge=0, le=4096)
    """Longest pattern to look for; 0 looks for none."""
    min_pattern_size: int = Field(default=0, ge=0, le=4096)
    """Shortest pattern; 0 stands for 1. At most `max_pattern_size`."""
    min_count: int = Field(default=0, ge=0, le=INT32_MAX)
    """Times a pattern repeats until the choice ends; at least 2."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError("expected min_pattern_size of at most max_pattern_size")
        if self.max_pattern_size and self.min_count < 2:
            raise ValueError("expected min_count of at least 2")
        return self


class CompletionParameters(Body):
    content = frozenset({"prompt", "suffix"})
    default_temperature: ClassVar[float] = 1.0

    model: Annotated[str, Field(max_length=MAX_MODEL_NAME), Source("OpenAI; D1, D2, D3")]
    """Name of the model, as `GET /v1/models` lists it."""
    prompt: Annotated[Prompts, Source("OpenAI; D1, D2, D3")]
    """What to complete: a text, texts, token ids, or lists of token ids. Each prompt gets `n` choices."""
    suffix: Annotated[str | None, _OPENAI] = None
    """Text behind the gap that the completion fills. Refused for models that were not trained to fill gaps."""
    max_tokens: Annotated[int | None, Field(ge=0, le=INT32_MAX), Source("OpenAI; D1, D2, D3")] = 16
    """Tokens of one choice, at most. 0 generates nothing: with `echo` and `logprobs` it scores the prompt."""
    temperature: Annotated[float | None, Field(ge=0, le=2), Source("OpenAI; D1, D2, D3")] = default_temperature
    """Randomness of sampling; 0 always takes the likeliest token."""
    top_p: Annotated[float | None, Field(ge=0, le=1), Source("OpenAI; D1, D3")] = 1.0
    """Samples among the likeliest tokens whose probabilities add up to this; 0 leaves the likeliest one."""
    n: Annotated[int | None, Field(ge=1, le=128), Source("OpenAI; D2, D3")] = 1
    """Choices for each prompt. Prompts times `n` (or `best_of`) are 1024 at most."""
    best_of: Annotated[int | None, Field(ge=1, le=128), Source("OpenAI; D3")] = None
    """Generates so many for each prompt and answers the `n` with the highest log probability per token. At least `n`;
    not with `stream`. All count as completion tokens."""
    stream: Annotated[bool | None, Source("OpenAI; D1, D2, D3")] = False
    """Answers as server-sent events while the tokens are generated."""
    stream_options: Annotated[StreamOptions | None, Source("OpenAI; D1, D2")] = None
    """Only with `stream`."""
    logprobs: Annotated[int | None, Field(ge=0, le=5), Source("OpenAI; D3")] = None
    """Tells the log probability of each token, and of so many of the likeliest at its position."""
    echo: Annotated[bool | None, Source("OpenAI; D3")] = False
    """Puts the prompt before the text, and its log probabilities before those of the text."""
    stop: Annotated[Stops, Source("OpenAI; D1, D2, D3")] = ()
    """Texts that end a choice; they are not part of its text. Each has 512 characters at most."""
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2), Source("OpenAI; D3")] = 0.0
    """Subtracted from the logits of tokens that the text has already."""
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2), Source("OpenAI; D3")] = 0.0
    """Subtracted from the logit of a token for each time that the text has it."""
    logit_bias: Annotated[LogitBias, _OPENAI] = None
    """By token id: added to the token's logit, from -100 to 100. Up to 1024 token ids; times the choices of all prompts
    262144 at most."""
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1), Source("OpenAI; D1, D2")] = None
    """Repeats a sampling, as far as the engine's batches allow. Each further choice of a prompt counts it up by one. -1
    is none, as in vLLM."""
    user: Annotated[Annotated[str, Field(max_length=1024)] | None, _OPENAI] = None
    """Of no effect: whose tokens they are is told by the key."""
    top_k: Annotated[int | None, Field(ge=-1, le=INT32_MAX), Source("vLLM; D1")] = 0
    """Samples among so many of the likeliest tokens; 0 and -1 among all."""
    min_p: Annotated[float | None, Field(ge=0, le=1), Source("vLLM; D1")] = 0.0
    """Samples among the tokens that have at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float | None, Field(gt=0, le=2), _VLLM] = 1.0
    """Divides the logits of tokens that prompt or text have already; below 1 it favours them."""
    min_tokens: Annotated[int | None, Field(ge=0, le=INT32_MAX), _VLLM] = 0
    """Tokens before which nothing ends a choice; at most `max_tokens`."""
    stop_token_ids: Annotated[StopTokenIds | None, _VLLM] = None
    """Tokens that end a choice; they are not part of its text."""
    ignore_eos: Annotated[bool | None, _VLLM] = False
    """The model's end of text does not end a choice. Not with a form of the output."""
    include_stop_str_in_output: Annotated[bool | None, Source("vLLM; D1")] = False
    """What ended a choice, a text of `stop` or a token, is part of its text."""
    skip_special_tokens: Annotated[bool | None, Source("vLLM; D1")] = True
    """Special tokens leave no trace in the text."""
    spaces_between_special_tokens: Annotated[bool | None, _VLLM] = True
    """Spaces around the special tokens of a text. Only with `skip_special_tokens` false."""
    return_tokens_as_token_ids: Annotated[bool | None, Source("vLLM; D1")] = False
    """`logprobs` names tokens as `token_id:123`."""
    return_token_ids: Annotated[bool | None, _VLLM] = False
    """Choices have `prompt_token_ids` and `token_ids` too."""
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=20), _VLLM] = None
    """Choices tell the log probability of each token of the prompt, and of so many of the likeliest at its position.
    Not with `stream`. One prompt has at most 65536 of them, and with all choices of all prompts there are at most
    262144; so it is with `echo` and `logprobs`."""
    logprob_token_ids: Annotated[LogprobTokenIds | None, _VLLM] = None
    """`logprobs` tells these tokens at each generated position instead of the likeliest. Only with `logprobs`."""
    truncate_prompt_tokens: Annotated[int | None, Field(ge=-1, le=INT32_MAX), _VLLM] = None
    """Cuts longer prompts down to so many tokens; -1 to what the context has room for. Not 0."""
    truncation_side: Annotated[Literal["left", "right"] | None, _VLLM] = None
    """Where they are cut: `left` (also when null) keeps the last tokens, `right` the first."""
    add_special_tokens: Annotated[bool | None, _VLLM] = True
    """Prompts get the special tokens that the model's tokenizer puts around a text."""
    allowed_token_ids: Annotated[AllowedTokenIds | None, _VLLM] = None
    """Samples among these tokens only. Times the choices of all prompts they are 262144 at most."""
    bad_words: Annotated[BadWords | None, _VLLM] = None
    """Texts that are not generated, of up to 128 characters each and 2048 together. Times the choices of all prompts
    they are 2048 at most."""
    response_format: Annotated[ResponseFormat | None, _VLLM] = None
    """Form of the output, as in OpenAI's chat completions. Only one of this, `structured_outputs` and `guided_…`."""
    structured_outputs: Annotated[StructuredOutputsOptions | None, _VLLM] = None
    """Form of the output, in vLLM's words."""
    guided_json: Annotated[JsonSchemaOrText, _OLDER_VLLM] = None
    """The same as `structured_outputs.json`."""
    guided_regex: Annotated[ConstraintText | None, _OLDER_VLLM] = None
    """The same as `structured_outputs.regex`."""
    guided_choice: Annotated[Labels | None, _OLDER_VLLM] = None
    """The same as `structured_outputs.choice`."""
    guided_grammar: Annotated[ConstraintText | None, _OLDER_VLLM] = None
    """The same as `structured_outputs.grammar`."""
    guided_whitespace_pattern: Annotated[Annotated[str, Field(max_length=100)] | None, _OLDER_VLLM] = None
    """The same as `structured_outputs.whitespace_pattern`. Only with `guided_json`."""
    repetition_detection: Annotated[RepetitionDetectionOptions | None, _VLLM] = None
    """Ends a choice that repeats itself."""
    priority: Annotated[int | None, Field(ge=-(2**31), le=INT32_MAX), _VLLM] = 0
    """Lower is served earlier. Other than 0 only where the engine's scheduling policy is `priority`."""
    cache_salt: Annotated[Annotated[str, Field(pattern=r"^[^@/\\\x00]{1,128}$")] | None, _VLLM] = None
    """Only requests of the same salt share the prefix cache. Without `@`, `/`, `\\` and NUL."""
    stream_interval: Annotated[int | None, Field(ge=1, le=INT32_MAX), _VLLM] = None
    """Tokens in one chunk of a stream, but for its first and its last."""
    vllm_xargs: Annotated[ExtraArguments, _VLLM] = None
    """For logits processors and plugins that the operator has installed in the engine. Up to 64 strings, numbers and
    arrays of these, of 16384 characters together, where a number counts as eight."""
    session_id: Annotated[Annotated[str, Field(max_length=256)] | None, _VLLM] = None
    """Of no effect."""
    request_id: Annotated[Annotated[str, Field(max_length=256)] | None, _VLLM] = None
    """Of no effect: the answer's `id` is the server's. Send `x-request-id` to name a request."""

    prompt_embeds: Annotated[None, NotServed("prompts are texts or token ids, not embeddings"), _VLLM] = None
    use_beam_search: Annotated[
        bool | None, NotServed("beam search is not supported; use n and best_of", neutral=False), _VLLM
    ] = False
    length_penalty: Annotated[
        float | None, NotServed("it belongs to beam search, which is not supported", neutral=1.0), _VLLM
    ] = 1.0
    watermarking: Annotated[bool | None, NotServed("the engines have no watermark", neutral=False), _VLLM] = None
    kv_transfer_params: Annotated[None, NotServed("transfers between engines are up to the cluster"), _VLLM] = None
    ec_transfer_params: Annotated[None, NotServed("transfers between engines are up to the cluster"), _VLLM] = None
    routed_experts_prompt_start: Annotated[
        int | None, NotServed("the routing of experts is not told", neutral=0), _VLLM
    ] = 0
    return_token_offsets: Annotated[
        bool | None, NotServed("offsets are not told; logprobs has text_offset", neutral=False), _VLLM
    ] = False
    mm_payload: Annotated[str | None, NotServed("prompts have text only", neutral="tensors"), _VLLM] = None
    return_mm_kwargs: Annotated[bool | None, NotServed("prompts have text only", neutral=True), _VLLM] = None
    thinking_token_budget: Annotated[
        int | None, NotServed("the engines do not tell thinking from text", neutral=-1), _VLLM
    ] = None
    guided_decoding_backend: Annotated[None, NotServed("the engine chooses the backend itself"), _OLDER_VLLM] = None


class CompletionRequest(ForeignParameters, CompletionParameters):
    @property
    def choices(self) -> int:
        """Answered per prompt."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """Generated per prompt; the best become choices."""
        return max(self.choices, self.best_of or 1)

    @property
    def tokens_per_choice(self) -> int:
        """Completion tokens of one choice, at most."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompt_options(self) -> PromptOptions:
        return PromptOptions(
            add_special_tokens=self.add_special_tokens is not False,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side or "left",
        )

    @property
    def prompt_positions(self) -> int | None:
        """How many of the likeliest tokens the engine must tell at each position of the prompt."""
        if self.prompt_logprobs is None and self.echo:
            return self.logprobs
        return self.prompt_logprobs

    @property
    def constraining(self) -> list[str]:
        """The parameters that say what the output must conform to."""
        given = {
            "response_format": self.response_format is not None and self.response_format.type != "text",
            "structured_outputs": self.structured_outputs is not None,
            "guided_json": self.guided_json is not None,
            "guided_regex": self.guided_regex is not None,
            "guided_choice": self.guided_choice is not None,
            "guided_grammar": self.guided_grammar is not None,
        }
        return [name for name, is_given in given.items() if is_given]

    def constraint(self) -> GivenConstraint | None:
        """What the output must conform to, from whichever parameter says it."""
        if self.response_format is not None and (given := self.response_format.constraint()) is not None:
            return given
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        if self.guided_json is not None:
            return GivenConstraint("guided_json", json_constraint(self.guided_json, self.guided_whitespace_pattern))
        if self.guided_regex is not None:
            return GivenConstraint("guided_regex", Constraint("regex", self.guided_regex))
        if self.guided_choice is not None:
            return GivenConstraint("guided_choice", Constraint("choice", json.dumps(self.guided_choice)))
        if self.guided_grammar is not None:
            return GivenConstraint("guided_grammar", Constraint("grammar", self.guided_grammar))
        return None

    def inference(self, prompts: list[str | list[int]]) -> InferenceRequest:
        """`prompts`: as the model gets them."""
        return InferenceRequest(
            model=self.model,
            prompts=prompts,
            prompt_options=self.prompt_options,
            candidates=self.candidates,
            max_tokens=self.tokens_per_choice,
            sampling=self.sampling(),
            text=TextOptions(
                stops=self.stop,
                include_stop_in_output=bool(self.include_stop_str_in_output),
                min_tokens=self.min_tokens or 0,
                skip_special_tokens=self.skip_special_tokens is not False,
                spaces_between_special_tokens=self.spaces_between_special_tokens is not False,
            ),
            constraint=self.constraint(),
            asks_prompt_logprobs="logprobs" if self.prompt_logprobs is None else "prompt_logprobs",
        )

    def sampling(self) -> Sampling:
        """Of the first candidate of each prompt. Ranking candidates takes the probability of each token chosen; a
        prompt that is only scored takes one token to be generated, which nobody sees or pays."""
        logprobs = self.logprobs if not self.logprob_token_ids else None
        if self.candidates > self.choices and self.logprobs is None:
            logprobs = 0
        detection = self.repetition_detection
        return Sampling(
            max_tokens=max(1, self.tokens_per_choice),
            min_tokens=self.min_tokens or 0,
            temperature=self.default_temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else max(self.top_p, _SMALLEST_TOP_P),
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=None if self.seed == NO_SEED else self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=self.prompt_positions,
            logprob_token_ids=tuple(self.logprob_token_ids) if self.logprob_token_ids else None,
            logit_bias=self.logit_bias or None,
            allowed_token_ids=tuple(self.allowed_token_ids) if self.allowed_token_ids else None,
            bad_words=tuple(self.bad_words or ()),
            repetition_detection=None
            if detection is None
            else RepetitionDetection(detection.max_pattern_size, detection.min_pattern_size, detection.min_count),
            stream_interval=self.stream_interval if self.stream else None,
            extra_args=dict(self.vllm_xargs) if self.vllm_xargs else None,
            priority=self.priority or 0,
            cache_salt=self.cache_salt,
        )

    def check_combination(self) -> None:
        """What one parameter forbids of another. Raises InvalidRequest."""
        if self.best_of is not None and self.best_of < self.choices:
            raise InvalidRequest(f"best_of is {self.best_of}; expected at least n, {self.choices}.", param="best_of")
        if self.stream and (self.best_of or 1) > 1:
            raise InvalidRequest("best_of cannot be streamed: set stream to false, or best_of to 1.", param="best_of")
        if len(self.prompt) * self.candidates > _MAX_GENERATIONS:
            name = "n" if self.best_of is None else "best_of"
            raise InvalidRequest(
                f"{len(self.prompt)} prompts with {name}={self.candidates} make more than {_MAX_GENERATIONS} choices.",
                param=name if self.candidates > 1 else "prompt",
            )
        for place, word in enumerate(self.bad_words or ()):
            if not word.strip():  # vLLM looks for words without the space before them
                name = f"bad_words.{place}"
                raise InvalidRequest(
                    f"Invalid value for '{name}': whitespace only is no word. To ban tokens use logit_bias.",
                    param=name,
                    location=("bad_words", place),
                )
        if (characters := sum(map(len, self.bad_words or ()))) > _MAX_BAD_WORD_CHARACTERS:
            raise InvalidRequest(
                f"bad_words have {characters} characters; expected at most {_MAX_BAD_WORD_CHARACTERS}.",
                param="bad_words",
            )
        for name, most in _MAX_REPEATED.items():
            entries, choices = len(getattr(self, name) or ()), len(self.prompt) * self.candidates
            if entries * choices > most:
                raise InvalidRequest(
                    f"{name} has {entries} entries for each of {choices} choices; expected at most {most} in all.",
                    param=name,
                )
        if (self.min_tokens or 0) > self.tokens_per_choice:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}; expected at most max_tokens, {self.tokens_per_choice}.",
                param="min_tokens",
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true.", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest(
                "prompt_logprobs cannot be streamed: set stream to false, or use echo with logprobs.",
                param="prompt_logprobs",
            )
        if self.logprob_token_ids and (self.logprobs is None or self.tokens_per_choice == 0):
            raise InvalidRequest(
                "logprob_token_ids is only allowed with logprobs, and with max_tokens of at least 1.",
                param="logprob_token_ids",
            )
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest(
                "truncate_prompt_tokens is 0, which leaves no prompt; expected at least 1, or -1 for as many as fit.",
                param="truncate_prompt_tokens",
            )
        if len(given := self.constraining) > 1:
            raise InvalidRequest(f"Only one of {' and '.join(given)} can be given.", param=given[1])
        if self.guided_whitespace_pattern is not None and self.guided_json is None:
            raise InvalidRequest(
                "guided_whitespace_pattern is only allowed with guided_json.", param="guided_whitespace_pattern"
            )
        if given:
            if self.ignore_eos:
                raise InvalidRequest(
                    f"ignore_eos is not allowed with {given[0]}: what follows the end would not conform.",
                    param="ignore_eos",
                )
            self._check_constraint_size()
        if self.suffix is not None and self.echo and self.logprobs is not None:
            raise InvalidRequest("suffix cannot be combined with echo and logprobs.", param="suffix")

    def _check_constraint_size(self) -> None:
        """Each candidate has a grammar of its own, which the engine compiles. Raises InvalidRequest."""
        given = self.constraint()
        candidates = len(self.prompt) * self.candidates
        if given is None or candidates == 1:
            return
        size = len(given.constraint.text.encode())
        if size > MAX_CONSTRAINT_BYTES:
            raise InvalidRequest(
                f"{given.param} has {size} bytes; expected at most {MAX_CONSTRAINT_BYTES}.", param=given.param
            )
        if size * candidates > MAX_CONSTRAINT_BYTES_OF_ALL:
            raise InvalidRequest(
                f"{given.param} has {size} bytes, for each of {candidates} choices of all prompts; expected at most "
                f"{MAX_CONSTRAINT_BYTES_OF_ALL} bytes together. Ask for fewer choices, or send several requests.",
                param=given.param,
            )


R = TypeVar("R", bound=CompletionRequest)


def parse_completion_request(body: bytes, kind: type[R]) -> R:
    """`kind` narrows CompletionRequest to a dialect. Raises InvalidRequest."""
    request = parse_body(body, kind)
    request.check_combination()
    return request
