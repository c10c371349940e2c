"""Gated linear attention over packed spans of prompts, as two Triton kernels.

The algorithm is that of :mod:`server.kernels.reference`: chunks, cut into blocks of 16 tokens, so that every exponent
is <= 0 between blocks and bounded inside one, whatever the gates. ``prepare_kernel`` does, for all blocks side by side,
what does not depend on a state: the scores A between the tokens of a chunk, the queries decayed since the chunk's
start, the keys decayed to its end. ``walk_kernel`` then holds a tile [head_k, BV] of a state in registers from the
first chunk of a span to its last, reads those, and leaves the state in the pool; no state in between is stored.

Heads of the same group share keys, values, gates and states; only queries, scores and outputs are per query head.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.shapes import check_head_k, next_power_of_2, product_dtype

BLOCK = tl.constexpr(16)
_MIDDLE = tl.constexpr(7)
_MAX_EXPONENT = tl.constexpr(80.0)  # of a factor inside a block, as in the reference
_FLOAT32_PRODUCT = tl.constexpr("tf32x3")  # on tensor cores, at nearly the precision of float32


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Sizes of both kernels' tiles."""

    chunk: int
    """Tokens that are computed by matrix products at once; a multiple of 16 that divides 64."""
    block_k: int
    """Rows of the walk's state tile: all of head_k, padded to a power of two."""
    block_v: int
    """Columns of the walk's state tile."""
    walk_warps: int
    walk_stages: int
    """Chunks whose inputs are on their way or in use at once."""
    prepare_block_k: int
    """Key channels that the preparation takes at once."""
    prepare_warps: int


def gla_prefill(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    g_TGK: Tensor,
    state_SGKV: Tensor,
    slots_N: Tensor,
    from_zero_N: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    max_length: int,
    plan: PrefillPlan | None = None,
) -> Tensor:
    """Absorb packed spans; see :func:`server.kernels.gla_prefill`, which has checked the arguments.

    Args:
        plan: sizes to use instead of those that :func:`plan_prefill` chooses, to compare them.

    Raises:
        ValueError: head_k is above 256.
    """
    tokens, heads, head_k = q_THK.shape
    kv_heads, head_v = v_TGV.shape[1:]
    spans, repeats, device = slots_N.shape[0], heads // kv_heads, q_THK.device
    check_head_k(head_k)
    o_THV = torch.empty((tokens, heads, head_v), dtype=v_TGV.dtype, device=device)
    if spans == 0:
        return o_THV

    dtype, dot_dtype = product_dtype(q_THK, prepare_kernel)
    plan = plan or plan_prefill(head_k, head_v, repeats, q_THK.element_size(), _shared_memory(device))
    scores_THL = torch.empty((tokens, heads, plan.chunk), dtype=dtype, device=device)
    q_decayed_THK = torch.empty((tokens, heads, head_k), dtype=dtype, device=device)
    k_decayed_TGK = torch.empty((tokens, kv_heads, head_k), dtype=dtype, device=device)
    chunks = tokens // plan.chunk + spans  # an upper bound, see _chunk_id
    decay_CGK = torch.empty((chunks, kv_heads, head_k), dtype=torch.float32, device=device)
    with torch.cuda.device_of(q_THK):
        prepare_kernel[(triton.cdiv(max_length, plan.chunk), heads, spans)](
            q_THK,
            k_TGK,
            g_TGK,
            scores_THL,
            q_decayed_THK,
            k_decayed_TGK,
            decay_CGK,
            cu_seqlens,
            *q_THK.stride()[:2],
            *k_TGK.stride()[:2],
            *g_TGK.stride()[:2],
            REPEATS=repeats,
            K=head_k,
            BK=plan.prepare_block_k,
            CHUNK=plan.chunk,
            DOT=dot_dtype,
            num_warps=plan.prepare_warps,
            num_stages=1,
        )
        walk_kernel[(triton.cdiv(head_v, plan.block_v), kv_heads, spans)](
            q_decayed_THK,
            k_decayed_TGK,
            v_TGV,
            scores_THL,
            decay_CGK,
            state_SGKV,
            o_THV,
            slots_N,
            from_zero_N,
            cu_seqlens,
            scale,
            *v_TGV.stride()[:2],
            state_SGKV.stride(0),
            REPEATS=repeats,
            K=head_k,
            V=head_v,
            BK=plan.block_k,
            BV=plan.block_v,
            CHUNK=plan.chunk,
            DOT=dot_dtype,
            num_warps=plan.walk_warps,
            num_stages=plan.walk_stages,
        )
    return o_THV


