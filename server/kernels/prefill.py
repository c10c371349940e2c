"""Gated linear attention over packed spans of prompts: what is launched, and how large.

The chunks are those of :mod:`server.kernels.reference`. :mod:`server.kernels.prefill_scores` does, for all of them side
by side, what does not depend on a state: the scores A between the tokens of a chunk, the queries decayed since the
chunk's start, the keys decayed to its end. :mod:`server.kernels.prefill_walk` follows the states from chunk to chunk.

Heads of the same group share keys, values, gates and states; only queries, scores and outputs are per query head.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from server.kernels.prefill_scores import BLOCK, WARP_CHANNELS, prepare_kernel
from server.kernels.prefill_walk import absorb_kernel, combine_kernel, walk_kernel
from server.kernels.shapes import check_head_k, next_power_of_2, product_dtype
from server.kernels.state import LayerState

MIN_SEGMENT = 256
"""Tokens. Shorter segments of a prompt of 2,048 took longer on an H200: more states in between."""
_COMBINED_ELEMENTS = 4096
"""Of a state, per program that combines segments."""


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Sizes of the kernels' tiles."""

    chunk: int
    """Tokens that are computed by matrix products at once: 16 or 32."""
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
    prepare_registers: int | None
    """At most so many per thread of the preparation, that a processor may run more programs."""


