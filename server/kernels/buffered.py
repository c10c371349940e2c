"""Decoding with buffered write-back: the state is read for every token, but written only once in C tokens.

The tokens since the last fold wait in a ring of their keys, values and cumulative gates G. With S the state after the
last fold and t the new token, which is the ring's last entry,

    o_t = scale * ((q_t * exp(G_t))^T S + sum over j <= t of a_j v_j)        a_j = sum_k q_tk k_jk exp(G_tk - G_jk)

and a fold is S' = diag(exp(G_t)) S + sum_j (k_j * exp(G_t - G_j)) v_j^T, after which the ring is empty. Every exponent
is <= 0. So a step moves the state once instead of twice, and a state of fewer bits is rounded once in C tokens. The
idea is published for other linear-attention models as ReplaySSM (dao-lab.ai) and KVBuffer (arXiv 2605.19049).

Up to three kernels: *score* appends the token to the ring and forms the weights, those of the state's rows
(q_t * exp(G_t)) and those of the ring's (a); *read* sums the rows of both under their weights, one warp to some
columns, and is what takes the time. Where a row is due, *read* rewrites its state while it has it, from keys that
*score* has decayed to the present. What it cannot do while reading (scales, which need whole rows of the state; query
heads that share a state, whose sums take the registers) is left to *fold*, which reads these states once more.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers, integers of no Python type, growing tuples.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment"

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gate import GateArguments, log_decays_of
from server.kernels.pdl import await_previous, launches_early, start_next
from server.kernels.shapes import check_head_k, is_interpreted, next_power_of_2
from server.kernels.state import LayerState, LowRankGate, RingRows


@dataclass(frozen=True, slots=True)
class BufferedPlan:
    """Sizes of the programs; tiles are [rows, columns] of the state."""

    read_k: int
    read_v: int
    read_warps: int
    read_stages: int
    """Tiles on their way from memory."""
    read_ahead: int
    """Tiles that a program reads before the scores are there, in a batch of few heads."""
    fold_k: int
    fold_v: int
    fold_warps: int
    fold_programs: int
    """Programs per multiprocessor, at most, which share the folds: few, so that they leave room for what runs beside
    them. Their number is fixed when a graph is captured. 0: the programs that read fold, too."""
    score_c: int = 16
    """Entries of the ring that a program scores."""
    score_warps: int = 4


_COLUMNS = ["p_slots", "p_from_zero", "p_pending", "p_num_folding"]
"""Parts of one upload, aligned as the parts before them leave them: one variant of a kernel must do for all."""
FEW_HEADS = 64
"""In a batch of up to so many heads, programs that read wait for their scores with most of their part of the state in
registers. With more, there are not registers enough; no bit of a result depends on it."""


def gla_decode(
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGV: Tensor,
    gate: Tensor | LowRankGate,
    state: LayerState,
    slots_N: Tensor,
    from_zero_N: Tensor,
    rows: RingRows,
    *,
    scale: float,
    plan: BufferedPlan | None = None,
) -> Tensor:
    """Absorb one token per row; see :func:`server.kernels.gla_decode`, which has checked the arguments.

    Args:
        rows: says which rows fold.
        plan: sizes to use instead of those that :func:`plan_buffered` chooses, to compare them.

    Raises:
        ValueError: head_k is above 256.
    """
    num_rows, heads, head_k = q_NHK.shape
    kv_heads, head_v = v_NGV.shape[1:]
    repeats = heads // kv_heads
    values, scales, ring = state.values_SGKV, state.scales_SGK, state.ring
    assert ring is not None and rows.num_folding is not None
    check_head_k(head_k)
    o_NHV = torch.empty((num_rows, heads, head_v), dtype=v_NGV.dtype, device=v_NGV.device)
    if num_rows == 0:
        return o_NHV
    plan = plan or plan_buffered(head_k, head_v, repeats, values.dtype)
    # What each query reads of the state's rows, then of the ring's.
    weights = torch.empty((num_rows, heads, head_k + ring.size), dtype=torch.float32, device=q_NHK.device)
    # Of the rows that fold, the keys decayed to the present, then the decay of the state.
    decayed = None
    if not plan.fold_programs:
        decayed = torch.empty((num_rows, kv_heads, ring.size + 1, head_k), dtype=torch.float32, device=q_NHK.device)
    exact = ring.keys_SGCK.dtype != torch.bfloat16 or is_interpreted(read_kernel)
    shape = {"K": head_k, "V": head_v, "C": ring.size}
    slot_strides = [values.stride(0), 0 if scales is None else scales.stride(0)]
    ring_strides = [ring.keys_SGCK.stride(0), ring.values_SGCV.stride(0), ring.decays_SGCK.stride(0)]
    early = launches_early(q_NHK.device)
    decays = GateArguments.of(gate)
    few = num_rows * kv_heads <= FEW_HEADS
    ahead = min(plan.read_ahead, triton.cdiv(head_k, plan.read_k)) if few else 0
    if _is_captured(q_NHK.device):
        _start_fold(q_NHK.device)
    with torch.cuda.device_of(q_NHK):
        score_kernel[(kv_heads, num_rows, triton.cdiv(ring.size, plan.score_c))](
            q_NHK,
            k_NGK,
            v_NGV,
            *decays.tensors,
            scales,
            ring.keys_SGCK,
            ring.values_SGCV,
            ring.decays_SGCK,
            weights,
            decayed,
            slots_N,
            from_zero_N,
            rows.pending_N,
            rows.num_folding,
            scale,
            *decays.scalars,
            *q_NHK.stride()[:2],
            *k_NGK.stride()[:2],
            *v_NGV.stride()[:2],
            *decays.strides,
            slot_strides[1],
            *ring_strides,
            **shape,
            R=decays.rank,
            BR=next_power_of_2(decays.rank) if decays.rank else 1,
            HAS_SCALES=scales is not None,
            FOLDS=decayed is not None,
            REPEATS=repeats,
            BC=plan.score_c,
            BK=next_power_of_2(head_k),
            BV=next_power_of_2(head_v),
            EARLY=early,
            num_warps=plan.score_warps,
            launch_pdl=early,
        )
        read_kernel[(triton.cdiv(head_v, plan.read_v), kv_heads, num_rows)](
            values,
            ring.values_SGCV,
            weights,
            decayed,
            o_NHV,
            slots_N,
            from_zero_N,
            rows.pending_N,
            rows.num_folding,
            slot_strides[0],
            ring_strides[1],
            **shape,
            HAS_SCALES=scales is not None,
            FOLDS=decayed is not None,
            REPEATS=repeats,
            BR=next_power_of_2(repeats),
            BK=plan.read_k,
            BV=plan.read_v,
            FK=plan.fold_k,
            FV=plan.fold_v,
            EXACT=exact,
            AHEAD=ahead,
            STAGES=plan.read_stages,
            EARLY=early,
            num_warps=plan.read_warps,
            launch_pdl=early,
        )

    if decayed is not None:
        return o_NHV

    def fold() -> None:
        tiles = num_rows * kv_heads * triton.cdiv(head_k, plan.fold_k) * triton.cdiv(head_v, plan.fold_v)
        with torch.cuda.device_of(values):
            fold_kernel[(min(tiles, _multiprocessors(values.device) * plan.fold_programs),)](
                values,
                scales,
                ring.keys_SGCK,
                ring.values_SGCV,
                ring.decays_SGCK,
                slots_N,
                from_zero_N,
                rows.pending_N,
                rows.num_folding,
                *slot_strides,
                *ring_strides,
                **shape,
                HAS_SCALES=scales is not None,
                G=kv_heads,
                BK=plan.fold_k,
                BV=plan.fold_v,
                EXACT=exact,
                num_warps=plan.fold_warps,
                num_stages=1,
            )

    if _is_captured(q_NHK.device):
        _waiting_folds[q_NHK.device] = fold
    else:
        fold()
    return o_NHV


_waiting_folds: dict[torch.device, Callable[[], None]] = {}
"""Captured decodes whose folds are not captured yet.

