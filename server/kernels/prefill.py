"""Gated linear attention over packed spans of prompts, as two Triton kernels.

The chunks are those of :mod:`server.kernels.reference`. ``prepare_kernel`` does, for all chunks side by side, what does
not depend on a state: the scores A between the tokens of a chunk, the queries decayed since the chunk's start, the keys
decayed to its end. ``walk_kernel`` then holds a tile [head_k, BV] of a state in registers from the first chunk of a
span to its last, reads those, and leaves the state in the pool; no state in between is stored.

The scores are formed by halving: those between the two halves of a chunk by one matrix product, the decay being split
where the halves meet; then those between the halves of each half, and so on down to groups of 4 tokens. Inside a group
they are formed token by token. So no factor ever exceeds 1 and nothing overflows, whatever the gates; a factor that
underflows belongs to a score that vanishes. Decays over several groups are products of the groups' decays, and the
exponents of those are sums over the very tokens that they span.

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

GROUP = tl.constexpr(4)
"""Tokens whose gates one thread sums."""
_FLOAT32_PRODUCT = tl.constexpr("tf32x3")  # on tensor cores, at nearly the precision of float32


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Sizes of both kernels' tiles. The walk's, but for `chunk`, change no bit of a result."""

    chunk: int
    """Tokens that are computed by matrix products at once: 16, 32 or 64."""
    block_k: int
    """Rows of the walk's state tile: all of head_k, padded to a power of two."""
    block_v: int
    """Columns of the walk's state tile."""
    transposed: bool
    """Whether the walk holds its tile transposed: then the tensor cores take it from the registers that they add to,
    instead of from shared memory, but it must have 64 columns."""
    walk_warps: int
    walk_stages: int
    """Chunks whose inputs are on their way or in use at once."""
    prepare_block_k: int
    """Key channels that the preparation takes at once."""
    prepare_warps: int


WALK_TILES = ((16, False, 4), (32, False, 4), (64, True, 4), (128, True, 8))
"""The walk's tiles for 16-bit inputs, as measured: columns, whether transposed, warps."""


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
    if plan is None:
        processors, shared_memory = _device_limits(device)
        itemsize = q_THK.element_size()
        plan = plan_prefill(head_k, head_v, repeats, itemsize, shared_memory, spans * kv_heads, processors)
    chunks = tokens // plan.chunk + spans  # an upper bound, see _chunk_id
    scores_CHLL = torch.empty((chunks, heads, plan.chunk, plan.chunk), dtype=dtype, device=device)
    q_decayed_CHLK = torch.empty((chunks, heads, plan.chunk, head_k), dtype=dtype, device=device)
    k_decayed_CGLK = torch.empty((chunks, kv_heads, plan.chunk, head_k), dtype=dtype, device=device)
    decay_CGK = torch.empty((chunks, kv_heads, head_k), dtype=torch.float32, device=device)
    with torch.cuda.device_of(q_THK):
        prepare_kernel[(heads * triton.cdiv(max_length, plan.chunk), spans)](
            q_THK,
            k_TGK,
            g_TGK,
            scores_CHLL,
            q_decayed_CHLK,
            k_decayed_CGLK,
            decay_CGK,
            cu_seqlens,
            *q_THK.stride()[:2],
            *k_TGK.stride()[:2],
            *g_TGK.stride()[:2],
            HEADS=heads,
            REPEATS=repeats,
            K=head_k,
            BK=plan.prepare_block_k,
            CHUNK=plan.chunk,
            DOT=dot_dtype,
            num_warps=plan.prepare_warps,
            num_stages=1,
        )
        walk_kernel[(triton.cdiv(head_v, plan.block_v), kv_heads, spans)](
            q_decayed_CHLK,
            k_decayed_CGLK,
            v_TGV,
            scores_CHLL,
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
            TRANSPOSED=plan.transposed,
            num_warps=plan.walk_warps,
            num_stages=plan.walk_stages,
        )
    return o_THV


