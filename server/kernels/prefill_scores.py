"""What prefill needs of a chunk of tokens and what depends on no state, for all blocks of 16 tokens side by side.

A program takes the queries of one block, and all keys of its chunk that they may see. Between blocks, the decay is
split where the block of the queries starts. Inside the block scores are formed by halving: those between its two halves
by one product, the decay being split where they meet, then those between the halves of each half, down to single
tokens. So no factor ever exceeds 1 and nothing overflows, whatever the gates; a factor that underflows belongs to a
score that vanishes. Inside a block, decays over several tokens are products of the tokens' decays; over whole blocks,
where rounding would add up, exponentials of sums.

A row of channels is a tensor of its own, so that what is multiplied along the tokens stays in a thread; and a warp
forms the products of its own channels, which are summed over the warps once, at the end.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type. Tuples grow,
# and Triton knows no unpacking inside one.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment"
# ruff: noqa: RUF005

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)
"""Tokens whose queries a program takes."""
WARP_CHANNELS = 64
"""Channels of a warp: two per thread."""
FLOAT32_PRODUCT = tl.constexpr("tf32x3")  # on tensor cores, at nearly the precision of float32


@triton.jit
def chunk_id(start, i_n, i_c, CHUNK: tl.constexpr):
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
    stride_qh,
    stride_kg,
    stride_gg,
    STRIDE_QT: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_GT: tl.constexpr,
    HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid: (query heads, fastest, times blocks of the longest span; spans). A chunk is a block or two."""
    tl.static_assert(CHUNK == BLOCK or CHUNK == 2 * BLOCK)
    BLOCKS: tl.constexpr = CHUNK // BLOCK
    G: tl.constexpr = HEADS // REPEATS
    i_h, i_block, i_n = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS, tl.program_id(1)
    i_g = i_h // REPEATS
    start = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    left = (tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32) - i_block * BLOCK
    if left <= 0:
        return
    i_c, i_b = i_block // BLOCKS, i_block % BLOCKS
    i_chunk = chunk_id(start, i_n, i_c, CHUNK)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    row = start + i_block * BLOCK
    p_q += row * STRIDE_QT + i_h * stride_qh + o_k
    p_k += row * STRIDE_KT + i_g * stride_kg + o_k
    p_g += row * STRIDE_GT + i_g * stride_gg + o_k

    # All loads first: the program waits for memory once.
    q = _load_rows(p_q, STRIDE_QT, left, m_k)
    k = _load_rows(p_k, STRIDE_KT, left, m_k)
    g = _load_rows(p_g, STRIDE_GT, left, m_k)
    if BLOCKS == 2:  # the chunk's other block: keys that these queries see, or only what these keys decay by behind it
        to_other = BLOCK - 2 * BLOCK * i_b
        k_other = _load_rows(p_k + to_other * STRIDE_KT, STRIDE_KT, BLOCK * i_b, m_k)
        g_other = _load_rows(p_g + to_other * STRIDE_GT, STRIDE_GT, left - to_other, m_k)

    # Of each row: queries decayed since the start of its group of 1, 2, 4, 8, 16 rows, keys to the group's end.
    b_sum = _sum_rows(g)
    decay = _exp_rows(g)
    b_same = _product(_tile(q, SLICES, DOT), _tile(k, SLICES, DOT))  # scores of each token with itself
    q = _times(q, decay)
    b_scores = _add_between_halves(b_same, q, k, 1, SLICES, DOT)
    q, k, decay = _join_groups(q, k, decay, 1)
    b_scores = _add_between_halves(b_scores, q, k, 2, SLICES, DOT)
    q, k, decay = _join_groups(q, k, decay, 2)
    b_scores = _add_between_halves(b_scores, q, k, 4, SLICES, DOT)
    q, k, decay = _join_groups(q, k, decay, 4)
    b_scores = _add_between_halves(b_scores, q, k, 8, SLICES, DOT)
    q, k, _ = _join_groups(q, k, decay, 8)

    o_i = tl.arange(0, BLOCK)[:, None]
    o_j = tl.arange(0, BLOCK)[None, :]
    m_i = o_i < left
    p_scores += ((i_chunk * HEADS + i_h) * CHUNK + i_b * BLOCK) * CHUNK + o_i * CHUNK + o_j
    b_scores = tl.where(o_i >= o_j, tl.sum(b_scores, axis=0), 0.0)
    tl.store(p_scores + i_b * BLOCK, b_scores, mask=m_i)
    b_before = tl.full([BK], 1.0, dtype=tl.float32)  # decay of what is before this block in its chunk, and behind it
    b_behind = tl.full([BK], 1.0, dtype=tl.float32)
    if BLOCKS == 2:
        b_sum_other = _sum_rows(g_other)
        b_other = tl.exp(b_sum_other)
        if i_b == 1:
            b_before = b_other
            decay = _exp_rows(g_other)
            _, k_other, decay = _join_groups(k_other, k_other, decay, 1)
            _, k_other, decay = _join_groups(k_other, k_other, decay, 2)
            _, k_other, decay = _join_groups(k_other, k_other, decay, 4)
            _, k_other, _ = _join_groups(k_other, k_other, decay, 8)
            b_other_scores = tl.sum(_product(_tile(q, SLICES, DOT), _tile(k_other, SLICES, DOT)), axis=0)
            tl.store(p_scores, b_other_scores, mask=m_i)
        else:
            b_behind = b_other
            b_sum += b_sum_other
            tl.store(p_scores + BLOCK, tl.zeros([BLOCK, BLOCK], dtype=tl.float32), mask=m_i)  # not seen
    _store_rows(p_q_decayed + ((i_chunk * HEADS + i_h) * CHUNK + i_b * BLOCK) * K + o_k, K, left, m_k, q, b_before)
    if i_h % REPEATS == 0:
        _store_rows(p_k_decayed + ((i_chunk * G + i_g) * CHUNK + i_b * BLOCK) * K + o_k, K, left, m_k, k, b_behind)
        if i_b == 0:
            tl.store(p_decay + (i_chunk * G + i_g) * K + o_k, tl.exp(b_sum), mask=m_k)


