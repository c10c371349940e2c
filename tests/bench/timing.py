"""Times on the GPU: CUDA-graph replays, and the rates of the device itself."""

from collections.abc import Callable, Sequence

import torch
import triton

_WARMUP_MS, _MEASURE_MS = 10, 60


def graph_time(calls: Sequence[Callable[[], object]], *, measure_ms: int = _MEASURE_MS) -> float:
    """Median microseconds of one call, all of them being captured in one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return event_time(graph.replay, measure_ms=measure_ms) / len(calls)


def event_time(call: Callable[[], object], *, measure_ms: int = _MEASURE_MS) -> float:
    """Median microseconds of one call between two events on the device, launches included."""
    median = triton.testing.do_bench(call, warmup=_WARMUP_MS, rep=measure_ms, return_mode="median")
    return float(median) * 1e3


def copy_rate() -> float:
    """GB/s of a copy within the device's memory, bytes read and written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / event_time(lambda: target.copy_(source)) / 1e3


def read_rate() -> float:
    """GB/s at which the device reads its memory, to form a sum."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    return source.nbytes / event_time(lambda: torch.sum(source)) / 1e3


def product_rate() -> float:
    """TFLOP/s of a large product of bfloat16 matrices."""
    size = 8192
    a, b = torch.randn((2, size, size), device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / event_time(lambda: a @ b) / 1e6
