"""Copies of states between the pool and float32, for prompts whose states the pool holds in fewer bits.

What they do is :meth:`LayerState.load` and :meth:`LayerState.store`, each in one kernel that reads and writes every
value once. Slot 0 is left out: a captured step has spans to spare, whose states nobody wants.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.shapes import next_power_of_2
from server.kernels.state import LayerState

_VALUES_PER_PROGRAM = 8192


def load(state: LayerState, slots_N: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 copy of some slots' states, without their rings.

    Returns:
        [N + 1, kv_heads, head_k, head_v], to be used as a pool of its own, and the place of each slot in it, int64 [N]:
        those of slot 0 are 0, and hold anything.
    """
    spans = slots_N.shape[0]
    copy_MGKV = torch.empty((spans + 1, *state.values_SGKV.shape[1:]), dtype=torch.float32, device=slots_N.device)
    places_N = torch.empty_like(slots_N)
    _launch(load_kernel, state, slots_N, copy_MGKV, places_N)
    return copy_MGKV, places_N


def store(state: LayerState, slots_N: Tensor, copy_MGKV: Tensor, places_N: Tensor) -> None:
    """Round the states of such a copy to nearest and write them to their slots, but for slot 0."""
    _launch(store_kernel, state, slots_N, copy_MGKV, places_N)


def _launch(
    kernel: triton.JITFunction, state: LayerState, slots_N: Tensor, copy_MGKV: Tensor, places_N: Tensor
) -> None:
    spans, (kv_heads, head_k, head_v) = slots_N.shape[0], copy_MGKV.shape[1:]
    if spans == 0:
        return
    values, scales = state.values_SGKV, state.scales_SGK
    block_v = next_power_of_2(head_v)
    block_k = min(max(1, _VALUES_PER_PROGRAM // block_v), next_power_of_2(head_k))
    with torch.cuda.device_of(copy_MGKV):
        kernel[(triton.cdiv(head_k, block_k), kv_heads, spans)](
            values,
            scales,
            copy_MGKV,
            slots_N,
            places_N,
            values.stride(0),
            0 if scales is None else scales.stride(0),
            HAS_SCALES=scales is not None,
            K=head_k,
            V=head_v,
            BK=block_k,
            BV=block_v,
            num_warps=4,
        )


# The spans of a mixed batch are slices that begin anywhere: one variant for all alignments, or serving would compile.
@triton.jit(do_not_specialize_on_alignment=["p_slots"])
def load_kernel(
    p_state,
    p_scales,
    p_copy,
    p_slots,
    p_places,
    stride_slot,
    stride_scales,
    HAS_SCALES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Grid: (row tiles, kv heads, spans)."""
    i_g, i_n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.load(p_slots + i_n).to(tl.int64)
    place = tl.where(slot == 0, 0, i_n + 1)
    tl.store(p_places + i_n, place)  # every program of the span does
    if slot == 0:
        return
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    m_kv = m_k[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    b_state = tl.load(p_state + slot * stride_slot + i_g * (K * V) + o_kv, mask=m_kv, other=0).to(tl.float32)
    if HAS_SCALES:
        b_scale = tl.load(p_scales + slot * stride_scales + i_g * K + o_k, mask=m_k, other=0.0)
        b_state = (b_state - 128.0) * b_scale[:, None]
    tl.store(p_copy + (place * tl.num_programs(1) + i_g) * (K * V) + o_kv, b_state, mask=m_kv)


@triton.jit(do_not_specialize_on_alignment=["p_slots"])
def store_kernel(
    p_state,
    p_scales,
    p_copy,
    p_slots,
    p_places,
    stride_slot,
    stride_scales,
    HAS_SCALES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Grid: (row tiles, kv heads, spans). A tile has whole rows, whose largest value decides their scale."""
    i_g, i_n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.load(p_slots + i_n).to(tl.int64)
    if slot == 0:
        return
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    m_kv = m_k[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    place = tl.load(p_places + i_n)
    b_state = tl.load(p_copy + (place * tl.num_programs(1) + i_g) * (K * V) + o_kv, mask=m_kv, other=0.0)
    if HAS_SCALES:
        b_scale = tl.max(tl.abs(b_state), axis=1) * (1.0 / 127.0)  # [BK]
        tl.store(p_scales + slot * stride_scales + i_g * K + o_k, b_scale, mask=m_k)
        b_state = b_state * tl.where(b_scale > 0.0, 1.0 / b_scale, 0.0)[:, None] + 128.5  # the cast cuts off
    tl.store(p_state + slot * stride_slot + i_g * (K * V) + o_kv, b_state.to(p_state.dtype.element_ty), mask=m_kv)
