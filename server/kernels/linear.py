"""Matrix products of a few rows, with what comes before and after them: RMSNorm, SwiGLU, the residual addition.

One row is a product of the weights with a vector: reading the weights is all that takes time, and a layer has so little
of it that the start of each kernel counts. :func:`matvec_kernel` therefore requests all of its weights before it waits
for the kernel before it (:mod:`server.kernels.pdl`), and norm, activation and addition are part of it. Some more rows
are multiplied by :mod:`server.kernels.skinny`, others by the matrix library, with kernels around them. So the path,
hence the rounding of a row's result, depends on the number of rows: 1, up to 64, or more.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers, integers of no Python type, growing tuples.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment, unreachable"

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import mlp, norm, skinny
from server.kernels.pdl import await_previous, launches_early, start_next
from server.kernels.shapes import next_power_of_2

MATVEC_MAX_INPUTS = 16384
"""A program holds whole rows of weights in registers."""

_BYTES_PER_WARP = 8192
"""Weights that a warp requests at once: 64 registers of each thread."""


@dataclass(frozen=True, slots=True)
class MatvecPlan:
    """Size of a program's tile of weights."""

    block_n: int
    """Outputs."""
    block_k: int
    """Inputs that the warps read side by side, 16 bytes per thread; all inputs are read, tile after tile."""
    num_warps: int


