"""Messages between the API processes and the engine process. Torch-free.

Everything here travels as msgpack (msgspec) over ZeroMQ, see ``server.ipc``. Token ids travel as
little-endian int32 bytes where there may be many of them (prompts), as plain lists where there is
one per sequence and step.
"""

import enum
from array import array
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, get_args

import msgspec


class FinishReason(enum.IntEnum):
    """Why a choice ended. RUNNING is the value of rows that have not ended."""

    RUNNING = 0
    STOP = 1
    """End-of-sequence token, a stop token id, or a stop string."""
    LENGTH = 2
    """``max_tokens`` reached, or the model length limit."""
    CANCELLED = 3
    """The API process asked for it (client gone, shutdown)."""
    ERROR = 4
    """The engine could not finish the request; ``StepOutput.errors`` says why."""
    ABORT = 5
    """A dead end: the request's own constraints leave no token, or its grammar cannot be followed any further."""


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as int32 bytes, the form in which prompts travel."""
    return array("i", token_ids).tobytes()


def unpack_tokens(packed: bytes) -> "array[int]":
    """The inverse of :func:`pack_tokens`."""
    token_ids: array[int] = array("i")
    token_ids.frombytes(packed)
    return token_ids


def view_tokens(packed: bytes) -> "memoryview[int]":
    """The same without a copy, to be read only."""
    return memoryview(packed).cast("i")


Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
"""Of a chat's messages."""
ROLES: Final = get_args(Role)
STATE_ID_PREFIX: Final = "state-"
"""Begins the id of every saved state, and no name of one."""


class RefusalReason(enum.IntEnum):
    """Why the engine did not take a request."""

    QUEUE_FULL = 1
    """Too many choices wait already, of everybody's or of this tenant's."""
    TENANT_LIMIT = 2
    """The tenant has as many choices waiting and running as it may."""
    FAILED = 3
    """The engine could not make sense of it."""
    UNKNOWN_STATE = 4
    """The tenant has no saved state of that id or name, or no longer."""
    STATES_FULL = 5
    """As many states are saved as may be."""
    STATES_OFF = 6
    """This engine parks no states, so it saves none."""
    TOO_LONG = 7
    """A saved state and what is to come after it exceed the model length limit."""
    STATES_LIMIT = 8
    """The tenant saves as many states as it may."""
    NOT_WRITTEN = 9
    """The file of a saved state could not be written."""
    NOT_ABSORBED = 10
    """The transcript of a saved state has to be absorbed again first."""
    BAD_FILE = 11
    """What was uploaded is no state that can be used here."""


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """The engine's answer to a request that it does not take."""

    reason: RefusalReason
    message: str
    code: str | None = None
    """For programs, where the reason does not say enough."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one request samples. Validated by the API process; the engine trusts it."""

    max_tokens: int | None = None
    """Most tokens to generate; None: until a stop or the model length limit. 0: only the prompt is absorbed."""
    min_tokens: int = 0
    """Stop tokens are not sampled, and stop strings not looked at, before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    """No other token is sampled, end-of-sequence included; None: all are allowed."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token ids of phrases: where all but the last are the newest tokens generated, the last one is not sampled."""
    grammar: str | None = None
    """What the generated text must follow, as :mod:`server.grammar` writes it; it decides where the text may end."""
    seed: int | None = None
    """None: drawn by the engine. The j-th answer to each prompt uses a stream derived from (seed, j)."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    """Whether the text ends with the stop string, or the stop token's text, that ended it; else before it."""
    skip_special_tokens: bool = True
    """Whether special tokens add nothing to the text; else they are written, such as ``</s>``."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of most likely alternatives to report per token; 0 reports the sampled token only."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, from the second on."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One HTTP request: ``len(prompts) * n`` choices, admitted whole or refused whole.

    Choice ``i * n + j`` is the j-th answer to prompt i.
    """

    request_id: int
    """Unique within the API process that sends it."""
    prompts: tuple[bytes, ...]
    """int32 token ids, see :func:`pack_tokens`; at least one id each, if no state is continued."""
    n: int = 1
    params: SamplingParams
    arrived: float
    """``time.monotonic()`` when the request arrived (one clock for all processes of a host)."""
    priority: int = 0
    """Among requests of one tenant, lower values are served first; among equals, the order of arrival counts."""
    checkpoint_at: tuple[int, ...] = ()
    """Positions within every prompt at which to park its state."""
    tenant: str = ""
    """The name of the API key that the request came with, never the key; empty where no key is needed."""
    state: str | None = None
    """Id or name of the saved state that every prompt continues; prompts may then be empty."""
    save_state: bool = False
    """Whether to save each choice's state at its end."""
    state_name: str | None = None
    """The name of the state to be saved; only with one choice."""
    state_ttl: float | None = None
    """Seconds for which it is kept; None: as the engine likes."""
    more: bool = False
    """Whether the prompt goes on in :class:`Extend` messages; only with one choice, of which nothing is generated. Its
    progress is told."""
    session: str | None = None
    """Names the conversation, among the tenant's, whose next message is likely to go on from an answer of this."""
    state_turn: str | None = None
    """The role of the message within which the transcripts of the saved states end, see :class:`StateInfo`."""

    @property
    def num_choices(self) -> int:
        """Answers wanted in all."""
        return len(self.prompts) * self.n


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The named requests are no longer wanted. Unknown ids are ignored."""

    request_ids: tuple[int, ...]


class Extend(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """More of the prompt of a request with ``more``. Ignored if the request has ended."""

    request_id: int
    tokens: bytes
    """int32 token ids; at least one in the last message."""
    last: bool
    """Whether the prompt ends with these."""


class StateAction(enum.IntEnum):
    """What to do about saved states."""

    LIST = 1
    """Tell of all of the tenant's."""
    DESCRIBE = 2
    DELETE = 3
    FORK = 4
    """Make another one of the same transcript."""
    DOWNLOAD = 5
    """Write it to a file."""
    UPLOAD = 6
    """Save what is in a file."""


