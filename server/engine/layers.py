"""The parts of a GLA layer around the recurrence: activations, the short convolution, and its index maps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels import PackedMatrix


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FEATURE_MAP_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": _squared_relu,
    "gelu": _gelu_tanh,
}
"""By the names of :data:`server.engine.config.FEATURE_MAPS`, with flash-linear-attention's meaning (its gelu is the
approximation by tanh)."""


class Projection:
    """A matrix that rows are multiplied by; its weight is uninitialised.

    On the CPU, one with more outputs than inputs is stored by columns: for a few rows, MKL is then up to three times as
    fast. :meth:`pack` does better still, where it can.

    Attributes:
        weight: [outputs, inputs]; empty when packed.
        matrix: what the kernels multiply by: the weight, or a packed form of it.
    """

    __slots__ = ("matrix", "weight")

    def __init__(self, outputs: int, inputs: int, *, device: torch.device, dtype: torch.dtype) -> None:
        if device.type == "cpu" and outputs > inputs:
            self.weight = torch.empty((inputs, outputs), device=device, dtype=dtype).t()
        else:
            self.weight = torch.empty((outputs, inputs), device=device, dtype=dtype)
        self.matrix: Tensor | PackedMatrix = self.weight

    def pack(self) -> None:
        """Replace the weight, now final, by a form that is multiplied faster, if there is one."""
        packed = PackedMatrix.pack(self.weight)
        if packed is not None:
            self.matrix = packed
            self.weight = self.weight.new_empty((0, 0))


@dataclass(frozen=True, slots=True)
class ConvIndex:
    """Which rows a short convolution over packed spans reads and keeps; the same for all layers of a step.

    Rows are those of the step's T inputs, followed by the N spans' kept inputs, ``size - 1`` each, oldest first.
    Everything is computed on the device from the spans' offsets.

    Attributes:
        taps_WT: int64 [size, T], the row that each tap reads for each token; the last tap reads the token itself.
        keep_NS: int64 [N, size - 1], the rows that a span keeps for the next one.
        slots_N: int64 [N], slot of each span.
        from_zero_N11: bool [N, 1, 1], spans before whose start there is nothing.
    """

    taps_WT: Tensor
    keep_NS: Tensor
    slots_N: Tensor
    from_zero_N11: Tensor

    @classmethod
    def build(
        cls,
        size: int,
        num_tokens: int,
        num_decodes: int,
        cu_seqlens: Tensor,
        slots_N: Tensor,
        from_zero_N: Tensor,
    ) -> "ConvIndex":
        """Index maps for ``num_decodes`` spans of one token, followed by the spans that ``cu_seqlens`` cuts.

        Args:
            size: taps of the convolution.
            num_tokens: T.
            num_decodes: D.
            cu_seqlens: int32 [P + 1], relative to row D.
            slots_N: int64 [D + P].
            from_zero_N: bool [D + P].
        """
        device = slots_N.device
        bounds = torch.cat((torch.arange(num_decodes, device=device), cu_seqlens.long() + num_decodes))
        starts_N, ends_N = bounds[:-1], bounds[1:]
        rows_T = torch.arange(num_tokens, device=device)
        # Empty spans are skipped; tokens behind the last span, which are padding, are counted to it.
        span_T = torch.searchsorted(ends_N, rows_T, right=True).clamp_(max=ends_N.shape[0] - 1)

        def rows(span: Tensor, offset: Tensor) -> Tensor:
            """Row of the input at an offset from its span's start; the kept inputs have offsets -(size - 1) to -1."""
            kept = num_tokens + (span + 1) * (size - 1) + offset
            return torch.where(offset >= 0, starts_N[span] + offset, kept)

        back_W1 = torch.arange(size - 1, -1, -1, device=device).unsqueeze(1)
        taps_WT = rows(span_T, rows_T - starts_N[span_T] - back_W1)
        spans_N1 = torch.arange(slots_N.shape[0], device=device).unsqueeze(1)
        keep_NS = rows(spans_N1, (ends_N - starts_N).unsqueeze(1) - back_W1[:-1].T)
        return cls(taps_WT, keep_NS, slots_N, from_zero_N[:, None, None])


def short_conv(x_TD: Tensor, weight_WD: Tensor, bias_D: Tensor, state_SWD: Tensor, index: ConvIndex) -> Tensor:
    """Causal depthwise convolution over packed spans, then silu; continues from, and updates, the kept inputs.

    Args:
        x_TD: inputs [T, channels]; may be a strided view.
        weight_WD: float32 [size, channels], the newest input's tap last.
        bias_D: float32 [channels].
        state_SWD: one layer's kept inputs [slots, size - 1, channels], oldest first. Updated in place.
        index: the step's index maps.

    Returns:
        [T, channels] of x's dtype, contiguous.
    """
    # By selection: a recycled slot may hold NaN, which multiplying by zero would keep.
    kept_NSD = state_SWD[index.slots_N].masked_fill_(index.from_zero_N11, 0.0)
    rows_D = torch.cat((x_TD, kept_NSD.flatten(0, 1)))
    state_SWD[index.slots_N] = rows_D[index.keep_NS]
    out_TD = bias_D.expand(x_TD.shape)
    for tap_D, rows_T in zip(weight_WD, index.taps_WT, strict=True):
        out_TD = torch.addcmul(out_TD, rows_D[rows_T].float(), tap_D)
    return F.silu(out_TD).to(x_TD.dtype)
