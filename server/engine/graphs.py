"""CUDA graphs of whole steps: one launch in place of some three hundred.

A graph repeats fixed work at fixed addresses, so there is one per shape (:mod:`server.engine.step_shapes`), and a batch
takes the smallest shape that holds it. What it has too few of is padding, which touches nobody: decodes of the null
slot, empty spans, tokens of no span. What differs from step to step lies in buffers that all shapes share: the inputs,
filled by one copy, and the logits, from which the common ways of sampling are graphs too and the others run as they do
without graphs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from server.engine.arrivals import Arrivals
from server.engine.batch import Batch
from server.engine.columns import Columns, pack, upload_size
from server.engine.sampler import Sampled, SamplePlan
from server.engine.state_pool import NULL_SLOT
from server.engine.step import StepModel
from server.engine.step_shapes import StepShape, in_order_of_choice, typical_lengths
from server.kernels import folds_every_token, join_folds

_TIMED_RUNS = 2


class StepGraphs:
    """Captured steps of a model and its sampler; :meth:`capture` adds one.

    Args:
        step: on a CUDA device.
        shapes: all that may be captured: whose inputs and rows there is to be room for.
        stream: to capture on. The matrix library keeps a workspace per stream, so every capture in a process should
            be given the same one.

    Attributes:
        arrivals: brings states for which captured steps with prompts wait.
    """

    def __init__(self, step: StepModel, shapes: Sequence[StepShape], *, stream: torch.cuda.Stream) -> None:
        self._step = step
        self.arrivals = Arrivals(step.states) if step.device.type == "cuda" else None
        device, rows = step.device, max(shape.rows for shape in shapes)
        with torch.inference_mode():
            self._inputs = torch.zeros(max(map(upload_size, shapes)), dtype=torch.int64, device=device)
            self._slots_R = torch.zeros(rows, dtype=torch.int64, device=device)
            self._logits_RV = torch.zeros((rows, step.sampler.vocab_size), device=device)
            self._tokens_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self._forward: dict[StepShape, Callable[[], None]] = {}
        self._sample: dict[tuple[int, bool], Callable[[], None]] = {}
        self._shapes: list[StepShape] = []
        self._recorder = _Recorder(stream)

    @torch.inference_mode()
    def capture(self, shape: StepShape, *, is_loaded: bool = False) -> None:
        """Record steps of this shape. The largest should come first: the others then find their memory in its own.

        Args:
            shape: to record.
            is_loaded: whether the kernels of such a step have run before, so that it need not run to be recorded.
        """
        # Recording runs the work, too: what another shape has left would point anywhere.
        self._inputs.zero_()
        self._forward[shape] = self._recorder.record(partial(self._run_model, shape), is_loaded=is_loaded)
        for greedy in (True, False):
            if (shape.rows, greedy) not in self._sample:
                work = partial(self._run_sampler, shape.rows, greedy)
                self._sample[shape.rows, greedy] = self._recorder.record(work, is_loaded=is_loaded)
        self._shapes = in_order_of_choice(self._forward)

    def find(self, size: StepShape) -> StepShape | None:
        """The smallest captured shape that holds a step of this size; None if there is none, or nothing to absorb."""
        if not size.rows:
            return None
        return next((shape for shape in self._shapes if shape.holds(size)), None)

    def folds_every_token(self, shape: StepShape) -> bool:
        """Whether the decodes of such steps update their states with every token."""
        return folds_every_token(shape.decodes, self._step.states.layers[0])

    def absorb(self, shape: StepShape, batch: Batch, order: list[int], pending: list[int], num_folding: int) -> None:
        """Absorb a batch's tokens and form the logits wanted, without waiting for the device.

        Args:
            shape: captured; holds the batch.
            batch: the step.
            order: indices of the spans whose last token's logits are wanted; without prompts, of all of them.
            pending: tokens in each decode's ring; empty if the pool has no rings.
            num_folding: how many decodes, the first ones, fold their rings; all where :meth:`folds_every_token`.
        """
        inputs = pack(batch, shape, order, pending, num_folding)
        if self._step.device.type == "cuda":
            inputs = inputs.pin_memory()
        self._inputs[: inputs.shape[0]].copy_(inputs, non_blocking=True)
        self._forward[shape]()

    def rows(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the first so many wanted rows of the last step sample from; the next step overwrites it.

        Returns:
            Logits float32 [count, vocab_size], slots and positions, as :meth:`Sampler.sample` takes them.
        """
        return self._logits_RV[:count], self._slots_R[:count], self._inputs[:count]  # an upload begins with positions

    def sample(self, shape: StepShape, plan: SamplePlan) -> Sampled:
        """Sample from the logits of the last step, without waiting for the device.

        Args:
            shape: the step's.
            plan: what its wanted rows need, in their order.

        Returns:
            The samples, in buffers that the next step overwrites.
        """
        rows = plan.num_sampled + plan.num_held
        greedy = plan.num_greedy == rows
        if plan == _uniform_plan(rows, greedy=greedy):
            self._sample[shape.rows, greedy]()
            return Sampled(self._tokens_R[:rows], None, None, None)
        return self._step.sampler.sample(*self.rows(rows), plan)

    @torch.inference_mode()
    def measure(self, shape: StepShape, *, folds: int | None = None) -> float:
        """Seconds that the model takes for a full step of a captured shape; leaves garbage in the pool's slots.

        Args:
            shape: the step's.
            folds: decodes that fold their rings; None: as many as do on average.
        """
        self._fill(shape, folds)
        forward = self._forward[shape]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        forward()
        start.record()
        for _ in range(_TIMED_RUNS):
            forward()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / (1000 * _TIMED_RUNS)

    def _fill(self, shape: StepShape, folds: int | None = None) -> None:
        """Inputs as a typical full step has them."""
        self._inputs[: upload_size(shape)] = 0
        columns = self._columns(shape)
        # Slots of their own: one alone would be read from the cache.
        num_slots = len(self._step.sampler.done_S) - 1
        spans = torch.arange(shape.rows, device=self._step.device)
        columns.slots_R1[:-1] = NULL_SLOT + 1 + spans % num_slots
        columns.order_R.copy_(spans)
        ring_size = self._step.states.ring_size
        if ring_size and not self.folds_every_token(shape):
            columns.pending_D.fill_(ring_size // 2)
            columns.num_folding.fill_(shape.decodes // ring_size if folds is None else folds)
        if columns.cu_seqlens is not None:
            columns.cu_seqlens.copy_(torch.tensor([0, *accumulate(typical_lengths(shape))]))

    def _columns(self, shape: StepShape) -> Columns:
        return Columns.cut(self._inputs, shape)

    def _run_model(self, shape: StepShape) -> None:
        step, columns, rows = self._step, self._columns(shape), shape.rows
        every_token = self.folds_every_token(shape)
        before_layer = self.arrivals.wait_for if shape.spans and self.arrivals is not None else None
        hidden, slots_R1 = step.absorb(columns, shape, every_token=every_token, before_layer=before_layer)
        step.model.logits(hidden, hidden.rows_R, out_RV=self._logits_RV[:rows])
        self._slots_R[:rows] = slots_R1[columns.order_R]
        if shape.decodes and step.states.ring_size and not every_token:
            join_folds(step.device)

    def _run_sampler(self, rows: int, greedy: bool) -> None:
        sampled = self._step.sampler.sample(*self.rows(rows), _uniform_plan(rows, greedy=greedy))
        self._tokens_R[:rows] = sampled.tokens_R


def _uniform_plan(rows: int, *, greedy: bool) -> SamplePlan:
    """All rows greedy, or all rows plain, and nothing else to do."""
    num_greedy = rows if greedy else 0
    return SamplePlan(num_greedy, rows - num_greedy, 0, False, False, False, None)


class _Recorder:
    """Captures work into graphs that share their memory; they must run one after the other."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None], *, is_loaded: bool) -> Callable[[], None]:
        """Capture the work, after it has run once to load what it needs; the result repeats it."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            if not is_loaded:
                work()
            # torch.cuda.graph would wait for the device and give all free memory back first, each time. Relaxed: a
            # kernel of the matrix library that has not run yet may be loaded while its launch is recorded.
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            try:
                work()
            finally:
                graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay
