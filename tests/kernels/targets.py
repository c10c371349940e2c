"""Compiles every Triton kernel for GPUs that are not there, at the sizes chosen for them, and reports what they need.

    python -m tests.kernels.targets 80 86 90 [--model 1.3B]

For each compute capability, in a process of its own: registers, spilled bytes and shared memory of every variant, as
the assembler says, and an error where a program needs more shared memory than such a GPU has. Nothing runs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes that one program may use, by compute capability; CUDA C++ Programming Guide, "Compute Capabilities", less the
kilobyte that the system keeps."""
PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 188}
"""Multiprocessors of A100, A10 / RTX 3090, L40 / RTX 4090, H100, B200, RTX 5090 and the like."""
SHAPES = {"1.3B": (4, 4, 256, 512, 2048), "340M": (4, 4, 128, 256, 1024), "7B": (32, 8, 128, 128, 4096)}
"""Query heads, kv heads, head_k, head_v, hidden size."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled kernel."""

    kernel: str
    registers: int
    spilled: int
    """Bytes of each thread's registers that go to memory and back."""
    shared: int
    """Bytes of shared memory of a program."""
    warps: int


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int, model: str) -> list[Variant]:
    """Every variant of every kernel that a model of this shape needs on a GPU of this kind, in this process."""
    import torch
    import triton
    from triton.runtime import driver

    import server.kernels
    from server.kernels import buffered, decode, gate, linear, mlp, norm, pick, prefill, skinny
    from server.kernels.compiling import compile_together

    variants: list[Variant] = []
    compile_kernel = triton.JITFunction.run
    seen: set[tuple[object, ...]] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_kernel(self, *args, grid=grid, warmup=True, **options)
        if kernel is not None and (key := (kernel.hash,)) not in seen:
            seen.add(key)
            registers, spilled = _resources(kernel.asm["cubin"])
            variants.append(
                Variant(self.__name__, registers, spilled, kernel.metadata.shared, kernel.metadata.num_warps)
            )
        return kernel

    driver.set_active(_Driver(capability))
    early = capability >= 90
    modules = (buffered, decode, gate, linear, mlp, norm, pick, prefill, skinny)
    patches = [
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(
            prefill, "_device_limits", lambda device: (PROCESSORS[capability], SHARED_MEMORY[capability])
        ),
        *(
            mock.patch.object(module, "launches_early", lambda device: early)
            for module in modules
            if hasattr(module, "launches_early")
        ),
    ]
    for patch in patches:
        patch.start()

    def call_all() -> None:
        for call in _calls(server.kernels, model):
            call()

    together = compile_together(call_all, torch.device("cpu"))
    assert not variants, "kernels were to be compiled, not run"
    # There is no driver here that could launch what is compiled now.
    triton.JITFunction.run, patched = compile_kernel, triton.JITFunction.run
    assert compile_together(call_all, torch.device("cpu")) == 0, "a kernel was compiled twice"
    triton.JITFunction.run = patched
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **_: compiled.append(1)
    call_all()
    assert not compiled, "a kernel was compiled that had been compiled ahead"
    assert together == len(variants), "two of the kernels compiled ahead are one"
    return variants


