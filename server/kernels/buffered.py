"""Decoding with buffered write-back: the state is read for every token, but written only once in C tokens.

The tokens since the last fold wait in a ring of their keys, values and cumulative gates G. With S the state after the
last fold and t the new token, which is the ring's last entry,

    o_t = scale * ((q_t * exp(G_t))^T S + sum over j <= t of a_j v_j)        a_j = sum_k q_tk k_jk exp(G_tk - G_jk)

and a fold is S' = diag(exp(G_t)) S + sum_j (k_j * exp(G_t - G_j)) v_j^T, after which the ring is empty. Every exponent
is <= 0. So a step moves the state once instead of twice, and a state of fewer bits is rounded once in C tokens. The
idea is published for other linear-attention models as ReplaySSM (dao-lab.ai) and KVBuffer (arXiv 2605.19049).

The kernels are in :mod:`server.kernels.buffered_kernels`: *score* appends the token to the ring and forms the weights,
those of the state's rows (q_t * exp(G_t)) and those of the ring's (a); *read* sums the rows of both under their
weights, one warp to some columns, and is what takes the time; *fold* rewrites the states of the rows that are due. Of
float32 states that are split (:data:`server.kernels.state.SPLIT`), *read* takes the upper halves: the errors of their
rounding are independent, and as large as that of the output's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from server.kernels.buffered_kernels import fold_kernel, read_kernel, score_kernel
from server.kernels.gate import GateArguments
from server.kernels.pdl import launches_early
from server.kernels.shapes import check_head_k, is_interpreted, next_power_of_2
from server.kernels.state import SPLIT, LayerState, LowRankGate, RingRows


@dataclass(frozen=True, slots=True)
class BufferedPlan:
    """Sizes of the programs; tiles are [rows, columns] of the state."""

    read_k: int
    read_v: int
    read_warps: int
    read_stages: int
    """Tiles on their way from memory."""
    few_v: int
    """Columns of a tile in a batch of few heads, which has few programs."""
    read_ahead: int
    """Tiles that a program reads before the scores are there, in a batch of few heads."""
    ring_ahead: bool
    """Whether a program reads its part of the ring before the scores are there."""
    fold_k: int
    fold_v: int
    fold_warps: int
    fold_programs: int
    """Programs per multiprocessor, at most, which share the folds: few, so that they leave room for what runs beside
    them. Their number is fixed when a graph is captured."""
    fold_part: int = 128
    """Rows of a strip, which one program goes through; a multiple of fold_k."""
    fold_stages: int = 3
    """Tiles on their way from memory."""
    score_c: int = 16
    """Entries of the ring that a program scores."""
    score_warps: int = 4


FEW_HEADS = 64
"""In a batch of up to so many heads, programs that read wait for their scores with most of their part of the state in
registers. With more, there are not registers enough."""


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
    held_dtype = SPLIT if state.residues_SGKV is not None else values.dtype
    plan = plan or plan_buffered(head_k, head_v, repeats, held_dtype)
    # What each query reads of the state's rows, then of the ring's.
    weights = torch.empty((num_rows, heads, head_k + ring.size), dtype=torch.float32, device=q_NHK.device)
    shape = {"K": head_k, "V": head_v, "C": ring.size}
    slot_strides = [values.stride(0), 0 if scales is None else scales.stride(0)]
    ring_strides = [ring.keys_SGCK.stride(0), ring.values_SGCV.stride(0), ring.decays_SGCK.stride(0)]
    early = launches_early(q_NHK.device)
    decays = GateArguments.of(gate)
    few = num_rows * kv_heads <= FEW_HEADS
    read_v = plan.few_v if few else plan.read_v
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
            slots_N,
            from_zero_N,
            rows.pending_N,
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
            REPEATS=repeats,
            BC=plan.score_c,
            BK=next_power_of_2(head_k),
            BV=next_power_of_2(head_v),
            EARLY=early,
            num_warps=plan.score_warps,
            launch_pdl=early,
        )
        read_kernel[(triton.cdiv(head_v, read_v), kv_heads, num_rows)](
            values,
            ring.values_SGCV,
            weights,
            o_NHV,
            slots_N,
            from_zero_N,
            rows.pending_N,
            slot_strides[0],
            ring_strides[1],
            **shape,
            HAS_SCALES=scales is not None,
            REPEATS=repeats,
            BR=next_power_of_2(repeats),
            BK=plan.read_k,
            BV=read_v,
            AHEAD=ahead,
            RING_AHEAD=plan.ring_ahead,
            STAGES=plan.read_stages,
            EARLY=early,
            num_warps=plan.read_warps,
            launch_pdl=early,
        )

    def fold() -> None:
        part = min(plan.fold_part, triton.cdiv(head_k, plan.fold_k) * plan.fold_k)
        strips = num_rows * kv_heads * triton.cdiv(head_k, part) * triton.cdiv(head_v, plan.fold_v)
        with torch.cuda.device_of(values):
            fold_kernel[(min(strips, _multiprocessors(values.device) * plan.fold_programs),)](
                values,
                state.residues_SGKV,
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
                PART=part,
                BK=plan.fold_k,
                BV=plan.fold_v,
                STAGES=plan.fold_stages,
                EXACT=ring.keys_SGCK.dtype != torch.bfloat16 or is_interpreted(fold_kernel),
                num_warps=plan.fold_warps,
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
    # Whoever captures a fold beside the next decode leaves one of its own waiting.
    if _is_captured(device) and device in _waiting_folds:
        _start_fold(device)
        torch.cuda.current_stream(device).wait_stream(_fold_stream(device))


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _fold_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@cache
def plan_buffered(head_k: int, head_v: int, repeats: int, held_dtype: torch.dtype) -> BufferedPlan:
    """Choose the tiles by shape: then every bit of a row's result is the same in any batch of few heads, and in any of
    many.

    ``tests/bench/kernels.py --sweep`` compares others. On an H200, programs of one warp, which wait for nobody, read
    fastest; whole float32 states have the bytes to keep two warps busy. A fold needs whole rows of the state where it
    has to find their scales, and tiles of at least 16 x 16 for its product.
    """
    all_v = max(16, next_power_of_2(head_v))
    has_scales, is_wide = held_dtype == torch.uint8, held_dtype in (torch.float32, SPLIT)
    if repeats > 1:
        columns = min(all_v, 128)
        read = (max(1, 16 // next_power_of_2(repeats)), columns, 1, 4, columns, 6, False)
    elif held_dtype == torch.float32:
        columns = min(all_v, 64)
        read = (32, columns, 2, 3, columns, 5, True)
    else:
        # A ring of 32 tokens, as int8 states have, would take too many registers.
        read = (16, min(all_v, 128), 1, 4, min(all_v, 32), 16, not has_scales)
    fold = (16, all_v, 8 if all_v >= 512 else 4, 1) if has_scales else (16, min(all_v, 128), 2, 2 if is_wide else 4)
    return BufferedPlan(*read, *fold)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
