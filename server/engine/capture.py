"""Captures the steps that serving takes as CUDA graphs, at start, and finds out how many prompt tokens a step may take.

Steps with prompts are timed as they are captured: beside decodes, larger ones than take twice the time of the decodes
alone are of no use, since a running request must not wait much longer than that for its next token.
"""

import logging
import time
from bisect import bisect_left

import torch

from server.component_settings import CHUNK
from server.engine.graphs import StepGraphs
from server.engine.step import StepModel
from server.engine.step_shapes import (
    PromptLimit,
    StepShape,
    allowed_seconds,
    decode_ladder,
    limit_prompts,
    prompt_rows,
    prompt_shapes,
    token_ladder,
)

logger = logging.getLogger(__name__)

_MiB = 1 << 20
_PROBES = 8


def prompt_ladders(max_rows: int, max_tokens: int) -> list[tuple[int, list[int]]]:
    """Decodes, and the numbers of prompt tokens beside them that a step of at most so many tokens may have."""
    ladders = []
    for decodes in prompt_rows(max_rows):
        room = max(CHUNK, (max_tokens - decodes) // CHUNK * CHUNK) if decodes else max_tokens
        ladders.append((decodes, token_ladder(room, decodes=decodes)))
    return ladders


def all_shapes(max_rows: int, max_tokens: int) -> list[StepShape]:
    """What :func:`capture_steps` captures, or would if no step with prompts took too long."""
    shapes = [StepShape(size, 0, 0) for size in decode_ladder(max_rows)]
    for decodes, ladder in prompt_ladders(max_rows, max_tokens):
        shapes += [shape for tokens in ladder for shape in prompt_shapes(decodes, tokens)]
    return shapes


def capture_steps(
    step: StepModel, *, max_rows: int, max_tokens: int, stream: torch.cuda.Stream
) -> tuple[StepGraphs, tuple[PromptLimit, ...]]:
    """Graphs of steps with and without prompts, and the limits of prompts that their times lead to.

    Args:
        step: what to capture. The slots of its pool hold garbage afterwards.
        max_rows: most decodes of a step.
        max_tokens: most tokens of a step.
        stream: to capture on.
    """
    start = time.monotonic()
    graphs = StepGraphs(step, all_shapes(max_rows, max_tokens), stream=stream)
    graphs.capture(prompt_shapes(0, max_tokens)[-1])
    sizes = decode_ladder(max_rows)
    for size in reversed(sizes):
        graphs.capture(StepShape(size, 0, 0))
    quiet = [(size, graphs.measure(StepShape(size, 0, 0))) for size in sizes]
    ring_size = step.states.ring_size
    fold_seconds = {}
    if ring_size:
        buffered = [StepShape(size, 0, 0) for size in prompt_rows(max_rows) if size]
        buffered = [shape for shape in buffered if not graphs.folds_every_token(shape)]
        fold_seconds = {shape.decodes: _fold_seconds(graphs, shape, ring_size) for shape in buffered}
    decoding = time.monotonic()
    seconds: dict[StepShape, float] = {}
    num_shapes = 0
    for decodes, ladder in prompt_ladders(max_rows, max_tokens):
        allowed = allowed_seconds(quiet[bisect_left(sizes, decodes)][1])
        for tokens in ladder:
            shapes = prompt_shapes(decodes, tokens)
            for shape in shapes:
                # Beside the number of spans, which changes no product of matrices, all that it needs has run before.
                graphs.capture(shape, is_loaded=shape.spans > 1)
            num_shapes += len(shapes)
            if not decodes:
                continue  # nobody waits, however long it takes
            # The most spans take longest: each moves a state.
            seconds[shapes[-1]] = graphs.measure(shapes[-1])
            if seconds[shapes[-1]] > allowed:
                break
    logger.info(
        "captured %d steps without prompts in %.2f s, %d with prompts in %.2f s",
        *(len(sizes), decoding - start, num_shapes, time.monotonic() - decoding),
    )
    limits = limit_prompts(quiet, seconds, max_tokens, ring_size=ring_size, fold_seconds=fold_seconds)
    usual = next(limit for limit in limits if limit.decodes == max_rows)
    logger.info(
        "%.0f prompt tokens per second; beside %d decodes a step takes %d of them",
        *(max_tokens / graphs.measure(StepShape(0, max_tokens, 1)), usual.decodes, usual.tokens),
    )
    return graphs, limits


def _fold_seconds(graphs: StepGraphs, shape: StepShape, ring_size: int) -> float:
    """What it takes one more decode of a step to fold its ring."""
    usual = shape.decodes // ring_size
    seconds = graphs.measure(shape, folds=shape.decodes) - graphs.measure(shape, folds=usual)
    return max(0.0, seconds) / (shape.decodes - usual)


def graph_bytes(step: StepModel, *, max_rows: int, max_tokens: int, stream: torch.cuda.Stream) -> int:
    """Memory that :func:`capture_steps` takes at most, in PyTorch's allocator and in the driver.

    Found by capturing the largest steps, and some others, against a few slots: the graphs in use hold the pool's
    address, so they can be captured only when the pool has been sized.
    """
    if max_rows < 1:
        return 0
    shapes = all_shapes(max_rows, max_tokens)
    largest = _largest(max_rows, max_tokens)
    others = [shape for shape in shapes if shape not in largest]
    others = others[:: max(1, len(others) // _PROBES)]
    free_before = _free_bytes(stream.device)
    graphs = StepGraphs(step, shapes, stream=stream)
    for shape in largest:
        graphs.capture(shape)
    free_largest = _free_bytes(stream.device)
    for shape in others:
        graphs.capture(shape)
    each = (free_largest - _free_bytes(stream.device)) // max(1, len(others))
    del graphs
    torch.cuda.empty_cache()
    taken = free_before - free_largest + each * (len(shapes) - len(largest))
    logger.info("graphs of up to %d steps take %.1f MiB", len(shapes), taken / _MiB)
    return taken


def _largest(max_rows: int, max_tokens: int) -> list[StepShape]:
    """Shapes such that no other one to capture needs more memory to compute than all of them."""
    decodes, ladder = prompt_ladders(max_rows, max_tokens)[-1]
    return [
        prompt_shapes(0, max_tokens)[-1],
        prompt_shapes(decodes, ladder[-1])[-1],
        StepShape(max_rows, 0, 0),
    ]


def _free_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free
