"""Log-probabilities of the prompts' own tokens, as they are absorbed.

The logits of a step's prompt rows would take as much memory as the vocabulary is wide, times the step's tokens. They
are computed a few rows at a time; what is kept of a row is its next token's log-probability and rank, and the most
likely tokens.
"""

from array import array
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from server.engine.batch import Batch, Span
from server.engine.model import GLAModel, Hidden
from server.types import PromptLogprobs

SCORED_ROWS: Final = 256
"""Rows whose logits are in memory at once."""


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """Which rows of a step are scored.

    Attributes:
        spans: prefills whose sequences want log-probabilities of their prompts, and how many rows of each are scored.
        rows: of each scored token, the row that predicts it, among all of the step's rows.
        targets: the scored tokens.
        num_top: alternatives to report, the most any sequence wants.
    """

    spans: tuple[tuple[Span, int], ...]
    rows: "array[int]"
    targets: "array[int]"
    num_top: int


@dataclass(frozen=True, slots=True)
class Scores:
    """What was found of each scored token.

    Attributes:
        logprobs_N: float32.
        ranks_N: int32, how many tokens are at least as likely, itself included.
        top_ids_NK, top_logprobs_NK: int32 and float32, the most likely tokens at its position, in order.
    """

    logprobs_N: Tensor
    ranks_N: Tensor
    top_ids_NK: Tensor
    top_logprobs_NK: Tensor

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four."""
        return self.logprobs_N, self.ranks_N, self.top_ids_NK, self.top_logprobs_NK


def plan_scores(batch: Batch) -> ScorePlan | None:
    """What a batch has to score; None: nothing."""
    spans: list[tuple[Span, int]] = []
    rows, targets = array("i"), array("i")
    num_top = 0
    offset = len(batch.decodes)
    for span in batch.prefills:
        prompt, wanted = span.seq.prompt, span.seq.params.prompt_logprobs
        # The prompt's last token predicts what is sampled.
        count = min(span.length, len(prompt) - 1 - span.start)
        if wanted is not None and count and not span.seq.leads_again:
            spans.append((span, count))
            rows.extend(range(offset, offset + count))
            targets.extend(prompt[span.start + 1 : span.start + 1 + count])
            num_top = max(num_top, wanted)
        offset += span.length
    return ScorePlan(tuple(spans), rows, targets, num_top) if rows else None


def score_rows(model: GLAModel, hidden: Hidden, rows_N: Tensor, targets_N: Tensor, num_top: int) -> Scores:
    """Score tokens by the hidden states of the rows that predict them.

    Args:
        model: whose head turns hidden states into logits.
        hidden: what :meth:`GLAModel.absorb` returned.
        rows_N: int64, rows of ``hidden``.
        targets_N: int64, the tokens that came after them.
        num_top: K, alternatives to report.

    Returns:
        On the model's device.
    """
    pieces = [
        _score(model.logits(hidden, rows_R), targets_R, num_top).columns
        for rows_R, targets_R in zip(rows_N.split(SCORED_ROWS), targets_N.split(SCORED_ROWS), strict=True)
    ]
    return Scores(*map(torch.cat, zip(*pieces, strict=True)))


def _score(logits_RV: Tensor, targets_R: Tensor, num_top: int) -> Scores:
    chosen_R1 = logits_RV.gather(1, targets_R[:, None])
    total_R1 = logits_RV.logsumexp(-1, keepdim=True)
    top_RK, top_ids_RK = logits_RV.topk(num_top, -1)
    return Scores(
        (chosen_R1 - total_R1)[:, 0],
        (logits_RV >= chosen_R1).sum(-1, dtype=torch.int32),
        top_ids_RK.int(),
        top_RK - total_R1,
    )


def pack_scores(plan: ScorePlan, scores: Scores) -> list[tuple[Span, PromptLogprobs | None]]:
    """Take the scores, on the host, apart by span; None where they are no numbers."""
    packed: list[tuple[Span, PromptLogprobs | None]] = []
    start = 0
    for span, count in plan.spans:
        logprobs_C, ranks_C, top_ids_CK, top_CK = (column[start : start + count] for column in scores.columns)
        start += count
        if bool(logprobs_C.isnan().any()):
            packed.append((span, None))
            continue
        wanted = span.seq.params.prompt_logprobs
        alternatives = (top_ids_CK[:, :wanted], top_CK[:, :wanted])
        packed.append((span, PromptLogprobs(*map(_to_bytes, (logprobs_C, ranks_C, *alternatives)))))
    return packed


def _to_bytes(column: Tensor) -> bytes:
    if not column.numel():
        return b""
    data = bytearray(column.nbytes)
    torch.frombuffer(data, dtype=column.dtype).copy_(column.flatten())
    return bytes(data)
