"""What follows the states from chunk to chunk, with what :mod:`server.kernels.prefill_scores` prepared.

``walk_kernel`` holds a tile of a state in registers from the first chunk of a segment to its last, and leaves the state
in the pool. A span is one segment where the spans alone keep the device busy. Otherwise it is cut into several, whose
states are found first: ``absorb_kernel`` gives what each segment adds to a state, and by what it decays it, side by
side, and ``combine_kernel`` goes through them, S' = decay * S + added. Then all segments are walked side by side.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from server.kernels.prefill_scores import chunk_id, exact_decay, span_of_chunk
from server.kernels.shapes import FLOAT32_PRODUCT
from server.kernels.tiles import load_tile, store_tile


@triton.jit
def _segment_id(start, segment_length):
    """A number for a segment behind a span's first, which starts at this packed row: unique, at most T // length."""
    return start // segment_length


@triton.jit
def _segment_of(p_cu_seqlens, spans, segment_length):
    """The span of this program's segment, and which of its segments that is; it may be behind the span's last."""
    i_segment = tl.program_id(2)
    i_n = span_of_chunk(p_cu_seqlens, spans, i_segment, segment_length)
    return i_n, i_segment - chunk_id(tl.load(p_cu_seqlens + i_n), i_n, 0, segment_length)