@cache
def plan_prefill(
    head_k: int, head_v: int, repeats: int, itemsize: int, shared_memory: int, states: int, processors: int
) -> PrefillPlan:
    """Choose sizes by shape and device. The batch decides about the walk's tile alone, and that changes no bit of a
    span's result (a test holds them to it), which is therefore the same in any batch.

    Args:
        head_k: at most 256.
        head_v: any.
        repeats: query heads per kv head.
        itemsize: bytes of an element of the inputs.
        shared_memory: bytes that a program may use.
        states: spans times kv heads.
        processors: multiprocessors of the device.
    """
    block_k, columns = max(16, next_power_of_2(head_k)), max(16, next_power_of_2(head_v))

    def fits(chunk: int, block_v: int, transposed: bool, stages: int) -> bool:
        queries = repeats if stages > 1 else 1  # heads whose inputs are there at once
        stage = chunk * (queries * (block_k + chunk) + block_k + block_v)
        state = 0 if transposed else block_k * block_v
        return itemsize * (stages * stage + state + chunk * block_v) <= shared_memory  # chunk * block_v: an output

    if itemsize == 2:
        chunk = next((chunk for chunk in (64, 32) if fits(chunk, 16, False, 1)), 16)
        tiles = [tile for tile in WALK_TILES if tile[0] <= columns and fits(chunk, *tile[:2], 1)] or [WALK_TILES[0]]
        # The narrowest tile of which the device runs all programs at once; the widest if it runs none so.
        at_once = [tile for tile in tiles if states * triton.cdiv(head_v, tile[0]) <= processors]
        block_v, transposed, warps = at_once[0] if at_once else tiles[-1]
    else:  # A float32 product is three tensor-core products of split operands; larger chunks would spill registers.
        chunk, block_v, transposed, warps = 16, min(columns, 32), False, 4
    prepare_block_k = min(block_k, 128)
    return PrefillPlan(
        chunk=chunk,
        block_k=block_k,
        block_v=block_v,
        transposed=transposed,
        walk_warps=warps,
        walk_stages=2 if itemsize == 2 and fits(chunk, block_v, transposed, 2) else 1,
        prepare_block_k=prepare_block_k,
        prepare_warps=max(1, prepare_block_k * chunk // 1024),
    )


@cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one program may use."""
    if device.type != "cuda":  # interpreted
        return 132, 232448
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, int(getattr(properties, "shared_memory_per_block_optin", 101376))


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
    HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid: (query heads, fastest, times chunks of the longest span; spans)."""
    i_h, i_c, i_n = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS, tl.program_id(1)
    G: tl.constexpr = HEADS // REPEATS
    i_g = i_h // REPEATS
    start = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    left = tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - start - i_c * CHUNK  # rows from here to the span's end
    if left <= 0:
        return
    row = start + i_c * CHUNK
    chunk_id = _chunk_id(start, i_n, i_c, CHUNK)
    p_q += row * stride_qt + i_h * stride_qh
    p_k += row * stride_kt + i_g * stride_kg
    p_g += row * stride_gt + i_g * stride_gg
    p_q_decayed += (chunk_id * HEADS + i_h) * (CHUNK * K)
    p_k_decayed += (chunk_id * G + i_g) * (CHUNK * K)
    p_scores += (chunk_id * HEADS + i_h) * (CHUNK * CHUNK)
    p_decay += (chunk_id * G + i_g) * K

    # A tile is [groups, rows of a group, channels]. Where it has two threads per channel, Triton's layouts give a
    # thread all the rows of a group, and what is summed over them stays in the thread.
    GROUPS: tl.constexpr = CHUNK // GROUP
    LEVELS: tl.constexpr = 2 if GROUPS == 4 else 3 if GROUPS == 8 else 4  # how often the groups can be halved
    o_i = tl.arange(0, GROUP)[None, :, None]  # row in its group
    o_u = tl.arange(0, GROUPS)  # group in the chunk
    o_t = o_u[:, None, None] * GROUP + o_i  # row in the chunk, [GROUPS, GROUP, 1]
    b_zero = tl.zeros([GROUPS], dtype=tl.float32)
    b_zeros = _four(b_zero, b_zero, b_zero, b_zero)
    b_in_group = _four(b_zeros, b_zeros, b_zeros, b_zeros)
    # Scores of tokens that the halving into groups of 1, 2, 4 and 8 parts. Each holds what it is for and, elsewhere,
    # finite numbers. With one sum for all, under a mask for each, the compiler spills five times the registers.
    b_apart_1 = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    b_apart_2 = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    b_apart_4 = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    b_apart_8 = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_tk = (o_t < left) & (o_k < K)[None, None, :]
        b_g = tl.load(p_g + o_t * stride_gt + o_k[None, None, :], mask=m_tk, other=0.0).to(tl.float32)
        b_q = tl.load(p_q + o_t * stride_qt + o_k[None, None, :], mask=m_tk, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_t * stride_kt + o_k[None, None, :], mask=m_tk, other=0.0).to(tl.float32)
        # The gate of the row behind each row of the same group.
        m_next = (o_i < GROUP - 1) & (o_t + 1 < left) & (o_k < K)[None, None, :]
        b_g_next = tl.load(p_g + (o_t + 1) * stride_gt + o_k[None, None, :], mask=m_next, other=0.0).to(tl.float32)

        # Inside a group, row by row: the keys so far, decayed to the row.
        _, b_decay_1, b_decay_2, b_decay_3 = _rows(tl.exp(b_g), GROUPS, BK)  # each [GROUPS, BK]
        b_q0, b_q1, b_q2, b_q3 = _rows(b_q, GROUPS, BK)
        b_k0, b_k1, b_k2, b_k3 = _rows(b_k, GROUPS, BK)
        b_row_0 = _four(tl.sum(b_q0 * b_k0, axis=1), b_zero, b_zero, b_zero)
        b_k0 *= b_decay_1
        b_row_1 = _four(tl.sum(b_q1 * b_k0, axis=1), tl.sum(b_q1 * b_k1, axis=1), b_zero, b_zero)
        b_k0 *= b_decay_2
        b_k1 *= b_decay_2
        b_20, b_21, b_22 = tl.sum(b_q2 * b_k0, axis=1), tl.sum(b_q2 * b_k1, axis=1), tl.sum(b_q2 * b_k2, axis=1)
        b_row_2 = _four(b_20, b_21, b_22, b_zero)
        b_30, b_31 = tl.sum(b_q3 * (b_k0 * b_decay_3), axis=1), tl.sum(b_q3 * (b_k1 * b_decay_3), axis=1)
        b_32, b_33 = tl.sum(b_q3 * (b_k2 * b_decay_3), axis=1), tl.sum(b_q3 * b_k3, axis=1)
        b_in_group += _four(b_row_0, b_row_1, b_row_2, _four(b_30, b_31, b_32, b_33))

        b_q *= tl.exp(tl.cumsum(b_g, axis=1))  # decayed since the group's start
        b_k *= tl.exp(tl.cumsum(b_g_next, axis=1, reverse=True))  # decayed to the group's end
        b_sum = tl.sum(b_g, axis=1)  # [GROUPS, BK]

        # Between groups: those that are neighbours, then two pairs of groups, then fours and eights.
        b_decay = tl.exp(b_sum)  # of the groups joined so far, [GROUPS, BK]
        b_before = tl.full([GROUPS, BK], 1.0, dtype=tl.float32)  # of those among them before the group
        b_after = tl.full([GROUPS, BK], 1.0, dtype=tl.float32)  # and after it
        for i_level in tl.static_range(LEVELS):
            m_later = ((o_u >> i_level) % 2 == 1)[:, None]
            b_factor = tl.where(m_later, b_before, b_after)
            # A group is on the side of the queries or of the keys: so one tile holds both factors of the product.
            b_parts = tl.where(m_later[:, None, :], b_q, b_k) * b_factor[:, None, :]
            b_parts = tl.reshape(b_parts.to(DOT), [CHUNK, BK])
            if i_level == 0:
                b_apart_1 = tl.dot(b_parts, tl.trans(b_parts), acc=b_apart_1, input_precision=_FLOAT32_PRODUCT)
            elif i_level == 1:
                b_apart_2 = tl.dot(b_parts, tl.trans(b_parts), acc=b_apart_2, input_precision=_FLOAT32_PRODUCT)
            elif i_level == 2:
                b_apart_4 = tl.dot(b_parts, tl.trans(b_parts), acc=b_apart_4, input_precision=_FLOAT32_PRODUCT)
            else:
                b_apart_8 = tl.dot(b_parts, tl.trans(b_parts), acc=b_apart_8, input_precision=_FLOAT32_PRODUCT)
            b_other = _of_other_half(b_decay, i_level, GROUPS, BK)
            b_before *= tl.where(m_later, b_other, 1.0)
            b_after *= tl.where(m_later, 1.0, b_other)
            b_decay *= b_other

        # What the walk needs: queries decayed since the chunk's start, keys to its end, the decay of the whole chunk.
        tl.store(p_q_decayed + o_t * K + o_k[None, None, :], b_q * b_before[:, None, :], mask=m_tk)
        if i_h % REPEATS == 0:
            tl.store(p_k_decayed + o_t * K + o_k[None, None, :], b_k * b_after[:, None, :], mask=m_tk)
            tl.store(p_decay + o_k, tl.exp(tl.sum(b_sum, axis=0)), mask=o_k < K)

    o_l = tl.arange(0, CHUNK)
    o_apart = (o_l[:, None] ^ o_l[None, :]) // GROUP  # its highest bit says which halving parts two tokens
    # From [groups, key's row as two bits, query's row as two bits] to one row per query, repeated for every group.
    b_in_group = tl.reshape(tl.permute(b_in_group, [0, 3, 4, 1, 2]), [CHUNK, 1, GROUP])
    b_scores = tl.reshape(tl.broadcast_to(b_in_group, [CHUNK, GROUPS, GROUP]), [CHUNK, CHUNK])
    b_scores = tl.where(o_apart >= 1, b_apart_1, b_scores)
    b_scores = tl.where(o_apart >= 2, b_apart_2, b_scores)
    b_scores = tl.where(o_apart >= 4, b_apart_4, b_scores)
    b_scores = tl.where(o_apart >= 8, b_apart_8, b_scores)
    b_scores = tl.where(o_l[:, None] >= o_l[None, :], b_scores, 0.0)
    tl.store(p_scores + o_l[:, None] * CHUNK + o_l[None, :], b_scores, mask=(o_l < left)[:, None])


@triton.jit
def _rows(b_x, GROUPS: tl.constexpr, BK: tl.constexpr):
    """Rows 0 to 3 of all groups, each [GROUPS, BK], of a tile [GROUPS, GROUP, BK]."""
    b_even, b_odd = tl.split(tl.reshape(tl.permute(b_x, [0, 2, 1]), [GROUPS, BK, 2, 2]))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    return b_0, b_1, b_2, b_3


@triton.jit
def _four(b_0, b_1, b_2, b_3):
    """Stack four tensors along two new last dimensions, of 2 each."""
    return tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))


