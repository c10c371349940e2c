"""Gated linear attention for one token per row, fused into one Triton kernel that updates states in place.

A program owns a tile [head_k, BV] of the state of one kv head and row. It reads the tile once, writes it once, and
serves every query head of the group from registers. Nothing but the state matters for time: at the sizes of the 1.3B
model it is 2 MB per row, against 14 KB of vectors. Tokens that :mod:`server.kernels.buffered` left in a row's ring are
absorbed on the way.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gate import GateArguments, log_decays_of
from server.kernels.pdl import await_previous, launches_early, start_next
from server.kernels.shapes import check_head_k, next_power_of_2
from server.kernels.state import LayerState, LowRankGate
from server.kernels.tiles import load_tile, store_tile


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Size of a program's state tile."""

    block_k: int
    """Rows: all of head_k, padded to a power of two."""
    block_v: int
    """Columns."""
    num_warps: int


def gla_decode(
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGV: Tensor,
    gate: Tensor | LowRankGate,
    state: LayerState,
    slots_N: Tensor,
    from_zero_N: Tensor,
    *,
    scale: float,
    pending_N: Tensor | None = None,
    plan: DecodePlan | None = None,
) -> Tensor:
    """Absorb one token per row; see :func:`server.kernels.gla_decode`, which has checked the arguments.

    Args:
        state: float32, whole or split. Tokens in its ring are absorbed together with the new one.
        pending_N: how many of the ring's entries each row has; None: there is no ring.
        plan: sizes to use instead of those that :func:`plan_decode` chooses, to compare them.

    Raises:
        ValueError: head_k is above 256.
    """
    rows, heads, head_k = q_NHK.shape
    kv_heads, head_v = v_NGV.shape[1:]
    check_head_k(head_k)
    o_NHV = torch.empty((rows, heads, head_v), dtype=v_NGV.dtype, device=v_NGV.device)
    if rows == 0:
        return o_NHV
    plan = plan or plan_decode(head_k, head_v)
    grid = (triton.cdiv(head_v, plan.block_v), kv_heads, rows)
    early = launches_early(q_NHK.device)
    decays = GateArguments.of(gate)
    values, ring = state.values_SGKV, state.ring if pending_N is not None else None
    with torch.cuda.device_of(q_NHK):
        decode_kernel[grid](
            q_NHK,
            k_NGK,
            v_NGV,
            *decays.tensors,
            values,
            state.residues_SGKV,
            o_NHV,
            None if ring is None else ring.keys_SGCK,
            None if ring is None else ring.values_SGCV,
            None if ring is None else ring.decays_SGCK,
            slots_N,
            from_zero_N,
            pending_N,
            scale,
            *decays.scalars,
            *q_NHK.stride()[:2],
            *k_NGK.stride()[:2],
            *v_NGV.stride()[:2],
            *decays.strides,
            values.stride(0),
            0 if ring is None else ring.keys_SGCK.stride(0),
            0 if ring is None else ring.values_SGCV.stride(0),
            0 if ring is None else ring.decays_SGCK.stride(0),
            C=0 if ring is None else ring.size,
            R=decays.rank,
            BR=next_power_of_2(decays.rank) if decays.rank else 1,
            REPEATS=heads // kv_heads,
            K=head_k,
            V=head_v,
            BK=plan.block_k,
            BV=plan.block_v,
            EARLY=early,
            num_warps=plan.num_warps,
            launch_pdl=early,
        )
    return o_NHV


