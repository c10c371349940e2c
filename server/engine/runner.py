"""Runs batches: uploads what the device does not know, launches model and sampler, fetches the tokens.

On CUDA ``launch`` returns before the device has finished; ``PendingStep.fetch`` waits for it. The
sampled tokens stay on the device as the next step's input, so the next batch can be launched first.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from server.engine.arrivals import Arrivals
from server.engine.batch import Batch, Span
from server.engine.columns import Columns, pack
from server.engine.copy_clock import CopyClock
from server.engine.graphs import StepGraphs
from server.engine.model import Hidden
from server.engine.sampler import Sampled, SamplePlan, has_bias, has_penalties, is_filtered, is_greedy, redirect_done
from server.engine.scoring import ScorePlan, Scores, pack_scores, plan_scores, score_rows
from server.engine.sequence import Sequence
from server.engine.snapshot import (
    RestoreError,
    Snapshot,
    fold_slot,
    fork_slot,
    parked_bytes,
    restore_snapshot,
    shrink,
    take_snapshot,
    to_device,
    to_host,
)
from server.engine.state_exchange import pool_layout
from server.engine.state_file import Part
from server.engine.step import StepModel
from server.engine.swap import SwapSpace
from server.types import PromptLogprobs, TokenLogprobs

logger = logging.getLogger(__name__)


class PendingStep:
    """A launched batch whose samples are, or will be, on the host.

    Attributes:
        batch: what was launched.
        rows: the spans that sample, in the order of the results.
        snapshots: of the prefills that ``batch.saves`` names, in order; None where one could not be taken.
        broken: sequences that the batch does not compute as they should be, and why. Nothing else is the matter with
            it: what it does with these is no worse than what it does with sequences that have ended.
        started: recorded when the device turned to it; None: not known.
    """

    __slots__ = ("_event", "_sampled", "_scored", "batch", "broken", "rows", "snapshots", "started")

    def __init__(
        self,
        batch: Batch,
        rows: list[Span],
        sampled: Sampled | None,
        scored: tuple[ScorePlan, Scores] | None = None,
        snapshots: Iterable[Snapshot | None] = (),
        broken: Mapping[Sequence, Exception] = MappingProxyType({}),
        *,
        on_cuda: bool,
    ) -> None:
        self.batch = batch
        self.broken = broken
        self.rows = rows
        self.started: torch.cuda.Event | None = None
        self.snapshots = tuple(snapshots)
        self._event: torch.cuda.Event | None = None
        self._sampled = sampled
        self._scored = scored
        if not on_cuda:
            return
        if scored is not None:
            self._scored = scored[0], Scores(*map(_to_pinned, scored[1].columns))
        if sampled is not None:
            self._sampled = Sampled(
                _to_pinned(sampled.tokens_R),
                None if sampled.logprobs_R is None else _to_pinned(sampled.logprobs_R),
                None if sampled.top_ids_RK is None else _to_pinned(sampled.top_ids_RK),
                None if sampled.top_logprobs_RK is None else _to_pinned(sampled.top_logprobs_RK),
            )
        # A step that samples nothing is waited for, too: the host must not run ahead of the device by more than one.
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    @property
    def done(self) -> bool:
        """Whether the device has completed it."""
        return self._event is None or self._event.query()

    def device_seconds(self) -> float | None:
        """How long the device worked on it, after :meth:`fetch`; None where it has no clock."""
        if self.started is None or self._event is None:
            return None
        return float(self.started.elapsed_time(self._event)) / 1e3

    def fetch(self) -> list[int]:
        """Wait for the device; the sampled token of each row, BROKEN or DEAD_END where none could be chosen."""
        if self._event is not None:
            self._event.synchronize()
        return [] if self._sampled is None else self._sampled.tokens_R.tolist()

    def fetch_logprobs(self, row: int) -> TokenLogprobs | None:
        """The row's log-probabilities, with as many alternatives as its request wants; None if it wants none."""
        wanted = self.rows[row].seq.params.logprobs
        if wanted is None:
            return None
        assert self._sampled is not None and self._sampled.logprobs_R is not None
        top_ids: list[int] = []
        top: list[float] = []
        if wanted:
            assert self._sampled.top_ids_RK is not None and self._sampled.top_logprobs_RK is not None
            top_ids = self._sampled.top_ids_RK[row, :wanted].tolist()
            top = self._sampled.top_logprobs_RK[row, :wanted].tolist()
        return TokenLogprobs(float(self._sampled.logprobs_R[row]), top_ids, top)

    def fetch_prompt_logprobs(self) -> list[tuple[Span, PromptLogprobs | None]]:
        """Of the prefills whose sequences want them, after :meth:`fetch`; None where the logits are no numbers."""
        return [] if self._scored is None else pack_scores(*self._scored)