@cache
def plan_prefill(head_k: int, head_v: int, repeats: int, itemsize: int, shared_memory: int) -> PrefillPlan:
    """Choose sizes by shape and device, never by batch, so that a span's result is the same in any batch.

    Args:
        head_k: at most 256.
        head_v: any.
        repeats: query heads per kv head.
        itemsize: bytes of an element of the inputs.
        shared_memory: bytes that a program may use.
    """
    block_k = max(16, next_power_of_2(head_k))
    block_v = min(max(16, next_power_of_2(head_v)), 64 if itemsize == 2 else 32)

    def bytes_needed(chunk: int, stages: int) -> int:
        queries = repeats if stages > 1 else 1  # heads whose inputs are there at once
        stage = chunk * (queries * (block_k + chunk) + block_k + block_v)
        return itemsize * (stages * stage + (block_k + chunk) * block_v)  # and the state, and an output

    # A float32 product is three tensor-core products of split operands; larger chunks would spill registers.
    candidates = [(64, 3), (64, 2), (32, 2), (64, 1), (32, 1), (16, 1)] if itemsize == 2 else [(16, 1)]
    fitting = [sizes for sizes in candidates if bytes_needed(*sizes) <= shared_memory]
    chunk, stages = (fitting or candidates[-1:])[0]
    return PrefillPlan(
        chunk=chunk,
        block_k=block_k,
        block_v=block_v,
        walk_warps=8 if block_k * block_v > 8192 else 4,
        walk_stages=stages,
        prepare_block_k=16 if chunk == 64 else min(block_k, 32),
        prepare_warps=4,
    )


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":  # interpreted
        return 232448
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 101376))


@triton.jit
def _chunk_id(start, i_n, i_c, CHUNK: tl.constexpr):
    """A number for chunk i_c of span i_n, which starts at this packed row: unique, at most T // CHUNK + N - 1."""
    return start // CHUNK + i_n + i_c