Nobody waits for a fold before the next step, so in a graph it runs beside what follows in this one. Not beside the
matrix products, though: they occupy whole multiprocessors, and would not start until it has ended. It starts with the
next layer's decode instead, which like the fold waits for memory alone.
"""


def _start_fold(device: torch.device) -> None:
    """Capture the waiting fold, if there is one, beside what is captured next."""
    fold = _waiting_folds.pop(device, None)
    if fold is None:
        return
    stream = _fold_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        fold()


def join_folds(device: torch.device) -> None:
    """Make the stream that captures a graph wait for the folds captured beside it; must be called where it ends."""
    if _is_captured(device):
        _start_fold(device)
        torch.cuda.current_stream(device).wait_stream(_fold_stream(device))


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _fold_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@cache
def plan_buffered(head_k: int, head_v: int, repeats: int, state_dtype: torch.dtype) -> BufferedPlan:
    """Choose the tiles by shape alone: then every bit of a row's result is the same in any batch.

    ``tests/bench/kernels.py --sweep`` compares others. On an H200, programs of one warp, which wait for nobody, read
    fastest; float32 states have the bytes to keep two warps busy. A fold needs whole rows of the state where it has to
    find their scales, and tiles of at least 16 x 16 for its product.
    """
    all_v = max(16, next_power_of_2(head_v))
    if state_dtype == torch.float32:
        read = (32, min(all_v, 64), 2, 3, 6)
    else:
        read = (16, min(all_v, 128), 1, 4, 6)
    if repeats > 1:
        read = (max(1, 16 // next_power_of_2(repeats)), min(all_v, 128), 1, 4, 6)
    if state_dtype == torch.uint8:
        return BufferedPlan(*read, fold_k=16, fold_v=all_v, fold_warps=8 if all_v >= 512 else 4, fold_programs=1)
    if repeats > 1:
        programs = 4 if state_dtype == torch.float32 else 8
        return BufferedPlan(*read, fold_k=16, fold_v=min(all_v, 128), fold_warps=2, fold_programs=programs)
    return BufferedPlan(*read, fold_k=16, fold_v=min(all_v, 64), fold_warps=read[2], fold_programs=0)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def score_kernel(
    p_q,
    p_k,
    p_v,
    p_gate,
    p_gate_weight,
    p_gate_bias,
    p_scales,
    p_ring_k,
    p_ring_v,
    p_ring_g,
    p_weights,
    p_decayed,
    p_slots,
    p_from_zero,
    p_pending,
    p_num_folding,
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
    stride_scales,
    stride_ring_k,
    stride_ring_v,
    stride_ring_g,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    FOLDS: tl.constexpr,
    REPEATS: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (kv heads, rows, blocks of the ring)."""
    start_next(EARLY)
    i_g, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_c = tl.program_id(2) * BC
    o_c = i_c + tl.arange(0, BC)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    # The ring, and where it stands, were complete before this step began: they need not be waited for.
    slot = tl.load(p_slots + i_n).to(tl.int64)
    if slot == 0:  # padding, or a sequence that has ended: nobody reads what it yields
        await_previous(EARLY)
        return
    from_zero = tl.load(p_from_zero + i_n) != 0
    pending = tl.where(from_zero, 0, tl.load(p_pending + i_n)).to(tl.int32)
    if FOLDS:
        folds = i_n < tl.load(p_num_folding)
        p_decayed += (i_n * tl.num_programs(0) + i_g) * ((C + 1) * K)
    m_c = o_c < pending
    m_ck = m_c[:, None] & m_k[None, :]
    p_keys = p_ring_k + slot * stride_ring_k + i_g * (C * K)
    p_decays = p_ring_g + slot * stride_ring_g + i_g * (C * K)
    # The ring's newest entry has the sum of all gates since the last fold.
    b_total = tl.load(p_decays + (pending - 1) * K + o_k, mask=m_k & (pending > 0), other=0.0)
    b_ring_g = tl.load(p_decays + o_c[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
    b_ring_k = tl.load(p_keys + o_c[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
    if R > 0:
        o_r = tl.arange(0, BR)
        p_channels = p_gate_weight + (i_g * K + o_k[:, None]) * R + o_r[None, :]
        b_gate_weight = tl.load(p_channels, mask=m_k[:, None] & (o_r < R)[None, :], other=0.0)
        b_gate_bias = tl.load(p_gate_bias + i_g * K + o_k, mask=m_k, other=0.0)
    await_previous(EARLY)
    if i_c > pending:
        return

    if R > 0:
        b_low_rank = tl.load(p_gate + i_n * stride_gn + o_r, mask=o_r < R, other=0.0).to(tl.float32)
        b_total += log_decays_of(b_low_rank, b_gate_weight, b_gate_bias, gate_factor, clamp_min)
    else:
        b_total += tl.load(p_gate + i_n * stride_gn + i_g * stride_gg + o_k, mask=m_k, other=0.0)
    p_rows = p_weights + (i_n * tl.num_programs(0) + i_g) * (REPEATS * (K + C))
    p_q += i_n * stride_qn + i_g * (REPEATS * stride_qh)
    b_scored = b_ring_k.to(tl.float32) * tl.exp(b_total[None, :] - b_ring_g)  # [BC, BK]
    if FOLDS:
        tl.store(p_decayed + o_c[:, None] * K + o_k[None, :], b_scored, mask=m_ck & folds)
    for i_r in tl.static_range(REPEATS):
        b_q = tl.load(p_q + i_r * stride_qh + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_score = tl.sum(b_scored * b_q[None, :], axis=1) * scale
        tl.store(p_rows + i_r * (K + C) + K + o_c, b_score, mask=m_c)
    if i_c == 0:
        # The token itself: an entry of the ring, its score, and what its queries read of the state.
        b_k = tl.load(p_k + i_n * stride_kn + i_g * stride_kg + o_k, mask=m_k, other=0.0)
        b_decay = tl.exp(b_total)
        if FOLDS:
            tl.store(p_decayed + pending * K + o_k, b_k.to(tl.float32), mask=m_k & folds)
            tl.store(p_decayed + C * K + o_k, b_decay, mask=m_k & folds)
        b_decay *= scale
        if HAS_SCALES:
            p_scale = p_scales + slot * stride_scales + i_g * K + o_k
            b_decay *= tl.load(p_scale, mask=m_k & (from_zero == 0), other=0.0)
        for i_r in tl.static_range(REPEATS):
            p_row = p_rows + i_r * (K + C)
            b_own = tl.load(p_q + i_r * stride_qh + o_k, mask=m_k, other=0.0).to(tl.float32)
            tl.store(p_row + o_k, b_own * b_decay, mask=m_k)
            tl.store(p_row + K + pending, tl.sum(b_own * b_k.to(tl.float32), axis=0) * scale)
        o_v = tl.arange(0, BV)
        m_v = o_v < V
        b_v = tl.load(p_v + i_n * stride_vn + i_g * stride_vg + o_v, mask=m_v, other=0.0)
        tl.store(p_keys + pending * K + o_k, b_k, mask=m_k)
        tl.store(p_decays + pending * K + o_k, b_total, mask=m_k)
        tl.store(p_ring_v + slot * stride_ring_v + i_g * (C * V) + pending * V + o_v, b_v, mask=m_v)


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def read_kernel(
    p_state,
    p_ring_v,
    p_weights,
    p_decayed,
    p_o,
    p_slots,
    p_from_zero,
    p_pending,
    p_num_folding,
    stride_slot,
    stride_ring_v,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    FOLDS: tl.constexpr,
    REPEATS: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    FK: tl.constexpr,
    FV: tl.constexpr,
    EXACT: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (value tiles, kv heads, rows)."""
    start_next(EARLY)
    i_v, i_g, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.load(p_slots + i_n).to(tl.int64)
    if slot == 0:  # padding, or a sequence that has ended: nobody reads what it yields
        await_previous(EARLY)
        return
    from_zero = tl.load(p_from_zero + i_n) != 0
    entries = tl.where(from_zero, 0, tl.load(p_pending + i_n)).to(tl.int32) + 1
    if FOLDS:
        if i_n < tl.load(p_num_folding):
            await_previous(EARLY)
            i_row = i_n * tl.num_programs(1) + i_g
            _read_and_fold(
                p_state + slot * stride_slot + i_g * (K * V),
                p_ring_v + slot * stride_ring_v + i_g * (C * V),
                p_weights + i_row * (K + C),
                p_decayed + i_row * ((C + 1) * K),
                p_o + i_row * V,
                from_zero,
                entries,
                i_v * BV,
                K,
                V,
                C,
                FK,
                FV,
                BV // FV,
                EXACT,
                STAGES,
            )
            return
    # Three dimensions [BR, BK, BV] from the start, query heads first: a tile of the state serves all of them.
    o_r = tl.arange(0, BR)[:, None, None]
    o_k = tl.arange(0, BK)[None, :, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, None, :]
    m_r = o_r < REPEATS
    m_v = o_v < V
    i_h = (i_n * tl.num_programs(1) + i_g) * REPEATS
    p_rows = p_weights + (i_h + o_r) * (K + C) + o_k
    p_tile = p_state + slot * stride_slot + i_g * (K * V) + o_k * V + o_v
    p_values = p_ring_v + slot * stride_ring_v + i_g * (C * V) + o_k * V + o_v

    # The state was complete before this step began: its first tiles need not be waited for.
    tiles = ()
    for i in tl.static_range(AHEAD):
        m_state = (i * BK + o_k < K) & m_v & (from_zero == 0)
        tiles += (tl.load(p_tile + i * BK * V, mask=m_state, other=0),)
    await_previous(EARLY)

    b_sum = tl.zeros((BR, BK, BV), dtype=tl.float32)
    for i in tl.static_range(AHEAD):
        b_weight = tl.load(p_rows + i * BK, mask=m_r & (i * BK + o_k < K), other=0.0)
        b_sum += b_weight * _widened(tiles[i], HAS_SCALES)
    for i_k in tl.range(AHEAD * BK, K, BK, num_stages=STAGES):
        m_k = i_k + o_k < K
        b_state = tl.load(p_tile + i_k * V, mask=m_k & m_v & (from_zero == 0), other=0)
        b_weight = tl.load(p_rows + i_k, mask=m_r & m_k, other=0.0)
        b_sum += b_weight * _widened(b_state, HAS_SCALES)
    for i_c in range(0, entries, BK):
        m_c = i_c + o_k < entries
        b_value = tl.load(p_values + i_c * V, mask=m_c & m_v, other=0.0)
        b_weight = tl.load(p_rows + K + i_c, mask=m_r & m_c, other=0.0)
        b_sum += b_weight * b_value.to(tl.float32)
    b_o = tl.sum(b_sum, axis=1, keep_dims=True)  # [BR, 1, BV]
    tl.store(p_o + (i_h + o_r) * V + o_v, b_o, mask=m_r & m_v)


@triton.jit
def _read_and_fold(
    p_state,
    p_values,
    p_weights,
    p_decayed,
    p_o,
    from_zero,
    entries,
    i_v,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TILES_V: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What one head of a row that folds reads of some columns of its state and ring, and the fold of these columns."""
    o_c = tl.arange(0, C)
    m_c = o_c < entries
    b_scores = tl.load(p_weights + K + o_c, mask=m_c, other=0.0)
    for i in range(TILES_V):
        o_v = i_v + i * BV + tl.arange(0, BV)
        m_v = o_v < V
        b_values = tl.load(p_values + o_c[:, None] * V + o_v[None, :], mask=m_c[:, None] & m_v[None, :], other=0.0)
        b_o = tl.sum(b_scores[:, None] * b_values.to(tl.float32), axis=0)  # [BV]
        for i_k in tl.range(0, K, BK, num_stages=STAGES):
            o_k = i_k + tl.arange(0, BK)
            m_k = o_k < K
            m_kv = m_k[:, None] & m_v[None, :]
            p_tile = p_state + o_k[:, None] * V + o_v[None, :]
            b_state = tl.load(p_tile, mask=m_kv & (from_zero == 0), other=0.0).to(tl.float32)  # [BK, BV]
            b_o += tl.sum(tl.load(p_weights + o_k, mask=m_k, other=0.0)[:, None] * b_state, axis=0)
            b_keys = tl.load(p_decayed + o_c[None, :] * K + o_k[:, None], mask=m_k[:, None] & m_c[None, :], other=0.0)
            b_state *= tl.load(p_decayed + C * K + o_k, mask=m_k, other=0.0)[:, None]
            b_state += _product(b_keys, b_values, EXACT)
            tl.store(p_tile, b_state.to(p_state.dtype.element_ty), mask=m_kv)
        tl.store(p_o + o_v, b_o, mask=m_v)


@triton.jit
def _product(b_keys, b_values, EXACT: tl.constexpr):
    """Of decayed keys [BK, C], float32, and values [C, BV]."""
    if EXACT:
        return tl.dot(b_keys, b_values.to(tl.float32), input_precision="ieee")
    # Two bfloat16 parts of a key have 16 bits; the values are bfloat16 as they are.
    b_high = b_keys.to(tl.bfloat16)
    b_product = tl.dot(b_high, b_values.to(tl.bfloat16))
    return tl.dot((b_keys - b_high.to(tl.float32)).to(tl.bfloat16), b_values.to(tl.bfloat16), b_product)


@triton.jit
def _widened(b_state, HAS_SCALES: tl.constexpr):
    """Values of a state as float32."""
    if HAS_SCALES:
        # 0x4B000000 is 2^23: the value becomes the last bits of a float32, and 2^23 + 128 is taken off again.
        return (b_state.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return b_state.to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def fold_kernel(
    p_state,
    p_scales,
    p_ring_k,
    p_ring_v,
    p_ring_g,
    p_slots,
    p_from_zero,
    p_pending,
    p_num_folding,
    stride_slot,
    stride_scales,
    stride_ring_k,
    stride_ring_v,
    stride_ring_g,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid: any number of programs, which share the tiles [BK, BV] of the folding rows."""
    o_c = tl.arange(0, C)
    TILES_K: tl.constexpr = (K + BK - 1) // BK
    TILES_V: tl.constexpr = (V + BV - 1) // BV
    for i in range(tl.program_id(0), tl.load(p_num_folding).to(tl.int32) * (G * TILES_K * TILES_V), tl.num_programs(0)):
        i_n = tl.cast(i // (G * TILES_K * TILES_V), tl.int64)
        i_g = i // (TILES_K * TILES_V) % G
        o_k = i // TILES_V % TILES_K * BK + tl.arange(0, BK)
        o_v = i % TILES_V * BV + tl.arange(0, BV)
        m_k = o_k < K
        m_v = o_v < V
        slot = tl.load(p_slots + i_n).to(tl.int64)
        from_zero = tl.load(p_from_zero + i_n) != 0
        # The row's newest token is in the ring already.
        newest = tl.where(from_zero, 0, tl.load(p_pending + i_n)).to(tl.int32)
        p_keys = p_ring_k + slot * stride_ring_k + i_g * (C * K)
        p_values = p_ring_v + slot * stride_ring_v + i_g * (C * V)
        p_decays = p_ring_g + slot * stride_ring_g + i_g * (C * K)
        p_tile = p_state + slot * stride_slot + i_g * (K * V) + o_k[:, None] * V + o_v[None, :]
        m_kv = m_k[:, None] & m_v[None, :]
        m_c = o_c <= newest
        m_kc = m_k[:, None] & m_c[None, :]
        b_state = tl.load(p_tile, mask=m_kv & (from_zero == 0), other=0).to(tl.float32)  # [BK, BV]
        if HAS_SCALES:
            b_state = tl.where(m_kv & (from_zero == 0), b_state - 128.0, 0.0)
        b_total = tl.load(p_decays + newest * K + o_k, mask=m_k, other=0.0)
        b_gk = tl.load(p_decays + o_c[None, :] * K + o_k[:, None], mask=m_kc, other=0.0)
        b_keys = tl.load(p_keys + o_c[None, :] * K + o_k[:, None], mask=m_kc, other=0.0).to(tl.float32)  # [BK, C]
        b_values = tl.load(p_values + o_c[:, None] * V + o_v[None, :], mask=m_c[:, None] & m_v[None, :], other=0.0)
        b_keys *= tl.exp(b_total[:, None] - b_gk)
        b_decay = tl.exp(b_total)
        if HAS_SCALES:
            p_scale = p_scales + slot * stride_scales + i_g * K + o_k
            b_decay *= tl.load(p_scale, mask=m_k & (from_zero == 0), other=0.0)
        b_update = _product(b_keys, b_values, EXACT)
        b_state = b_state * b_decay[:, None] + b_update
        if HAS_SCALES:
            b_scale = tl.max(tl.abs(b_state), axis=1) * (1.0 / 127.0)  # [BK]
            tl.store(p_scale, b_scale, mask=m_k)
            b_scaled = b_state * tl.where(b_scale > 0.0, 1.0 / b_scale, 0.0)[:, None]
            b_state = b_scaled + 128.5  # the cast cuts off
        tl.store(p_tile, b_state.to(p_state.dtype.element_ty), mask=m_kv)
