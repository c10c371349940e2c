"""The kernels that decode with buffered write-back; see :mod:`server.kernels.buffered` for the formulas."""

# Triton's decorator has no types, and a kernel's arguments are pointers, integers of no Python type, growing tuples.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment"

import triton
import triton.language as tl

from server.kernels.gate import log_decays_of
from server.kernels.pdl import await_previous, start_next
from server.kernels.tiles import load_tile, store_tile

_COLUMNS = ["p_slots", "p_from_zero", "p_pending", "p_num_folding"]
"""Parts of one upload, aligned as the parts before them leave them: one variant of a kernel must do for all."""


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
    for i_r in tl.static_range(REPEATS):
        b_q = tl.load(p_q + i_r * stride_qh + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_score = tl.sum(b_scored * b_q[None, :], axis=1) * scale
        tl.store(p_rows + i_r * (K + C) + K + o_c, b_score, mask=m_c)
    if i_c == 0:
        # The token itself: an entry of the ring, its score, and what its queries read of the state.
        b_k = tl.load(p_k + i_n * stride_kn + i_g * stride_kg + o_k, mask=m_k, other=0.0)
        b_decay = tl.exp(b_total) * scale
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
    p_o,
    p_slots,
    p_from_zero,
    p_pending,
    stride_slot,
    stride_ring_v,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    REPEATS: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    AHEAD: tl.constexpr,
    RING_AHEAD: tl.constexpr,
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
    if RING_AHEAD:
        o_c = tl.arange(0, C)[None, :, None]
        p_entries = p_ring_v + slot * stride_ring_v + i_g * (C * V) + o_v
        b_entries = tl.load(p_entries + o_c * V, mask=(o_c < entries - 1) & m_v, other=0.0)
    await_previous(EARLY)
    if RING_AHEAD:
        # The newest entry is the score kernel's.
        b_newest = tl.load(p_entries + (entries - 1) * V, mask=m_v, other=0.0)
        b_scores = tl.load(p_weights + i_h * (K + C) + K + o_c, mask=o_c < entries, other=0.0)

    b_sum = tl.zeros((BR, BK, BV), dtype=tl.float32)
    for i in tl.static_range(AHEAD):
        b_weight = tl.load(p_rows + i * BK, mask=m_r & (i * BK + o_k < K), other=0.0)
        b_sum += b_weight * _widened(tiles[i], HAS_SCALES)
    for i_k in tl.range(AHEAD * BK, K, BK, num_stages=STAGES):
        m_k = i_k + o_k < K
        b_state = tl.load(p_tile + i_k * V, mask=m_k & m_v & (from_zero == 0), other=0)
        b_weight = tl.load(p_rows + i_k, mask=m_r & m_k, other=0.0)
        b_sum += b_weight * _widened(b_state, HAS_SCALES)
    if not RING_AHEAD:
        for i_c in range(0, entries, BK):
            m_c = i_c + o_k < entries
            b_value = tl.load(p_values + i_c * V, mask=m_c & m_v, other=0.0)
            b_weight = tl.load(p_rows + K + i_c, mask=m_r & m_c, other=0.0)
            b_sum += b_weight * b_value.to(tl.float32)
    b_o = tl.sum(b_sum, axis=1, keep_dims=True)  # [BR, 1, BV]
    if RING_AHEAD:
        b_entries = tl.where(o_c == entries - 1, b_newest, b_entries).to(tl.float32)
        b_o += tl.sum(b_scores * b_entries, axis=1, keep_dims=True)
    tl.store(p_o + (i_h + o_r) * V + o_v, b_o, mask=m_r & m_v)


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
    p_residues,
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
    PART: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid: any number of programs, which share strips [PART, BV] of the folding rows' states, and go through them in
    tiles [BK, BV]."""
    o_c = tl.arange(0, C)
    PARTS_K: tl.constexpr = (K + PART - 1) // PART
    TILES_V: tl.constexpr = (V + BV - 1) // BV
    for i in range(tl.program_id(0), tl.load(p_num_folding).to(tl.int32) * (G * PARTS_K * TILES_V), tl.num_programs(0)):
        i_n = tl.cast(i // (G * PARTS_K * TILES_V), tl.int64)
        i_g = i // (PARTS_K * TILES_V) % G
        i_part = i // TILES_V % PARTS_K * PART
        o_v = i % TILES_V * BV + tl.arange(0, BV)
        m_v = o_v < V
        slot = tl.load(p_slots + i_n).to(tl.int64)
        from_zero = tl.load(p_from_zero + i_n) != 0
        # The row's newest token is in the ring already.
        newest = tl.where(from_zero, 0, tl.load(p_pending + i_n)).to(tl.int32)
        p_keys = p_ring_k + slot * stride_ring_k + i_g * (C * K)
        p_values = p_ring_v + slot * stride_ring_v + i_g * (C * V)
        p_decays = p_ring_g + slot * stride_ring_g + i_g * (C * K)
        m_c = o_c <= newest
        b_values = tl.load(p_values + o_c[:, None] * V + o_v[None, :], mask=m_c[:, None] & m_v[None, :], other=0.0)
        for i_k in tl.range(i_part, i_part + PART, BK, num_stages=STAGES):
            o_k = i_k + tl.arange(0, BK)
            m_k = o_k < K
            m_kv = m_k[:, None] & m_v[None, :]
            m_kc = m_k[:, None] & m_c[None, :]
            o_tile = slot * stride_slot + i_g * (K * V) + o_k[:, None] * V + o_v[None, :]
            b_state = load_tile(p_state, p_residues, o_tile, m_kv & (from_zero == 0))  # [BK, BV]
            if HAS_SCALES:
                b_state = tl.where(m_kv & (from_zero == 0), b_state - 128.0, 0.0)
            b_total = tl.load(p_decays + newest * K + o_k, mask=m_k, other=0.0)
            b_gk = tl.load(p_decays + o_c[None, :] * K + o_k[:, None], mask=m_kc, other=0.0)
            b_keys = tl.load(p_keys + o_c[None, :] * K + o_k[:, None], mask=m_kc, other=0.0).to(tl.float32)  # [BK, C]
            b_keys *= tl.exp(b_total[:, None] - b_gk)
            b_decay = tl.exp(b_total)
            if HAS_SCALES:
                p_scale = p_scales + slot * stride_scales + i_g * K + o_k
                b_decay *= tl.load(p_scale, mask=m_k & (from_zero == 0), other=0.0)
            if EXACT:
                b_update = tl.dot(b_keys, b_values.to(tl.float32), input_precision="ieee")
            else:
                # Two bfloat16 parts of a key have 16 bits; the values are bfloat16 as they are.
                b_high = b_keys.to(tl.bfloat16)
                b_update = tl.dot(b_high, b_values.to(tl.bfloat16))
                b_update = tl.dot((b_keys - b_high.to(tl.float32)).to(tl.bfloat16), b_values.to(tl.bfloat16), b_update)
            b_state = b_state * b_decay[:, None] + b_update
            if HAS_SCALES:
                b_scale = tl.max(tl.abs(b_state), axis=1) * (1.0 / 127.0)  # [BK]
                tl.store(p_scale, b_scale, mask=m_k)
                b_scaled = b_state * tl.where(b_scale > 0.0, 1.0 / b_scale, 0.0)[:, None]
                b_state = b_scaled + 128.5  # the cast cuts off
            store_tile(p_state, p_residues, o_tile, b_state, m_kv)
