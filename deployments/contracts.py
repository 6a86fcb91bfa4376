"""Every message that crosses a process boundary, reviewed as one contract.

All are msgspec structs sent as MessagePack bytes, over the cluster's own connections (deployments/connections/) or
inside a call through Ray Serve, which then pickles one `bytes` object and nothing else. Structs on the step stream are
arrays (no field names on the wire): append fields only at the end and give them defaults. Encode and decode with `pack`
and `unpack`; the msgspec Encoder and Decoder objects cannot be pickled and so must not be captured by a class that
Serve ships by value.

Couplings: `Submission`, `EngineStep` between deployments/ingress/routing/replica_stream.py and
deployments/engine/replica.py; `AdmissionRequest`, `Settlement` between deployments/ingress/meter_client.py and
deployments/meter/meter.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeVar

import msgspec

__all__ = [
    "USAGE_SUMS",
    "WITNESS_RANKS",
    "Account",
    "AdministrationAnswer",
    "AdministrationCommand",
    "AdministrationError",
    "AdmissionRefusalCode",
    "AdmissionRefused",
    "AdmissionRequest",
    "Admitted",
    "CheckedConstraint",
    "CheckedOutputs",
    "Constraint",
    "ConstraintCheck",
    "ConstraintKind",
    "CreateKey",
    "DurationHistogram",
    "DurationSum",
    "EngineCommands",
    "EngineLoad",
    "EngineStep",
    "FinishReason",
    "GetKey",
    "IngressCounters",
    "KeyChanges",
    "KeyDraft",
    "KeyInfo",
    "KeyRecord",
    "Limits",
    "ListKeys",
    "ListTeams",
    "MeterCounters",
    "Output",
    "OutputCheck",
    "PoolCounters",
    "PositionLogprobs",
    "PromptOptions",
    "RateLimits",
    "RemoveTeam",
    "RepetitionDetection",
    "RequestCounter",
    "RevokeKey",
    "RotateKey",
    "Sampling",
    "SetTeam",
    "Settlement",
    "SettlementStatus",
    "Sibling",
    "Submission",
    "TeamRecord",
    "TokenDelta",
    "UpdateKey",
    "UsageDimension",
    "UsageQuery",
    "UsageRow",
    "Witness",
    "owner_of",
    "pack",
    "unpack",
    "unpack_admission",
    "unpack_command",
]

T = TypeVar("T")


def pack(message: msgspec.Struct | Sequence[msgspec.Struct]) -> bytes:
    """Encode one message, or a list of them, as MessagePack."""
    return msgspec.msgpack.encode(message)


def unpack(data: bytes, kind: type[T]) -> T:
    """Decode `data` as `kind`. Raises msgspec.ValidationError when the two ends disagree on the contract."""
    return msgspec.msgpack.decode(data, type=kind)


def unpack_admission(data: bytes) -> Admitted | AdmissionRefused:
    """Decode the meter's answer to an AdmissionRequest; the tag on the wire tells which it is."""
    answer: Admitted | AdmissionRefused = msgspec.msgpack.decode(data, type=Admitted | AdmissionRefused)
    return answer


# --- ingress -> engine replica -----------------------------------------------------------------------------------


