"""CUDA graphs of the step in which every sequence decodes: one launch in place of some three hundred.

A graph repeats fixed work at fixed addresses, so there is one per batch size of a ladder, and a batch takes the next
size up. Rows too many are padding: they decode the null slot, and never a live one. What differs from step to step
lies in buffers that all sizes share: the inputs, filled by one copy, and the logits, from which the common ways of
sampling are graphs too and the others run as they do without graphs.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from server.engine.batch import ModelInputs
from server.engine.model import GLAModel
from server.engine.sampler import Sampled, SamplePlan, Sampler, redirect_done
from server.engine.state_pool import NULL_SLOT, StateTensors
from server.kernels import RingRows, folds_every_token, join_folds

MAX_ROWS = 1024
"""Larger batches run without a graph: their kernels take longer than launching them does."""

_INPUT_COLUMNS = 5
"""Slots, sampling order, positions, tokens pending in rings, rows that fold theirs (preceded by their number)."""


def ladder(max_rows: int) -> list[int]:
    """Batch sizes to capture, ascending, the last one ``max_rows``.

    Powers of two to 8, then steps of 8, above 64 of an eighth of the power of two below: at most one row in eight
    is padding, or seven rows.
    """
    sizes = [1]
    while sizes[-1] < max_rows:
        size = sizes[-1]
        step = size if size < 8 else max(8, (1 << (size.bit_length() - 1)) // 8)
        sizes.append(min(size + step, max_rows))
    return sizes


class DecodeGraphs:
    """Captured decode steps of a model and its sampler.

    Args:
        model: weights on a CUDA device.
        states: the pool that the graphs will update.
        sampler: its tables have as many slots as the pool.
        max_rows: largest batch to capture.
        stream: to capture on. The matrix library keeps a workspace per stream, so every capture in a process should
            be given the same one.

    Attributes:
        max_rows: as above.
    """

    @torch.inference_mode()
    def __init__(
        self, model: GLAModel, states: StateTensors, sampler: Sampler, *, max_rows: int, stream: torch.cuda.Stream
    ) -> None:
        self.max_rows = max_rows
        self._model = model
        self._states = states
        self._sampler = sampler
        self._sizes = ladder(max_rows)
        device = sampler.last_token_S.device
        self._device = device
        self._inputs = torch.zeros(_INPUT_COLUMNS * max_rows + 1, dtype=torch.int64, device=device)
        self._from_zero_N = torch.zeros(max_rows, dtype=torch.bool, device=device)
        self._cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device)
        self._slots_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._logits_RV = torch.zeros((max_rows, sampler.vocab_size), device=device)
        self._tokens_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._forward: dict[int, Callable[[], None]] = {}
        self._sample: dict[tuple[int, bool], Callable[[], None]] = {}
        recorder = _Recorder(stream)
        # The largest first: the others then find the memory they need in what it took.
        for size in reversed(self._sizes):
            self._forward[size] = recorder.record(partial(self._run_model, size))
            for greedy in (True, False):
                self._sample[size, greedy] = recorder.record(partial(self._run_sampler, size, greedy))

    def folds_every_token(self, rows: int) -> bool:
        """Whether a batch of so many rows updates its states with every token."""
        return self._in_place(self._sizes[bisect_left(self._sizes, rows)])

    def launch(
        self,
        slots: Sequence[int],
        order: Sequence[int],
        positions: Sequence[int],
        plan: SamplePlan,
        pending: Sequence[int],
        folding: Sequence[int],
    ) -> Sampled:
        """Absorb one token in each slot and sample the next, without waiting for the device.

        Args:
            slots: of the rows; at most ``max_rows``.
            order: the sampling rows: a permutation of the rows' indices, sorted as ``plan`` says.
            positions: of the sampling rows, as in :meth:`Sampler.sample`.
            plan: what the sampling rows need.
            pending: tokens in each row's ring; empty if the pool has no rings.
            folding: rows that fold their rings with this token; all of them where :meth:`folds_every_token`.

        Returns:
            The samples, in buffers that the next launch overwrites.
        """
        rows = len(slots)
        size = self._sizes[bisect_left(self._sizes, rows)]
        host = array("q", slots)
        host.extend(repeat(NULL_SLOT, size - rows))
        host.extend(order)
        host.extend(range(rows, size))
        host.extend(positions)
        host.extend(repeat(0, size - rows))
        host.extend(pending)
        host.extend(repeat(0, size - rows))
        host.append(len(folding))
        host.extend(folding)
        inputs = torch.frombuffer(host, dtype=torch.int64)
        if self._device.type == "cuda":
            inputs = inputs.pin_memory()
        self._inputs[: inputs.shape[0]].copy_(inputs, non_blocking=True)
        self._forward[size]()
        greedy = plan.num_greedy == rows
        if plan == _uniform_plan(rows, greedy=greedy):
            self._sample[size, greedy]()
            return Sampled(self._tokens_R[:rows], None, None, None)
        positions_R = self._columns(size)[2][:rows]
        return self._sampler.sample(self._logits_RV[:rows], self._slots_R[:rows], positions_R, plan)

    @torch.inference_mode()
    def measure(self) -> list[tuple[int, float]]:
        """Every captured size and the seconds that its model takes; leaves garbage in the pool's slots."""
        times = []
        for size in self._sizes:
            # Slots of their own: the null slot alone would be read from the cache.
            self._inputs[:size] = torch.arange(1, size + 1, device=self._device)
            self._inputs[size : _INPUT_COLUMNS * size + 1] = 0
            if self._states.ring_size and not self._in_place(size):
                # Rings half full, and as many folds as come in a step on average.
                self._inputs[3 * size : 4 * size] = self._states.ring_size // 2
                self._inputs[4 * size] = folds = size // self._states.ring_size
                self._inputs[4 * size + 1 : 4 * size + 1 + folds] = torch.arange(folds, device=self._device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._forward[size]()
            start.record()
            self._forward[size]()
            self._forward[size]()
            end.record()
            end.synchronize()
            times.append((size, start.elapsed_time(end) / 2000))
        return times

    def _in_place(self, size: int) -> bool:
        return folds_every_token(size, self._states.layers[0].values_SGKV)

    def _columns(self, size: int) -> tuple[Tensor, Tensor, Tensor, RingRows | None]:
        """The input buffer as a batch of this size uses it: slots, sampling order, positions, rings."""
        columns = self._inputs[: _INPUT_COLUMNS * size + 1].split((size, size, size, size, size + 1))
        slots_N, order_R, positions_R, pending_N, folding = columns
        ring_rows = RingRows(pending_N, None if self._in_place(size) else folding) if self._states.ring_size else None
        return slots_N, order_R, positions_R, ring_rows

    def _run_model(self, size: int) -> None:
        slots_N, order_R, _, ring_rows = self._columns(size)
        slots_N = redirect_done(slots_N, self._sampler.done_S)
        inputs = ModelInputs(
            token_ids_T=self._sampler.last_token_S[slots_N],
            num_decodes=size,
            slots_N=slots_N,
            from_zero_N=self._from_zero_N[:size],
            cu_seqlens=self._cu_seqlens,
            prefill_lengths=(),
            output_rows_R=order_R,
            ring_rows=ring_rows,
        )
        self._model.forward(inputs, self._states, out_RV=self._logits_RV[:size])
        self._slots_R[:size] = slots_N[order_R]
        if ring_rows is not None and ring_rows.folding is not None:
            join_folds(self._device)

    def _run_sampler(self, size: int, greedy: bool) -> None:
        plan = _uniform_plan(size, greedy=greedy)
        positions_R = self._columns(size)[2]
        sampled = self._sampler.sample(self._logits_RV[:size], self._slots_R[:size], positions_R, plan)
        self._tokens_R[:size] = sampled.tokens_R


def _uniform_plan(size: int, *, greedy: bool) -> SamplePlan:
    """All rows greedy, or all rows plain, and nothing else to do."""
    num_greedy = size if greedy else 0
    return SamplePlan(num_greedy, size - num_greedy, 0, False, False, False, None)


class _Recorder:
    """Captures work into graphs that share their memory; they must run one after the other."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work once, so that everything it needs is loaded, and capture it; the result repeats it."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        replay: Callable[[], None] = graph.replay
        return replay
