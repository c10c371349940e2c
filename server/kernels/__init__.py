"""Gated linear attention as two operations, and the small ones around it; the only door to the kernels.

For every token t of a span and every kv head, with S of shape [head_k, head_v]::

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

The states live in a pool and are read and updated in place, by slot. H query heads share G kv heads: query head h
reads the state of kv head ``h // (H // G)``, and a state is never repeated for the heads that share it.

CPU tensors are computed by :mod:`server.kernels.reference`, CUDA tensors by Triton kernels in modules that are imported
at their first use.

Letters in names and comments: T packed tokens, N spans or rows, S slots of the pool, H query heads, G kv heads,
K channels of a key (head_k), V channels of a value (head_v), D = G * K, E = H * V, I inner channels of the MLP,
R rank of the gate, or rows whose logits are wanted.
"""

from types import ModuleType

import torch
from torch import Tensor

from server.kernels import reference
from server.kernels.packed import PackedMatrix
from server.kernels.state import (
    SPLIT,
    STATE_DTYPES,
    LayerState,
    LowRankGate,
    Ring,
    RingRows,
    held_shape,
    is_split_finite,
    ring_size,
    state_itemsize,
)

__all__ = [
    "SPLIT",
    "STATE_DTYPES",
    "LayerState",
    "LowRankGate",
    "PackedMatrix",
    "Ring",
    "RingRows",
    "folds_every_token",
    "gla_decode",
    "gla_prefill",
    "held_shape",
    "is_split_finite",
    "join_folds",
    "linear_add_",
    "log_decay",
    "norm_gate",
    "norm_linear",
    "norm_swiglu",
    "pick_greedy",
    "ring_size",
    "state_itemsize",
]

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gla_prefill(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    gate: Tensor | LowRankGate,
    state: LayerState,
    slots_N: Tensor,
    from_zero_N: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    max_length: int,
) -> Tensor:
    """Absorb N packed spans of tokens, each into its own state, and return what every token reads.

    Span n is the rows ``cu_seqlens[n]:cu_seqlens[n + 1]``; it may be empty. It continues from the state in slot
    ``slots_N[n]``, or from zero where ``from_zero_N[n]``: then nothing depends on what the slot held before, NaN
    included. Its final state is written to that slot.

    A span that the Triton kernels walk whole gives the same bits in any batch, and cut at multiples of 64 tokens, if
    states are float32; others are rounded where a span ends. Where there are too few tokens to keep the device busy
    otherwise, long spans are walked in segments side by side (:func:`server.kernels.prefill.plan_segments`): the batch
    and the cuts then decide about the order of float32 sums.

    Args:
        q_THK: queries [T, H, K], float32, bfloat16 or float16. It and the next three may be strided views, with a
            contiguous last dimension.
        k_TGK: keys [T, G, K], of q's dtype.
        v_TGV: values [T, G, V], of q's dtype.
        gate: natural logarithms of the decay [T, G, K], float32, all <= 0; or what they are computed from.
        state: one layer of the pool. Updated in place; its rings must be empty. States held in float32 (split ones on
            CUDA only) are computed on where they lie, others in a float32 copy of the N states.
        slots_N: int64 [N]. Slot 0 may occur several times, and then holds anything; any other slot at most once.
        from_zero_N: bool [N].
        cu_seqlens: int32 [N + 1], ascending from 0 to at most T. Rows behind the last span are padding.
        scale: factor of the output.
        max_length: at least the length of the longest span.

    Returns:
        [T, H, V] of v's dtype, contiguous; rows of padding hold anything.

    Raises:
        ValueError: a shape, dtype, device or stride is not as above; the message names the argument.
            The contents of slots_N and cu_seqlens are not checked.
    """
    _check(q_THK, k_TGK, v_TGV, gate, state, slots_N, from_zero_N)
    _check_tensor("cu_seqlens", cu_seqlens, (slots_N.shape[0] + 1,), (torch.int32,), q_THK.device)
    if max_length < 0:
        raise ValueError(f"max_length: must not be negative, is {max_length}")
    computed, places_N = state, slots_N
    # The reference does not know of split states.
    copied = not (state.is_exact if q_THK.is_cuda else state.values_SGKV.dtype == torch.float32)
    if copied:
        states_SGKV, places_N = _load_copy(state, slots_N)
        computed = LayerState(states_SGKV)
    backend: ModuleType = reference
    if q_THK.is_cuda:
        from server.kernels import prefill

        backend = prefill
    o_THV: Tensor = backend.gla_prefill(
        *(q_THK, k_TGK, v_TGV, _log_decays(gate, k_TGK), computed, places_N, from_zero_N, cu_seqlens),
        scale=scale,
        max_length=max_length,
    )
    if copied:
        _store_copy(state, slots_N, computed.values_SGKV, places_N)
    return o_THV


