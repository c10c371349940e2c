"""Gated linear attention as two operations; the only door to the kernels.

For every token t of a span and every kv head, with S of shape [head_k, head_v]::

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

The states live in a pool and are read and updated in place, by slot. H query heads share G kv heads: query head h
reads the state of kv head ``h // (H // G)``, and a state is never repeated for the heads that share it.

CPU tensors are computed by :mod:`server.kernels.reference`, CUDA tensors by the Triton kernels in
:mod:`server.kernels.prefill` and :mod:`server.kernels.decode`, which are imported at their first use.

Letters in names and comments: T packed tokens, N spans or rows, S slots of the pool, H query heads, G kv heads,
K channels of a key (head_k), V channels of a value (head_v).
"""

import torch
from torch import Tensor

from server.kernels import reference

__all__ = ["gla_decode", "gla_prefill"]

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
) -> Tensor:
    """Absorb N packed spans of tokens, each into its own state, and return what every token reads.

    Span n is the rows ``cu_seqlens[n]:cu_seqlens[n + 1]``; it may be empty. It continues from the state in slot
    ``slots_N[n]``, or from zero where ``from_zero_N[n]``: then nothing depends on what the slot held before, NaN
    included. Its final state is written to that slot. Cutting a span at a multiple of 64 tokens does not change the
    result of the Triton kernels by a bit.

    Args:
        q_THK: queries [T, H, K], float32, bfloat16 or float16. It and the next three may be strided views, with a
            contiguous last dimension.
        k_TGK: keys [T, G, K], of q's dtype.
        v_TGV: values [T, G, V], of q's dtype.
        g_TGK: natural logarithms of the decay [T, G, K], float32, all <= 0.
        state_SGKV: the pool of one layer [S, G, K, V], float32; any stride between slots, the rest contiguous.
            Updated in place.
        slots_N: int64 [N]. Slot 0 may occur several times, and then holds anything; any other slot at most once.
        from_zero_N: bool [N].
        cu_seqlens: int32 [N + 1], ascending from 0 to T.
        scale: factor of the output.
        max_length: at least the length of the longest span.

    Returns:
        [T, H, V] of v's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or stride is not as above; the message names the argument.
            The contents of slots_N and cu_seqlens are not checked.
    """
    _check(q_THK, k_TGK, v_TGV, g_TGK, state_SGKV, slots_N, from_zero_N)
    _check_tensor("cu_seqlens", cu_seqlens, (slots_N.shape[0] + 1,), (torch.int32,), q_THK.device)
    if max_length < 0:
        raise ValueError(f"max_length: must not be negative, is {max_length}")
    if q_THK.is_cuda:
        from server.kernels import prefill

        return prefill.gla_prefill(
            q_THK, k_TGK, v_TGV, g_TGK, state_SGKV, slots_N, from_zero_N, cu_seqlens, scale=scale, max_length=max_length
        )
    return reference.gla_prefill(
        q_THK, k_TGK, v_TGV, g_TGK, state_SGKV, slots_N, from_zero_N, cu_seqlens, scale=scale, max_length=max_length
    )


def gla_decode(
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGV: Tensor,
    g_NGK: Tensor,
    state_SGKV: Tensor,
    slots_N: Tensor,
    from_zero_N: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Absorb one token per row into the row's state, and return what the token reads.

    Args:
        q_NHK: queries [N, H, K]; this and all others as in :func:`gla_prefill`, with one token per row.
        k_NGK: keys [N, G, K].
        v_NGV: values [N, G, V].
        g_NGK: natural logarithms of the decay [N, G, K], float32, all <= 0.
        state_SGKV: the pool of one layer [S, G, K, V], float32. Updated in place.
        slots_N: int64 [N].
        from_zero_N: bool [N].
        scale: factor of the output.

    Returns:
        [N, H, V] of v's dtype, contiguous.

    Raises:
        ValueError: as in :func:`gla_prefill`.
    """
    _check(q_NHK, k_NGK, v_NGV, g_NGK, state_SGKV, slots_N, from_zero_N)
    if slots_N.shape[0] != q_NHK.shape[0]:
        raise ValueError(f"slots: must have one slot per row of q, {q_NHK.shape[0]}, has {slots_N.shape[0]}")
    if q_NHK.is_cuda:
        from server.kernels import decode

        return decode.gla_decode(q_NHK, k_NGK, v_NGV, g_NGK, state_SGKV, slots_N, from_zero_N, scale=scale)
    return reference.gla_decode(q_NHK, k_NGK, v_NGV, g_NGK, state_SGKV, slots_N, from_zero_N, scale=scale)


def _check(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    g_TGK: Tensor,
    state_SGKV: Tensor,
    slots_N: Tensor,
    from_zero_N: Tensor,
) -> None:
    """Raise ValueError unless the arguments common to both operations fit together."""
    if q_THK.dim() != 3:
        raise ValueError(f"q: must have 3 dimensions [tokens, heads, head_k], has shape {tuple(q_THK.shape)}")
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
    _check_tensor("g", g_TGK, (tokens, kv_heads, head_k), (torch.float32,), device)
    _check_tensor("state", state_SGKV, (slots, kv_heads, head_k, head_v), (torch.float32,), device)
    if state_SGKV.stride()[1:] != (head_k * head_v, head_v, 1):
        raise ValueError(f"state: its last three dimensions must be contiguous, strides are {state_SGKV.stride()}")
    _check_tensor("slots", slots_N, tuple(slots_N.shape), (torch.int64,), device)
    _check_tensor("from_zero", from_zero_N, tuple(slots_N.shape), (torch.bool,), device)


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
