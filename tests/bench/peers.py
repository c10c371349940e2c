"""What others take for the work of our kernels, on the same GPU in the same run.

flash-linear-attention's GLA where it is installed (``pip install fla-core``), and softmax attention of the same width
through ``scaled_dot_product_attention``. fla tunes every kernel for every new shape by compiling some 130 variants
for each head size, one after the other, which takes minutes. :func:`precompile` compiles them in parallel processes
beforehand; fla still chooses among all of them, from shorter timings than by default.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence

import torch
import triton

from tests.bench.common import installed
from tests.bench.timing import event_time, graph_time

Heads = tuple[int, int, int, int]
"""Query heads, kv heads, head_k, head_v."""

SOFTMAX_HEAD = 128
FLA = "fla"
_LONG_SECONDS = 0.01


def fla_is_installed() -> bool:
    """Whether flash-linear-attention's kernels can be used."""
    return installed("fla")


def quicken_tuning() -> None:
    """Let Triton's autotuner, which only fla uses here, time each variant for 12 instead of 125 ms."""
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = functools.partial(triton.testing.do_bench, warmup=2, rep=10)  # type: ignore[method-assign]


def precompile(work: Callable[[], None], *, seconds: float) -> float:
    """Fill Triton's cache with every variant that the tuner will want for some work of fla's.

    Args:
        work: to be pickled; does the work in miniature. In the processes that it runs in, kernels are compiled and not
            launched.
        seconds: most time to take; what is not compiled by then is compiled when it is needed.

    Returns:
        Seconds taken.
    """
    start = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    count = max(1, len(os.sched_getaffinity(0)) - 2)
    workers = [spawn.Process(target=_compile_share, args=(index, count, work), daemon=True) for index in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, start + seconds - time.monotonic()))
    for worker in workers:
        worker.kill()
        worker.join()
    return time.monotonic() - start


def _compile_share(index: int, of: int, work: Callable[[], None]) -> None:
    """Compile every of-th variant, and launch none."""
    from triton.runtime.autotuner import Autotuner

    numbers = itertools.count()

    def run(self: Autotuner, *args: object, **kwargs: object) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            if next(numbers) % of == index:
                # A variant that does not compile is the tuner's to find out.
                with contextlib.suppress(Exception):
                    self.fn.run(*args, **(kwargs | config.all_kwargs() | {"warmup": True}))

    Autotuner.run = run
    work()


def touch_kernels(shapes: Sequence[Heads], batches: Sequence[int]) -> None:
    """What :func:`fla_decode` and :func:`fla_prefill` run for these head sizes and prefill batches, for precompile."""
    for heads in shapes:
        fla_decode(heads, 1, 1)[0]()
        for batch in batches:
            fla_prefill(heads, batch, 128)()


def _fla_inputs(heads: Heads, batch: int, length: int) -> list[torch.Tensor]:
    """q, k, v and log decays in bfloat16; fla wants keys, values and gates repeated for every query head."""
    query_heads, _, head_k, head_v = heads
    q, k, g = torch.randn((3, batch, length, query_heads, head_k), device="cuda", dtype=torch.bfloat16)
    v = torch.randn((batch, length, query_heads, head_v), device="cuda", dtype=torch.bfloat16)
    return [q, k, v, -0.4 * g.square()]


def fla_decode(heads: Heads, batch: int, sets: int) -> list[Callable[[], object]]:
    """One call for each of so many sets of states; a state is read from its set and written elsewhere."""
    from fla.ops.gla import fused_recurrent_gla

    query_heads, _, head_k, head_v = heads
    q, k, v, g = _fla_inputs(heads, batch, 1)
    states = torch.randn((sets, batch, query_heads, head_k, head_v), device="cuda")

    def call(state: torch.Tensor) -> Callable[[], object]:
        return lambda: fused_recurrent_gla(q, k, v, g, initial_state=state, output_final_state=True)

    return [call(state) for state in states]


def fla_prefill(heads: Heads, batch: int, length: int) -> Callable[[], object]:
    """``chunk_gla`` from an initial to a final state."""
    from fla.ops.gla import chunk_gla

    query_heads, _, head_k, head_v = heads
    inputs = _fla_inputs(heads, batch, length)
    state = torch.randn((batch, query_heads, head_k, head_v), device="cuda")
    return lambda: chunk_gla(*inputs, initial_state=state, output_final_state=True)


def softmax_backends() -> dict[str, torch.nn.attention.SDPBackend]:
    """Names of the attention kernels to compare with."""
    backends = torch.nn.attention.SDPBackend
    return {"FlashAttention-2": backends.FLASH_ATTENTION, "cuDNN attention": backends.CUDNN_ATTENTION}


def softmax_prefill(width: int, batch: int, length: int, backend: torch.nn.attention.SDPBackend) -> float | None:
    """Microseconds of causal attention of this width over prompts of this length; None if the backend cannot."""
    shape = (3, batch, width // SOFTMAX_HEAD, length, SOFTMAX_HEAD)
    q, k, v = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def call() -> object:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with torch.nn.attention.sdpa_kernel(backend):
        return captured_or_launched(call)


def softmax_decode(width: int, batch: int, context: int) -> float | None:
    """Microseconds of FlashAttention-2 for one new token per sequence, with a contiguous cache of keys and values."""
    heads = width // SOFTMAX_HEAD
    q = torch.randn((batch, heads, 1, SOFTMAX_HEAD), device="cuda", dtype=torch.bfloat16)
    k, v = torch.empty((2, batch, heads, context, SOFTMAX_HEAD), device="cuda", dtype=torch.bfloat16).normal_()

    def call() -> object:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return captured_or_launched(call)


def captured_or_launched(call: Callable[[], object]) -> float | None:
    """Microseconds of a call in a CUDA graph; launched one by one where it cannot be captured or takes long anyway.

    None if it fails, for want of memory or because these sizes are not supported.
    """
    try:
        call()  # compiles, tunes
        torch.cuda.synchronize()
        start = time.monotonic()
        call()
        torch.cuda.synchronize()
        seconds = time.monotonic() - start
    except (RuntimeError, torch.OutOfMemoryError):
        return None
    if seconds > _LONG_SECONDS:
        return event_time(call)
    try:
        return graph_time([call] * 2)
    except RuntimeError:
        torch.cuda.synchronize()
        return event_time(call)