@triton.jit
def prepare_kernel(
    p_q,
    p_k,
    p_g,
    p_scores,
    p_q_decayed,
    p_k_decayed,
    p_decay,
    p_cu_seqlens,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kg,
    stride_gt,
    stride_gg,
    REPEATS: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid: (chunks of the longest span, query heads, spans)."""
    i_c, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    H = tl.num_programs(1)
    G = H // REPEATS
    i_g = i_h // REPEATS
    start = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    left = tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - start - i_c * CHUNK  # rows from here to the span's end
    if left <= 0:
        return
    row = start + i_c * CHUNK
    p_q += row * stride_qt + i_h * stride_qh
    p_k += row * stride_kt + i_g * stride_kg
    p_g += row * stride_gt + i_g * stride_gg
    p_q_decayed += (row * H + i_h) * K
    p_k_decayed += (row * G + i_g) * K
    p_scores += (row * H + i_h) * CHUNK
    p_decay += (_chunk_id(start, i_n, i_c, CHUNK) * G + i_g) * K

    BLOCKS: tl.constexpr = CHUNK // BLOCK
    LEVELS: tl.constexpr = BLOCKS // 2  # how often 1, 2 or 4 blocks can be halved
    o_b = tl.arange(0, BLOCKS)
    o_i = tl.arange(0, BLOCK)[None, :, None]  # row in its block, [1, BLOCK, 1]
    o_t = o_b[:, None, None] * BLOCK + o_i  # row in the chunk, [BLOCKS, BLOCK, 1]
    o_l = tl.arange(0, CHUNK)
    m_causal = (o_l[:, None] >= o_l[None, :]) & (o_l[:, None] // BLOCK == o_l[None, :] // BLOCK)

    b_scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)[None, None, :]
        m_tk = (o_t < left) & (o_k < K)
        b_q = tl.load(p_q + o_t * stride_qt + o_k, mask=m_tk, other=0.0).to(tl.float32)  # [BLOCKS, BLOCK, BK]
        b_k = tl.load(p_k + o_t * stride_kt + o_k, mask=m_tk, other=0.0).to(tl.float32)
        b_g = tl.load(p_g + o_t * stride_gt + o_k, mask=m_tk, other=0.0).to(tl.float32)
        # The gate of the row behind each row of the same block.
        m_next = (o_i < BLOCK - 1) & (o_t + 1 < left) & (o_k < K)
        b_g_next = tl.load(p_g + (o_t + 1) * stride_gt + o_k, mask=m_next, other=0.0).to(tl.float32)
        b_total = tl.sum(b_g, axis=1)  # [BLOCKS, BK]
        b_q_start = b_q * tl.exp(tl.cumsum(b_g, axis=1))  # decayed since the block's start
        b_k_end = b_k * tl.exp(tl.cumsum(b_g_next, axis=1, reverse=True))  # decayed to the block's end

        # What the walk needs: queries decayed since the chunk's start, keys to its end, the decay of the whole chunk.
        b_q_chunk = b_q_start * _decay_of_blocks(b_total, BLOCKS, False, BLOCKS)[:, None, :]
        tl.store(p_q_decayed + o_t * (H * K) + o_k, b_q_chunk, mask=m_tk)
        if i_h % REPEATS == 0:
            b_k_chunk = b_k_end * _decay_of_blocks(b_total, BLOCKS, True, BLOCKS)[:, None, :]
            tl.store(p_k_decayed + o_t * (G * K) + o_k, b_k_chunk, mask=m_tk)
            o_channel = i_k + tl.arange(0, BK)
            tl.store(p_decay + o_channel, tl.exp(tl.sum(b_total, axis=0)), mask=o_channel < K)

        # Between blocks: the later half of the chunk with the earlier half, the decay split where they meet; then the
        # same in each half.
        for i_level in tl.static_range(LEVELS):
            b_scores += _scores_of_halves(b_q_start, b_k_end, b_total, BLOCKS >> (i_level + 1), BLOCKS, CHUNK, BK, DOT)

        # Inside a block: the decay is split at the middle, or formed by pairs where that could overflow.
        b_from_middle = tl.cumsum(tl.where(o_i > _MIDDLE, b_g, 0.0), axis=1) - tl.cumsum(
            tl.where(o_i < _MIDDLE, b_g_next, 0.0), axis=1, reverse=True
        )
        b_strong = tl.max(tl.max(tl.abs(b_from_middle), axis=2), axis=1) > _MAX_EXPONENT  # [BLOCKS]
        m_strong = b_strong[:, None, None]
        b_q_middle = tl.where(m_strong, 0.0, b_q * tl.exp(b_from_middle))
        b_k_middle = tl.where(m_strong, 0.0, b_k * tl.exp(-b_from_middle))
        # By selection: above the diagonal stand exponents > 0, hence perhaps infinities.
        b_scores += tl.where(m_causal, _product(b_q_middle, b_k_middle, CHUNK, BK, DOT), 0.0)
        if tl.max(b_strong.to(tl.int32)) > 0:
            b_pairs = tl.zeros([BLOCKS, BLOCK, BLOCK], dtype=tl.float32)
            o_j = tl.arange(0, BLOCK)[None, None, :]
            for j in range(BLOCK):
                b_passed = tl.cumsum(tl.where(o_i > j, b_g, 0.0), axis=1)
                o_tj = o_b[:, None, None] * BLOCK + j
                b_k_row = tl.load(p_k + o_tj * stride_kt + o_k, mask=(o_tj < left) & (o_k < K), other=0.0)
                b_column = tl.sum(b_q * tl.exp(b_passed) * b_k_row.to(tl.float32), axis=2)  # [BLOCKS, BLOCK]
                b_pairs += tl.where((o_j == j) & m_strong, b_column[:, :, None], 0.0)
            b_all_pairs = tl.broadcast_to(b_pairs[:, :, None, :], [BLOCKS, BLOCK, BLOCKS, BLOCK])
            b_scores += tl.where(m_causal, tl.reshape(b_all_pairs, [CHUNK, CHUNK]), 0.0)

    tl.store(p_scores + o_l[:, None] * (H * CHUNK) + o_l[None, :], b_scores, mask=(o_l < left)[:, None])


@triton.jit
def _decay_of_blocks(b_total, WIDTH: tl.constexpr, AFTER: tl.constexpr, BLOCKS: tl.constexpr):
    """For each block, the decay [BLOCKS, BK] over the blocks before it, or after it, in its group of WIDTH blocks."""
    o_b = tl.arange(0, BLOCKS)[:, None]
    o_other = tl.arange(0, BLOCKS)[None, :]
    if AFTER:
        m_other = (o_b // WIDTH == o_other // WIDTH) & (o_b < o_other)
    else:
        m_other = (o_b // WIDTH == o_other // WIDTH) & (o_b > o_other)
    return tl.exp(tl.sum(tl.where(m_other[:, :, None], b_total[None, :, :], 0.0), axis=1))


@triton.jit
def _scores_of_halves(
    b_q_start,
    b_k_end,
    b_total,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Scores [CHUNK, CHUNK] of every second group of WIDTH blocks with the group before it; zero elsewhere."""
    b_q = b_q_start * _decay_of_blocks(b_total, WIDTH, False, BLOCKS)[:, None, :]
    b_k = b_k_end * _decay_of_blocks(b_total, WIDTH, True, BLOCKS)[:, None, :]
    o_group = tl.arange(0, CHUNK) // (WIDTH * BLOCK)
    m_pair = (o_group[:, None] % 2 == 1) & (o_group[:, None] == o_group[None, :] + 1)
    return tl.where(m_pair, _product(b_q, b_k, CHUNK, BK, DOT), 0.0)


@triton.jit
def _product(b_q, b_k, CHUNK: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):
    """Scores [CHUNK, CHUNK] of two tiles [BLOCKS, BLOCK, BK]."""
    b_q = tl.reshape(b_q, [CHUNK, BK]).to(DOT)
    b_k = tl.reshape(b_k, [CHUNK, BK]).to(DOT)
    return tl.dot(b_q, tl.trans(b_k), input_precision=_FLOAT32_PRODUCT)


# The spans of a mixed batch are slices that begin anywhere: one variant for all alignments, or serving would compile.
@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_from_zero"])
def walk_kernel(
    p_q_decayed,
    p_k_decayed,
    p_v,
    p_scores,
    p_decay,
    p_state,
    p_o,
    p_slots,
    p_from_zero,
    p_cu_seqlens,
    scale,
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
):
    """Grid: (value tiles, kv heads, spans). Each program walks the chunks of one span."""
    i_v, i_g, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G = tl.num_programs(1)
    H = G * REPEATS
    start = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    length = (tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)

    o_l = tl.arange(0, CHUNK)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]

    slot = tl.load(p_slots + i_n).to(tl.int64)
    continues = tl.load(p_from_zero + i_n) == 0
    p_tile = p_state + slot * stride_slot + i_g * (K * V) + o_k[:, None] * V + o_v[None, :]  # [BK, BV]
    # A state that starts from zero is not read at all: whatever its slot holds, NaN included, cannot matter.
    b_state = tl.load(p_tile, mask=m_kv & continues, other=0.0).to(tl.float32)

    p_v += start * stride_vt + i_g * stride_vg
    p_k_decayed += (start * G + i_g) * K
    p_q_decayed += (start * H + i_g * REPEATS) * K
    p_scores += (start * H + i_g * REPEATS) * CHUNK
    p_o += (start * H + i_g * REPEATS) * V
    p_decay += (_chunk_id(start, i_n, 0, CHUNK) * G + i_g) * K
    for left in range(length, 0, -CHUNK):
        m_l = o_l < left
        m_lk = m_l[:, None] & m_k[None, :]
        m_lv = m_l[:, None] & m_v[None, :]
        b_v = tl.load(p_v + o_l[:, None] * stride_vt + o_v[None, :], mask=m_lv, other=0.0)  # [CHUNK, BV]
        if p_v.dtype.element_ty != DOT:
            b_v = b_v.to(tl.float32).to(DOT)
        b_factor = b_state.to(DOT)
        for i_r in tl.static_range(REPEATS):
            p_q_head = p_q_decayed + (o_l[:, None] * H + i_r) * K + o_k[None, :]
            p_scores_head = p_scores + (o_l[:, None] * H + i_r) * CHUNK + o_l[None, :]
            b_q = tl.load(p_q_head, mask=m_lk, other=0.0)  # [CHUNK, BK]
            b_scores = tl.load(p_scores_head, mask=m_l[:, None], other=0.0)  # [CHUNK, CHUNK]
            b_o = tl.dot(b_q, b_factor, input_precision=_FLOAT32_PRODUCT)
            b_o = tl.dot(b_scores, b_v, acc=b_o, input_precision=_FLOAT32_PRODUCT)
            tl.store(p_o + (o_l[:, None] * H + i_r) * V + o_v[None, :], b_o * scale, mask=m_lv)
        p_k_chunk = p_k_decayed + o_k[:, None] + o_l[None, :] * (G * K)
        b_k = tl.load(p_k_chunk, mask=m_k[:, None] & m_l[None, :], other=0.0)  # [BK, CHUNK]
        b_decay = tl.load(p_decay + o_k, mask=m_k, other=0.0)
        b_state = tl.dot(b_k, b_v, acc=b_state * b_decay[:, None], input_precision=_FLOAT32_PRODUCT)
        p_v += CHUNK * stride_vt
        p_k_decayed += CHUNK * G * K
        p_q_decayed += CHUNK * H * K
        p_scores += CHUNK * H * CHUNK
        p_o += CHUNK * H * V
        p_decay += G * K
    tl.store(p_tile, b_state, mask=m_kv)
