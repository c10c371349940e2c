"""RMSNorm over every head's output, times swish of the output gate, as one Triton kernel; a whole row is one head.

A program has one head of one token, so a row's result does not depend on its batch.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.pdl import await_previous, launches_early, start_next
from server.kernels.shapes import next_power_of_2


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """RMSNorm of every row [T, D], which may be strided, the mean square in float32; [T, D], contiguous."""
    return norm_gate(x_TD.unsqueeze(1), weight_D, None, eps=eps)


def norm_gate(o_THV: Tensor, weight_V: Tensor | None, gate_TE: Tensor | None, *, eps: float) -> Tensor:
    """See :func:`server.kernels.norm_gate`, which has checked the arguments."""
    tokens, heads, head_v = o_THV.shape
    out_TE = torch.empty((tokens, heads * head_v), dtype=o_THV.dtype, device=o_THV.device)
    if tokens == 0:
        return out_TE
    block = next_power_of_2(head_v)
    early = launches_early(o_THV.device)
    with torch.cuda.device_of(o_THV):
        norm_gate_kernel[(tokens, heads)](
            o_THV,
            weight_V,
            gate_TE,
            out_TE,
            eps,
            o_THV.stride(0),
            o_THV.stride(1),
            0 if gate_TE is None else gate_TE.stride(0),
            HAS_WEIGHT=weight_V is not None,
            HAS_GATE=gate_TE is not None,
            V=head_v,
            BV=block,
            EARLY=early,
            num_warps=min(max(block // 256, 1), 8),
            launch_pdl=early,
        )
    return out_TE


@triton.jit
def norm_gate_kernel(
    p_o,
    p_weight,
    p_gate,
    p_out,
    eps,
    stride_ot,
    stride_oh,
    stride_gt,
    HAS_WEIGHT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (tokens, heads)."""
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    start_next(EARLY)
    if HAS_WEIGHT:
        b_weight = tl.load(p_weight + o_v, mask=m_v, other=0.0).to(tl.float32)
    await_previous(EARLY)
    b_o = tl.load(p_o + i_t * stride_ot + i_h * stride_oh + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_o *= tl.rsqrt(tl.sum(b_o * b_o, axis=0) / V + eps)
    if HAS_WEIGHT:
        b_o *= b_weight
    if HAS_GATE:
        b_gate = tl.load(p_gate + i_t * stride_gt + i_h * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_o *= b_gate * tl.sigmoid(b_gate)
    tl.store(p_out + (i_t * tl.num_programs(1) + i_h) * V + o_v, b_o, mask=m_v)