@triton.jit
def _load_rows(p_x, STRIDE: tl.constexpr, left, m_k):
    """The block's rows, [BK] each, in float32; zero behind the span and its channels."""
    rows = ()
    for i in tl.static_range(BLOCK):
        rows = rows + (tl.load(p_x + i * STRIDE, mask=m_k & (i < left), other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _store_rows(p_x, STRIDE: tl.constexpr, left, m_k, rows, b_factor):
    """Store rows, each times a factor [BK]."""
    for i in tl.static_range(BLOCK):
        tl.store(p_x + i * STRIDE, rows[i] * b_factor, mask=m_k & (i < left))


@triton.jit
def _exp_rows(rows):
    exponentials = ()
    for i in tl.static_range(BLOCK):
        exponentials = exponentials + (tl.exp(rows[i]),)
    return exponentials


@triton.jit
def _sum_rows(rows):
    b_sum = rows[0]
    for i in tl.static_range(1, BLOCK):
        b_sum += rows[i]
    return b_sum


@triton.jit
def _times(rows, factors):
    products = ()
    for i in tl.static_range(BLOCK):
        products = products + (rows[i] * factors[i],)
    return products


@triton.jit
def _halves(q, k, WIDTH: tl.constexpr):
    """Queries where a row is in the later of two neighbouring groups of WIDTH rows, keys where it is in the earlier."""
    rows = ()
    for i in tl.static_range(BLOCK):
        rows = rows + (q[i] if i // WIDTH % 2 == 1 else k[i],)
    return rows


@triton.jit
def _join_groups(q, k, decay, WIDTH: tl.constexpr):
    """Go from groups of WIDTH rows to groups of twice as many.

    Args:
        q: decayed since the start of each row's group.
        k: decayed to its end.
        decay: of each group.
    """
    new_q, new_k, new_decay = (), (), ()
    for i in tl.static_range(BLOCK):
        if i // WIDTH % 2 == 1:
            new_q = new_q + (q[i] * decay[i // WIDTH - 1],)
            new_k = new_k + (k[i],)
        else:
            new_q = new_q + (q[i],)
            new_k = new_k + (k[i] * decay[i // WIDTH + 1],)
    for i in tl.static_range(BLOCK // (2 * WIDTH)):
        new_decay = new_decay + (decay[2 * i] * decay[2 * i + 1],)
    return new_q, new_k, new_decay


@triton.jit
def _tile(rows, SLICES: tl.constexpr, DOT: tl.constexpr):
    """[slices, channels of a slice, BLOCK]: as many columns as there are rows."""
    for i_level in tl.static_range(4):
        joined = ()
        for i in tl.static_range(BLOCK >> (i_level + 1)):
            # Rows whose numbers differ in their highest bit first: that is the first of the new dimensions.
            joined = joined + (tl.join(rows[i], rows[i + (BLOCK >> (i_level + 1))]),)
        rows = joined
    return tl.reshape(rows[0], [SLICES, rows[0].shape[0] // SLICES, BLOCK]).to(DOT)


@triton.jit
def _product(b_q, b_k):
    """Products of two tiles by slices, [slices, BLOCK, BLOCK]."""
    return tl.dot(tl.permute(b_q, [0, 2, 1]), b_k, input_precision=FLOAT32_PRODUCT)


@triton.jit
def _add_between_halves(b_scores, q, k, WIDTH: tl.constexpr, SLICES: tl.constexpr, DOT: tl.constexpr):
    """Put into scores those between tokens of two neighbouring groups of WIDTH."""
    b_rows = _tile(_halves(q, k, WIDTH), SLICES, DOT)
    o_i = tl.arange(0, BLOCK)
    m_apart = (o_i[:, None] ^ o_i[None, :]) >= WIDTH  # what is farther apart is replaced later
    return tl.where(m_apart[None, :, :], _product(b_rows, b_rows), b_scores)