class StateCommand(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Do something about saved states; answered in ``StepOutput.states_told`` or ``rejected``."""

    request_id: int
    """Unique within the API process, requests for text included."""
    tenant: str
    action: StateAction
    state: str = ""
    """Id or name."""
    name: str | None = None
    """Of the new one, if one is made."""
    ttl: float | None = None
    """Seconds for which the new one is kept; None: as the engine likes."""
    path: str = ""
    """Of the file."""
    convert: bool = False
    """Whether numbers may be rounded if this engine cannot hold them as they are."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First message of an API process; answered with :class:`EngineInfo` once the engine is ready."""


ClientMessage: TypeAlias = Hello | GenerateRequest | Extend | Cancel | StateCommand


class StateInfo(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A saved state."""

    id: str
    name: str | None
    num_tokens: int
    """Of its transcript."""
    nbytes: int
    """What its snapshot takes, forks sharing it; 0: it has to be computed again from the transcript."""
    created: float
    """Unix time."""
    expires: float
    """Unix time."""
    turn: str | None = None
    """The role of the chat message within which the transcript ends, for the next message comes behind it; None: it
    is not known to end within any."""
    digest: str = ""
    """SHA-256 of the contents, in hex, in answer to a DOWNLOAD."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural log, of the unmodified logits) at one sampled position."""

    sampled: float
    top_ids: list[int]
    top: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural log, of the unmodified logits) of a prompt's tokens, in the order of the prompt.

    Packed, since there may be many: N tokens, K alternatives to each.
    """

    logprobs: bytes
    """N float32."""
    ranks: bytes
    """N int32: how many tokens are at least as likely, itself included."""
    top_ids: bytes
    """N x K int32, the most likely tokens at each position, in order."""
    top: bytes
    """N x K float32."""


class HistogramSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """A histogram's totals. ``counts[i]`` holds values <= ``bounds[i]``; the last one, the rest."""

    bounds: tuple[float, ...]
    counts: list[int]
    """One longer than ``bounds``; not cumulative."""
    sum: float


class SavedStats(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of saved states."""

    states: int = 0
    nbytes: int = 0
    """What they take: their files, or else their snapshots in memory."""
    transcript_bytes: int = 0
    """What their transcripts take in memory, beyond that."""
    snapshots: dict[str, int] = {}
    """Their snapshots by tier, those in memory or among the cache's files, and those in the states' files only: device,
    host, disk, saved."""
    snapshots_bytes: dict[str, int] = {}
    operations: dict[str, int] = {}
    """What was done, by name: save, restore, fork, delete, expire, upload, download."""
    failed: int = 0
    """States whose files could not be written."""
    skipped: dict[str, int] = {}
    """Files found at the start that are not used, by why: damaged, layout, model."""
    skipped_bytes: dict[str, int] = {}
    seconds: dict[str, HistogramSnapshot] = {}
    """From the end of an answer, or from the command, until the file was there, by operation."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's figures since its start, as ``/metrics`` shows them."""

    running: int
    waiting: int
    slots_used: int
    slots_total: int
    accepted: int
    """Choices queued: those that run, that wait and that have finished."""
    prompt_tokens: int
    """Prompt tokens absorbed."""
    generated_tokens: int
    finished: dict[str, int]
    """Choices ended, by lower-case name of :class:`FinishReason`."""
    time_to_first_token: HistogramSnapshot
    time_per_output_token: HistogramSnapshot
    end_to_end: HistogramSnapshot
    queue_time: HistogramSnapshot
    tokens_per_step: HistogramSnapshot
    step_parts: dict[str, HistogramSnapshot]
    """Seconds, by part: schedule, launch, device, retire."""
    prefix_hits: int
    """Prompts that began from a parked state."""
    prefix_misses: int
    """Prompts that could have, had there been one."""
    prefix_tokens_saved: int
    """Prompt tokens that were not absorbed therefore."""
    states_evicted: int
    """Parked states given up for want of room."""
    swapped: int
    """Choices that wait after having run."""
    swaps_out: int
    """States taken out of their slots for more urgent choices."""
    swaps_in: int
    """Of these, those that came back."""
    swapped_bytes: int
    """Copied by both."""
    states_parked: dict[str, int]
    """Parked states by tier: device, host, disk."""
    states_parked_bytes: dict[str, int]
    state_restore: HistogramSnapshot
    state_save: HistogramSnapshot
    state_read: HistogramSnapshot
    state_write: HistogramSnapshot
    saved: SavedStats = SavedStats()


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the API process has to know of the engine; sent once it can serve."""

    vocab_size: int
    """Token ids in [0, vocab_size) are valid in prompts, ``logit_bias`` and ``stop_token_ids``."""
    eos_token_ids: tuple[int, ...]
    max_model_len: int | None
    max_num_seqs: int
    """Slots: sequences that can run at once."""
    max_num_queued_reqs: int
    """Choices that may wait beyond the running ones."""
    max_request_choices: int
    """Choices that one request may have; one with more can never be taken."""
    max_logprobs: int
    default_sampling: dict[str, float | int]
    """Fields of :class:`SamplingParams` set by the checkpoint's ``generation_config.json``."""
    num_parameters: int
    """Numbers of the checkpoint."""
    state_bytes: int
    """Memory of one sequence's state."""
    state_file_bytes: int
    """Most bytes that a state's file may have beside its transcript."""
    dtype: str
    state_dtype: str
    device: str
    fingerprint: str
    """Names the checkpoint, the version and the types: what OpenAI calls ``system_fingerprint``."""


class StepOutput(msgspec.Struct, kw_only=True, tag=True):
    """What one engine step means to one API process: parallel columns, one row per choice.

    A row with ``finish_reasons != RUNNING`` is the choice's only terminal event. A terminal row may
    carry no token: its ``token_ids`` entry is then -1 (a cancelled request, an error).
    """

    request_ids: list[int] = []
    choices: list[int] = []
    token_ids: list[int] = []
    texts: list[bytes] = []
    """New text of the choice (UTF-8, possibly cut inside a character; text that might still become
    a stop string is held back). Empty when the engine has no tokenizer."""
    finish_reasons: list[int] = []
    logprobs: dict[int, TokenLogprobs] = {}
    """By row, for choices that asked."""
    prompt_logprobs: list[tuple[int, int, PromptLogprobs]] = []
    """Request id, the first choice of a prompt, and what is known of the prompt's next tokens. The last of them come no
    later than the first row of any choice of this prompt."""
    cached_tokens: dict[int, int] = {}
    """By row, of a choice's first row: tokens of the prompt that had been absorbed for an earlier request; 0 if not
    given. Counted once per prompt, not per answer to it."""
    stop_reasons: dict[int, int | str] = {}
    """By row: the stop token id or stop string that ended the choice. Not set for end-of-sequence."""
    accepted: list[int] = []
    """Request ids now queued or running."""
    contexts: dict[int, int] = {}
    """By request id, of accepted ones that continue a saved state: tokens of it, before every prompt."""
    progress: dict[int, int] = {}
    """By request id, of requests with ``more``: tokens absorbed so far, those of a saved state included."""
    states: dict[int, StateInfo] = {}
    """By row: the saved state of a choice that has ended."""
    states_told: dict[int, list[StateInfo]] = {}
    """By request id of a :class:`StateCommand`."""
    rejected: dict[int, Refusal] = {}
    """By request id: requests that were not taken."""
    errors: dict[int, str] = {}
    """By row: message of a choice that ended with FinishReason.ERROR."""
    unsaved: dict[int, str] = {}
    """By row: why the state of a choice that ended so could not be saved; otherwise it would have ended well."""
    stats: EngineStats | None = None


class ClientReset(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The API process read too slowly: the engine dropped its messages and cancelled its requests."""

    reason: str


EngineMessage: TypeAlias = EngineInfo | StepOutput | ClientReset
