"""Matrix products of few rows, 2 to 64, by tensor cores, with SwiGLU behind them or sums left to the next kernel.

Reading the weights is what takes time here. A program multiplies 64 rows of weights with all rows of the input, which
stand in the place of the tensor cores' columns, and tiles come through the tensor memory accelerator, several in
flight. Where an output has too few such tiles to occupy the device, the sum is cut into parts, and the norm that
follows adds them up, in a fixed order (:func:`server.kernels.norm.add_rms_norm`): a kernel of its own for that would
cost as much as the norm does.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from server.kernels.pdl import await_previous, launches_early, start_next
from server.kernels.shapes import next_power_of_2

MAX_ROWS = 64
"""With more, the matrix library is as fast or faster (measured with whole models on an H200)."""

_MULTIPROCESSORS = 132
"""Of the device that the plans are made for; a constant, so that a sum is cut in the same way everywhere."""
_MAX_SPLITS = 8


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """How a product is divided."""

    block_m: int
    """Rows of the input."""
    block_n: int
    """Outputs; of a gated product, as many of either half."""
    block_k: int
    """Inputs of a tile."""
    splits: int
    """Parts of the sum."""
    num_stages: int
    """Tiles in flight."""
    num_warps: int
    late: bool
    """Whether the next kernel may start only when this one's inputs are there, not at its beginning."""


@cache
def plan_skinny(rows: int, outputs: int, inputs: int, *, gated: bool = False, parts: bool = False) -> SkinnyPlan:
    """Choose by shape; a row's sums are cut in the same way whatever the number of rows.

    Args:
        gated: two products, of so many outputs each.
        parts: the sum may be left in parts.
    """
    splits = 1
    if parts:
        tiles = triton.cdiv(outputs, 64)
        while splits < _MAX_SPLITS and 2 * splits * tiles <= _MULTIPROCESSORS and inputs % (2 * splits * 128) == 0:
            splits *= 2
    return SkinnyPlan(max(16, next_power_of_2(rows)), 64, 128, splits, 3 if gated else 4, 4, late=rows > 16)


def fits(x_MK: Tensor, weight_JK: Tensor) -> bool:
    """Whether the kernels can compute this product, and are the faster way."""
    return (
        x_MK.element_size() == 2
        and 1 < x_MK.shape[0] <= MAX_ROWS
        and x_MK.shape[1] % 8 == x_MK.stride(0) % 8 == 0  # the accelerator's rows begin at multiples of 16 bytes
        and x_MK.data_ptr() % 16 == weight_JK.data_ptr() % 16 == 0
        and launches_early(x_MK.device)
    )


def linear(x_MK: Tensor, weight_NK: Tensor, out_MN: Tensor) -> None:
    """Write a projection [M, N] to ``out_MN``, contiguous, of any floating type."""
    plan = plan_skinny(x_MK.shape[0], weight_NK.shape[0], x_MK.shape[1])
    _multiply(x_MK, weight_NK, out_MN, plan, gated=False)


def swiglu(x_MK: Tensor, weight_JK: Tensor) -> Tensor:
    """The projections of a gated MLP, gate above up, and its activation: [M, J / 2]."""
    out_MI = x_MK.new_empty((x_MK.shape[0], weight_JK.shape[0] // 2))
    plan = plan_skinny(x_MK.shape[0], out_MI.shape[1], x_MK.shape[1], gated=True)
    _multiply(x_MK, weight_JK, out_MI, plan, gated=True)
    return out_MI


def linear_parts(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """A projection as parts that are still to be added up: float32 [S, M, N]."""
    plan = plan_skinny(x_MK.shape[0], weight_NK.shape[0], x_MK.shape[1], parts=True)
    parts_SMN = x_MK.new_empty((plan.splits, x_MK.shape[0], weight_NK.shape[0]), dtype=torch.float32)
    _multiply(x_MK, weight_NK, parts_SMN, plan, gated=False)
    return parts_SMN


def _multiply(x_MK: Tensor, weight_JK: Tensor, out_SMN: Tensor, plan: SkinnyPlan, *, gated: bool) -> None:
    rows, inputs = x_MK.shape
    outputs = out_SMN.shape[-1]
    early = launches_early(x_MK.device)
    grid = (triton.cdiv(rows, plan.block_m), triton.cdiv(outputs, plan.block_n), plan.splits)
    with torch.cuda.device_of(x_MK):
        skinny_kernel[grid](
            TensorDescriptor(x_MK, [rows, inputs], [x_MK.stride(0), 1], [plan.block_m, plan.block_k]),
            TensorDescriptor(weight_JK, list(weight_JK.shape), [inputs, 1], [plan.block_n, plan.block_k]),
            out_SMN,
            rows,
            N=outputs,
            PART=inputs // plan.splits,
            BM=plan.block_m,
            BN=plan.block_n,
            BK=plan.block_k,
            STAGES=plan.num_stages,
            GATED=gated,
            LATE=plan.late,
            EARLY=early,
            num_warps=plan.num_warps,
            launch_pdl=early,
        )


@triton.jit(do_not_specialize=["rows"])
def skinny_kernel(
    d_x,
    d_weight,
    p_out,
    rows,
    N: tl.constexpr,
    PART: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    LATE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (row tiles, output tiles, parts of the sum). Descriptors give zeros beyond the ends of their tensors."""
    i_m, i_n, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if not LATE:
        start_next(EARLY)
    await_previous(EARLY)
    if LATE:
        # Programs of the next kernel that wait for this one from its beginning crowd on some multiprocessors.
        start_next(EARLY)
    b_out = tl.zeros([BN, BM], tl.float32)
    b_up = tl.zeros([BN, BM], tl.float32)
    for i_k in tl.range(i_s * PART, (i_s + 1) * PART, BK, num_stages=STAGES):
        b_x = d_x.load([i_m * BM, i_k]).T
        b_out = tl.dot(d_weight.load([i_n * BN, i_k]), b_x, b_out)
        if GATED:
            b_up = tl.dot(d_weight.load([N + i_n * BN, i_k]), b_x, b_up)
    if GATED:
        b_out *= tl.sigmoid(b_out) * b_up
    o_n = i_n * BN + tl.arange(0, BN)
    o_m = i_m * BM + tl.arange(0, BM)
    p_tile = p_out + (i_s * rows + o_m[None, :]) * N + o_n[:, None]
    tl.store(p_tile, b_out, mask=(o_n < N)[:, None] & (o_m < rows)[None, :])