def _load_copy(state: LayerState, slots_N: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 copy of some slots' states, and the place of each slot in it."""
    if not slots_N.is_cuda:
        return state.load(slots_N), torch.arange(len(slots_N))
    from server.kernels import copies

    return copies.load(state, slots_N)


def _store_copy(state: LayerState, slots_N: Tensor, states_MGKV: Tensor, places_N: Tensor) -> None:
    """Round such a copy and write it to its slots."""
    if not slots_N.is_cuda:
        state.store(slots_N, states_MGKV)
        return
    from server.kernels import copies

    copies.store(state, slots_N, states_MGKV, places_N)


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
    rows: RingRows | None = None,
) -> Tensor:
    """Absorb one token per row into the row's state, and return what the token reads.

    A state without a ring absorbs every token at once. With one, so does a row whose ring folds with this token; any
    other token waits in the ring.

    Args:
        q_NHK: queries [N, H, K]; this and all others as in :func:`gla_prefill`, with one token per row.
        k_NGK: keys [N, G, K].
        v_NGV: values [N, G, V].
        gate: natural logarithms of the decay [N, G, K], float32, all <= 0; or what they are computed from.
        state: one layer of the pool. Updated in place. Of a split state with a ring, what a token reads is rounded to
            bfloat16 on CUDA; on the CPU, a split state must have one. On CUDA, states, rings and where they stand are
            read while the kernels of this package launched before may still run: between two calls for the same slots,
            some operation of PyTorch has to run on the stream, as it does at the beginning of a model's step.
        slots_N: int64 [N]. What rows of slot 0 read may be anything.
        from_zero_N: bool [N].
        scale: factor of the output.
        rows: where the rings stand, if the state has them. Only float32 states may fold with every token: others
            would be rounded every time.

    Returns:
        [N, H, V] of v's dtype, contiguous.

    Raises:
        ValueError: as in :func:`gla_prefill`. The contents of rows are not checked.
    """
    _check(q_NHK, k_NGK, v_NGV, gate, state, slots_N, from_zero_N)
    if slots_N.shape[0] != q_NHK.shape[0]:
        raise ValueError(f"slots: must have one slot per row of q, {q_NHK.shape[0]}, has {slots_N.shape[0]}")
    pending_N = None
    if state.ring is not None or rows is not None:
        pending_N, num_folding = _check_ring(state, rows, q_NHK, v_NGV)
        if num_folding is not None:
            assert rows is not None
            if not q_NHK.is_cuda:
                return reference.gla_decode_buffered(
                    *(q_NHK, k_NGK, v_NGV, _log_decays(gate, k_NGK), state, slots_N, from_zero_N, rows), scale=scale
                )
            from server.kernels import buffered

            return buffered.gla_decode(q_NHK, k_NGK, v_NGV, gate, state, slots_N, from_zero_N, rows, scale=scale)
    if q_NHK.is_cuda:
        from server.kernels import decode

        return decode.gla_decode(
            *(q_NHK, k_NGK, v_NGV, gate, state, slots_N, from_zero_N), scale=scale, pending_N=pending_N
        )
    if state.residues_SGKV is not None:
        raise ValueError("state: split states need a ring on the CPU")
    return reference.gla_decode(
        *(q_NHK, k_NGK, v_NGV, _log_decays(gate, k_NGK), state, slots_N, from_zero_N), scale=scale
    )


def join_folds(device: torch.device) -> None:
    """To be called at the end of a graph's capture, if rows were decoded in it that did not all fold.

    Their folds are captured beside everything that follows, and nothing but the graph's end waits for them. Without a
    capture, this does nothing.
    """
    if device.type == "cuda":
        from server.kernels import buffered

        buffered.join_folds(device)


def folds_every_token(num_rows: int, state: LayerState) -> bool:
    """Whether a batch of so many rows decodes fastest by updating states in place with every token.

    Measured on an H200: up to 8 MiB of float32 states, or 2 MiB of split ones, one kernel that reads and writes is
    faster than three that mostly read. Smaller types are never updated so, since their rounding would add up.
    """
    most = 2**21 if state.residues_SGKV is None else 2**19
    return state.is_exact and num_rows * state.values_SGKV[0].numel() <= most


