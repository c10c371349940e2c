"""What prefill needs of a chunk of tokens and what depends on no state, for all blocks of 16 tokens side by side.

A program takes the queries of one block, and all keys of its chunk that they may see. Between blocks, the decay is
split where the block of the queries starts. Inside the block scores are formed by halving: those between its two halves
with the decay being split where they meet, then those between the halves of each half, down to single tokens; two such
levels share a product of matrices. So no factor ever exceeds 1 and nothing overflows, whatever the gates; a factor that
underflows belongs to a score that vanishes. Inside a block, decays over several tokens are products of the tokens'
decays; over whole blocks, where rounding would add up, exponentials of sums.

A row of channels is a tensor of its own, so that what is multiplied along the tokens stays in a thread; and a warp
forms the products of its own channels, which are summed over the warps once, at the end.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type. Tuples grow,
# and Triton knows no unpacking inside one.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment"
# ruff: noqa: RUF005

import triton
import triton.language as tl

from server.kernels.shapes import FLOAT32_PRODUCT

BLOCK = tl.constexpr(16)
"""Tokens whose queries a program takes."""
WARP_CHANNELS = 64
"""Channels of a warp: two per thread."""


@triton.jit
def chunk_id(start, i_n, i_c, chunk):
    """A number for chunk i_c of span i_n, which starts at this packed row: unique, at most T // chunk + N - 1."""
    return start // chunk + i_n + i_c


@triton.jit
def span_of_chunk(p_cu_seqlens, spans, i_chunk, chunk):
    """The span whose chunks' numbers, see chunk_id, this one is among; it may be behind the span's last."""
    i_n, i_last = 0, spans - 1
    while i_n < i_last:
        i_middle = (i_n + i_last + 1) // 2
        begins_before = chunk_id(tl.load(p_cu_seqlens + i_middle), i_middle, 0, chunk) <= i_chunk
        i_n = tl.where(begins_before, i_middle, i_n)
        i_last = tl.where(begins_before, i_last, i_middle - 1)
    return i_n


