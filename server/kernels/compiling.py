"""Compiles the kernels of a piece of work side by side, before any of them runs.

Triton compiles a kernel when it is first launched, one after the other, and up to version 3.6 the C that launches it:
some forty variants, whose time goes largely into the assembler and the C compiler, processes of their own. Here the
work is gone through once without launching anything, which says what it needs, and all of that is compiled by threads.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
import triton
from triton import knobs

MAX_THREADS: Final = 16
"""More do not help: what the compiler does in Python, one thread does at a time."""


def compile_together(work: Callable[[], object], device: torch.device) -> int:
    """Compile what a piece of work launches, as far as this process has not; how many kernels those were.

    Args:
        work: runs with no kernel of Triton's launched, compiled or not: what they would write is garbage, and it must
            not look at that. Everything else in it, PyTorch's own operations among it, does run.
        device: whose kernels they are.

    Raises:
        Exception: what the compiler says of the first kernel that cannot be compiled.
    """
    wanted: dict[tuple[int, str], Callable[[], Any]] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        kernel, data = fn.jit_function, compile["specialization_data"]
        wanted.setdefault((id(kernel), compile["key"]), lambda: kernel.preload(data))
        return True

    def compile_one(preload: Callable[[], Any]) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is a thread's own
        kernel = preload()
        if device.type == "cuda" and kernel is not None:
            # Asked for what launches it, it is loaded, and that is compiled: by a C compiler, up to Triton 3.6.
            _ = kernel.run

    run = triton.JITFunction.run

    def run_nothing(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        # The hook is not asked about kernels that are compiled, and they would take what others have not written.
        return run(self, *args, grid=grid, warmup=True, **options)

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    triton.JITFunction.run = run_nothing
    try:
        work()
    finally:
        knobs.runtime.jit_cache_hook = before
        triton.JITFunction.run = run
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as threads:
        list(threads.map(compile_one, wanted.values()))
    return len(wanted)