def log_decay(
    low_rank_TR: Tensor, weight_DR: Tensor, bias_D: Tensor, *, normalizer: float, clamp_min: float | None
) -> Tensor:
    """logsigmoid(weight @ low_rank + bias) / normalizer, at least ``clamp_min``: the gate's log decays.

    Args:
        low_rank_TR: the gate's inner projection [T, R], float32, bfloat16 or float16; rows may be strided.
        weight_DR: float32 [D, R], contiguous.
        bias_D: float32 [D].
        normalizer: divisor, > 0.
        clamp_min: lower bound, <= 0; None: none.

    Returns:
        float32 [T, D], contiguous, all <= 0.

    Raises:
        ValueError: a shape, dtype, device or stride is not as above; the message names the argument.
    """
    gate_arguments = LowRankGate(low_rank_TR, weight_DR, bias_D, normalizer, clamp_min)
    _check_gate(gate_arguments, low_rank_TR.shape[0], weight_DR.shape[0], low_rank_TR.device)
    if low_rank_TR.is_cuda:
        from server.kernels import gate

        return gate.log_decay(low_rank_TR, weight_DR, bias_D, normalizer=normalizer, clamp_min=clamp_min)
    return reference.log_decay(low_rank_TR, weight_DR, bias_D, normalizer=normalizer, clamp_min=clamp_min)


def norm_gate(o_THV: Tensor, weight_V: Tensor | None, gate_TE: Tensor | None, *, eps: float) -> Tensor:
    """RMSNorm over the channels of every head, times swish of the output gate.

    Args:
        o_THV: what the recurrence returned [T, H, V], float32, bfloat16 or float16; its first two dimensions may be
            strided.
        weight_V: of the norm [V], of o's dtype; None: ones.
        gate_TE: the output gate [T, E], of o's dtype, rows may be strided; None: no gate.
        eps: added to the mean square.

    Returns:
        [T, E] of o's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or stride is not as above; the message names the argument.
    """
    device, dtype = o_THV.device, (o_THV.dtype,)
    _check_dimensions("o", o_THV, 3)
    tokens, heads, head_v = o_THV.shape
    _check_tensor("o", o_THV, (tokens, heads, head_v), _INPUT_DTYPES, device)
    if weight_V is not None:
        _check_tensor("weight", weight_V, (head_v,), dtype, device)
    if gate_TE is not None:
        _check_tensor("gate", gate_TE, (tokens, heads * head_v), dtype, device)
    if o_THV.is_cuda:
        from server.kernels import norm

        return norm.norm_gate(o_THV, weight_V, gate_TE, eps=eps)
    return reference.norm_gate(o_THV, weight_V, gate_TE, eps=eps)


def norm_linear(
    x_TD: Tensor,
    norm_D: Tensor,
    weight_ND: Tensor | PackedMatrix,
    *,
    eps: float,
    addends_STD: Tensor | None = None,
    rows_R: Tensor | None = None,
    out_RN: Tensor | None = None,
) -> Tensor:
    """RMSNorm of every row, or of some, then a projection.

    On CUDA, the rounding of a row's result depends on how many there are (:mod:`server.kernels.linear`).

    Args:
        x_TD: [T, D], float32, bfloat16 or float16; rows may be strided.
        norm_D: weight of the norm [D], of x's dtype.
        weight_ND: [N, D], of x's dtype; contiguous on CUDA. On the CPU it may be packed.
        eps: added to the mean square.
        addends_STD: float32 [S, T, D], contiguous, what :func:`linear_add_` has left to be added to x first. The sums
            replace x, unless ``rows_R`` is given: then x stays as it is.
        rows_R: int64 [R], the rows that are wanted, in this order; None: all.
        out_RN: where to write the result: contiguous, of x's dtype or float32; None: a new tensor of x's dtype.

    Returns:
        The result [R, N], or [T, N].

    Raises:
        ValueError: a shape, dtype, device or stride is not as above; the message names the argument.
    """
    _check_projection(x_TD, weight_ND, "x")
    _check_norm(x_TD, norm_D, addends_STD)
    num_rows = x_TD.shape[0]
    if rows_R is not None:
        num_rows = rows_R.shape[0]
        _check_tensor("rows", rows_R, (num_rows,), (torch.int64,), x_TD.device)
    shape = (num_rows, weight_ND.shape[0])
    if out_RN is None:
        out_RN = x_TD.new_empty(shape)
    _check_tensor("out", out_RN, shape, (x_TD.dtype, torch.float32), x_TD.device)
    if not out_RN.is_contiguous():
        raise ValueError(f"out: must be contiguous, strides are {out_RN.stride()}")
    if x_TD.is_cuda:
        from server.kernels import linear

        assert isinstance(weight_ND, Tensor)
        linear.norm_linear(x_TD, norm_D, weight_ND, out_RN, eps=eps, addends_STD=addends_STD, rows_R=rows_R)
    else:
        reference.norm_linear(x_TD, norm_D, weight_ND, out_RN, eps=eps, addends_STD=addends_STD, rows_R=rows_R)
    return out_RN