# The spans of a mixed batch are slices that begin anywhere: one variant for all alignments, or serving would compile.
@triton.jit(do_not_specialize=["spans", "segment_length"], do_not_specialize_on_alignment=["p_slots", "p_from_zero"])
def walk_kernel(
    p_q_decayed,
    p_k_decayed,
    p_v,
    p_scores,
    p_decay,
    p_segments,
    p_state,
    p_residues,
    p_o,
    p_slots,
    p_from_zero,
    p_cu_seqlens,
    scale,
    spans,
    segment_length,
    stride_vt,
    stride_vg,
    stride_slot,
    REPEATS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Grid: (value tiles, kv heads, spans or segments). Each program walks the chunks of one segment.

    SEGMENTED: whether spans may have several segments, numbered as chunk_id does. The states at the starts of those
    behind a span's first are then read from p_segments [segments, G, K, V].
    """
    i_v, i_g, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G = tl.num_programs(1)
    H = G * REPEATS
    i_s = 0
    if SEGMENTED:
        i_n, i_s = _segment_of(p_cu_seqlens, spans, segment_length)
    span = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    i_first = i_s * segment_length  # token of the span
    left_in_span = (tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - span).to(tl.int32) - i_first
    slot = tl.load(p_slots + i_n).to(tl.int64)
    if (left_in_span <= 0) & ((i_s > 0) | (slot == 0)):  # the null slot's: padding of a captured step
        return
    length = tl.minimum(left_in_span, segment_length)
    start = span + i_first

    o_l = tl.arange(0, CHUNK)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    if TRANSPOSED:  # state [BV, BK], output [BV, CHUNK]
        o_sk, o_sv, o_ol, o_ov = o_k[None, :], o_v[:, None], o_l[None, :], o_v[:, None]
    else:  # state [BK, BV], output [CHUNK, BV]
        o_sk, o_sv, o_ol, o_ov = o_k[:, None], o_v[None, :], o_l[:, None], o_v[None, :]
    m_state = (o_sk < K) & (o_sv < V)

    continues = tl.load(p_from_zero + i_n) == 0
    o_tile = slot * stride_slot + i_g * (K * V) + o_sk * V + o_sv
    # A state that starts from zero is not read at all: whatever its slot holds, NaN included, cannot matter.
    b_state = load_tile(p_state, p_residues, o_tile, m_state & continues & (i_s == 0))
    if SEGMENTED:  # noqa: SIM102 (known when this is compiled, unlike the next)
        if i_s > 0:
            p_segment = p_segments + (_segment_id(start, segment_length) * G + i_g) * (K * V)
            b_state = tl.load(p_segment + o_sk * V + o_sv, mask=m_state, other=0.0)

    first = chunk_id(span, i_n, i_first // CHUNK, CHUNK)
    p_v += start * stride_vt + i_g * stride_vg
    p_k_decayed += (first * G + i_g) * (CHUNK * K)
    p_q_decayed += (first * H + i_g * REPEATS) * (CHUNK * K)
    p_scores += (first * H + i_g * REPEATS) * (CHUNK * CHUNK)
    p_o += (start * H + i_g * REPEATS) * V
    p_decay += (first * G + i_g) * K
    # Decays are loaded a chunk ahead, as the factors of products are by Triton's pipeline.
    b_next_decay = tl.load(p_decay + o_k, mask=m_k & (length > 0), other=0.0)
    for left in range(length, 0, -CHUNK):
        m_l = o_l < left
        m_lk = m_l[:, None] & m_k[None, :]
        m_lv = m_l[:, None] & m_v[None, :]
        b_decay = b_next_decay
        p_decay += G * K
        b_next_decay = tl.load(p_decay + o_k, mask=m_k & (left > CHUNK), other=0.0)
        b_v = tl.load(p_v + o_l[:, None] * stride_vt + o_v[None, :], mask=m_lv, other=0.0)  # [CHUNK, BV]
        if p_v.dtype.element_ty != DOT:
            b_v = b_v.to(tl.float32).to(DOT)
        b_factor = b_state.to(DOT)
        for i_r in tl.static_range(REPEATS):
            p_q_head = p_q_decayed + i_r * (CHUNK * K) + o_l[:, None] * K + o_k[None, :]
            p_scores_head = p_scores + i_r * (CHUNK * CHUNK) + o_l[:, None] * CHUNK + o_l[None, :]
            b_q = tl.load(p_q_head, mask=m_lk, other=0.0)  # [CHUNK, BK]
            b_scores = tl.load(p_scores_head, mask=m_l[:, None], other=0.0)  # [CHUNK, CHUNK]
            # The product without the state first: while it is formed, the state is rounded for the other.
            if TRANSPOSED:
                b_o = tl.dot(tl.trans(b_v), tl.trans(b_scores), input_precision=FLOAT32_PRODUCT)
                b_o = tl.dot(b_factor, tl.trans(b_q), acc=b_o, input_precision=FLOAT32_PRODUCT)
            else:
                b_o = tl.dot(b_scores, b_v, input_precision=FLOAT32_PRODUCT)
                b_o = tl.dot(b_q, b_factor, acc=b_o, input_precision=FLOAT32_PRODUCT)
            tl.store(p_o + (o_ol * H + i_r) * V + o_ov, b_o * scale, mask=(o_ol < left) & (o_ov < V))
        b_k = tl.load(p_k_decayed + o_l[:, None] * K + o_k[None, :], mask=m_lk, other=0.0)  # [CHUNK, BK]
        b_state = _absorb_chunk(b_state, b_k, b_v, b_decay, p_v.dtype.element_ty == tl.float32, TRANSPOSED)
        p_v += CHUNK * stride_vt
        p_k_decayed += G * (CHUNK * K)
        p_q_decayed += H * (CHUNK * K)
        p_scores += H * (CHUNK * CHUNK)
        p_o += CHUNK * H * V
    if left_in_span <= segment_length:  # the span's last segment
        store_tile(p_state, p_residues, o_tile, b_state, m_state)


@triton.jit
def _absorb_chunk(b_state, b_k, b_v, b_decay, EXACT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The state behind a chunk.

    EXACT: whether decays are as :func:`exact_decay` keeps them, and the chunk is summed up by itself and then added:
    tensor cores round every sum towards zero, which adds up where a state grows for thousands of tokens.
    """
    if TRANSPOSED:
        b_left, b_right, b_decay = tl.trans(b_v), b_k, b_decay[None, :]
    else:
        b_left, b_right, b_decay = tl.trans(b_k), b_v, b_decay[:, None]
    if EXACT:
        return _decay_exactly(b_state, b_decay, tl.dot(b_left, b_right, input_precision=FLOAT32_PRODUCT))
    else:
        return tl.dot(b_left, b_right, acc=b_state * b_decay, input_precision=FLOAT32_PRODUCT)


@triton.jit
def _decay_exactly(b_state, b_decay, b_added):
    """decay * state + added, the decay as :func:`exact_decay` keeps it."""
    # No mere addition, which the compiler would make part of a product that gives what is added.
    b_added = tl.fma(b_state, tl.broadcast_to(-b_decay, b_state.shape), b_added)
    return tl.where(b_decay >= 0, b_state, 0.0) + b_added


@triton.jit(do_not_specialize=["spans", "segment_length"])
def absorb_kernel(
    p_k_decayed,
    p_v,
    p_decay,
    p_segments,
    p_segments_decay,
    p_cu_seqlens,
    spans,
    segment_length,
    stride_vt,
    stride_vg,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """What a segment adds to a state, p_segments [segments, G, K, V], and the decay over it, p_segments_decay
    [segments, G, K], both where the state at the next segment's start will be; not for the last segment of a span.

    Grid: (value tiles, kv heads, segments, numbered as chunk_id does).
    """
    i_v, i_g = tl.program_id(0), tl.program_id(1)
    i_n, i_s = _segment_of(p_cu_seqlens, spans, segment_length)
    G = tl.num_programs(1)
    span = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    i_first = i_s * segment_length
    left_in_span = (tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - span).to(tl.int32) - i_first
    if left_in_span <= segment_length:
        return

    o_l = tl.arange(0, CHUNK)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    if TRANSPOSED:
        o_sk, o_sv = o_k[None, :], o_v[:, None]
        b_state = tl.zeros([BV, BK], dtype=tl.float32)
    else:
        o_sk, o_sv = o_k[:, None], o_v[None, :]
        b_state = tl.zeros([BK, BV], dtype=tl.float32)
    EXACT: tl.constexpr = p_v.dtype.element_ty == tl.float32
    b_all = tl.full([BK], 1.0, dtype=tl.float32)
    b_lost = tl.zeros([BK], dtype=tl.float32)
    first = chunk_id(span, i_n, i_first // CHUNK, CHUNK)
    p_v += (span + i_first) * stride_vt + i_g * stride_vg
    p_k_decayed += (first * G + i_g) * (CHUNK * K)
    p_decay += (first * G + i_g) * K
    b_next_decay = tl.load(p_decay + o_k, mask=m_k, other=0.0)
    for _ in range(segment_length // CHUNK):
        b_decay = b_next_decay
        p_decay += G * K
        b_next_decay = tl.load(p_decay + o_k, mask=m_k, other=0.0)  # there is always a chunk behind this segment
        b_v = tl.load(p_v + o_l[:, None] * stride_vt + o_v[None, :], mask=m_v[None, :], other=0.0)
        if p_v.dtype.element_ty != DOT:
            b_v = b_v.to(tl.float32).to(DOT)
        b_k = tl.load(p_k_decayed + o_l[:, None] * K + o_k[None, :], mask=m_k[None, :], other=0.0)
        b_state = _absorb_chunk(b_state, b_k, b_v, b_decay, EXACT, TRANSPOSED)
        if EXACT:
            b_lost += tl.where(b_decay >= 0, b_decay, 1 + b_decay) * (1 - b_lost)
            b_all *= tl.where(b_decay >= 0, 1 - b_decay, -b_decay)
        else:
            b_all *= b_decay
        p_v += CHUNK * stride_vt
        p_k_decayed += G * (CHUNK * K)
    i_segment = _segment_id(span + i_first + segment_length, segment_length) * G + i_g
    tl.store(p_segments + i_segment * (K * V) + o_sk * V + o_sv, b_state, mask=(o_sk < K) & (o_sv < V))
    if i_v == 0:
        if EXACT:
            b_all = exact_decay(b_all, b_lost)
        tl.store(p_segments_decay + i_segment * K + o_k, b_all, mask=m_k)


@triton.jit(do_not_specialize=["segment_length"], do_not_specialize_on_alignment=["p_slots", "p_from_zero"])
def combine_kernel(
    p_segments,
    p_segments_decay,
    p_state,
    p_residues,
    p_slots,
    p_from_zero,
    p_cu_seqlens,
    segment_length,
    stride_slot,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Replace what each segment adds to a state by the state at the next one's start.

    EXACT: whether decays are as :func:`exact_decay` keeps them.

    Grid: (tiles of BK channels of keys, kv heads, spans).
    """
    i_k, i_g, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G = tl.num_programs(1)
    start = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    length = (tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)
    if length <= segment_length:
        return
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = i_g * (K * V) + o_k[:, None] * V + o_v[None, :]
    slot = tl.load(p_slots + i_n).to(tl.int64)
    continues = tl.load(p_from_zero + i_n) == 0
    b_state = load_tile(p_state, p_residues, slot * stride_slot + o_kv, m_kv & continues)
    i_second = _segment_id(start + segment_length, segment_length)
    p_segments += i_second * (G * K * V) + o_kv
    p_segments_decay += (i_second * G + i_g) * K + o_k
    for _ in tl.range(0, (length - 1) // segment_length, num_stages=4):
        b_added = tl.load(p_segments, mask=m_kv, other=0.0)
        b_decay = tl.load(p_segments_decay, mask=o_k < K, other=0.0)
        b_decay = b_decay[:, None]
        b_state = _decay_exactly(b_state, b_decay, b_added) if EXACT else b_decay * b_state + b_added
        tl.store(p_segments, b_state, mask=m_kv)
        p_segments += G * K * V
        p_segments_decay += G * K
