"""Greedy sampling as one Triton kernel: the most likely token of a row, and what the next step must know of it."""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.pdl import await_previous, launches_early, start_next
from server.kernels.shapes import next_power_of_2

_BLOCK = 8192


def pick_greedy(
    logits_RV: Tensor, slots_R: Tensor, flags_SV: Tensor, last_token_S: Tensor, done_S: Tensor, *, stop_flag: int
) -> Tensor:
    """See :func:`server.kernels.pick_greedy`, which has checked the arguments."""
    rows, vocab_size = logits_RV.shape
    tokens_R = torch.empty_like(slots_R)
    if rows == 0:
        return tokens_R
    early = launches_early(logits_RV.device)
    with torch.cuda.device_of(logits_RV):
        pick_greedy_kernel[(rows,)](
            logits_RV,
            slots_R,
            flags_SV,
            last_token_S,
            done_S,
            tokens_R,
            STOP=stop_flag,
            V=vocab_size,
            BV=min(next_power_of_2(vocab_size), _BLOCK),
            EARLY=early,
            num_warps=16,
            launch_pdl=early,
        )
    return tokens_R


@triton.jit
def pick_greedy_kernel(
    p_logits,
    p_slots,
    p_flags,
    p_last_token,
    p_done,
    p_tokens,
    STOP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (rows)."""
    i_r = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    start_next(EARLY)
    await_previous(EARLY)
    slot = tl.load(p_slots + i_r)
    b_top = tl.full([BV], -float("inf"), tl.float32)
    b_token = o_v
    b_nan = tl.zeros([BV], tl.int32)
    for i in tl.static_range((V + BV - 1) // BV):
        b_x = tl.load(p_logits + i_r * V + i * BV + o_v, mask=i * BV + o_v < V, other=-float("inf"))
        b_nan |= (b_x != b_x).to(tl.int32)
        b_token = tl.where(b_x > b_top, i * BV + o_v, b_token)  # of equals, the first
        b_top = tl.maximum(b_top, b_x)
    top = tl.max(b_top, axis=0)
    token = tl.min(tl.where(b_top == top, b_token, V - 1), axis=0).to(tl.int64)
    broken = (tl.max(b_nan, axis=0) > 0) | (tl.abs(top) == float("inf"))
    stops = (tl.load(p_flags + slot * V + token).to(tl.int32) & STOP) != 0
    tl.store(p_last_token + slot, token)
    tl.store(p_done + slot, stops)
    tl.store(p_tokens + i_r, tl.where(broken, -1, token))
