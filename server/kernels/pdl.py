"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits for its results itself.

From compute capability 9.0 on, a kernel launched with ``launch_pdl`` starts as soon as every program of its predecessor
has started. What it may do before it waits is what depends on no earlier kernel: launch overhead, and reading weights.
Every kernel launched so must call :func:`await_previous` in every program: it returns when the predecessor has
completed, which had itself waited for its own, so that everything launched earlier has completed as well.
"""

# Triton's decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@cache
def launches_early(device: torch.device) -> bool:
    """Whether kernels on this device are launched before their predecessors have completed."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def start_next(EARLY: tl.constexpr):
    """Let the next kernel start, once every program of this one has called this."""
    if EARLY:
        cuda.gdc_launch_dependents()


@triton.jit
def await_previous(EARLY: tl.constexpr):
    """Wait until all earlier kernels have completed; their results can be read, and memory be overwritten."""
    if EARLY:
        cuda.gdc_wait()