# Spans are few in one step and many in the next: one variant for all, or serving would compile.
@triton.jit(do_not_specialize=["spans"])
def prepare_kernel(
    p_q,
    p_k,
    p_g,
    p_scores,
    p_q_decayed,
    p_k_decayed,
    p_decay,
    p_cu_seqlens,
    spans,
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
    """Grid: (query heads, fastest, times blocks of all chunks, as chunk_id numbers them). A chunk is a block or two."""
    tl.static_assert(CHUNK == BLOCK or CHUNK == 2 * BLOCK)
    BLOCKS: tl.constexpr = CHUNK // BLOCK
    G: tl.constexpr = HEADS // REPEATS
    i_h = tl.program_id(0) % HEADS
    i_chunk, i_b = tl.program_id(0) // (HEADS * BLOCKS), tl.program_id(0) // HEADS % BLOCKS
    i_g = i_h // REPEATS
    i_n = span_of_chunk(p_cu_seqlens, spans, i_chunk, CHUNK)
    start = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    i_block = (i_chunk - chunk_id(start, i_n, 0, CHUNK)) * BLOCKS + i_b  # of the span
    left = (tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - start - i_block * BLOCK).to(tl.int32)
    if left <= 0:
        return
    i_chunk = i_chunk.to(tl.int64)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    row = start + i_block * BLOCK
    p_q += row * STRIDE_QT + i_h * stride_qh + o_k
    p_k += row * STRIDE_KT + i_g * stride_kg + o_k
    p_g += row * STRIDE_GT + i_g * stride_gg + o_k

    # All loads first: the program waits for memory once.
    q = _load_rows(p_q, STRIDE_QT, left, m_k)
    k = _load_rows(p_k, STRIDE_KT, left, m_k)
    g = _load_decays(p_g, STRIDE_GT, left, m_k)
    if BLOCKS == 2:  # the chunk's other block: keys that these queries see, or only what these keys decay by behind it
        to_other = BLOCK - 2 * BLOCK * i_b
        k_other = _load_rows(p_k + to_other * STRIDE_KT, STRIDE_KT, BLOCK, m_k & (i_b == 1))
        g_other = _load_decays(p_g + to_other * STRIDE_GT, STRIDE_GT, left - to_other, m_k)

    # Of each row: queries decayed since the start of its group of 1, 2, 4, 8, 16 rows, keys to the group's end.
    b_sum = _sum_rows(g)
    decay = _exp_rows(g)
    b_same = _product(_tile(q, SLICES, DOT), _tile(_flip_rows(k, 4), SLICES, DOT))  # of each token with itself
    q = _times(q, decay)
    q_1, k_1 = _later(q, 1), _earlier(k, 1)
    q, k, decay = _join_groups(q, k, decay, 1)
    b_near = _product(_tile(q_1 + _later(q, 2), SLICES, DOT), _tile(k_1 + _earlier(k, 2), SLICES, DOT))
    q, k, decay = _join_groups(q, k, decay, 2)
    q_4, k_4 = _later(q, 4), _earlier(k, 4)
    q, k, decay = _join_groups(q, k, decay, 4)
    b_far = _product(_tile(q_4 + _later(q, 8), SLICES, DOT), _tile(_earlier(k, 8) + k_4, SLICES, DOT))
    q, k, _ = _join_groups(q, k, decay, 8)

    o_i = tl.arange(0, BLOCK)[:, None]
    o_j = tl.arange(0, BLOCK)[None, :]
    p_scores += ((i_chunk * HEADS + i_h) * CHUNK + i_b * BLOCK) * CHUNK
    p_own_scores = p_scores + i_b * BLOCK
    # What is wanted of the three products lies in different places. One sum over the slices, then, for all of them:
    # in quarters of 8 x 8, whose rows are the later groups' of 1, 4, 8 and 2 tokens, and columns the earlier groups'.
    b_scores = tl.where((o_i // 8 == o_j // 8)[None, :, :], b_near, b_far)
    m_same = (o_i ^ o_j) == 4
    b_scores = tl.sum(tl.where(m_same[None, :, :], b_same, b_scores), axis=0)
    width = tl.where(o_i // 8 == o_j // 8, 1, 4) << (o_i // 8)
    o_a, o_b = o_i % 8, o_j % 8
    token_i = tl.where(m_same, o_i, 2 * o_a - (o_a & (width - 1)) + width)
    token_j = tl.where(m_same, o_i, 2 * o_b - (o_b & (width - 1)))
    m_scores = m_same | ((o_a ^ o_b) < width)
    tl.store(p_own_scores + token_i * CHUNK + token_j, b_scores, mask=m_scores)
    p_scores += o_i * CHUNK + o_j
    tl.store(p_scores + i_b * BLOCK, tl.zeros([BLOCK, BLOCK], dtype=tl.float32), mask=o_i < o_j)  # not seen
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
            tl.store(p_scores, b_other_scores)
        else:
            b_behind = b_other
            b_sum += b_sum_other
            tl.store(p_scores + BLOCK, tl.zeros([BLOCK, BLOCK], dtype=tl.float32))  # not seen
    _store_rows(p_q_decayed + ((i_chunk * HEADS + i_h) * CHUNK + i_b * BLOCK) * K + o_k, K, m_k, q, b_before)
    if i_h % REPEATS == 0:
        _store_rows(p_k_decayed + ((i_chunk * G + i_g) * CHUNK + i_b * BLOCK) * K + o_k, K, m_k, k, b_behind)
        if i_b == 0:
            b_decay = tl.exp(b_sum)
            if p_q.dtype.element_ty == tl.float32:
                b_decay = exact_decay(b_decay, _lost(b_sum))
            tl.store(p_decay + (i_chunk * G + i_g) * K + o_k, b_decay, mask=m_k)


@triton.jit
def exact_decay(b_decay, b_lost):
    """How decays over many tokens are kept for inputs of float32: what is lost, if that is little, or minus the decay.

    A decay next to 1 rounds to the same float32 again and again, which adds up over thousands of tokens.
    """
    return tl.where(b_lost < 0.25, b_lost, -tl.maximum(b_decay, 1e-37, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _lost(b_g):
    """1 - exp(g) where that is below 0.25, by its series; anything above elsewhere."""
    b_x = tl.maximum(b_g, -0.5)
    b_series = 1 + b_x / 4 * (1 + b_x / 5 * (1 + b_x / 6 * (1 + b_x / 7 * (1 + b_x / 8))))
    return -b_x * (1 + b_x / 2 * (1 + b_x / 3 * b_series))


@triton.jit
def _load_rows(p_x, STRIDE: tl.constexpr, left, m_k):
    """The block's rows, [BK] each, in float32. What is behind the span repeats its last: nothing there is ever read."""
    rows = ()
    for i in tl.static_range(BLOCK):
        rows = rows + (tl.load(p_x + tl.minimum(i, left - 1) * STRIDE, mask=m_k, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _load_decays(p_g, STRIDE: tl.constexpr, left, m_k):
    """As :func:`_load_rows`, but nothing decays behind the span."""
    rows = ()
    for i in tl.static_range(BLOCK):
        rows = rows + (tl.load(p_g + i * STRIDE, mask=m_k & (i < left), other=0.0),)
    return rows


@triton.jit
def _store_rows(p_x, STRIDE: tl.constexpr, m_k, rows, b_factor):
    """Store rows, each times a factor [BK]."""
    for i in tl.static_range(BLOCK):
        tl.store(p_x + i * STRIDE, rows[i] * b_factor, mask=m_k)


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
def _later(rows, WIDTH: tl.constexpr):
    """The eight rows that are in the later of two neighbouring groups of WIDTH."""
    chosen = ()
    for i in tl.static_range(BLOCK):
        if i // WIDTH % 2 == 1:
            chosen = chosen + (rows[i],)
    return chosen


@triton.jit
def _earlier(rows, WIDTH: tl.constexpr):
    chosen = ()
    for i in tl.static_range(BLOCK):
        if i // WIDTH % 2 == 0:
            chosen = chosen + (rows[i],)
    return chosen


@triton.jit
def _flip_rows(rows, BIT: tl.constexpr):
    """Each row in the place of the one whose number differs in this bit."""
    flipped = ()
    for i in tl.static_range(BLOCK):
        flipped = flipped + (rows[i ^ BIT],)
    return flipped


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
