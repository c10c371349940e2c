"""Matrix products of a few rows, 2 to 8, by tensor cores, with SwiGLU or the residual addition behind them.

Reading the weights is what takes time here. A program multiplies 64 rows of weights with all rows of the input, which
stand in the place of the tensor cores' columns, and tiles come through the tensor memory accelerator, several in
flight. Where an output has too few such tiles to occupy the device, the sum is split, and :func:`sum_add_kernel` adds
the parts up in a fixed order.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from server.kernels.pdl import await_previous, launches_early, start_next
from server.kernels.shapes import next_power_of_2

MAX_ROWS = 8
"""With more, the matrix library is as fast or faster (measured with whole models on an H200)."""

_BLOCK_N = 64
_BLOCK_K = 128
_FEW_TILES = 64
"""Outputs of fewer tiles than this occupy less than half of an H200."""
_SPLITS = 4
_SUM_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """How a product is divided."""

    block_m: int
    """Rows of the input, padded."""
    splits: int
    """Parts of the sum."""
    num_stages: int
    """Tiles in flight, as many as shared memory holds, at most four."""


@cache
def plan_skinny(rows: int, outputs: int, inputs: int, *, gated: bool) -> SkinnyPlan:
    """Choose by shape; a row's sums are cut the same way whatever the number of rows."""
    few = triton.cdiv(outputs, _BLOCK_N) < _FEW_TILES
    splits = _SPLITS if few and not gated and inputs % (_SPLITS * _BLOCK_K) == 0 else 1
    return SkinnyPlan(max(16, next_power_of_2(rows)), splits, 3 if gated else 4)


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
    _multiply(x_MK, weight_NK, out_MN, replace(_plan(x_MK, weight_NK), splits=1), gated=False)


def swiglu(x_MK: Tensor, weight_JK: Tensor) -> Tensor:
    """The projections of a gated MLP, gate above up, and its activation: [M, J / 2]."""
    out_MI = x_MK.new_empty((x_MK.shape[0], weight_JK.shape[0] // 2))
    _multiply(x_MK, weight_JK, out_MI, _plan(x_MK, weight_JK, gated=True), gated=True)
    return out_MI


def add_(x_MN: Tensor, o_MK: Tensor, weight_NK: Tensor) -> None:
    """Add a projection of ``o_MK`` to ``x_MN``, contiguous, in place."""
    rows, outputs = x_MN.shape
    plan = _plan(o_MK, weight_NK)
    parts_SMN = torch.empty((plan.splits, rows, outputs), dtype=torch.float32, device=x_MN.device)
    _multiply(o_MK, weight_NK, parts_SMN, plan, gated=False)
    early = launches_early(x_MN.device)
    with torch.cuda.device_of(x_MN):
        sum_add_kernel[(triton.cdiv(rows * outputs, _SUM_BLOCK),)](
            parts_SMN,
            x_MN,
            rows * outputs,
            SPLITS=plan.splits,
            B=_SUM_BLOCK,
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )


def _plan(x_MK: Tensor, weight_JK: Tensor, *, gated: bool = False) -> SkinnyPlan:
    return plan_skinny(x_MK.shape[0], weight_JK.shape[0], x_MK.shape[1], gated=gated)


def _multiply(x_MK: Tensor, weight_JK: Tensor, out_SMN: Tensor, plan: SkinnyPlan, *, gated: bool) -> None:
    rows, inputs = x_MK.shape
    outputs = out_SMN.shape[-1]
    early = launches_early(x_MK.device)
    with torch.cuda.device_of(x_MK):
        skinny_kernel[(triton.cdiv(outputs, _BLOCK_N), plan.splits)](
            TensorDescriptor(x_MK, [rows, inputs], [x_MK.stride(0), 1], [plan.block_m, _BLOCK_K]),
            TensorDescriptor(weight_JK, list(weight_JK.shape), [inputs, 1], [_BLOCK_N, _BLOCK_K]),
            out_SMN,
            rows,
            N=outputs,
            PART=inputs // plan.splits,
            BM=plan.block_m,
            BN=_BLOCK_N,
            BK=_BLOCK_K,
            STAGES=plan.num_stages,
            GATED=gated,
            EARLY=early,
            num_warps=4,
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
    EARLY: tl.constexpr,
):
    """Grid: (output tiles, parts of the sum). Descriptors give zeros beyond the ends of their tensors."""
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    start_next(EARLY)
    await_previous(EARLY)
    b_out = tl.zeros([BN, BM], tl.float32)
    b_up = tl.zeros([BN, BM], tl.float32)
    for i_k in tl.range(i_s * PART, (i_s + 1) * PART, BK, num_stages=STAGES):
        b_x = d_x.load([0, i_k]).T
        b_out = tl.dot(d_weight.load([i_n * BN, i_k]), b_x, b_out)
        if GATED:
            b_up = tl.dot(d_weight.load([N + i_n * BN, i_k]), b_x, b_up)
    if GATED:
        b_out *= tl.sigmoid(b_out) * b_up
    o_n = i_n * BN + tl.arange(0, BN)
    o_m = tl.arange(0, BM)
    p_tile = p_out + (i_s * rows + o_m[None, :]) * N + o_n[:, None]
    tl.store(p_tile, b_out, mask=(o_n < N)[:, None] & (o_m < rows)[None, :])


@triton.jit(do_not_specialize=["size"])
def sum_add_kernel(p_parts, p_x, size, SPLITS: tl.constexpr, B: tl.constexpr, EARLY: tl.constexpr):
    """Grid: (tiles of the elements)."""
    o = tl.program_id(0) * B + tl.arange(0, B)
    m = o < size
    start_next(EARLY)
    await_previous(EARLY)
    b_sum = tl.load(p_parts + o, mask=m, other=0.0)
    for i_s in tl.static_range(1, SPLITS):
        b_sum += tl.load(p_parts + i_s * size + o, mask=m, other=0.0)
    tl.store(p_x + o, tl.load(p_x + o, mask=m, other=0.0).to(tl.float32) + b_sum, mask=m)