@cache
def plan_matvec(inputs: int, element_size: int, *, gated: bool) -> MatvecPlan:
    """Choose a tile by the row's length: measured at 2,048 and 5,632 inputs on an H200."""
    row_bytes = inputs * element_size
    num_warps = min(max(next_power_of_2(row_bytes) // 1024, 1), 8 if row_bytes > 8192 else 4)
    block_n = num_warps * _BYTES_PER_WARP // (row_bytes * (2 if gated else 1))
    block_n = min(1 << max(block_n.bit_length() - 1, 0), 16)
    return MatvecPlan(block_n, min(num_warps * 512 // element_size, next_power_of_2(inputs)), num_warps)


def norm_linear(
    x_TD: Tensor,
    norm_D: Tensor,
    weight_ND: Tensor,
    out_RN: Tensor,
    *,
    eps: float,
    addends_STD: Tensor | None = None,
    rows_R: Tensor | None = None,
) -> None:
    """See :func:`server.kernels.norm_linear`, which has checked the arguments."""
    if rows_R is not None and rows_R.shape[0] == 1 and addends_STD is None:
        x_TD, rows_R = x_TD.index_select(0, rows_R), None
    if rows_R is None and _is_vector(x_TD):
        _matvec(x_TD, norm_D, weight_ND, out_RN, eps=eps)
        return
    h_RD = norm.add_rms_norm(x_TD, addends_STD, norm_D, eps=eps, rows_R=rows_R)
    if skinny.fits(h_RD, weight_ND):
        skinny.linear(h_RD, weight_ND, out_RN)
    elif out_RN.dtype == h_RD.dtype:
        torch.mm(h_RD, weight_ND.t(), out=out_RN)
    else:
        torch.mm(h_RD, weight_ND.t(), out_dtype=out_RN.dtype, out=out_RN)


def norm_swiglu(
    x_TD: Tensor, norm_D: Tensor, weight_JD: Tensor, *, eps: float, addends_STD: Tensor | None = None
) -> Tensor:
    """See :func:`server.kernels.norm_swiglu`, which has checked the arguments."""
    if _is_vector(x_TD):
        out_TI = x_TD.new_empty((1, weight_JD.shape[0] // 2))
        _matvec(x_TD, norm_D, weight_JD, out_TI, eps=eps, gated=True)
        return out_TI
    h_TD = norm.add_rms_norm(x_TD, addends_STD, norm_D, eps=eps)
    if skinny.fits(h_TD, weight_JD):
        return skinny.swiglu(h_TD, weight_JD)
    return mlp.swiglu(F.linear(h_TD, weight_JD))


def linear_add_(x_TN: Tensor, o_TK: Tensor, weight_NK: Tensor) -> Tensor | None:
    """See :func:`server.kernels.linear_add_`, which has checked the arguments."""
    if _is_vector(o_TK):
        _matvec(o_TK, None, weight_NK, x_TN, eps=0.0, add=True)
        return None
    if skinny.fits(o_TK, weight_NK):
        return skinny.linear_parts(o_TK, weight_NK)
    x_TN.addmm_(o_TK, weight_NK.t())
    return None


def _is_vector(x_TK: Tensor) -> bool:
    return x_TK.shape[0] == 1 and x_TK.shape[1] <= MATVEC_MAX_INPUTS


def _matvec(
    x_1K: Tensor,
    norm_K: Tensor | None,
    weight_JK: Tensor,
    out_1N: Tensor,
    *,
    eps: float,
    gated: bool = False,
    add: bool = False,
) -> None:
    outputs, inputs = out_1N.shape[1], x_1K.shape[1]
    plan = plan_matvec(inputs, weight_JK.element_size(), gated=gated)
    early = launches_early(x_1K.device)
    with torch.cuda.device_of(x_1K):
        matvec_kernel[(triton.cdiv(outputs, plan.block_n),)](
            x_1K,
            norm_K,
            weight_JK,
            out_1N,
            eps,
            N=outputs,
            K=inputs,
            BN=plan.block_n,
            BK=plan.block_k,
            HAS_NORM=norm_K is not None,
            GATED=gated,
            ADD=add,
            EARLY=early,
            num_warps=plan.num_warps,
            launch_pdl=early,
        )


@triton.jit
def matvec_kernel(
    p_x,
    p_norm,
    p_weight,
    p_out,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (output tiles).

    The norm multiplies a row by one number, which is applied to the sums. The vector is loaded in the shape of the
    weights' tiles, [1, BK], so that each thread gets what belongs to its weights.
    """
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)[None, :]
    m_n = o_n < N
    p_rows = p_weight + o_n[:, None].to(tl.int64) * K
    TILES: tl.constexpr = (K + BK - 1) // BK
    start_next(EARLY)
    weights = ()
    ups = ()
    norms = ()
    for i in tl.static_range(TILES):
        m_k = i * BK + o_k < K
        m_nk = m_n[:, None] & m_k
        weights += (tl.load(p_rows + i * BK + o_k, mask=m_nk, other=0.0),)
        if GATED:
            ups += (tl.load(p_rows + N * K + i * BK + o_k, mask=m_nk, other=0.0),)
        if HAS_NORM:
            norms += (tl.load(p_norm + i * BK + o_k, mask=m_k, other=0.0),)
    await_previous(EARLY)

    b_sum = tl.zeros([BN, BK], tl.float32)
    b_up_sum = tl.zeros([BN, BK], tl.float32)
    b_square = tl.zeros([1, BK], tl.float32)
    for i in tl.static_range(TILES):
        b_x = tl.load(p_x + i * BK + o_k, mask=i * BK + o_k < K, other=0.0).to(tl.float32)
        if HAS_NORM:
            b_square += b_x * b_x
            b_x *= norms[i].to(tl.float32)
        b_sum += weights[i].to(tl.float32) * b_x
        if GATED:
            b_up_sum += ups[i].to(tl.float32) * b_x
    b_out = tl.sum(b_sum, axis=1)  # [BN]
    b_up = tl.sum(b_up_sum, axis=1)
    if HAS_NORM:
        b_scale = tl.rsqrt(tl.sum(b_square, axis=1) / K + eps)  # [1]
        b_out *= b_scale
        b_up *= b_scale
    if GATED:
        b_out *= tl.sigmoid(b_out) * b_up
    if ADD:
        b_out += tl.load(p_out + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_out + o_n, b_out, mask=m_n)