@cache
def plan_decode(head_k: int, head_v: int) -> DecodePlan:
    """Choose the tile by head size alone: then the order in which a sum is formed, hence every bit of a row's result,
    is the same in any batch."""
    block_k = next_power_of_2(head_k)
    block_v = min(next_power_of_2(head_v), 32)  # small: this kernel serves small batches, which have few programs
    return DecodePlan(block_k, block_v, num_warps=4 if block_k * block_v >= 4096 else 1)


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_from_zero", "p_pending"])
def decode_kernel(
    p_q,
    p_k,
    p_v,
    p_gate,
    p_gate_weight,
    p_gate_bias,
    p_state,
    p_residues,
    p_o,
    p_ring_k,
    p_ring_v,
    p_ring_g,
    p_slots,
    p_from_zero,
    p_pending,
    scale,
    gate_factor,
    clamp_min,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kg,
    stride_vn,
    stride_vg,
    stride_gn,
    stride_gg,
    stride_slot,
    stride_ring_k,
    stride_ring_v,
    stride_ring_g,
    C: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    REPEATS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (value tiles, kv heads, rows)."""
    i_v, i_g, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]

    start_next(EARLY)
    # States, rings and where they stand were complete before this step began: they need not be waited for.
    slot = tl.load(p_slots + i_n).to(tl.int64)
    if slot == 0:  # padding, or a sequence that has ended: nobody reads what it yields
        await_previous(EARLY)
        return
    continues = tl.load(p_from_zero + i_n) == 0
    o_tile = slot * stride_slot + i_g * (K * V) + o_k[:, None] * V + o_v[None, :]  # [BK, BV]
    # A state that starts from zero is not read at all: whatever its slot holds, NaN included, cannot matter.
    b_state = load_tile(p_state, p_residues, o_tile, m_kv & continues)
    if R > 0:
        o_r = tl.arange(0, BR)
        p_channels = p_gate_weight + (i_g * K + o_k[:, None]) * R + o_r[None, :]
        b_gate_weight = tl.load(p_channels, mask=m_k[:, None] & (o_r < R)[None, :], other=0.0)
        b_gate_bias = tl.load(p_gate_bias + i_g * K + o_k, mask=m_k, other=0.0)
    await_previous(EARLY)
    if R > 0:
        b_low_rank = tl.load(p_gate + i_n * stride_gn + o_r, mask=o_r < R, other=0.0).to(tl.float32)
        b_g = log_decays_of(b_low_rank, b_gate_weight, b_gate_bias, gate_factor, clamp_min)
    else:
        b_g = tl.load(p_gate + i_n * stride_gn + i_g * stride_gg + o_k, mask=m_k, other=0.0)
    b_k = tl.load(p_k + i_n * stride_kn + i_g * stride_kg + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + i_n * stride_vn + i_g * stride_vg + o_v, mask=m_v, other=0.0).to(tl.float32)
    if C > 0:
        # Tokens that wait in the ring, as the buffered kernels leave them: seldom any.
        pending = tl.where(continues, tl.load(p_pending + i_n), 0).to(tl.int32)
        p_decays = p_ring_g + slot * stride_ring_g + i_g * (C * K) + o_k
        b_g += tl.load(p_decays + (pending - 1) * K, mask=m_k & (pending > 0), other=0.0)
        b_state *= tl.exp(b_g)[:, None]
        for j in range(pending):
            b_kj = tl.load(p_ring_k + slot * stride_ring_k + (i_g * C + j) * K + o_k, mask=m_k, other=0.0)
            b_vj = tl.load(p_ring_v + slot * stride_ring_v + (i_g * C + j) * V + o_v, mask=m_v, other=0.0)
            b_kj = b_kj.to(tl.float32) * tl.exp(b_g - tl.load(p_decays + j * K, mask=m_k, other=0.0))
            b_state += b_kj[:, None] * b_vj.to(tl.float32)[None, :]
        b_state += b_k[:, None] * b_v[None, :]
    else:
        b_state = b_state * tl.exp(b_g)[:, None] + b_k[:, None] * b_v[None, :]
    store_tile(p_state, p_residues, o_tile, b_state, m_kv)

    for i_r in tl.static_range(REPEATS):
        i_h = i_g * REPEATS + i_r
        b_q = tl.load(p_q + i_n * stride_qn + i_h * stride_qh + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_o = tl.sum(b_state * b_q[:, None], axis=0) * scale  # [BV]
        p_row = p_o + (i_n * tl.num_programs(1) * REPEATS + i_h) * V
        tl.store(p_row + o_v, b_o, mask=m_v)