class RepetitionDetection(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ends a generation that repeats itself: vLLM's RepetitionDetectionParams."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one choice is generated. Names, meanings and ranges are those of vLLM's SamplingParams.

    Stop strings are absent on purpose: the engine sees token ids only, so the ingress matches them.
    """

    max_tokens: int
    """Tokens to generate at most, >= 1."""
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 considers all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many of the likeliest tokens to tell at each position, beside the chosen one; None tells nothing."""
    prompt_logprobs: int | None = None
    """The same for the positions of the prompt, told with the first delta."""
    logprob_token_ids: tuple[int, ...] | None = None
    """Told at each position instead of the likeliest."""
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    grammar: str | None = None
    """What the output must conform to, as a grammar in llguidance's Lark syntax. Its state within the answer is the
    engine's, so another replica cannot go on with it."""
    repetition_detection: RepetitionDetection | None = None
    stream_interval: int | None = None
    """Tokens to gather before they are delivered, but for the first and the last ones."""
    extra_args: dict[str, Any] | None = None
    """For logits processors and plugins that the operator installed in the engine."""
    priority: int = 0
    """Lower is served earlier, where the engine schedules by priority."""
    cache_salt: str | None = None
    """Only requests of the same salt share prefix-cache blocks."""


class Sibling(msgspec.Struct, frozen=True, array_like=True):
    """One more choice of the same prompt: all else is as in the submission that it comes with."""

    generation: int
    choice: int
    seed: int | None = None


class Submission(msgspec.Struct, frozen=True, omit_defaults=True):
    """Choices of one prompt, to be generated by the replica that receives it. The prompt travels once for all."""

    generation: int
    """Names the generation of the first choice on the step stream; each higher than those before, over all streams to
    this replica."""
    token_ids: list[int]
    """Prompt, followed by the tokens that earlier replicas generated when the generation is resumed."""
    sampling: Sampling
    """With `max_tokens` already reduced by the resumed tokens."""
    account: Account
    """The client's request, for logs, and to settle it by, should its ingress be gone."""
    meter: str
    """Serve's name of the deployment that accounts for it (deployments/meter/remote/shards.py)."""
    choice: int = 0
    """Its number in the request, over all prompts."""
    resumed: bool = False
    """Accepted before by a replica that is gone: taken even when the queue is full, since it cannot be refused now."""
    resumed_tokens: int = 0
    """How many of the last `token_ids` are completion tokens that earlier replicas generated."""
    siblings: tuple[Sibling, ...] = ()
    """The further choices. A resumed generation has none: its tokens are its own."""


class EngineCommands(msgspec.Struct, frozen=True, array_like=True):
    """All that an ingress replica wants of an engine replica since the commands before; carried out in this order."""

    released: list[str]
    """Requests that are settled: the replica may forget them."""
    submissions: list[msgspec.Raw]
    """Each a packed `Submission`, so that one that cannot be read harms no other. All of them together are bounded
    (COMMAND_BYTES in deployments/ingress/routing/replica_stream.py), but for one that is larger alone."""
    aborted: list[int]
    """Generations to be stopped; those that are unknown have ended already."""


# --- engine replica -> ingress (the step stream) -------------------------------------------------------------------

FinishReason = Literal["stop", "stop_token", "end_of_text", "length", "repetition", "refused", "failed"]
"""`stop_token`, `end_of_text`: the last token of the delta, one of `stop_token_ids` or the model's end of text, ended
the generation and is not part of the text. `repetition`: it repeats itself. `stop`: the engine ended it for a reason of
its own. `refused`: the engine cannot do what the request asks for. `failed`: the engine lost it."""


class PositionLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log probabilities of tokens at one position: first of the token that is there, then of the others that were
    asked for, the likeliest first. No token is told twice.

    A prompt has thousands of them, and tuples of numbers are none of the garbage collector's.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    """Among all of the vocabulary; 1 is the likeliest."""


class TokenDelta(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What one generation gained since the last message."""

    generation: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache; told with the generation's first delta, else 0."""
    message: str = ""
    """Why, when `finish_reason` is `failed` (in words for the log) or `refused` (in words for the caller)."""
    param: str | None = None
    """The parameter that made the engine refuse."""
    logprobs: list[PositionLogprobs] | None = None
    """One per token, where asked for."""
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    """One per prompt token, the first None; told with the generation's first delta, where asked for, or in parts: in
    deltas before that without tokens."""


class EngineLoad(msgspec.Struct, frozen=True, array_like=True):
    """What the router needs to know of a replica."""

    running: int = 0
    """Sequences in the batch."""
    waiting: int = 0
    """Sequences accepted but not yet prefilled."""
    waiting_prefill_tokens: int = 0
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    finished_per_s: float = 0.0
    """Generations that ended per second lately: the drain rate of the queue."""
    start_up_s: float = 0.0
    """How long the replica took to start."""
    kv_block_tokens: int = 0
    """Tokens per KV block."""
    max_num_seqs: int = 0
    """Sequences in the batch at most."""
    unsettled: int = 0
    """Settlements in the replica's own outbox: of requests whose ingress is gone."""


class EngineStep(msgspec.Struct, frozen=True, array_like=True):
    """All news for one ingress replica since the message before; without deltas it is a heartbeat."""

    sequence: int
    """0, 1, 2, … without gaps per stream."""
    load: EngineLoad
    deltas: list[TokenDelta]
    acknowledged: int = 0
    """The last generation that was submitted: it and all before it are accepted, but for those that were `refused`."""
    refused: list[int] = []
    """Generations for which the queue has no room, since the message before."""


# --- ingress <-> its checkers of constraints (deployments/ingress/constraints/worker.py) ------------------------------

ConstraintKind = Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]


class Constraint(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a caller asks of the form of the output, in the caller's words."""

    kind: ConstraintKind
    text: str
    """The schema, the labels or the tags as JSON; the regular expression or the grammar as it is."""
    any_whitespace: bool = True
    """Between the tokens of JSON."""
    whitespace_pattern: str | None = None
    closed: bool = False
    """Objects have no properties beside those of their schema."""


class ConstraintCheck(msgspec.Struct, frozen=True, omit_defaults=True, tag="constraint"):
    """Is there output that conforms, and with these tokens?"""

    folder: str
    """Of the model."""
    constraint: Constraint
    candidates: int = 1
    """Of all prompts."""
    min_tokens: int = 0
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    """By a bias of -100."""
    bad_words: tuple[str, ...] = ()


class CheckedConstraint(msgspec.Struct, frozen=True, omit_defaults=True, tag="constraint"):
    grammar: str = ""
    """Empty where it is refused."""
    message: str = ""
    """Why, in words for the caller."""
    param: str | None = None
    """The other parameter that contradicts the constraint, if it is one."""


class Output(msgspec.Struct, frozen=True, array_like=True):
    token_ids: list[int]
    ended: bool
    """The model's end of text, which is not among the tokens, follows: the whole conforms, or else a beginning."""


class OutputCheck(msgspec.Struct, frozen=True, tag="outputs"):
    """Do these conform?"""

    folder: str
    grammar: str
    outputs: list[Output]


class CheckedOutputs(msgspec.Struct, frozen=True, tag="outputs"):
    conforming: list[bool]


# --- ingress -> meter ------------------------------------------------------------------------------------------------


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a key or a team may use; None sets no limit. Minutes slide, days and months are those of UTC.

    Tokens count as prompt + completion: reserved as prompt + `max_tokens` of every choice, and once the request is
    settled as what it used.
    """

    requests_per_minute: int | None = None
    """>= 1, as all of them."""
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    """Requests admitted and not yet settled."""
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    money_per_day: float | None = None
    """In the currency of the models' prices, > 0."""
    money_per_month: float | None = None


def owner_of(key_id: str, team: str | None) -> str:
    """Who is accounted for together: one meter replica owns this name, and so decides on all keys of a team."""
    return f"key {key_id}" if team is None else f"team {team}"


class KeyInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who a key belongs to. The key itself is stored and sent as its SHA-256 only."""

    key_id: str
    name: str
    admin: bool
    team: str | None = None
    models: tuple[str, ...] | None = None
    """Names of the models it may use; None allows all."""

    @property
    def owner(self) -> str:
        return owner_of(self.key_id, self.team)


class PromptOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """How prompts become token ids; names as in vLLM."""

    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    """Tokens to keep, >= 1; -1 keeps what the model's context has room for."""
    truncation_side: Literal["left", "right"] = "left"
    """`left` keeps the last tokens, as vLLM's server does by default."""


class AdmissionRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Asks to tokenize, check and reserve for one request."""

    request_id: str
    key_id: str
    model: str
    prompts: list[str | list[int]]
    """Each a text or its token ids; never empty."""
    max_tokens: int
    """Completion tokens reserved per generated choice."""
    choices: int
    """Generated per prompt."""
    options: PromptOptions = PromptOptions()
    team: str | None = None
    dialect: str = "D3"
    caller_request_id: str | None = None
    """The caller's `x-request-id`."""
    started_at: float = 0.0
    """Unix time in seconds at which the request arrived."""
    ingress_id: str = ""
    """Who witnesses what the request uses, for as long as it renews its lease (see MeterTransport.renew)."""

    @property
    def all_choices(self) -> int:
        """Generated over all prompts."""
        return len(self.prompts) * self.choices

    def account(
        self,
        prompt_tokens: int = 0,
        *,
        admitted_at: float | None = None,
        reserved_tokens: int = 0,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
    ) -> Account:
        """With what was decided of it, if it was."""
        return Account(
            request_id=self.request_id,
            key_id=self.key_id,
            model=self.model,
            prompt_tokens=prompt_tokens,
            choices=self.all_choices,
            team=self.team,
            dialect=self.dialect,
            caller_request_id=self.caller_request_id,
            started_at=self.started_at,
            admitted_at=admitted_at,
            reserved_tokens=reserved_tokens,
            prompt_price=prompt_price,
            completion_price=completion_price,
        )


class RateLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """The narrowest limits per minute of a caller after a decision, for the `x-ratelimit-*` headers; None where there
    is no such limit."""

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests_s: float | None = None
    """Seconds until all are there again."""
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_s: float | None = None


class Admitted(msgspec.Struct, frozen=True, tag="admitted", omit_defaults=True):
    token_ids: list[list[int]]
    """One list per prompt, none empty, each with room for `max_tokens` in the model's context."""
    admitted_at: float = 0.0
    """Unix time in seconds, by the meter's clock."""
    reserved_tokens: int = 0
    """Prompt tokens, and `max_tokens` of every choice of every prompt."""
    prompt_price: float = 0.0
    """Per million tokens, at the time of the admission."""
    completion_price: float = 0.0
    rate_limits: RateLimits | None = None


AdmissionRefusalCode = Literal[
    "context_length_exceeded",
    "empty_prompt",
    "too_many_prompt_tokens",
    "token_out_of_vocabulary",
    "model_not_found",
    "invalid_api_key",
    "model_not_allowed",
    "rate_limit_exceeded",
    "insufficient_quota",
    "unavailable",
]


class AdmissionRefused(msgspec.Struct, frozen=True, tag="refused", omit_defaults=True):
    code: AdmissionRefusalCode
    """`invalid_api_key`: revoked or expired since the ingress looked it up. `rate_limit_exceeded`: of a minute, or of
    requests at a time. `insufficient_quota`: of a day or a month. `unavailable`: cannot be decided now; worth another
    try, and not for the caller's eyes."""
    message: str
    """Written for the caller."""
    param: str | None = None
    retry_after_s: float | None = None
    """When the same request is admitted if nobody else interferes; None if it never is."""
    rate_limits: RateLimits | None = None


class Account(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of an admitted request before it runs. Travels with its submissions, so that an engine replica
    can settle it when its ingress is gone."""

    request_id: str
    key_id: str
    model: str
    prompt_tokens: int
    """Over all prompts, each counted once."""
    choices: int
    """Generated, over all prompts."""
    team: str | None = None
    dialect: str = "D3"
    caller_request_id: str | None = None
    started_at: float = 0.0
    """Unix time in seconds at which the request arrived."""
    admitted_at: float | None = None
    reserved_tokens: int = 0
    prompt_price: float = 0.0
    completion_price: float = 0.0

    @property
    def owner(self) -> str:
        return owner_of(self.key_id, self.team)


SettlementStatus = Literal["finished", "cancelled", "disconnected", "failed", "refused", "lost"]
"""`cancelled`: the client left. `disconnected`: its ingress died. `failed`: the engines could not. `refused`: never
admitted. `lost`: admitted, and nobody is left to tell what became of it."""
Witness = Literal["ingress", "engine", "none"]
"""Who counted. A row of a better witness takes the place of another's."""
WITNESS_RANKS: Final[dict[str, int]] = {"none": 0, "engine": 1, "ingress": 2}
"""The better the higher."""


class Settlement(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one request used: becomes one row of the ledger. Idempotent by `account.request_id` and witness."""

    account: Account
    status: SettlementStatus
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    """Over all choices that were generated."""
    resumes: int
    first_token_s: float | None
    """From arrival to the first token; None when there was none."""
    total_s: float
    queue_s: float | None = None
    """From arrival until engines had accepted all of it; None if none did."""
    witness: Witness = "ingress"
    parts: dict[int, int] | None = None
    """Of an engine replica: completion tokens by the number of the choice in the request, those of earlier replicas
    included. Several replicas may each know some of the choices; of one choice the highest count holds."""

    @classmethod
    def unused(cls, account: Account, status: SettlementStatus, now: float) -> Settlement:
        """Of a request that nobody saw use anything; `now` is Unix time in seconds."""
        return cls(
            account=account,
            status=status,
            prompt_tokens=0,
            cached_tokens=0,
            completion_tokens=0,
            resumes=0,
            first_token_s=None,
            total_s=max(0.0, now - account.started_at),
            witness="none",
        )


# --- administration: ingress -> meter ---------------------------------------------------------------------------------


class KeyRecord(msgspec.Struct, frozen=True):
    """A key as administrators see it; the key itself is shown once, when it is made."""

    id: str
    name: str
    prefix: str
    """Its first characters, to know it by."""
    owner: str | None
    team: str | None
    labels: dict[str, str]
    models: tuple[str, ...] | None
    """None allows all."""
    limits: Limits
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class TeamRecord(msgspec.Struct, frozen=True):
    """A team whose limits hold for all its keys together."""

    name: str
    limits: Limits
    created_at: float


UsageDimension = Literal["model", "key", "team", "dialect", "status"]


class UsageQuery(msgspec.Struct, frozen=True, omit_defaults=True):
    """Asks for sums over the rows of the ledger."""

    since: float
    """Unix time in seconds; rows count from here by `started_at`. Of whole hours unless `width_s` is below."""
    until: float | None = None
    """Exclusive; None for now."""
    width_s: int | None = None
    """Length of a bucket: 60, 3600 or 86400; None sums over all of the time. Buckets begin at multiples of it."""
    by: tuple[UsageDimension, ...] = ()
    key_ids: tuple[str, ...] | None = None
    teams: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None


USAGE_SUMS: Final = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost")
"""What is summed up of requests: by hours in the ledger, in answers about usage, and in metrics."""


class UsageRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one group used in one bucket; groups without requests have no row. Ordered by bucket, then by group."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: float
    begins_at: int | None = None
    """Of the bucket, Unix time in seconds; None without `width_s`."""
    model: str | None = None
    """These are None where the query does not ask by them."""
    key: str | None = None
    team: str | None = None
    """Empty for keys without one."""
    dialect: str | None = None
    status: str | None = None


# --- metrics: meter -> ingress ---------------------------------------------------------------------------------------


class RequestCounter(msgspec.Struct, array_like=True):
    """What the requests of one group have used, as committed to the ledger since the meter's process began."""

    model: str
    key_id: str
    team: str | None
    status: str
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class DurationSum(msgspec.Struct, array_like=True):
    """How often something was done, and how long all of it took."""

    count: int = 0
    seconds: float = 0.0


class MeterCounters(msgspec.Struct, omit_defaults=True):
    """What one meter has done since its process began, and what it holds now."""

    requests: list[RequestCounter]
    refusals: dict[str, int]
    """By code of AdmissionRefused."""
    admissions: DurationSum
    """Requests admitted, and the seconds from their arrival at the meter to the decision."""
    commits: DurationSum
    """Calls of `settle`, and the seconds until what they brought was durable."""
    wrong_keys: int = 0
    lost_reservations: int = 0
    open_reservations: int = 0
    spooled: int = 0
    """Settlements on the meter's disk that the database does not have yet."""


# --- metrics: ingress -> ingress --------------------------------------------------------------------------------------


class DurationHistogram(msgspec.Struct, array_like=True):
    """How many durations fell between which bounds, and how long all of them were."""

    bounds_s: tuple[float, ...]
    """Rising; a duration counts at the first bound that is not below it."""
    counts: list[int]
    """One per bound, and one for what is above the last."""
    seconds: float = 0.0

    @classmethod
    def empty(cls, bounds_s: tuple[float, ...]) -> DurationHistogram:
        return cls(bounds_s, [0] * (len(bounds_s) + 1))

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.seconds += seconds


class PoolCounters(msgspec.Struct, array_like=True):
    """What one ingress replica has seen of one model since it serves it."""

    model: str
    first_tokens: DurationHistogram
    """From the arrival of a request to its first token."""
    inter_tokens: DurationHistogram
    """Between successive deliveries of a request's tokens."""
    resumes: int = 0
    held: int = 0
    """Requests that wait now, because no replica is up."""
    suspects: int = 0
    """Generations that are tried alone now, or wait for it: a replica was lost while they began."""
    given_up: int = 0
    """Generations that ended because the replica that tried them alone was lost as well."""
    not_resumable: int = 0
    """Generations that ended with their replica, because no other can go on exactly."""


class IngressCounters(msgspec.Struct, array_like=True):
    """Of one ingress replica."""

    ingress_id: str
    pools: list[PoolCounters]
    unsettled: int = 0
    """Settlements in its outbox."""
    oldest_unsettled_s: float = 0.0
    """How long ago the oldest of them was made; 0 without any."""
    loop_lag_s: float = 0.0
    """How much later than asked for its event loop wakes, averaged over some seconds."""
    responses: list[tuple[str, int, int]] = []
    """How many it has begun, by the path of the route and the status."""


# --- administration: commands and their answer -----------------------------------------------------------------------


class KeyDraft(msgspec.Struct, frozen=True, omit_defaults=True):
    """A key to be made; the values that are allowed are in deployments/meter/keys/key_values.py."""

    name: str
    owner: str | None = None
    """Whom to ask about it; means nothing to the meter."""
    team: str | None = None
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    models: tuple[str, ...] | None = None
    """None allows all."""
    limits: Limits = Limits()
    expires_at: float | None = None
    """Unix time in seconds; None for never."""


class KeyChanges(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is to change of a key; what is UNSET stays as it is, and None means what it does in KeyDraft."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    owner: str | msgspec.UnsetType | None = msgspec.UNSET
    team: str | msgspec.UnsetType | None = msgspec.UNSET
    labels: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    models: tuple[str, ...] | msgspec.UnsetType | None = msgspec.UNSET
    limits: dict[str, int | float | None] | msgspec.UnsetType = msgspec.UNSET
    """By field of Limits: those that are named change, None lifts one."""
    expires_at: float | msgspec.UnsetType | None = msgspec.UNSET


class CreateKey(msgspec.Struct, frozen=True, tag="create_key"):
    draft: KeyDraft


class UpdateKey(msgspec.Struct, frozen=True, tag="update_key"):
    key_id: str
    changes: KeyChanges


class RotateKey(msgspec.Struct, frozen=True, tag="rotate_key"):
    key_id: str


class RevokeKey(msgspec.Struct, frozen=True, tag="revoke_key"):
    key_id: str


class GetKey(msgspec.Struct, frozen=True, tag="get_key"):
    key_id: str


class ListKeys(msgspec.Struct, frozen=True, tag="list_keys"):
    team: str | None = None
    """None lists those of all teams and of none."""
    include_revoked: bool = False


class SetTeam(msgspec.Struct, frozen=True, tag="set_team"):
    name: str
    limits: Limits


class ListTeams(msgspec.Struct, frozen=True, tag="list_teams"):
    pass


class RemoveTeam(msgspec.Struct, frozen=True, tag="remove_team"):
    name: str


AdministrationCommand = (
    CreateKey | UpdateKey | RotateKey | RevokeKey | GetKey | ListKeys | SetTeam | ListTeams | RemoveTeam
)
"""A meter may carry one out twice when its first answer is lost; then CreateKey leaves a key that nobody holds."""


class AdministrationError(msgspec.Struct, frozen=True):
    code: Literal["not_found", "invalid", "conflict"]
    message: str
    """Written for the caller."""
    param: str | None = None
    """Such as `limits.tokens_per_day`."""


class AdministrationAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The keys or teams that a command is about, as they are now."""

    keys: tuple[KeyRecord, ...] = ()
    teams: tuple[TeamRecord, ...] = ()
    secret: str | None = None
    """The key itself, after CreateKey and RotateKey."""
    error: AdministrationError | None = None


def unpack_command(data: bytes) -> AdministrationCommand:
    """Decode a command; the tag on the wire tells which it is."""
    command: AdministrationCommand = msgspec.msgpack.decode(data, type=AdministrationCommand)
    return command