def norm_swiglu(
    x_TD: Tensor,
    norm_D: Tensor,
    weight_JD: Tensor | PackedMatrix,
    *,
    eps: float,
    addends_STD: Tensor | None = None,
) -> Tensor:
    """RMSNorm of every row, then the projections of a gated MLP and its activation, swish(gate) * up.

    Args:
        x_TD: [T, D]; this and the others as in :func:`norm_linear`.
        norm_D: [D].
        weight_JD: gate above up, [2 * I, D].
        eps: added to the mean square.
        addends_STD: float32 [S, T, D] or None.

    Returns:
        [T, I] of x's dtype, contiguous.

    Raises:
        ValueError: as in :func:`norm_linear`, or weight has an odd number of rows.
    """
    _check_projection(x_TD, weight_JD, "x")
    _check_norm(x_TD, norm_D, addends_STD)
    if weight_JD.shape[0] % 2:
        raise ValueError(f"weight: must have an even number of rows, has {weight_JD.shape[0]}")
    if x_TD.is_cuda:
        from server.kernels import linear

        assert isinstance(weight_JD, Tensor)
        return linear.norm_swiglu(x_TD, norm_D, weight_JD, eps=eps, addends_STD=addends_STD)
    return reference.norm_swiglu(x_TD, norm_D, weight_JD, eps=eps, addends_STD=addends_STD)


def linear_add_(x_TN: Tensor, o_TK: Tensor, weight_NK: Tensor | PackedMatrix) -> Tensor | None:
    """Add a projection of ``o_TK`` to ``x_TN``, in place, or leave it to the norm that follows.

    Args:
        x_TN: [T, N], contiguous, of o's dtype. Updated, unless something is returned.
        o_TK: [T, K]; it and the weight [N, K] as in :func:`norm_linear`.
        weight_NK: as there.

    Returns:
        None, or what is still to be added to x: float32 [S, T, N], for :func:`norm_linear` or :func:`norm_swiglu`.

    Raises:
        ValueError: as in :func:`norm_linear`.
    """
    _check_projection(o_TK, weight_NK, "o")
    _check_tensor("x", x_TN, (o_TK.shape[0], weight_NK.shape[0]), (o_TK.dtype,), o_TK.device)
    if not x_TN.is_contiguous():
        raise ValueError(f"x: must be contiguous, strides are {x_TN.stride()}")
    if o_TK.is_cuda:
        from server.kernels import linear

        assert isinstance(weight_NK, Tensor)
        return linear.linear_add_(x_TN, o_TK, weight_NK)
    reference.linear_add_(x_TN, o_TK, weight_NK)
    return None


