"""One step on the device, from its columns to the logits of the rows that sample; launched, or captured as a graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from server.engine.batch import ModelInputs
from server.engine.columns import Columns
from server.engine.model import GLAModel, Hidden
from server.engine.sampler import Sampler, redirect_done
from server.engine.state_pool import StateTensors
from server.engine.step_shapes import MAX_ROWS, StepShape
from server.kernels import RingRows


class StepModel:
    """A model, the states that it updates, and the sampler that knows its newest tokens.

    Args:
        model: weights on a device.
        states: the pool, null slot included.
        sampler: its tables have as many slots as the pool.

    Attributes:
        model, states, sampler: as above.
        device: where all of them lie.
    """

    def __init__(self, model: GLAModel, states: StateTensors, sampler: Sampler) -> None:
        self.model = model
        self.states = states
        self.sampler = sampler
        self.device = sampler.last_token_S.device
        # Of a step without prompts, kept because a graph of it would fill them anew with every token.
        most = max(MAX_ROWS, len(sampler.last_token_S))
        self._continue_N = torch.zeros(most, dtype=torch.bool, device=self.device)
        self._no_spans = torch.zeros(1, dtype=torch.int32, device=self.device)

    def absorb(
        self,
        columns: Columns,
        shape: StepShape,
        *,
        every_token: bool,
        longest_prefill: int | None = None,
        wanted: int | None = None,
        all_rows: bool = False,
        before_layer: Callable[[int], None] | None = None,
    ) -> tuple[Hidden, Tensor]:
        """Absorb a step's tokens, without waiting for the device.

        Args:
            columns: what the host knows of the step.
            shape: the columns' shape.
            every_token: whether the states of the decodes absorb every token at once; else as the columns say.
            longest_prefill: at least the length of the longest prompt span; None: all prompt tokens may be one span's.
            wanted: how many of the columns' rows, the first ones, want logits; None: all.
            all_rows, before_layer: as :meth:`GLAModel.absorb` takes them.

        Returns:
            The hidden states, see :meth:`GLAModel.absorb`; the slots, those of sequences that have met
            their stop token being the null slot.
        """
        decodes = shape.decodes
        slots_R1 = redirect_done(columns.slots_R1, self.sampler.done_S)
        token_ids_T = self.sampler.last_token_S[slots_R1[:decodes]]
        from_zero_N, cu_seqlens = self._continue_N[:decodes], self._no_spans
        if shape.spans:
            assert columns.token_ids_P is not None
            assert columns.from_zero_R is not None and columns.cu_seqlens is not None
            token_ids_T = torch.cat((token_ids_T, columns.token_ids_P)) if decodes else columns.token_ids_P
            from_zero_N, cu_seqlens = columns.from_zero_R.bool(), columns.cu_seqlens.int()
        ring_rows = None
        if self.states.ring_size:
            ring_rows = RingRows(columns.pending_D, None if every_token else columns.num_folding)
        inputs = ModelInputs(
            token_ids_T=token_ids_T,
            num_decodes=decodes,
            slots_N=slots_R1[: shape.rows],
            from_zero_N=from_zero_N,
            cu_seqlens=cu_seqlens,
            longest_prefill=shape.tokens if longest_prefill is None else longest_prefill,
            output_rows_R=columns.logit_rows[:wanted],
            ring_rows=ring_rows,
        )
        return self.model.absorb(inputs, self.states, all_rows=all_rows, before_layer=before_layer), slots_R1