def _calls(ops: Any, model: str) -> Iterator[Callable[[], object]]:
    """Every public operation at the sizes that choose between kernels."""
    import torch

    heads, kv_heads, head_k, head_v, hidden = SHAPES[model]
    inner = hidden * 11 // 4
    bf16 = torch.bfloat16

    def tokens(count: int) -> dict[str, Any]:
        return {
            "q_%sK": torch.zeros((count, heads, head_k), dtype=bf16),
            "k_%sK": torch.zeros((count, kv_heads, head_k), dtype=bf16),
            "v_%sV": torch.zeros((count, kv_heads, head_v), dtype=bf16),
            "gate_%s": ops.LowRankGate(
                torch.zeros((count, 16), dtype=bf16),
                torch.zeros((kv_heads * head_k, 16)),
                torch.zeros(kv_heads * head_k),
                normalizer=16.0,
                clamp_min=None,
            ),
        }

    def state(dtype: torch.dtype, with_ring: bool) -> Any:
        slots, size = 3, ops.ring_size(dtype)
        ring = ops.Ring(
            torch.zeros((slots, kv_heads, size, head_k), dtype=bf16),
            torch.zeros((slots, kv_heads, size, head_v), dtype=bf16),
            torch.zeros((slots, kv_heads, size, head_k)),
        )
        scales = torch.zeros((slots, kv_heads, head_k)) if dtype == torch.uint8 else None
        held = torch.zeros((slots, *ops.held_shape(kv_heads, head_k, head_v, dtype)), dtype=dtype)
        return ops.LayerState.of(held, scales, ring if with_ring else None)

    for spans, length, dtype in ((1, 2048, ops.SPLIT), (16, 128, bf16), (16, 128, torch.uint8)):
        q, k, v, g = tokens(spans * length).values()
        cu_seqlens = torch.arange(0, spans * length + 1, length, dtype=torch.int32)
        slots, from_zero = torch.ones(spans, dtype=torch.int64), torch.zeros(spans, dtype=torch.bool)
        yield lambda i=(q, k, v, g), n=slots, z=from_zero, c=cu_seqlens, s=dtype, m=length: ops.gla_prefill(
            *i, state(s, True), n, z, c, scale=1.0, max_length=m
        )
    for rows in (1, 300):
        q, k, v, g = tokens(rows).values()
        slots, from_zero = torch.ones(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
        pending, num_folding = torch.zeros(rows, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for dtype in (*ops.STATE_DTYPES.values(), ops.SPLIT):
            for folds in (num_folding, None) if dtype in (torch.float32, ops.SPLIT) else (num_folding,):
                ring_rows = ops.RingRows(pending, folds)
                yield lambda i=(q, k, v, g), s=dtype, n=slots, z=from_zero, r=ring_rows: ops.gla_decode(
                    *i, state(s, True), n, z, scale=1.0, rows=r
                )
    for rows in (1, 2, 40, 100, 200, 2048):
        x, norm_weight = torch.zeros((rows, hidden), dtype=bf16), torch.ones(hidden, dtype=bf16)
        weight, packed = torch.zeros((hidden, hidden), dtype=bf16), torch.zeros((2 * inner, hidden), dtype=bf16)
        down, h = torch.zeros((hidden, inner), dtype=bf16), torch.zeros((rows, inner), dtype=bf16)
        parts, wanted = torch.zeros((4, rows, hidden)), torch.zeros(rows, dtype=torch.int64)
        for addends in (None, parts):
            yield lambda x=x, n=norm_weight, w=weight, p=addends, r=wanted: ops.norm_linear(
                x, n, w, eps=1e-6, addends_STD=p, rows_R=r
            )
        yield lambda x=x, n=norm_weight, w=packed: ops.norm_swiglu(x, n, w, eps=1e-6)
        yield lambda x=x, h=h, w=down: ops.linear_add_(x, h, w)
        o = torch.zeros((rows, heads, head_v), dtype=bf16)
        yield lambda o=o: ops.norm_gate(o, None, torch.zeros((o.shape[0], heads * head_v), dtype=bf16), eps=1e-6)
    for rows in (1, 2048):
        low_rank, gate_weight = torch.zeros((rows, 16), dtype=bf16), torch.zeros((kv_heads * head_k, 16))
        yield lambda r=low_rank, w=gate_weight: ops.log_decay(
            r, w, torch.zeros(w.shape[0]), normalizer=16.0, clamp_min=None
        )
    slots, flags = torch.zeros(4, dtype=torch.int64), torch.zeros((5, 32000), dtype=torch.uint8)
    yield lambda: ops.pick_greedy(
        torch.zeros((4, 32000)), slots, flags, torch.zeros(5, dtype=torch.int64), torch.zeros(5).bool(), stop_flag=2
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as Triton's own cuobjdump reads them from the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers and stack, text
    return int(registers[1]), int(stack[1])


def compile_apart(capability: int, model: str) -> list[Variant]:
    """As :func:`compile_all`, in a new process: this one may have loaded Triton's interpreter."""
    command = [sys.executable, "-m", "tests.kernels.targets", "--one", f"{capability}", "--model", model]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"compute capability {capability}: {done.stderr[-2000:]}")
    return [Variant(**variant) for variant in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", type=int, nargs="*", default=list(SHARED_MEMORY))
    parser.add_argument("--model", default="1.3B", choices=SHAPES)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        variants = compile_all(args.one, args.model)
        print(json.dumps([{name: getattr(v, name) for name in Variant.__slots__} for v in variants]))
        return
    failed = False
    for capability in args.capabilities:
        print(f"\ncompute capability {capability}: at most {SHARED_MEMORY[capability]:,} bytes of shared memory")
        for variant in compile_apart(capability, args.model):
            too_large = variant.shared > SHARED_MEMORY[capability]
            failed |= too_large
            print(
                f"{variant.kernel:>20} {variant.warps:2} warps {variant.registers:4} registers "
                f"{variant.spilled:6} bytes spilled {variant.shared:8} shared{'  TOO LARGE' if too_large else ''}"
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