def pick_greedy(
    logits_RV: Tensor, slots_R: Tensor, flags_SV: Tensor, last_token_S: Tensor, done_S: Tensor, *, stop_flag: int
) -> Tensor:
    """The most likely token of every row, noted by slot.

    Args:
        logits_RV: float32 [R, V], contiguous.
        slots_R: int64 [R]. Slot 0 may occur several times, and what is noted there is one of its rows'.
        flags_SV: uint8 [S, V], contiguous.
        last_token_S: int64 [S]. Updated: the row's token, whatever its logits.
        done_S: bool [S]. Updated: whether the slot's flags of the token have ``stop_flag``.
        stop_flag: the bit that means so.

    Returns:
        int64 [R]; the first of the most likely tokens, -1 where the largest logit is not finite.

    Raises:
        ValueError: a shape, dtype, device or stride is not as above; the message names the argument.
    """
    device = logits_RV.device
    _check_dimensions("logits", logits_RV, 2)
    rows, vocab_size = logits_RV.shape
    slots = last_token_S.shape[0]
    _check_tensor("logits", logits_RV, (rows, vocab_size), (torch.float32,), device)
    _check_tensor("slots", slots_R, (rows,), (torch.int64,), device)
    _check_tensor("flags", flags_SV, (slots, vocab_size), (torch.uint8,), device)
    _check_tensor("last_token", last_token_S, (slots,), (torch.int64,), device)
    _check_tensor("done", done_S, (slots,), (torch.bool,), device)
    for name, tensor in (("logits", logits_RV), ("flags", flags_SV)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, strides are {tensor.stride()}")
    if logits_RV.is_cuda:
        from server.kernels import pick

        return pick.pick_greedy(logits_RV, slots_R, flags_SV, last_token_S, done_S, stop_flag=stop_flag)
    return reference.pick_greedy(logits_RV, slots_R, flags_SV, last_token_S, done_S, stop_flag=stop_flag)


def _log_decays(gate: Tensor | LowRankGate, k_TGK: Tensor) -> Tensor:
    """The gate's log decays, in the keys' shape."""
    if isinstance(gate, Tensor):
        return gate
    g_TD = log_decay(
        *(gate.low_rank_TR, gate.weight_DR, gate.bias_D), normalizer=gate.normalizer, clamp_min=gate.clamp_min
    )
    return g_TD.view(k_TGK.shape)


def _check_gate(gate: LowRankGate, tokens: int, channels: int, device: torch.device) -> None:
    """Raise ValueError unless the gate's tensors fit each other and so many tokens and channels."""
    _check_dimensions("low_rank", gate.low_rank_TR, 2)
    _check_dimensions("weight", gate.weight_DR, 2)
    rank = gate.weight_DR.shape[1]
    _check_tensor("low_rank", gate.low_rank_TR, (tokens, rank), _INPUT_DTYPES, device)
    _check_tensor("weight", gate.weight_DR, (channels, rank), (torch.float32,), device)
    if not gate.weight_DR.is_contiguous():
        raise ValueError(f"weight: must be contiguous, strides are {gate.weight_DR.stride()}")
    _check_tensor("bias", gate.bias_D, (channels,), (torch.float32,), device)


def _check(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    gate: Tensor | LowRankGate,
    state: LayerState,
    slots_N: Tensor,
    from_zero_N: Tensor,
) -> None:
    """Raise ValueError unless the arguments common to both operations fit together."""
    if q_THK.dim() != 3:
        raise ValueError(f"q: must have 3 dimensions [tokens, heads, head_k], has shape {tuple(q_THK.shape)}")
    state_SGKV = state.values_SGKV
    if state_SGKV.dim() != 4:
        raise ValueError(
            f"state: must have 4 dimensions [slots, kv_heads, head_k, head_v], has shape {tuple(state_SGKV.shape)}"
        )
    if slots_N.dim() != 1:
        raise ValueError(f"slots: must have 1 dimension, has shape {tuple(slots_N.shape)}")
    tokens, heads, head_k = q_THK.shape
    slots, kv_heads, _, head_v = state_SGKV.shape
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q: its {heads} heads are not a multiple of the state's {kv_heads} kv heads")
    device, dtype = q_THK.device, (q_THK.dtype,)
    _check_tensor("q", q_THK, (tokens, heads, head_k), _INPUT_DTYPES, device)
    _check_tensor("k", k_TGK, (tokens, kv_heads, head_k), dtype, device)
    _check_tensor("v", v_TGV, (tokens, kv_heads, head_v), dtype, device)
    if isinstance(gate, Tensor):
        _check_tensor("gate", gate, (tokens, kv_heads, head_k), (torch.float32,), device)
    else:
        _check_gate(gate, tokens, kv_heads * head_k, device)
    _check_tensor("state", state_SGKV, (slots, kv_heads, head_k, head_v), tuple(STATE_DTYPES.values()), device)
    if (state_SGKV.dtype == torch.uint8) != (state.scales_SGK is not None):
        raise ValueError("state: uint8 values, and no others, have scales")
    if state.scales_SGK is not None:
        _check_tensor("state's scales", state.scales_SGK, (slots, kv_heads, head_k), (torch.float32,), device)
    if state_SGKV.stride()[1:] != (head_k * head_v, head_v, 1):
        raise ValueError(f"state: its last three dimensions must be contiguous, strides are {state_SGKV.stride()}")
    if (residues := state.residues_SGKV) is not None:
        _check_tensor("state's residues", residues, tuple(state_SGKV.shape), (SPLIT,), device)
        if state_SGKV.dtype != torch.bfloat16 or residues.stride() != state_SGKV.stride():
            raise ValueError("state: residues belong to bfloat16 values of the same strides")
    _check_tensor("slots", slots_N, tuple(slots_N.shape), (torch.int64,), device)
    _check_tensor("from_zero", from_zero_N, tuple(slots_N.shape), (torch.bool,), device)


def _check_ring(state: LayerState, rows: RingRows | None, q_NHK: Tensor, v_NGV: Tensor) -> tuple[Tensor, Tensor | None]:
    """Raise ValueError unless ring and rows fit the other, checked, arguments; what the rows say."""
    ring = state.ring
    if ring is None or rows is None:
        raise ValueError("rows: a state with a ring, and no other, needs them")
    slots, kv_heads, head_k, head_v = state.values_SGKV.shape
    num_rows, device = q_NHK.shape[0], q_NHK.device
    shape = (slots, kv_heads, ring.size)
    _check_tensor("ring's keys", ring.keys_SGCK, (*shape, head_k), (q_NHK.dtype,), device)
    _check_tensor("ring's values", ring.values_SGCV, (*shape, head_v), (v_NGV.dtype,), device)
    _check_tensor("ring's decays", ring.decays_SGCK, (*shape, head_k), (torch.float32,), device)
    _check_tensor("pending", rows.pending_N, (num_rows,), (torch.int64,), device)
    if rows.num_folding is not None:
        _check_tensor("num_folding", rows.num_folding, (1,), (torch.int64,), device)
    elif not state.is_exact:
        raise ValueError(f"num_folding: {state.values_SGKV.dtype} states must not fold with every token")
    elif not q_NHK.is_cuda:
        raise ValueError("num_folding: needed on the CPU, where float32 states need no ring")
    return rows.pending_N, rows.num_folding


def _check_projection(x_TK: Tensor, weight_NK: Tensor | PackedMatrix, name: str) -> None:
    """Raise ValueError unless ``x_TK``, which is called ``name``, can be multiplied with the weight."""
    _check_dimensions(name, x_TK, 2)
    if len(weight_NK.shape) != 2:
        raise ValueError(f"weight: must have 2 dimensions, has shape {tuple(weight_NK.shape)}")
    _check_tensor(name, x_TK, tuple(x_TK.shape), _INPUT_DTYPES, x_TK.device)
    shape = (weight_NK.shape[0], x_TK.shape[1])
    if isinstance(weight_NK, PackedMatrix):
        if weight_NK.shape != shape or x_TK.dtype != torch.float32 or x_TK.is_cuda:
            raise ValueError(f"weight: packed, of shape {tuple(weight_NK.shape)}, not for {name} {tuple(x_TK.shape)}")
        return
    if not x_TK.is_cuda and weight_NK.stride(0) == 1:  # stored by columns, which the CPU's library likes
        weight_NK, shape = weight_NK.t(), shape[::-1]
    _check_tensor("weight", weight_NK, shape, (x_TK.dtype,), x_TK.device)
    if x_TK.is_cuda and not weight_NK.is_contiguous():
        raise ValueError(f"weight: must be contiguous, strides are {weight_NK.stride()}")


def _check_norm(x_TD: Tensor, norm_D: Tensor, addends_STD: Tensor | None) -> None:
    """Raise ValueError unless a norm's weight and what is added before it fit ``x_TD``."""
    _check_tensor("norm", norm_D, tuple(x_TD.shape[1:]), (x_TD.dtype,), x_TD.device)
    if addends_STD is not None:
        _check_dimensions("addends", addends_STD, 3)
        shape = (addends_STD.shape[0], *x_TD.shape)
        _check_tensor("addends", addends_STD, shape, (torch.float32,), x_TD.device)
        if not addends_STD.is_contiguous():
            raise ValueError(f"addends: must be contiguous, strides are {addends_STD.stride()}")


def _check_dimensions(name: str, tensor: Tensor, dimensions: int) -> None:
    """Raise ValueError unless the tensor has so many dimensions."""
    if tensor.dim() != dimensions:
        raise ValueError(f"{name}: must have {dimensions} dimensions, has shape {tuple(tensor.shape)}")


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ValueError unless the tensor has this shape, one of these dtypes and a contiguous last dimension."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: must have shape {shape}, has {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: must be {' or '.join(map(str, dtypes))}, is {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: must be on {device} as q is, is on {tensor.device}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: its last dimension must be contiguous, its stride is {tensor.stride(-1)}")
