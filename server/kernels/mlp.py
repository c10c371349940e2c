"""The gated MLP's activation, swish(gate) * up, as one Triton kernel."""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.pdl import await_previous, launches_early, start_next

_BLOCK = 512
_MANY_TOKENS = 1024
"""From so many on, a program takes several: starting programs of one row would take longer than moving its bytes."""


def swiglu(gate_up_TJ: Tensor) -> Tensor:
    """swish(gate) * up of both side by side [T, 2 * I], rows may be strided; [T, I] of its dtype, contiguous."""
    tokens, both = gate_up_TJ.shape
    out_TI = torch.empty((tokens, both // 2), dtype=gate_up_TJ.dtype, device=gate_up_TJ.device)
    if out_TI.numel() == 0:
        return out_TI
    early = launches_early(gate_up_TJ.device)
    block_t = 4 if tokens >= _MANY_TOKENS else 1
    with torch.cuda.device_of(gate_up_TJ):
        swiglu_kernel[(triton.cdiv(both // 2, _BLOCK), triton.cdiv(tokens, block_t))](
            gate_up_TJ,
            out_TI,
            tokens,
            gate_up_TJ.stride(0),
            INNER=both // 2,
            BT=block_t,
            BI=_BLOCK,
            EARLY=early,
            num_warps=2 if block_t == 1 else 4,
            launch_pdl=early,
        )
    return out_TI


@triton.jit(do_not_specialize=["tokens"])
def swiglu_kernel(
    p_gate_up, p_out, tokens, stride_t, INNER: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, EARLY: tl.constexpr
):
    """Grid: (channel tiles, token tiles)."""
    o_i = tl.program_id(0) * BI + tl.arange(0, BI)[None, :]
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    mask = (o_t < tokens) & (o_i < INNER)
    start_next(EARLY)
    await_previous(EARLY)
    b_gate = tl.load(p_gate_up + o_t * stride_t + o_i, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate_up + o_t * stride_t + INNER + o_i, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + o_t * INNER + o_i, b_gate * tl.sigmoid(b_gate) * b_up, mask=mask)
