"""What the host knows of a step and the device does not, as int64 columns of one upload."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from server.engine.batch import Batch
from server.engine.state_pool import NULL_SLOT
from server.engine.step_shapes import StepShape


def pack(batch: Batch, shape: StepShape, order: Sequence[int], pending: Sequence[int], num_folding: int) -> Tensor:
    """A batch's columns, padded to a shape that holds it; :meth:`Columns.cut` names the parts.

    Padding decodes the null slot. Padding spans are empty and the null slot's, and padding tokens belong to no span.

    Args:
        batch: the step.
        shape: holds the batch's own.
        order: indices of the spans whose last token's logits are wanted; without prompts, of all spans.
        pending: tokens in the ring of each decode; empty if the pool has no rings.
        num_folding: how many decodes, the first ones, fold their rings with this token.

    Returns:
        int64, on the host.
    """
    decodes, prefills = batch.decodes, batch.prefills
    absorbing = decodes + prefills
    padding_rows = shape.rows - len(order)
    padding_decodes, padding_spans = shape.decodes - len(decodes), shape.spans - len(prefills)
    small = array("q", (absorbing[index].position for index in order))
    small.extend(repeat(0, padding_rows))
    # Spans of the batch -> entries of the padded slots: the prompts' follow the padding of the decodes.
    num_decodes = len(decodes)
    entries = [index if index < num_decodes else index + padding_decodes for index in order]
    small.extend(entries)
    # Rows that must not count sample for the null slot: a padding decode's, or the entry behind all spans.
    small.extend(repeat(shape.rows, padding_rows) if shape.spans else range(len(order), shape.rows))
    small.extend(span.slot for span in decodes)
    small.extend(repeat(NULL_SLOT, padding_decodes))
    small.extend(span.slot for span in prefills)
    small.extend(repeat(NULL_SLOT, padding_spans + 1))
    small.extend(pending)
    small.extend(repeat(0, shape.decodes - len(pending)))
    small.append(num_folding)
    if not shape.spans:
        return torch.frombuffer(small, dtype=torch.int64)
    offsets = [0]
    for span in prefills:
        offsets.append(offsets[-1] + span.length)
    small.extend(
        entry if entry < shape.decodes else shape.decodes + offsets[entry - shape.decodes + 1] - 1 for entry in entries
    )
    small.extend(repeat(0, padding_rows + shape.decodes))  # decodes never start from zero
    small.extend(span.start == 0 for span in prefills)
    small.extend(repeat(1, padding_spans))
    small.extend(offsets)
    small.extend(repeat(offsets[-1], padding_spans))
    host = torch.empty(len(small) + shape.tokens, dtype=torch.int64)
    host[: len(small)] = torch.frombuffer(small, dtype=torch.int64)
    token_ids = host[len(small) :]
    for span, offset in zip(prefills, offsets, strict=False):
        # Copied, for a tensor must not be a view of what may not be written.
        piece = bytearray(span.seq.prompt[span.start : span.start + span.length])
        token_ids[offset : offset + span.length] = torch.frombuffer(piece, dtype=torch.int32)
    token_ids[offsets[-1] :] = 0
    return host


def upload_size(shape: StepShape) -> int:
    """Numbers that :func:`pack` returns."""
    return sum(_sizes(shape))


def _sizes(shape: StepShape) -> tuple[int, ...]:
    rows, decodes = shape.rows, shape.decodes
    sizes = (rows, rows, rows + 1, decodes, 1)
    if not shape.spans:
        return sizes
    return (*sizes, rows, rows, shape.spans + 1, shape.tokens)


@dataclass(frozen=True, slots=True)
class Columns:
    """A step's columns on the device. D decodes, S prompt spans, P prompt tokens, R = D + S rows at most that sample.

    Attributes:
        positions_R: of the sampled token among its sequence's outputs.
        order_R: each sampling row's entry in the slots; without prompts, its row as well.
        slots_R1: of the decodes, then of the prompt spans, then the null slot once more.
        pending_D: tokens in the decodes' rings.
        num_folding: [1], how many decodes, the first ones, fold their rings.
        output_rows_R: see :attr:`logit_rows`; this and the next ones only in a step with prompts.
        from_zero_R: whether a span starts from zero, 0 or 1.
        cu_seqlens: [S + 1], where each prompt span begins, relative to row D.
        token_ids_P: the prompts' tokens.
    """

    positions_R: Tensor
    order_R: Tensor
    slots_R1: Tensor
    pending_D: Tensor
    num_folding: Tensor
    output_rows_R: Tensor | None = None
    from_zero_R: Tensor | None = None
    cu_seqlens: Tensor | None = None
    token_ids_P: Tensor | None = None

    @classmethod
    def cut(cls, upload: Tensor, shape: StepShape) -> "Columns":
        """The parts of an upload of this shape; numbers behind them are left alone."""
        return cls(*upload[: upload_size(shape)].split(_sizes(shape)))

    @property
    def logit_rows(self) -> Tensor:
        """Of each sampling row, the row of the step whose logits it samples from."""
        return self.order_R if self.output_rows_R is None else self.output_rows_R