WALK_TILES = ((128, True, 8), (64, True, 4), (32, False, 4), (16, False, 4))
"""The walk's tiles for 16-bit inputs, the fastest first: columns, whether transposed, warps."""


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
    plan: PrefillPlan | None = None,
    segment_length: int | None = None,
) -> Tensor:
    """Absorb packed spans; see :func:`server.kernels.gla_prefill`, which has checked the arguments.

    Args:
        state: float32, whole or split.
        plan: sizes to use instead of those that :func:`plan_prefill` chooses, to compare them.
        segment_length: tokens of a segment, instead of what :func:`plan_segments` chooses; a multiple of the plan's
            chunk.

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
    processors, shared_memory = _device_limits(device)
    plan = plan or plan_prefill(head_k, head_v, repeats, q_THK.element_size(), shared_memory)
    value_tiles = triton.cdiv(head_v, plan.block_v)
    if segment_length is None:
        segment_length = plan_segments(tokens, max_length, kv_heads * value_tiles, plan.chunk, processors)
    is_segmented = max_length > segment_length
    chunks = tokens // plan.chunk + spans  # an upper bound, see chunk_id
    scores_CHLL = torch.empty((chunks, heads, plan.chunk, plan.chunk), dtype=dtype, device=device)
    q_decayed_CHLK = torch.empty((chunks, heads, plan.chunk, head_k), dtype=dtype, device=device)
    k_decayed_CGLK = torch.empty((chunks, kv_heads, plan.chunk, head_k), dtype=dtype, device=device)
    decay_CGK = torch.empty((chunks, kv_heads, head_k), dtype=torch.float32, device=device)
    ids = 1 + tokens // segment_length if is_segmented else 0  # an upper bound, see _segment_id
    segments_IGKV = torch.empty((ids, kv_heads, head_k, head_v), dtype=torch.float32, device=device)
    segments_decay_IGK = torch.empty((ids, kv_heads, head_k), dtype=torch.float32, device=device)
    sizes = {"K": head_k, "V": head_v, "BK": plan.block_k, "BV": plan.block_v, "CHUNK": plan.chunk, "DOT": dot_dtype}
    slices = max(1, plan.block_k // WARP_CHANNELS)
    launch = {"TRANSPOSED": plan.transposed, "num_warps": plan.walk_warps, "num_stages": plan.walk_stages}
    values, residues = state.values_SGKV, state.residues_SGKV
    walk_grid = (value_tiles, kv_heads, spans + tokens // segment_length if is_segmented else spans)
    with torch.cuda.device_of(q_THK):
        prepare_kernel[(heads * chunks * plan.chunk // BLOCK.value,)](
            q_THK,
            k_TGK,
            g_TGK,
            scores_CHLL,
            q_decayed_CHLK,
            k_decayed_CGLK,
            decay_CGK,
            cu_seqlens,
            spans,
            q_THK.stride(1),
            k_TGK.stride(1),
            g_TGK.stride(1),
            STRIDE_QT=q_THK.stride(0),
            STRIDE_KT=k_TGK.stride(0),
            STRIDE_GT=g_TGK.stride(0),
            HEADS=heads,
            REPEATS=repeats,
            K=head_k,
            BK=plan.block_k,
            SLICES=slices,
            CHUNK=plan.chunk,
            DOT=dot_dtype,
            num_warps=slices,
            num_stages=1,
            maxnreg=plan.prepare_registers,
        )
        if is_segmented:
            absorb_kernel[walk_grid](
                k_decayed_CGLK,
                v_TGV,
                decay_CGK,
                segments_IGKV,
                segments_decay_IGK,
                cu_seqlens,
                spans,
                segment_length,
                *v_TGV.stride()[:2],
                **sizes,
                **launch,
            )
            combined_v = next_power_of_2(head_v)
            combined_k = max(1, _COMBINED_ELEMENTS // combined_v)
            combine_kernel[(triton.cdiv(head_k, combined_k), kv_heads, spans)](
                segments_IGKV,
                segments_decay_IGK,
                values,
                residues,
                slots_N,
                from_zero_N,
                cu_seqlens,
                segment_length,
                values.stride(0),
                K=head_k,
                V=head_v,
                BK=combined_k,
                BV=combined_v,
                EXACT=v_TGV.dtype == torch.float32,
                num_warps=4,
            )
        walk_kernel[walk_grid](
            q_decayed_CHLK,
            k_decayed_CGLK,
            v_TGV,
            scores_CHLL,
            decay_CGK,
            segments_IGKV,
            values,
            residues,
            o_THV,
            slots_N,
            from_zero_N,
            cu_seqlens,
            scale,
            spans,
            segment_length,
            *v_TGV.stride()[:2],
            values.stride(0),
            REPEATS=repeats,
            **sizes,
            **launch,
            SEGMENTED=is_segmented,
        )
    return o_THV


@cache
def plan_prefill(head_k: int, head_v: int, repeats: int, itemsize: int, shared_memory: int) -> PrefillPlan:
    """Choose tiles by shape and device, never by batch: a span that is walked whole gives the same bits in any.

    Args:
        head_k: at most 256.
        head_v: any.
        repeats: query heads per kv head.
        itemsize: bytes of an element of the inputs.
        shared_memory: bytes that a program may use.
    """
    block_k, columns = max(16, next_power_of_2(head_k)), max(16, next_power_of_2(head_v))

    def fits(chunk: int, block_v: int, transposed: bool, stages: int) -> bool:
        queries = repeats if stages > 1 else 1  # heads whose inputs are there at once
        stage = chunk * (queries * (block_k + chunk) + block_k + block_v)
        state = 0 if transposed else block_k * block_v
        walking = itemsize * (stages * stage + state + chunk * block_v)  # chunk * block_v: an output
        return max(walking, 4 * block_k * block_v) <= shared_memory  # the state is stored by way of shared memory

    if itemsize == 2:
        chunk = 32 if fits(32, 16, False, 1) else 16
        fitting = [tile for tile in WALK_TILES if tile[0] <= columns and fits(chunk, *tile[:2], 2)]
        block_v, transposed, warps = (fitting or WALK_TILES[-1:])[0]
        stages = max(stages for stages in (1, 2, 3) if stages == 1 or fits(chunk, block_v, transposed, stages))
    else:  # A float32 product is three tensor-core products of split operands; larger chunks would spill registers.
        chunk, block_v, transposed, warps, stages = 16, min(columns, 32), False, 4, 1
    return PrefillPlan(
        chunk=chunk,
        block_k=block_k,
        block_v=block_v,
        transposed=transposed,
        walk_warps=warps,
        walk_stages=stages,
        prepare_registers=168 if itemsize == 2 else None,
    )


def plan_segments(tokens: int, max_length: int, programs: int, chunk: int, processors: int) -> int:
    """Tokens of a segment: so many that no span has two, unless the device would then have too little to do.

    A captured step has room for more spans than it absorbs, so what counts is how many there must be if one of them is
    the longest.

    Args:
        tokens: of all spans, at most.
        max_length: of a span, at most.
        programs: of a walk of one span: kv heads times value tiles.
        chunk: tokens of a chunk.
        processors: of the device.
    """
    full_spans = max(1, tokens // max(1, max_length))
    segments = max(1, min(processors // (programs * full_spans), max_length // MIN_SEGMENT))
    return max(1, int(triton.cdiv(max_length, segments * chunk))) * chunk


@cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one program may use."""
    if device.type != "cuda":  # interpreted
        return 132, 232448
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, int(getattr(properties, "shared_memory_per_block_optin", 101376))
