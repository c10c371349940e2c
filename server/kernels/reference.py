"""Gated linear attention in plain PyTorch: the specification, and the backend for CPU tensors.

A prompt is computed in chunks of 64 tokens, by matrix products. Within a chunk, with G the cumulative sum of the gates
and S the state at the chunk's start,

    o_i = scale * ((q_i * exp(G_i))^T S + sum over j <= i of A_ij v_j)        A_ij = sum_k q_ik k_jk exp(G_ik - G_jk)
    S'  = diag(exp(G_end)) S + sum_j (k_j * exp(G_end - G_j)) v_j^T

Trained gates are strong: exp(G_i) and exp(-G_j), taken apart, underflow and overflow within a chunk. So a chunk is cut
into blocks of 16 tokens. Between two blocks, the decay is split at the end of the earlier and at the start of the later
one: the query's part, the key's part and that of whole blocks in between are all <= 1, so a part that underflows
belongs to a product that vanishes. Inside a block the decay is split at the block's middle where every exponent stays
under 80, as it nearly always does, and formed for every pair of tokens otherwise; which one depends on the gates of
that block alone. Exponents are sums over the very tokens between two positions, never differences of long cumulative
sums, whose rounding would show in exp.

float32 states are updated in place in the pool, without being gathered or scattered.
"""

import math
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels.packed import PackedMatrix
from server.kernels.state import LayerState, RingRows

CHUNK = 64
BLOCK = 16
_MIDDLE = BLOCK // 2 - 1
_MAX_EXPONENT = 80.0
"""Of a factor inside a block. exp(80) = 5.5e34 leaves room for the factor it multiplies; exp overflows at 88.7."""


def log_decay(
    low_rank_TR: Tensor, weight_DR: Tensor, bias_D: Tensor, *, normalizer: float, clamp_min: float | None
) -> Tensor:
    """Log decays from the gate's inner projection; see :func:`server.kernels.log_decay`."""
    g_TD: Tensor = F.logsigmoid(F.linear(low_rank_TR.float(), weight_DR, bias_D)).mul_(1 / normalizer)
    return g_TD if clamp_min is None else g_TD.clamp_min_(clamp_min)


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """RMSNorm of every row [T, D] with the norm's weight [D], the mean square in float32; [T, D] of x's dtype."""
    return _normalize(x_TD, weight_D, eps)


def norm_gate(o_THV: Tensor, weight_V: Tensor | None, gate_TE: Tensor | None, *, eps: float) -> Tensor:
    """RMSNorm per head, times swish of the output gate; see :func:`server.kernels.norm_gate`."""
    o_TE = _normalize(o_THV, weight_V, eps).flatten(1)
    return o_TE if gate_TE is None else F.silu(gate_TE).mul_(o_TE)


