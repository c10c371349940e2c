"""What one step computes: spans of sequences, and the tensors the model sees."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from server.engine.sequence import Sequence
from server.engine.step_shapes import StepShape
from server.kernels import RingRows


class Span(NamedTuple):
    """Tokens ``[start, start + length)`` of a sequence's transcript, to be absorbed in one step.

    A tuple, since hundreds are made per step, and a frozen dataclass takes three times as long.
    """

    seq: Sequence
    slot: int
    start: int
    length: int
    samples: bool
    """Whether the span's last token yields a new one."""
    position: int
    """Index of the sampled token among the sequence's outputs (the random stream's counter)."""
    discards: bool = False
    """Whether the new token is thrown away: only the logits are wanted, which a snapshot will hold."""


@dataclass(frozen=True, slots=True)
class Fork:
    """The end of a prompt that several sequences share: its state is copied to those that did not absorb it.

    Attributes:
        source: index of the prefill that ends the prompt.
        branches: spans of no tokens, one per follower that has a slot; they sample from the source's logits.
        waiting: followers without a slot: they get a snapshot.
    """

    source: int
    branches: tuple[Span, ...]
    waiting: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. A decode absorbs the newest sampled token; a prefill absorbs prompt tokens."""

    decodes: tuple[Span, ...]
    """Those that fold their rings come first."""
    prefills: tuple[Span, ...]
    leased: tuple[Sequence, ...]
    """Sequences that got their slot in this step: their sampling parameters go to the device, and their snapshots, if
    they have one, to their slots."""
    replays: tuple[Span, ...] = ()
    """Spans of no tokens, whose whole prompt is in their snapshot: they sample from its logits."""
    forks: tuple[Fork, ...] = ()
    resumed: tuple[Span, ...] = ()
    """Spans of no tokens, whose logits an earlier step has held: they sample from these."""
    swaps: tuple[tuple[Sequence, int], ...] = ()
    """Sequences that have to wait from this step on, and the slots that their states are taken out of before it."""
    saves: tuple[int, ...] = ()
    """Indices of the prefills after which a snapshot is to be taken."""
    num_folding: int = 0
    """How many decodes fold their rings with this token."""

    @property
    def num_tokens(self) -> int:
        """Tokens absorbed by this step."""
        return len(self.decodes) + sum(span.length for span in self.prefills)

    @property
    def shape(self) -> StepShape:
        """The step's size."""
        return StepShape(len(self.decodes), sum(span.length for span in self.prefills), len(self.prefills))

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans: decodes, prefills, resumed ones, replays, branches."""
        spans = self.decodes + self.prefills + self.resumed
        if self.replays or self.forks:
            spans += self.replays + tuple(branch for fork in self.forks for branch in fork.branches)
        return spans


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """A batch as the model sees it: decode rows first, then the packed prompt spans.

    Device tensors unless said. D decodes, P prompt spans, T >= D + their tokens, R wanted rows. Tokens behind the last
    span are padding: they change no state, and what the model makes of them is anything.

    Attributes:
        token_ids_T: int64 [T].
        num_decodes: D, on the host.
        slots_N: int64 [D + P], each span's slot.
        from_zero_N: bool [D + P]; such a span ignores what its slot holds.
        cu_seqlens: int32 [P + 1], where each prompt span begins, relative to row D.
        longest_prefill: at least the length of the longest prompt span, on the host; 0: there are no prompt spans.
        output_rows_R: int64 [R], the rows whose logits are wanted.
        ring_rows: where the rings of the D decodes stand; None: the pool has no rings.
    """

    token_ids_T: Tensor
    num_decodes: int
    slots_N: Tensor
    from_zero_N: Tensor
    cu_seqlens: Tensor
    longest_prefill: int
    output_rows_R: Tensor
    ring_rows: RingRows | None = None
