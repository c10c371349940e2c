"""The gated MLP's activation, swish(gate) * up, as one Triton kernel."""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.pdl import await_previous, launches_early, start_next

_BLOCK = 512


def swiglu(gate_up_TJ: Tensor) -> Tensor:
    """swish(gate) * up of both side by side [T, 2 * I], rows may be strided; [T, I] of its dtype, contiguous."""
    tokens, both = gate_up_TJ.shape
    out_TI = torch.empty((tokens, both // 2), dtype=gate_up_TJ.dtype, device=gate_up_TJ.device)
    if out_TI.numel() == 0:
        return out_TI
    early = launches_early(gate_up_TJ.device)
    with torch.cuda.device_of(gate_up_TJ):
        swiglu_kernel[(tokens, triton.cdiv(both // 2, _BLOCK))](
            gate_up_TJ,
            out_TI,
            gate_up_TJ.stride(0),
            INNER=both // 2,
            BI=_BLOCK,
            EARLY=early,
            num_warps=2,
            launch_pdl=early,
        )
    return out_TI


@triton.jit
def swiglu_kernel(p_gate_up, p_out, stride_t, INNER: tl.constexpr, BI: tl.constexpr, EARLY: tl.constexpr):
    """Grid: (tokens, channel tiles)."""
    i_t = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * BI + tl.arange(0, BI)
    m_i = o_i < INNER
    start_next(EARLY)
    await_previous(EARLY)
    b_gate = tl.load(p_gate_up + i_t * stride_t + o_i, mask=m_i, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate_up + i_t * stride_t + INNER + o_i, mask=m_i, other=0.0).to(tl.float32)
    tl.store(p_out + i_t * INNER + o_i, b_gate * tl.sigmoid(b_gate) * b_up, mask=m_i)