def _normalize(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in float32, contiguous. With few rows its cost is the number of operations:
    these are half as many as PyTorch's own rms_norm makes on the CPU."""
    size = x.shape[-1]
    x_float = x.float()
    weighted = x_float if weight_D is None else x_float * weight_D.float()
    root = torch.linalg.vector_norm(x_float, dim=-1, keepdim=True)
    root.hypot_(_constant(math.sqrt(size * eps)))  # the root of size * (mean square + eps)
    return torch.addcdiv(_constant(0.0), weighted, root, value=math.sqrt(size)).to(x.dtype)


@cache
def _constant(value: float) -> Tensor:
    return torch.tensor(value)


def swiglu(gate_up_TJ: Tensor) -> Tensor:
    """The gated MLP's activation, swish(gate) * up, of both side by side [T, 2 * I]; [T, I]."""
    gate_TI, up_TI = gate_up_TJ.chunk(2, dim=1)
    return F.silu(gate_TI).mul_(up_TI)


def gla_decode(
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGV: Tensor,
    g_NGK: Tensor,
    state: LayerState,
    slots_N: Tensor,
    from_zero_N: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Absorb one token per row into states that are whole; see :func:`server.kernels.gla_decode`.

    Rows are taken in runs whose slots are consecutive: a run is a view of the pool, updated in place. Rows in another
    order are sorted by slot first, which moves vectors, not states.
    """
    slots = slots_N.tolist()
    if slots != sorted(slots):
        order = slots_N.argsort(stable=True)
        q_sorted, k_sorted, v_sorted, g_sorted = (x.index_select(0, order) for x in (q_NHK, k_NGK, v_NGV, g_NGK))
        o_sorted = gla_decode(
            q_sorted, k_sorted, v_sorted, g_sorted, state, slots_N[order], from_zero_N[order], scale=scale
        )
        return torch.empty_like(o_sorted).index_copy_(0, order, o_sorted)

    rows, heads, head_k = q_NHK.shape
    kv_heads, head_v = v_NGV.shape[1:]
    state_SGKV = state.values_SGKV
    if True in from_zero_N.tolist():
        state_SGKV.index_fill_(0, slots_N[from_zero_N], 0.0)
    q_NGRK = q_NHK.float().reshape(rows, kv_heads, heads // kv_heads, head_k)
    o_NGRV = q_NGRK.new_empty((rows, kv_heads, heads // kv_heads, head_v))
    columns = (q_NGRK, k_NGK.float().unsqueeze(-1), v_NGV.float().unsqueeze(-2), g_NGK.exp().unsqueeze(-1), o_NGRV)
    firsts, lengths = _runs(slots)
    parts = [columns] if len(firsts) == 1 else zip(*(column.split(lengths) for column in columns), strict=True)
    for first, length, (q, k, v, decay, o) in zip(firsts, lengths, parts, strict=True):
        state_NGKV = state_SGKV[first : first + length].mul_(decay).addcmul_(k, v)
        o.flatten(0, 1).baddbmm_(q.flatten(0, 1), state_NGKV.flatten(0, 1), beta=0, alpha=scale)
    return o_NGRV.view(rows, heads, head_v).to(v_NGV.dtype)


def gla_decode_buffered(
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGV: Tensor,
    g_NGK: Tensor,
    state: LayerState,
    slots_N: Tensor,
    from_zero_N: Tensor,
    rows: RingRows,
    *,
    scale: float,
) -> Tensor:
    """Absorb one token per row into its ring; see :func:`server.kernels.gla_decode` and, for the formulas,
    :mod:`server.kernels.buffered`. The states are formed with every token, but kept only where a ring folds."""
    ring = state.ring
    assert ring is not None and rows.num_folding is not None
    num_rows, heads, head_k = q_NHK.shape
    kv_heads, head_v = v_NGV.shape[1:]
    row_N = torch.arange(num_rows, device=q_NHK.device)
    pending_N = rows.pending_N.masked_fill(from_zero_N, 0)
    decays_NGCK = ring.decays_SGCK[slots_N]
    before_NGK = decays_NGCK[row_N, :, (pending_N - 1).clamp_min(0)]
    total_NGK = torch.where((pending_N > 0)[:, None, None], before_NGK, 0.0) + g_NGK
    ring.keys_SGCK[slots_N, :, pending_N] = k_NGK
    ring.values_SGCV[slots_N, :, pending_N] = v_NGV
    ring.decays_SGCK[slots_N, :, pending_N] = total_NGK

    # By selection: entries that are not in the ring may hold NaN.
    waits_NGC1 = (torch.arange(ring.size, device=q_NHK.device) <= pending_N.unsqueeze(1))[:, None, :, None]
    since_NGCK = (total_NGK.unsqueeze(2) - ring.decays_SGCK[slots_N]).exp()
    keys_NGCK = torch.where(waits_NGC1, ring.keys_SGCK[slots_N].float() * since_NGCK, 0.0)
    values_NGCV = torch.where(waits_NGC1, ring.values_SGCV[slots_N].float(), 0.0)
    states_NGKV = state.load(slots_N).masked_fill_(from_zero_N[:, None, None, None], 0.0)
    states_NGKV.mul_(total_NGK.exp().unsqueeze(-1)).add_(keys_NGCK.transpose(2, 3) @ values_NGCV)
    folding = slice(int(rows.num_folding))
    state.store(slots_N[folding], states_NGKV[folding].clone())
    q_NGRK = q_NHK.float().view(num_rows, kv_heads, heads // kv_heads, head_k)
    return ((q_NGRK * scale) @ states_NGKV).view(num_rows, heads, head_v).to(v_NGV.dtype)


def _runs(slots: list[int]) -> tuple[list[int], list[int]]:
    """Cut ascending slots into the longest runs of consecutive ones: the first of each, and their lengths."""
    starts = [row for row, slot in enumerate(slots) if row == 0 or slot != slots[row - 1] + 1]
    return [slots[start] for start in starts], [stop - start for start, stop in pairwise([*starts, len(slots)])]


def gla_prefill(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    g_TGK: Tensor,
    state: LayerState,
    slots_N: Tensor,
    from_zero_N: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    max_length: int,
) -> Tensor:
    """Absorb packed spans into float32 states that are whole; see :func:`server.kernels.gla_prefill`.

    What happens inside the chunks is computed for all chunks of all spans at once. Then the chunks are walked in order:
    each adds what its queries read from the state before it, and leaves its own state behind.
    """
    tokens, heads, _ = q_THK.shape
    kv_heads, head_v = v_TGV.shape[1:]
    state_SGKV = state.values_SGKV
    if True in from_zero_N.tolist():
        state_SGKV.index_fill_(0, slots_N[from_zero_N], 0.0)
    if tokens == 0:
        return v_TGV.new_empty((0, heads, head_v))

    bounds = cu_seqlens.tolist()
    if bounds[-1] < tokens:
        o_THV = v_TGV.new_full((tokens, heads, head_v), torch.nan)  # of padding, nobody may use anything
        q_THK, k_TGK, v_TGV, g_TGK = (x[: bounds[-1]] for x in (q_THK, k_TGK, v_TGV, g_TGK))
        o_THV[: bounds[-1]] = gla_prefill(
            *(q_THK, k_TGK, v_TGV, g_TGK, state, slots_N, from_zero_N, cu_seqlens),
            scale=scale,
            max_length=max_length,
        )
        return o_THV
    chunk = BLOCK if max_length <= BLOCK else CHUNK
    spans = list(pairwise(bounds))
    chunk_slots = [s for s, span in zip(slots_N.tolist(), spans, strict=True) for _ in range(*span, chunk)]
    rows_T = _padded_rows(spans, chunk)
    q_CGBRIK, k_CGBRIK, v_CGBRIV, g_CGBRIK = (
        _to_blocks(x, rows_T, len(chunk_slots), chunk, kv_heads) for x in (q_THK, k_TGK, v_TGV, g_TGK)
    )
    k_CGBIK, v_CGLV, g_CGBIK = k_CGBRIK.squeeze(3), v_CGBRIV.flatten(2, 4), g_CGBRIK.squeeze(3)

    since_start, to_end, from_middle = _sums_in_blocks(g_CGBIK)
    total_CGBK = since_start[..., -1, :]
    q_start = q_CGBRIK * since_start.exp().unsqueeze(3)  # each query decayed since its block's start
    k_end = k_CGBIK * to_end.exp()  # each key decayed to its block's end
    scores = _scores_between_blocks(q_start, k_end, total_CGBK)
    diagonal = _scores_in_blocks(q_CGBRIK, k_CGBIK, g_CGBIK, from_middle)
    for block in range(chunk // BLOCK):
        scores[:, :, block, :, :, block * BLOCK : (block + 1) * BLOCK] = diagonal[:, :, block]

    lower_BB = q_start.new_ones((chunk // BLOCK, chunk // BLOCK)).tril(-1)
    before_CGBK, after_CGBK = lower_BB @ total_CGBK, lower_BB.mT @ total_CGBK
    o_CGXV = scores.flatten(2, 4) @ v_CGLV  # X: [B, R, I] flattened, the queries that share a state
    q_CGXK = (q_start * before_CGBK.exp()[:, :, :, None, None]).flatten(2, 4)
    k_CGKL = (k_end * after_CGBK.exp().unsqueeze(3)).flatten(2, 3).mT
    decay_CGK1 = total_CGBK.sum(2).exp().unsqueeze(-1)
    for slot, *chunk_parts in zip(chunk_slots, o_CGXV, q_CGXK, k_CGKL, v_CGLV, decay_CGK1, strict=True):
        o_GXV, q_GXK, k_GKL, v_GLV, decay_GK1 = chunk_parts
        state_GKV = state_SGKV[slot]
        o_GXV.baddbmm_(q_GXK, state_GKV, beta=scale, alpha=scale)
        state_GKV.mul_(decay_GK1).baddbmm_(k_GKL, v_GLV)

    o_CBIGRV = o_CGXV.view(*q_CGBRIK.shape[:5], head_v).permute(0, 2, 4, 1, 3, 5)
    o_padded = o_CBIGRV.reshape(-1, heads, head_v)
    o_THV = o_padded if rows_T is None else o_padded.index_select(0, rows_T)
    return o_THV.to(v_TGV.dtype)


def _padded_rows(spans: list[tuple[int, int]], chunk: int) -> Tensor | None:
    """Where each token goes if every span is padded to whole chunks: int64 [T], or None if no span needs padding."""
    if all((stop - start) % chunk == 0 for start, stop in spans):
        return None
    rows, first = [], 0
    for start, stop in spans:
        rows.append(torch.arange(first, first + stop - start))
        first += len(range(start, stop, chunk)) * chunk
    return torch.cat(rows)


def _to_blocks(x_TDE: Tensor, rows_T: Tensor | None, chunks: int, chunk: int, kv_heads: int) -> Tensor:
    """Lay packed rows out as contiguous float32 [C, G, B, R, I, E]: chunks, kv heads, blocks of a chunk, heads of x per
    kv head, tokens of a block, channels. Rows of padding are zero."""
    if rows_T is None:
        x_PDE = x_TDE
    else:
        x_PDE = x_TDE.new_zeros((chunks * chunk, *x_TDE.shape[1:])).index_copy_(0, rows_T, x_TDE)
    x_CBIGRE = x_PDE.reshape(chunks, chunk // BLOCK, BLOCK, kv_heads, -1, x_PDE.shape[2])
    return x_CBIGRE.permute(0, 3, 1, 4, 2, 5).float().contiguous()


def _sums_in_blocks(g_CGBIK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the gates inside each block, for each of its tokens; three times [C, G, B, I, K].

    From the block's start to the token, the token's gate included; from behind the token to the block's end; from the
    block's middle to the token (negative sums, positive before the middle).
    """
    ones_II = g_CGBIK.new_ones((BLOCK, BLOCK))
    since_start, to_end = ones_II.tril(), ones_II.triu(1)
    from_middle = torch.zeros_like(ones_II)
    from_middle[_MIDDLE + 1 :, _MIDDLE + 1 :] = since_start[_MIDDLE + 1 :, _MIDDLE + 1 :]
    from_middle[: _MIDDLE + 1, : _MIDDLE + 1] = -to_end[: _MIDDLE + 1, : _MIDDLE + 1]
    sums = torch.cat((since_start, to_end, from_middle)) @ g_CGBIK
    return sums[..., :BLOCK, :], sums[..., BLOCK : 2 * BLOCK, :], sums[..., 2 * BLOCK :, :]


def _scores_between_blocks(q_start: Tensor, k_end: Tensor, total_CGBK: Tensor) -> Tensor:
    """Scores A [C, G, B, R, I, L] of every query with the keys of earlier blocks; zero elsewhere."""
    chunks, kv_heads, blocks, repeats, _, _ = q_start.shape
    scores = q_start.new_zeros((chunks, kv_heads, blocks, repeats, BLOCK, blocks * BLOCK))
    for block in range(1, blocks):
        upper = q_start.new_ones((block, block)).triu(1)
        between = (upper @ total_CGBK[:, :, :block]).exp()  # decay from each earlier block's end to this block's start
        k_CGJK = (k_end[:, :, :block] * between.unsqueeze(3)).flatten(2, 3)
        products = q_start[:, :, block].flatten(2, 3) @ k_CGJK.mT
        scores[:, :, block, :, :, : block * BLOCK] = products.view(chunks, kv_heads, repeats, BLOCK, -1)
    return scores


def _scores_in_blocks(q_CGBRIK: Tensor, k_CGBIK: Tensor, g_CGBIK: Tensor, from_middle: Tensor) -> Tensor:
    """Scores A [C, G, B, R, I, J] of every query with the keys of its own block, up to its own token; zero above."""
    chunks, kv_heads, blocks, repeats, _, _ = q_CGBRIK.shape
    q_middle = (q_CGBRIK * from_middle.exp().unsqueeze(3)).flatten(3, 4)
    k_middle = k_CGBIK * from_middle.neg().exp()
    scores = (q_middle @ k_middle.mT).view(chunks, kv_heads, blocks, repeats, BLOCK, BLOCK)
    strong = from_middle.abs().amax((-2, -1)) > _MAX_EXPONENT  # [C, G, B]
    if strong.any():
        scores[strong] = _scores_of_pairs(q_CGBRIK[strong], k_CGBIK[strong], g_CGBIK[strong])
    causal = torch.ones((BLOCK, BLOCK), dtype=torch.bool).tril()
    # By selection: above the diagonal stand exponents > 0, hence perhaps infinities.
    return scores.masked_fill_(~causal, 0.0)


def _scores_of_pairs(q_XRIK: Tensor, k_XIK: Tensor, g_XIK: Tensor) -> Tensor:
    """Scores [X, R, I, J] of X blocks whatever their gates, the decay being formed for every pair of tokens."""
    token = torch.arange(BLOCK)
    passed_IJL = (token[None, :, None] < token) & (token <= token[:, None, None])  # from token j to i: j < l <= i
    scores = []
    for q, k, g in zip(q_XRIK.split(8), k_XIK.split(8), g_XIK.split(8), strict=True):  # few at a time: decays are large
        k_XIJK = (passed_IJL.to(g.dtype) @ g.unsqueeze(1)).exp_() * k.unsqueeze(1)
        scores.append((q.transpose(1, 2) @ k_XIJK.mT).transpose(1, 2))
    return torch.cat(scores)


def norm_linear(
    x_TD: Tensor,
    norm_D: Tensor,
    weight_ND: Tensor | PackedMatrix,
    out_RN: Tensor,
    *,
    eps: float,
    addends_STD: Tensor | None = None,
    rows_R: Tensor | None = None,
) -> None:
    """See :func:`server.kernels.norm_linear`."""
    if rows_R is not None:
        x_TD = x_TD.index_select(0, rows_R)
        addends_STD = None if addends_STD is None else addends_STD.index_select(1, rows_R)
    _add_(x_TD, addends_STD)
    h_RD = rms_norm(x_TD, norm_D, eps=eps)
    if isinstance(weight_ND, Tensor) and out_RN.dtype == h_RD.dtype:
        torch.mm(h_RD, weight_ND.t(), out=out_RN)
    else:
        out_RN.copy_(_multiply(h_RD, weight_ND))


def norm_swiglu(
    x_TD: Tensor,
    norm_D: Tensor,
    weight_JD: Tensor | PackedMatrix,
    *,
    eps: float,
    addends_STD: Tensor | None = None,
) -> Tensor:
    """See :func:`server.kernels.norm_swiglu`."""
    _add_(x_TD, addends_STD)
    return swiglu(_multiply(rms_norm(x_TD, norm_D, eps=eps), weight_JD))


def linear_add_(x_TN: Tensor, o_TK: Tensor, weight_NK: Tensor | PackedMatrix) -> None:
    """See :func:`server.kernels.linear_add_`; here, nothing is left to be added."""
    if isinstance(weight_NK, Tensor):
        x_TN.addmm_(o_TK, weight_NK.t())
    else:
        x_TN.add_(weight_NK.multiply(o_TK))


def _add_(x_TD: Tensor, addends_STD: Tensor | None) -> None:
    if addends_STD is not None:
        x_TD.copy_(x_TD.float() + addends_STD.sum(0))


def _multiply(x_TD: Tensor, weight_ND: Tensor | PackedMatrix) -> Tensor:
    return F.linear(x_TD, weight_ND) if isinstance(weight_ND, Tensor) else weight_ND.multiply(x_TD)


def pick_greedy(
    logits_RV: Tensor, slots_R: Tensor, flags_SV: Tensor, last_token_S: Tensor, done_S: Tensor, *, stop_flag: int
) -> Tensor:
    """See :func:`server.kernels.pick_greedy`."""
    top_R, tokens_R = logits_RV.max(-1)
    last_token_S[slots_R] = tokens_R
    done_S[slots_R] = (flags_SV[slots_R, tokens_R] & stop_flag) != 0
    return tokens_R.masked_fill(~top_R.isfinite(), -1)
