"""RMSNorm over every head's output, times swish of the output gate, and RMSNorm of a residual with what is added to it.

A warp or two have one head of one token, a program one row of the residual: which others there are does not matter to a
row's result, but for the order of the sum over a head, which is another one from 1,024 tokens on.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.pdl import await_previous, launches_early, start_next
from server.kernels.shapes import next_power_of_2

_MANY_TOKENS = 1024
"""From so many on, a program normalizes several heads: starting one for each takes longer than moving its bytes."""


def add_rms_norm(
    x_TD: Tensor, addends_STD: Tensor | None, weight_D: Tensor, *, eps: float, rows_R: Tensor | None = None
) -> Tensor:
    """RMSNorm of the rows of x plus addends, the mean square in float32.

    Args:
        x_TD: [T, D], rows may be strided. All rows of it being wanted, the sums replace it.
        addends_STD: float32 [S, T, D], contiguous; None: nothing is added.
        weight_D: of the norm [D], of x's dtype.
        eps: added to the mean square.
        rows_R: int64 [R], the rows that are wanted; None: all.

    Returns:
        [R, D] of x's dtype, contiguous.
    """
    tokens, channels = x_TD.shape
    rows = tokens if rows_R is None else rows_R.shape[0]
    out_RD = torch.empty((rows, channels), dtype=x_TD.dtype, device=x_TD.device)
    if rows == 0:
        return out_RD
    block = next_power_of_2(channels)
    early = launches_early(x_TD.device)
    with torch.cuda.device_of(x_TD):
        add_rms_norm_kernel[(rows,)](
            x_TD,
            addends_STD,
            weight_D,
            rows_R,
            out_RD,
            eps,
            x_TD.stride(0),
            tokens * channels,
            ADDENDS=0 if addends_STD is None else addends_STD.shape[0],
            HAS_ROWS=rows_R is not None,
            D=channels,
            BD=block,
            EARLY=early,
            num_warps=min(max(block // 256, 1), 8),
            launch_pdl=early,
        )
    return out_RD


def norm_gate(o_THV: Tensor, weight_V: Tensor | None, gate_TE: Tensor | None, *, eps: float) -> Tensor:
    """See :func:`server.kernels.norm_gate`, which has checked the arguments."""
    tokens, heads, head_v = o_THV.shape
    out_TE = torch.empty((tokens, heads * head_v), dtype=o_THV.dtype, device=o_THV.device)
    if tokens == 0:
        return out_TE
    block = next_power_of_2(head_v)
    block_r = 4 if tokens >= _MANY_TOKENS and block <= 1024 else 1
    early = launches_early(o_THV.device)
    with torch.cuda.device_of(o_THV):
        norm_gate_kernel[(triton.cdiv(tokens * heads, block_r),)](
            o_THV,
            weight_V,
            gate_TE,
            out_TE,
            tokens * heads,
            eps,
            o_THV.stride(0),
            o_THV.stride(1),
            0 if gate_TE is None else gate_TE.stride(0),
            HAS_WEIGHT=weight_V is not None,
            HAS_GATE=gate_TE is not None,
            H=heads,
            V=head_v,
            BR=block_r,
            BV=block,
            EARLY=early,
            num_warps=min(max(block // 256, 1), 8) if block_r == 1 else block_r,
            launch_pdl=early,
        )
    return out_TE


@triton.jit(do_not_specialize=["rows"])
def norm_gate_kernel(
    p_o,
    p_weight,
    p_gate,
    p_out,
    rows,
    eps,
    stride_ot,
    stride_oh,
    stride_gt,
    HAS_WEIGHT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (tiles of rows, each a head of a token)."""
    i_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    i_t, i_h = i_r // H, i_r % H
    o_v = tl.arange(0, BV)[None, :]
    m_v = o_v < V
    mask = (i_r < rows) & m_v
    start_next(EARLY)
    if HAS_WEIGHT:
        b_weight = tl.load(p_weight + o_v, mask=m_v, other=0.0).to(tl.float32)
    await_previous(EARLY)
    b_o = tl.load(p_o + i_t * stride_ot + i_h * stride_oh + o_v, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        b_gate = tl.load(p_gate + i_t * stride_gt + i_h * V + o_v, mask=mask, other=0.0).to(tl.float32)
    b_o *= tl.rsqrt(tl.sum(b_o * b_o, axis=1) / V + eps)[:, None]
    if HAS_WEIGHT:
        b_o *= b_weight
    if HAS_GATE:
        b_o *= b_gate * tl.sigmoid(b_gate)
    tl.store(p_out + i_r * V + o_v, b_o, mask=mask)


@triton.jit(do_not_specialize=["stride_addend"], do_not_specialize_on_alignment=["p_rows"])
def add_rms_norm_kernel(
    p_x,
    p_addends,
    p_weight,
    p_rows,
    p_out,
    eps,
    stride_x,
    stride_addend,
    ADDENDS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (rows)."""
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    start_next(EARLY)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    await_previous(EARLY)
    i_t = tl.load(p_rows + i_r) if HAS_ROWS else i_r
    p_row = p_x + i_t * stride_x + o_d
    b_x = tl.load(p_row, mask=m_d, other=0.0).to(tl.float32)
    if ADDENDS > 0:
        b_sum = tl.load(p_addends + i_t * D + o_d, mask=m_d, other=0.0)
        for i_s in tl.static_range(1, ADDENDS):
            b_sum += tl.load(p_addends + i_s * stride_addend + i_t * D + o_d, mask=m_d, other=0.0)
        b_x = (b_x + b_sum).to(p_x.dtype.element_ty)
        if not HAS_ROWS:
            tl.store(p_row, b_x, mask=m_d)
        b_x = b_x.to(tl.float32)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    tl.store(p_out + i_r * D + o_d, b_x * b_weight, mask=m_d)
