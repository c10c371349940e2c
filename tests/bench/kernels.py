"""Times of the Triton kernels on one GPU, one layer at a time: medians of CUDA-graph replays on random data.

    python -m tests.bench.kernels [--shapes 1.3B,7B] [--json FILE]    the sizes chosen by shape
    python -m tests.bench.kernels --sweep                             other sizes, to choose them by

Decode rotates through states of half a gigabyte and more, so that every state comes from memory and not from the
cache. GB/s counts each state once read and once written.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from server.kernels import decode, prefill

HEADS = {"1.3B": (4, 4, 256, 512), "340M": (4, 4, 128, 256), "7B": (32, 8, 128, 128)}
DECODE_BATCHES = (1, 8, 64, 256)
PREFILL_BATCHES = ((1, 2048), (1, 8192), (16, 2048))
ROTATED_BYTES = 2**29


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of N spans of the same length, or of N rows if the length is 1."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    from_zero: torch.Tensor
    cu_seqlens: torch.Tensor
    length: int


def make_inputs(model: str, spans: int, length: int) -> Inputs:
    """Slices of one bfloat16 projection, as in the model, and gates as trained ones are distributed."""
    heads, kv_heads, head_k, head_v = HEADS[model]
    tokens = spans * length
    widths = [heads * head_k, kv_heads * head_k, kv_heads * head_v]
    q, k, v = torch.randn((tokens, sum(widths)), device="cuda", dtype=torch.bfloat16).split(widths, dim=1)
    return Inputs(
        q=q.unflatten(1, (heads, head_k)),
        k=k.unflatten(1, (kv_heads, head_k)),
        v=v.unflatten(1, (kv_heads, head_v)),
        g=-0.4 * torch.rand((tokens, kv_heads, head_k), device="cuda").clamp_min(1e-8).log().square(),
        from_zero=torch.zeros(spans, dtype=torch.bool, device="cuda"),
        cu_seqlens=torch.arange(0, tokens + 1, length, device="cuda", dtype=torch.int32),
        length=length,
    )


def graph_time(calls: list[Callable[[], object]]) -> float:
    """Median microseconds of one call, all of them being captured in one graph."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return float(triton.testing.do_bench(graph.replay, warmup=50, rep=200, return_mode="median")) * 1e3 / len(calls)


def time_decode(model: str, batch: int, plan: decode.DecodePlan | None = None) -> tuple[float, int]:
    """Microseconds, and bytes of states moved."""
    _, kv_heads, head_k, head_v = HEADS[model]
    inputs = make_inputs(model, batch, 1)
    moved = 2 * 4 * batch * kv_heads * head_k * head_v
    sets = -(-2 * ROTATED_BYTES // moved)
    pool = torch.randn((1 + sets * batch, kv_heads, head_k, head_v), device="cuda")
    slots = 1 + torch.randperm(sets * batch, device="cuda").view(sets, batch)

    def call(row: torch.Tensor) -> Callable[[], object]:
        return lambda: decode.gla_decode(
            inputs.q, inputs.k, inputs.v, inputs.g, pool, row, inputs.from_zero, scale=head_k**-0.5, plan=plan
        )

    calls = [call(row) for row in slots]
    return graph_time(calls * -(-8 // len(calls))), moved


def time_prefill(model: str, spans: int, length: int, plan: prefill.PrefillPlan | None = None) -> float:
    """Microseconds."""
    _, kv_heads, head_k, head_v = HEADS[model]
    x = make_inputs(model, spans, length)
    pool = torch.randn((1 + spans, kv_heads, head_k, head_v), device="cuda")
    slots = 1 + torch.randperm(spans, device="cuda")

    def call() -> object:
        return prefill.gla_prefill(
            *(x.q, x.k, x.v, x.g, pool, slots, x.from_zero, x.cu_seqlens),
            scale=head_k**-0.5,
            max_length=length,
            plan=plan,
        )

    return graph_time([call] * 4)


def copy_rate() -> float:
    """GB/s of a copy within the device's memory, bytes read and written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.nbytes / milliseconds / 1e6


def chosen_sizes(shapes: list[str]) -> Iterator[dict[str, object]]:
    """One row of the table for each operation, shape and batch."""
    for model, batch in itertools.product(shapes, DECODE_BATCHES):
        microseconds, moved = time_decode(model, batch)
        yield {
            "op": "decode",
            "shape": model,
            "batch": f"{batch}",
            "us": microseconds,
            "GB/s": moved / microseconds / 1e3,
        }
    for model, (spans, length) in itertools.product(shapes, PREFILL_BATCHES):
        microseconds = time_prefill(model, spans, length)
        yield {
            "op": "prefill",
            "shape": model,
            "batch": f"{spans} x {length}",
            "us": microseconds,
            "ns/token": microseconds * 1e3 / (spans * length),
        }


def sweep(shapes: list[str]) -> Iterator[dict[str, object]]:
    """One row for each candidate of sizes; those that do not fit the device are left out."""
    for model in shapes:
        _, kv_heads, head_k, head_v = HEADS[model]
        chosen_decode = decode.plan_decode(head_k, head_v)
        for block_v, warps in itertools.product((16, 32, 64, 128), (2, 4, 8)):
            if not 1024 <= head_k * block_v // warps <= 4096:
                continue
            decode_plan = replace(chosen_decode, block_v=block_v, num_warps=warps)
            times = {f"{batch}": time_decode(model, batch, decode_plan)[0] for batch in (1, 64, 256)}
            yield {"op": "decode", "shape": model, **times, "plan": f"{decode_plan}"}
        chosen = prefill.plan_prefill(head_k, head_v, HEADS[model][0] // kv_heads, 2, 232448)
        candidates = [replace(chosen, prepare_block_k=bk, prepare_warps=w) for bk, w in ((16, 8), (32, 8), (64, 8))]
        for chunk, stages, block_v, warps in itertools.product((64, 32), (1, 2, 3), (32, 64, 128), (4, 8)):
            if 1024 <= head_k * block_v // warps <= 4096:
                sizes = {"chunk": chunk, "walk_stages": stages, "block_v": block_v, "walk_warps": warps}
                candidates.append(replace(chosen, **sizes))
        for plan in candidates:
            try:
                times = {f"{n} x {length}": time_prefill(model, n, length, plan) for n, length in PREFILL_BATCHES[1:]}
            except triton.runtime.errors.OutOfResources:
                continue
            yield {"op": "prefill", "shape": model, **times, "plan": f"{plan}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other sizes than those chosen by shape")
    parser.add_argument("--shapes", default=",".join(HEADS), help="which of them, by default %(default)s")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    print(f"{device}; torch {torch.__version__}, triton {triton.__version__}; copy {copy_rate():.0f} GB/s")
    rows = []
    shapes = options.shapes.split(",")
    for row in sweep(shapes) if options.sweep else chosen_sizes(shapes):
        rows.append(row)
        print("  ".join(f"{k} {v:9.2f}" if isinstance(v, float) else f"{v!s:>9}" for k, v in row.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