@triton.jit
def _of_other_half(b_x, LEVEL: tl.constexpr, GROUPS: tl.constexpr, BK: tl.constexpr):
    """For each row i of [GROUPS, BK], the row whose number differs from i in bit LEVEL."""
    WIDTH: tl.constexpr = 1 << LEVEL
    b_halves = tl.reshape(b_x, [GROUPS // (2 * WIDTH), 2, WIDTH, BK])
    return tl.reshape(tl.flip(b_halves, 1), [GROUPS, BK])


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
    TRANSPOSED: tl.constexpr,
):
    """Grid: (value tiles, kv heads, spans). Each program walks the chunks of one span."""
    i_v, i_g, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G = tl.num_programs(1)
    H = G * REPEATS
    start = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    length = (tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)
    slot = tl.load(p_slots + i_n).to(tl.int64)
    if (length == 0) & (slot == 0):  # padding of a captured step
        return

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
    p_tile = p_state + slot * stride_slot + i_g * (K * V) + o_sk * V + o_sv
    # A state that starts from zero is not read at all: whatever its slot holds, NaN included, cannot matter.
    b_state = tl.load(p_tile, mask=m_state & continues, other=0.0).to(tl.float32)

    first = _chunk_id(start, i_n, 0, CHUNK)
    p_v += start * stride_vt + i_g * stride_vg
    p_k_decayed += (first * G + i_g) * (CHUNK * K)
    p_q_decayed += (first * H + i_g * REPEATS) * (CHUNK * K)
    p_scores += (first * H + i_g * REPEATS) * (CHUNK * CHUNK)
    p_o += (start * H + i_g * REPEATS) * V
    p_decay += (first * G + i_g) * K
    for left in range(length, 0, -CHUNK):
        m_l = o_l < left
        m_lk = m_l[:, None] & m_k[None, :]
        m_lv = m_l[:, None] & m_v[None, :]
        b_v = tl.load(p_v + o_l[:, None] * stride_vt + o_v[None, :], mask=m_lv, other=0.0)  # [CHUNK, BV]
        if p_v.dtype.element_ty != DOT:
            b_v = b_v.to(tl.float32).to(DOT)
        b_factor = b_state.to(DOT)
        for i_r in tl.static_range(REPEATS):
            p_q_head = p_q_decayed + i_r * (CHUNK * K) + o_l[:, None] * K + o_k[None, :]
            p_scores_head = p_scores + i_r * (CHUNK * CHUNK) + o_l[:, None] * CHUNK + o_l[None, :]
            b_q = tl.load(p_q_head, mask=m_lk, other=0.0)  # [CHUNK, BK]
            b_scores = tl.load(p_scores_head, mask=m_l[:, None], other=0.0)  # [CHUNK, CHUNK]
            if TRANSPOSED:
                b_o = tl.dot(b_factor, tl.trans(b_q), input_precision=_FLOAT32_PRODUCT)
                b_o = tl.dot(tl.trans(b_v), tl.trans(b_scores), acc=b_o, input_precision=_FLOAT32_PRODUCT)
            else:
                b_o = tl.dot(b_q, b_factor, input_precision=_FLOAT32_PRODUCT)
                b_o = tl.dot(b_scores, b_v, acc=b_o, input_precision=_FLOAT32_PRODUCT)
            tl.store(p_o + (o_ol * H + i_r) * V + o_ov, b_o * scale, mask=(o_ol < left) & (o_ov < V))
        b_k = tl.load(p_k_decayed + o_l[:, None] * K + o_k[None, :], mask=m_lk, other=0.0)  # [CHUNK, BK]
        b_decay = tl.load(p_decay + o_k, mask=m_k, other=0.0)
        if TRANSPOSED:
            b_state = tl.dot(tl.trans(b_v), b_k, acc=b_state * b_decay[None, :], input_precision=_FLOAT32_PRODUCT)
        else:
            b_state = tl.dot(tl.trans(b_k), b_v, acc=b_state * b_decay[:, None], input_precision=_FLOAT32_PRODUCT)
        p_v += CHUNK * stride_vt
        p_k_decayed += G * (CHUNK * K)
        p_q_decayed += H * (CHUNK * K)
        p_scores += H * (CHUNK * CHUNK)
        p_o += CHUNK * H * V
        p_decay += G * K
    tl.store(p_tile, b_state, mask=m_state)
