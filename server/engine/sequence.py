"""One choice of one request on its way through the engine."""

from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from server.component_settings import CHUNK
from server.engine.constraints import Constraint
from server.engine.detokenizer import StopMatcher
from server.types import FinishReason, SamplingParams, StateInfo, pack_tokens

if TYPE_CHECKING:
    from server.engine.named_states import NamedState, Saving
    from server.engine.prefix_cache import Awaited, Ticket
    from server.engine.snapshot import Snapshot

Tokens: TypeAlias = "array[int] | memoryview[int]"
"""Token ids, int32: an array where more may come, else a view of the bytes in which they travelled."""


@dataclass(frozen=True, slots=True)
class Save:
    """How a state is to be saved.

    Attributes:
        name: None: by its id only.
        ttl: seconds for which it is kept; None: the default.
        turn: the role of the chat message within which its transcript ends; None: of none.
    """

    name: str | None
    ttl: float | None
    turn: str | None


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt, what has been generated after it, and where its state stands.

    The transcript is ``prompt + outputs``. ``num_launched`` counts the transcript's tokens that
    launched steps absorb into the state; the newest sampled token is in the transcript before it
    is absorbed. With a step in flight, ``num_sampled`` runs ahead of ``len(outputs)``.

    Of several choices of one prompt, the first is the leader: it absorbs the prompt, and the others, its followers,
    begin with a copy of its state.
    """

    client: bytes
    request_id: int
    choice: int
    prompt: Tokens
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_tokens: int | None
    """Most tokens to sample, the model length limit considered."""
    matcher: StopMatcher | None
    arrived: float
    table: list[bytes] | None = None
    """The text of every token, as the request wants it; None: only ids are wanted."""
    tenant: str = ""
    """Whose turn it takes in the queue."""
    session: str | None = None
    """The conversation, among its tenant's, that it is a part of."""
    island: str | None = None
    """Whose snapshots it may begin from and leaves its own to, apart from the tenant's; see :class:`NamedState`."""
    context: "NamedState | None" = None
    """The saved state that it goes on from, until it has begun."""
    checkpoint_at: tuple[int, ...] = ()
    """Positions within the prompt at which to park its state."""
    save: "Save | None" = None
    """How to save its state at its end; None: it is not to be saved."""
    saved: StateInfo | None = None
    """The state that was saved."""
    closes: bool = False
    """Whether its last token has been, or is being, absorbed: of a sequence to be saved whose length ends it."""
    last_reason: FinishReason = FinishReason.RUNNING
    """Why it ends, once its last token has been absorbed."""
    logits: dict[int, Any] = field(default_factory=dict)
    """Of a sequence to be saved: the logits behind so many tokens, float32 [V] on the device, of its newest steps."""
    saving: "Saving | None" = None
    """The state that is being saved."""
    priority: int = 0
    """Lower values are served first, among sequences of one tenant."""

    constraint: Constraint | None = None
    """What has to be known of the tokens so far before the next one can be sampled; None: nothing."""
    streams: bool = False
    """Whether its prompt has come, or is still coming, in pieces."""
    grows: bool = False
    """Whether more of its prompt is to come."""
    leader: "Sequence | None" = None
    """Who absorbs the prompt for this sequence, until it has done so."""
    followers: list["Sequence"] = field(default_factory=list)
    """Whose leader this is; empty once the prompt has been absorbed."""
    leads_again: bool = False
    """Whether another leader has absorbed the prompt before, and told what there is to tell of it."""
    snapshot: "Snapshot | None" = None
    """What the slot is to hold when this waiting sequence gets one: its first ``num_launched`` tokens. Of a swapped
    some may wait in the ring."""
    absorbs_all: bool = False
    """Whether it begins with nothing that is parked, for what it was to begin with could not be restored."""
    swapped: bool = False
    """Whether it has run, and waits with all that its slot held in its snapshot, or about to be."""
    ticket: "Ticket[Any] | None" = None
    """Its dealings with the prefix cache, while its prompt is absorbed."""
    slot: int | None = None
    num_launched: int = 0
    num_folded: int = 0
    """Of these, the tokens that the state itself has absorbed; the others wait in its ring."""
    num_folded_before: int = 0
    """``num_folded`` before the newest launched decode, which may turn out not to have counted."""
    num_sampled: int = 0
    """Samplings launched, or held until the constraint's mask is known."""
    in_flight: int = 0
    """Launched steps not yet retired that refer to this sequence's slot."""
    outputs: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    """Tokens of the prompt that had been absorbed for an earlier request."""
    num_dropped: int = 0
    """Of the outputs, those at the end that hold any of what a stop string has cut off the text."""
    finish_reason: FinishReason = FinishReason.RUNNING
    admitted: float = 0.0
    first_token: float = 0.0

    def again(self) -> "Sequence":
        """The same choice as it was before it got its slot, of one that has sampled nothing; to absorb its prompt."""
        return replace(
            self,
            # Who led it, if somebody did, is through with the prompt: then it has no dealings with the cache.
            leads_again=self.leads_again or self.ticket is None,
            absorbs_all=True,
            leader=None,
            followers=[],
            snapshot=None,
            ticket=None,
            slot=None,
            num_launched=0,
            num_folded=0,
            num_folded_before=0,
            num_sampled=0,
            in_flight=0,
            cached_tokens=0,
            closes=False,
            logits={},
        )

    @property
    def finished(self) -> bool:
        """Whether the terminal event has been produced."""
        return self.finish_reason is not FinishReason.RUNNING

    @property
    def prompt_end(self) -> int:
        """Up to where the prompt can be absorbed now: its end, or, of one that grows, the last place where a piece may
        end that leaves a token for the last piece."""
        return (len(self.prompt) - 1) // CHUNK * CHUNK if self.grows else len(self.prompt)

    @property
    def prompt_remaining(self) -> int:
        """Prompt tokens that can be absorbed now, and have not been given to a launched step."""
        # Asked of every running sequence in every step, hence neither max() nor, mostly, the other property.
        remaining = (self.prompt_end if self.grows else len(self.prompt)) - self.num_launched
        return remaining if remaining > 0 else 0

    @property
    def starved(self) -> bool:
        """Whether it can do nothing until more of its prompt has come."""
        return self.grows and not self.prompt_remaining

    @property
    def blocked(self) -> bool:
        """Whether this waiting sequence waits for a snapshot that another one is about to leave, or for a launched step
        that will tell its newest token, or for more of its prompt."""
        return self.starved or (self.swapped and self.in_flight > 0) or self.awaited is not None

    @property
    def awaited(self) -> "Awaited[Any] | None":
        """The snapshot, still to come, that this waiting sequence waits for; None: for none."""
        ticket = self.ticket if self.leader is None else self.leader.ticket
        return None if ticket is None else ticket.awaited

    @property
    def prompt_stop(self) -> int:
        """Where the next piece of the prompt must end at the latest: where a snapshot is to be taken, or its end."""
        if self.ticket is not None and self.ticket.points:
            return min(self.ticket.points[0], self.prompt_end)
        return self.prompt_end

    @property
    def packed_prompt(self) -> bytes:
        """The prompt, int32 bytes; without a copy unless it has come in pieces."""
        whole = self.prompt.obj if isinstance(self.prompt, memoryview) else None
        return whole if isinstance(whole, bytes) else self.prompt.tobytes()

    @property
    def transcript(self) -> bytes:
        """The prompt and the answer without the token, or the tokens of the string, that stopped it, int32 bytes."""
        stopped = bool(self.outputs) and self.outputs[-1] in self.stop_ids
        kept = len(self.outputs) - (1 if stopped else self.num_dropped)
        return self.packed_prompt + pack_tokens(self.outputs[:kept])

    @property
    def num_absorbed(self) -> int:
        """Tokens of the transcript that the state has absorbed, of a sequence that has ended.

        A step launched before a stop token was known did not count, whereas after a stop string it did.
        """
        if self.outputs and self.outputs[-1] in self.stop_ids:
            return min(self.num_launched, len(self.prompt) + len(self.outputs) - 1)
        return self.num_launched