def _to_pinned(column: Tensor) -> Tensor:
    # The caching host allocator does not hand the memory out again before the copy has completed.
    host = torch.empty(column.shape, dtype=column.dtype, pin_memory=True)
    return host.copy_(column, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _LogitRows:
    """Which logits a batch needs of the model, and which of them each sampling row takes.

    Attributes:
        spans: indices of the spans whose last token's logits the model is to yield.
        of_row: for each sampling row, an index into these and, behind them, into the batch's replays; None: the rows
            are the spans, in order.
    """

    spans: list[int]
    of_row: list[int] | None

    @classmethod
    def of(cls, batch: Batch, span_of_row: list[int]) -> "_LogitRows":
        if not batch.replays and not batch.forks:
            return cls(span_of_row, None)
        absorbed = len(batch.decodes) + len(batch.prefills)
        spans = [span for span in span_of_row if span < absorbed]
        place = {span: place for place, span in enumerate(spans)}
        place |= {absorbed + i: len(spans) + i for i in range(len(batch.replays))}
        branch = absorbed + len(batch.replays)
        for fork in batch.forks:
            for _ in fork.branches:
                place[branch] = place[len(batch.decodes) + fork.source]
                branch += 1
        return cls(spans, [place[span] for span in span_of_row])


class Runner:
    """One device's model, states and sampler.

    Args:
        step: the three of them.
        graphs: captured steps of them; None: every batch is launched kernel by kernel, as one that no graph holds is.
        parked_dtype: to which states are rounded that are kept for later prompts; None: they are not.
        swap: takes states of sequences that have to wait; None: none has to.

    Attributes:
        copies: times copies of states.
        swap: as above.
    """

    def __init__(
        self,
        step: StepModel,
        graphs: StepGraphs | None = None,
        *,
        parked_dtype: torch.dtype | None = None,
        swap: SwapSpace | None = None,
    ) -> None:
        self._step = step
        self._graphs = graphs
        self._sampler = step.sampler
        self._states = step.states
        self._device = step.device
        self._parked_dtype = parked_dtype
        self.swap = swap
        self.copies = CopyClock(step.device)
        self._arriving: torch.cuda.Stream | None = None

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        """Start a batch. Steps complete in the order of their launches."""
        started = None
        if self._on_cuda:
            started = torch.cuda.Event(enable_timing=True)
            started.record()
        step = self._launch(batch)
        step.started = started
        return step

    def _launch(self, batch: Batch) -> PendingStep:
        if self._arriving is not None:
            # The step before waited for what came layer by layer, unless it could not be launched.
            torch.cuda.current_stream(self._device).wait_stream(self._arriving)
            self._arriving = None
        swap_failures = self._take_out(batch.swaps)
        broken = self._lease(batch.leased) | swap_failures
        score_plan = plan_scores(batch)
        graphs = self._graphs
        shape = graphs.find(batch.shape) if graphs is not None and score_plan is None and batch.num_tokens else None
        replayed = self._restore(batch, broken, graphs.arrivals if graphs and shape and shape.spans else None)
        rows, span_of_row, plan = _plan(batch.spans)
        logits = _LogitRows.of(batch, span_of_row)
        scored = None
        if graphs is not None and shape is not None:
            pending, num_folding = self._advance_rings(batch, every_token=graphs.folds_every_token(shape))
            graphs.absorb(shape, batch, logits.spans, pending, num_folding)
            logits_UV, slots_R, positions_R = graphs.rows(len(logits.spans))
            self._keep_logits(batch, logits_UV, logits.spans)
            if logits.of_row is None:
                snapshots = self._save(batch, logits_UV, logits.spans)
                sampled = graphs.sample(shape, plan) if rows else None
                sampling = rows[: plan.num_sampled]
                return PendingStep(batch, sampling, sampled, None, snapshots, broken, on_cuda=self._on_cuda)
        else:
            pending, num_folding = self._advance_rings(batch, every_token=False)
            scores = score_plan is not None
            hidden, slots_R1, columns = self._absorb(batch, logits.spans, pending, num_folding, all_rows=scores)
            if score_plan is not None:
                scored = score_plan, self._score(score_plan, hidden)
            wanted = len(logits.spans)
            if wanted:
                logits_UV = self._step.model.logits(hidden, hidden.rows_R)
            else:
                logits_UV = torch.empty((0, self._sampler.vocab_size), device=self._device)
            slots_R, positions_R = slots_R1[columns.order_R[:wanted]], columns.positions_R[:wanted]
            self._keep_logits(batch, logits_UV, logits.spans)
        snapshots = self._save(batch, logits_UV, logits.spans)
        sampled = None
        if rows:
            self._fork(batch, logits_UV, logits.spans, broken)
            if logits.of_row is not None:
                of_row, slots, positions = (logits.of_row, [row.slot for row in rows], [row.position for row in rows])
                places_R, slots_R, positions_R = self._to_device(torch.tensor((of_row, slots, positions))).unbind()
                logits_UV = torch.cat((logits_UV, *replayed)).index_select(0, places_R)
                slots_R = redirect_done(slots_R, self._sampler.done_S)
            sampled = self._sampler.sample(logits_UV, slots_R, positions_R, plan)
        return PendingStep(batch, rows[: plan.num_sampled], sampled, scored, snapshots, broken, on_cuda=self._on_cuda)

    def check_device(self, error: Exception) -> None:
        """Raise if an exception was, or hides, an error of the device, after which nothing can be computed there."""
        if self._on_cuda:
            if isinstance(error, torch.AcceleratorError):
                raise error
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def snapshot(self, seq: Sequence) -> Snapshot:
        """The state of a sequence that has ended, for prompts to go on from: its slot's, if it still has one."""
        num_tokens = seq.num_absorbed
        if seq.slot is None:
            assert seq.snapshot is not None and seq.snapshot.num_tokens == num_tokens
            return self._shrunk(replace(to_device(seq.snapshot, self._device), logits_V=seq.logits.get(num_tokens)))
        # A launched decode that did not count did not fold the ring either.
        num_folded = seq.num_folded if num_tokens == seq.num_launched else seq.num_folded_before
        with self.copies.time(self.copies.saves):
            return self._shrunk(
                take_snapshot(
                    self._states,
                    seq.slot,
                    seq.logits.get(num_tokens),
                    num_tokens=num_tokens,
                    num_folded=num_folded,
                )
            )

    @property
    def parked_bytes(self) -> int:
        """Most bytes of a snapshot that is kept for later prompts."""
        return parked_bytes(self._states, self._parked_dtype, self._sampler.vocab_size)

    @property
    def pool_layout(self) -> dict[str, Part]:
        """What a snapshot looks like that is not rounded."""
        return pool_layout(self._states, self._sampler.vocab_size)

    def _shrunk(self, snapshot: Snapshot) -> Snapshot:
        return snapshot if self._parked_dtype is None else shrink(snapshot, self._parked_dtype)

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _absorb(
        self, batch: Batch, output_spans: list[int], pending: list[int], num_folding: int, *, all_rows: bool
    ) -> tuple[Hidden, Tensor, Columns]:
        """Absorb the batch's tokens, kernel by kernel; the hidden states, and the slots of its spans."""
        shape = batch.shape
        columns = Columns.cut(self._to_device(pack(batch, shape, output_spans, pending, num_folding)), shape)
        if not shape.rows:
            return Hidden(self._step.model.embeddings[:0]), columns.slots_R1, columns
        longest = max((span.length for span in batch.prefills), default=0)
        wanted = len(output_spans)
        hidden, slots_R1 = self._step.absorb(
            columns, shape, every_token=False, longest_prefill=longest, wanted=wanted, all_rows=all_rows
        )
        return hidden, slots_R1, columns

    def _score(self, plan: ScorePlan, hidden: Hidden) -> Scores:
        """The log-probabilities of the batch's prompt tokens, as far as somebody wants them."""
        upload = self._to_device(torch.frombuffer(plan.rows + plan.targets, dtype=torch.int32))
        rows_N, targets_N = upload.long().chunk(2)
        return score_rows(self._step.model, hidden, rows_N, targets_N, plan.num_top)

    @torch.inference_mode()
    def resume(self, batch: Batch) -> PendingStep:
        """Sample rows that earlier steps have held; their masks must be known."""
        rows, _, plan = _plan(batch.resumed, masked=True)
        slots = [span.slot for span in rows]
        sampled = self._sampler.resume(slots, [span.position for span in rows], plan, _masks(rows))
        return PendingStep(batch, rows, sampled, on_cuda=self._on_cuda)

    def _lease(self, sequences: tuple[Sequence, ...]) -> dict[Sequence, Exception]:
        """Tell the sampler of newly leased sequences; those for which it fails, and why."""
        if not sequences:
            return {}
        try:
            self._sampler.lease(sequences)
            return {}
        except Exception as error:
            if len(sequences) == 1:
                return {sequences[0]: error}
        return {seq: error for one in sequences for seq, error in self._lease((one,)).items()}

    def _restore(self, batch: Batch, broken: dict[Sequence, Exception], arrivals: Arrivals | None) -> list[Tensor]:
        """Write the snapshots of newly leased sequences to their slots; the logits [1, V] of the replays, in order.

        Args:
            broken: sequences for which that fails are added.
            arrivals: for which the batch's step waits layer by layer; None: for none.
        """
        leased: dict[Snapshot, list[Sequence]] = {}
        for seq in batch.leased:
            if seq.swapped:
                self._bring_back(seq, broken)
            elif seq.snapshot is not None:
                leased.setdefault(seq.snapshot, []).append(seq)
        logits: dict[Sequence, Tensor] = {}
        replayed = {span.seq for span in batch.replays}
        for snapshot, sequences in leased.items():
            slots = [seq.slot for seq in sequences if seq.slot is not None]
            try:
                if arrivals is not None and replayed.isdisjoint(sequences) and arrivals.takes(snapshot, slots):
                    self._bring(snapshot, slots[0], arrivals)
                    logits_V = None
                else:
                    logits_V = self._restore_one(snapshot, slots)
            except Exception as error:
                self.check_device(error)
                failure = RestoreError(f"{type(error).__name__}: {error}")
                failure.__cause__ = error
                broken.update(dict.fromkeys(sequences, failure))
                logits_V = torch.zeros(self._sampler.vocab_size, device=self._device)
            for seq in sequences:
                if logits_V is not None:
                    logits[seq] = logits_V[None]
                seq.num_folded = snapshot.num_tokens
                seq.snapshot = None
        return [logits[span.seq] for span in batch.replays]

    def _take_out(self, swaps: tuple[tuple[Sequence, int], ...]) -> dict[Sequence, Exception]:
        """Let sequences that have to wait have what their slots hold; those for which that fails, and why."""
        failures: dict[Sequence, Exception] = {}
        for seq, slot in swaps:
            assert self.swap is not None
            folded = seq.num_folded if self._states.ring_size else seq.num_launched
            try:
                seq.snapshot = self.swap.take(slot, num_tokens=seq.num_launched, num_folded=folded)
            except Exception as error:
                failures[seq] = error
        return failures

    def _bring_back(self, seq: Sequence, broken: dict[Sequence, Exception]) -> None:
        """Let the slot of a sequence that had to wait hold what it held before, down to the ring."""
        snapshot = seq.snapshot
        assert snapshot is not None and seq.slot is not None and self.swap is not None
        try:
            restore_snapshot(self._states, snapshot, [seq.slot])
        except Exception as error:
            broken[seq] = error
        seq.num_folded, seq.snapshot, seq.swapped = snapshot.num_folded, None, False
        self.swap.brought_back(snapshot)

    def _bring(self, snapshot: Snapshot, slot: int, arrivals: Arrivals) -> None:
        """Start bringing a snapshot to a slot, for a step that waits for its layers."""
        self._arriving = arrivals.stream
        arrivals.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(arrivals.stream), self.copies.time(self.copies.restores):
            arrivals.bring(snapshot, slot)

    def _restore_one(self, snapshot: Snapshot, slots: list[int]) -> Tensor | None:
        with self.copies.time(self.copies.restores):
            logits_V = restore_snapshot(self._states, snapshot, slots)
            num_pending = snapshot.num_tokens - snapshot.num_folded
            if self._states.ring_size and num_pending:
                for slot in slots:
                    fold_slot(self._states, slot, num_pending)
        return logits_V

    def _fork(self, batch: Batch, logits_UV: Tensor, spans: list[int], broken: dict[Sequence, Exception]) -> None:
        """Copy the states of prompts that ended in this batch to the followers: to their slots, or to a snapshot.

        Args:
            logits_UV: of the spans.
            spans: indices in the batch.
            broken: the followers of such sequences are added.
        """
        for fork in batch.forks:
            source = batch.prefills[fork.source]
            leader = source.seq
            if leader in broken:
                followers = [*(branch.seq for branch in fork.branches), *fork.waiting]
                broken.update(dict.fromkeys(followers, broken[leader]))
            try:
                if fork.branches:
                    fork_slot(self._states, source.slot, [branch.slot for branch in fork.branches])
            except Exception as error:
                broken.update((branch.seq, error) for branch in fork.branches)
            for branch in fork.branches:
                branch.seq.num_folded = leader.num_folded
            if not fork.waiting:
                continue
            try:
                snapshot = to_host(self._take(batch, fork.source, logits_UV, spans))
            except Exception as error:
                broken.update(dict.fromkeys(fork.waiting, error))
                continue
            for seq in fork.waiting:
                seq.snapshot = snapshot

    def _save(self, batch: Batch, logits_UV: Tensor, spans: list[int]) -> list[Snapshot | None]:
        """The snapshots that the batch asks for; None where there is no memory for one: nobody's answer needs it."""
        snapshots: list[Snapshot | None] = []
        for index in batch.saves:
            try:
                with self.copies.time(self.copies.saves):
                    snapshots.append(self._shrunk(self._take(batch, index, logits_UV, spans)))
            except Exception as error:
                self.check_device(error)
                logger.warning("a snapshot could not be taken", exc_info=error)
                snapshots.append(None)
        return snapshots

    def _keep_logits(self, batch: Batch, logits_UV: Tensor, spans: list[int]) -> None:
        """Let sequences to be saved keep their logits, for any token may turn out to be their last.

        Those of the step before stay, too: a step launched ahead may turn out not to have counted.
        """
        absorbing = batch.decodes + batch.prefills
        rows = [row for row, index in enumerate(spans) if absorbing[index].seq.save is not None]
        if not rows:
            return
        kept_UV = logits_UV[self._to_device(torch.tensor(rows))]
        for row, logits_V in zip(rows, kept_UV, strict=True):
            span = absorbing[spans[row]]
            logits = span.seq.logits
            while len(logits) > 1:
                del logits[min(logits)]
            logits[span.start + span.length] = logits_V

    def _take(self, batch: Batch, index: int, logits_UV: Tensor, spans: list[int]) -> Snapshot:
        """What a prefill of the batch has led to; with the last position's logits where it samples."""
        span = batch.prefills[index]
        logits_V = logits_UV[spans.index(len(batch.decodes) + index)] if span.samples else None
        num_tokens = span.start + span.length
        return take_snapshot(self._states, span.slot, logits_V, num_tokens=num_tokens, num_folded=span.seq.num_folded)

    def _to_device(self, host: Tensor) -> Tensor:
        return host.pin_memory().to(self._device, non_blocking=True) if self._on_cuda else host

    def _advance_rings(self, batch: Batch, *, every_token: bool) -> tuple[list[int], int]:
        """Tokens in the ring of every decode, and how many decodes fold theirs; notes what the states then hold."""
        pending: list[int] = []
        if not self._states.ring_size:
            return pending, 0
        num_folding = len(batch.decodes) if every_token else batch.num_folding
        for row, span in enumerate(batch.decodes):
            seq, start = span.seq, span.start
            pending.append(start - seq.num_folded)
            seq.num_folded_before = seq.num_folded
            if row < num_folding:
                seq.num_folded = start + 1
        for span in batch.prefills:
            span.seq.num_folded = span.start + span.length
        return pending, num_folding


def _plan(spans: tuple[Span, ...], *, masked: bool = False) -> tuple[list[Span], list[int], SamplePlan]:
    """The rows whose logits are wanted, in the plan's order; each row's span; what the rows need.

    Args:
        masked: whether the masks of constraints are known; else the constrained rows are held.
    """
    greedy: list[int] = []
    plain: list[int] = []
    filtered: list[int] = []
    held: list[int] = []
    penalties = bias = min_tokens = False
    num_logprobs: int | None = None
    for index, span in enumerate(spans):
        if not span.samples:
            continue
        seq = span.seq
        if span.discards:
            greedy.append(index)
            continue
        if seq.constraint is not None and not masked:
            held.append(index)
            continue
        params = seq.params
        (greedy if is_greedy(seq) else filtered if is_filtered(seq) else plain).append(index)
        penalties |= has_penalties(seq)
        bias |= has_bias(seq)
        min_tokens |= span.position < params.min_tokens
        if params.logprobs is not None:
            num_logprobs = max(num_logprobs or 0, params.logprobs)
    order = greedy + plain + filtered + held
    plan = SamplePlan(
        len(greedy), len(plain), len(filtered), penalties, bias, min_tokens, num_logprobs, num_held=len(held)
    )
    return [spans[index] for index in order], order, plan


def _masks(rows: list[Span]) -> Tensor:
    """The rows' masks, int32 [R, W]."""
    constraints = [span.seq.constraint for span in rows]
    jobs = {id(one.job): one.job for one in constraints if one is not None and one.job is not None}
    if len(jobs) == 1:
        (job,) = jobs.values()
        return job.masks_RW[[one.row for one in constraints if one is not None]]
    return torch.stack([one.job.masks_RW[one.row] for one in constraints if one is not None and one.job is not None])
