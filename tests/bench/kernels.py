"""Times of the kernels on one GPU, one layer at a time, beside the peers'. Medians of CUDA-graph replays, random data.

    python -m tests.bench.kernels [--shapes 1.3B,7B] [--ops decode,prefill] [--json FILE] [--plot FILE]
    python -m tests.bench.kernels --sweep                             other sizes than those chosen by shape

Decode rotates through states of half a gigabyte and more, so that every state comes from memory and not from the
cache; its floor is the least that a step must move, at the rate of a copy. Prefill's floor is the larger of the bytes
(queries, keys, values, gates and outputs, 16 bits each, once) and of the products at the rate of a large one. The last
table is one token at the end of a context: softmax attention reads all keys and values, GLA its state.

The peers are flash-linear-attention, where it is installed, and softmax attention (:mod:`tests.bench.peers`);
``--no-peers`` leaves them out, ``--peer-seconds`` bounds what compiling fla in advance may take.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import triton

from server.kernels import (
    SPLIT,
    STATE_DTYPES,
    LayerState,
    Ring,
    RingRows,
    buffered,
    decode,
    folds_every_token,
    prefill,
    ring_size,
    state_itemsize,
)
from tests.bench import peers
from tests.bench.common import Row, add_output_flags, environment, finish, pivot, print_table
from tests.bench.timing import copy_rate, graph_time, product_rate, read_rate

HEADS: dict[str, peers.Heads] = {"1.3B": (4, 4, 256, 512), "340M": (4, 4, 128, 256), "7B": (32, 8, 128, 128)}
WIDTHS = {"1.3B": 2048, "340M": 1024, "7B": 4096}
CURVES = "1.3B"
"""The shape that is measured at many sizes; for the others, a few must do."""
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PREFILL_BATCHES = ((16, 2048), (8, 2048), *((1, 1 << exponent) for exponent in range(10, 18)))
FEW_DECODE_BATCHES = (1, 8, 64, 256, 1024)
FEW_PREFILL_BATCHES = ((16, 2048), (8, 2048), (1, 2048), (1, 8192))
CONTEXT_BATCH = 8
CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
SWEEP_BATCHES = ((1, 2048), (1, 8192), (16, 2048))
ROTATED_BYTES = 2**29
GALE = "gale"
_Size = TypeVar("_Size")


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


@dataclass(frozen=True, slots=True)
class DecodeVariant:
    """One way to decode, a column of the table."""

    name: str
    time: Callable[[str, int], tuple[float, int]]
    """Microseconds by shape and batch, and the least bytes of states that must move."""


def time_decode(
    model: str,
    batch: int,
    dtype: str = "float32",
    *,
    in_place: bool | None = None,
    plan: decode.DecodePlan | buffered.BufferedPlan | None = None,
) -> tuple[float, int]:
    """Microseconds, and the least bytes that must move: states, and for those with rings what these hold.

    Args:
        dtype: of the states.
        in_place: update states with every token, or buffer tokens in rings; None: as the engine would.
        plan: sizes of the kernel's programs; None: as chosen by shape.
    """
    _, kv_heads, head_k, head_v = HEADS[model]
    x = make_inputs(model, batch, 1)
    # As the engine holds those of a bfloat16 model.
    held_dtype = SPLIT if dtype == "float32" else STATE_DTYPES[dtype]
    one = kv_heads * head_k * head_v * state_itemsize(held_dtype)
    sets = num_sets(batch * one)
    slots = 1 + torch.randperm(sets * batch, device="cuda").view(sets, batch)
    state = _random_state(model, 1 + sets * batch, held_dtype)
    if folds_every_token(batch, state) if in_place is None else in_place:
        assert plan is None or isinstance(plan, decode.DecodePlan)
        calls = [
            partial(
                decode.gla_decode,
                x.q,
                x.k,
                x.v,
                x.g,
                state,
                row,
                x.from_zero,
                scale=head_k**-0.5,
                plan=plan,
            )
            for row in slots
        ]
        return graph_time(repeated(calls)), 2 * batch * one
    assert plan is None or isinstance(plan, buffered.BufferedPlan)
    # Rings in all phases, as those of requests that came at different times; those that fold come first.
    size = ring_size(held_dtype)
    pending = torch.randperm(batch, device="cuda") % size
    full = pending == size - 1
    rows = RingRows(torch.cat((pending[full], pending[~full])), full.sum().view(1))

    def call(row: torch.Tensor) -> None:
        buffered.gla_decode(x.q, x.k, x.v, x.g, state, row, x.from_zero, rows, scale=head_k**-0.5, plan=plan)

    def last_call(row: torch.Tensor) -> None:
        call(row)
        buffered.join_folds(row.device)

    # As in a model, the fold of one call runs beside the next.
    calls = repeated([partial(call, row) for row in slots])
    calls[-1] = partial(last_call, slots[-1])
    entry = kv_heads * (head_k * 6 + head_v * 2)
    read = one // 2 if held_dtype == SPLIT else one
    return graph_time(calls), batch * (read + (one - read + one) // size) + int(pending.sum()) * entry


def _random_state(model: str, slots: int, dtype: torch.dtype) -> LayerState:
    """States and rings with something in them."""
    _, kv_heads, head_k, head_v = HEADS[model]
    size = ring_size(dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn((slots, kv_heads, *shape), device="cuda", dtype=torch.bfloat16)

    scales = None
    if dtype == torch.uint8:
        held = torch.randint(1, 256, (slots, kv_heads, head_k, head_v), device="cuda", dtype=dtype)
        scales = torch.full((slots, kv_heads, head_k), 1 / 64, device="cuda")
    elif dtype == SPLIT:
        held = torch.randint(-(2**15), 2**15, (slots, 2, kv_heads, head_k, head_v), device="cuda", dtype=dtype)
        held[:, 0].view(torch.bfloat16).normal_()
    else:
        held = torch.randn((slots, kv_heads, head_k, head_v), device="cuda", dtype=dtype)
    decays = -0.4 * torch.arange(1, size + 1, device="cuda").float().view(1, 1, size, 1)
    ring = Ring(normal(size, head_k), normal(size, head_v), decays.expand(slots, kv_heads, -1, head_k).contiguous())
    return LayerState.of(held, scales, ring)


def time_prefill(
    model: str, spans: int, length: int, plan: prefill.PrefillPlan | None = None, segment_length: int | None = None
) -> float:
    """Microseconds, with other sizes than those chosen by shape if they are given."""
    head_k = HEADS[model][2]
    x = make_inputs(model, spans, length)
    state = _random_state(model, 1 + spans, SPLIT)
    slots = 1 + torch.randperm(spans, device="cuda")

    def call() -> object:
        return prefill.gla_prefill(
            *(x.q, x.k, x.v, x.g, state, slots, x.from_zero, x.cu_seqlens),
            scale=head_k**-0.5,
            max_length=length,
            plan=plan,
            segment_length=segment_length,
        )

    return graph_time([call] * 4)


DECODE_VARIANTS = tuple(DecodeVariant(f"{GALE} {dtype}", partial(time_decode, dtype=dtype)) for dtype in STATE_DTYPES)


def num_sets(state_bytes: int) -> int:
    """How many sets of states of a batch to rotate through."""
    return -(-ROTATED_BYTES // state_bytes)


def repeated(calls: list[Callable[[], object]]) -> list[Callable[[], object]]:
    """At least 8 calls, so that a graph's own launch does not count, and at most 128."""
    return (calls * -(-8 // len(calls)))[:128]


def _sizes(shapes: list[str], many: Sequence[_Size], few: Sequence[_Size]) -> Iterator[tuple[str, _Size]]:
    """Every size to measure for each shape."""
    return ((model, size) for model in shapes for size in (many if model == CURVES else few))


def decode_rows(shapes: list[str], *, copy: float, with_fla: bool) -> Iterator[Row]:
    """One row per shape, batch and way to decode."""
    for model, batch in _sizes(shapes, DECODE_BATCHES, FEW_DECODE_BATCHES):
        for variant in DECODE_VARIANTS:
            microseconds, moved = variant.time(model, batch)
            yield {
                "op": "decode",
                "shape": model,
                "batch": batch,
                "implementation": variant.name,
                "us": microseconds,
                "GB/s": moved / microseconds / 1e3,
                "floor us": moved / copy / 1e3,
            }
        if with_fla:
            heads, _, head_k, head_v = HEADS[model]
            calls = peers.fla_decode(HEADS[model], batch, num_sets(4 * batch * heads * head_k * head_v))
            yield {
                "op": "decode",
                "shape": model,
                "batch": batch,
                "implementation": peers.FLA,
                "us": graph_time(repeated(calls)),
            }


def prefill_floor(model: str, tokens: int, *, copy: float, product: float) -> float:
    """Microseconds: see the module's docstring. Scores count for chunks of 64 tokens."""
    heads, kv_heads, head_k, head_v = HEADS[model]
    moved = 2 * (heads * head_k + 2 * kv_heads * head_k + kv_heads * head_v + heads * head_v)
    flops = heads * (2 * head_k * head_v + 64 * (head_k + head_v)) + kv_heads * 2 * head_k * head_v
    return tokens * max(moved / copy / 1e3, flops / product / 1e6)


def prefill_rows(shapes: list[str], *, copy: float, product: float, with_fla: bool, with_peers: bool) -> Iterator[Row]:
    """One row per shape, batch of prompts and way to absorb them."""
    for model, (spans, length) in _sizes(shapes, PREFILL_BATCHES, FEW_PREFILL_BATCHES):
        timed: dict[str, float | None] = {GALE: time_prefill(model, spans, length)}
        if with_fla:
            timed[peers.FLA] = peers.captured_or_launched(peers.fla_prefill(HEADS[model], spans, length))
        if with_peers:
            for name, backend in peers.softmax_backends().items():
                timed[name] = peers.softmax_prefill(WIDTHS[model], spans, length, backend)
        for name, microseconds in timed.items():
            yield {
                "op": "prefill",
                "shape": model,
                "spans": spans,
                "length": length,
                "implementation": name,
                "us": microseconds,
                "ns/token": microseconds and microseconds * 1e3 / (spans * length),
                "floor us": prefill_floor(model, spans * length, copy=copy, product=product),
            }


def context_rows(shapes: list[str]) -> Iterator[Row]:
    """One new token for each of a few sequences, by the length of what came before."""
    for model in {CURVES}.intersection(shapes):
        ours = {variant.name: variant.time(model, CONTEXT_BATCH)[0] for variant in DECODE_VARIANTS}
        for context in CONTEXTS:
            row: Row = {"op": "context", "shape": model, "batch": CONTEXT_BATCH, "context": context}
            for name, microseconds in ours.items():
                yield row | {"implementation": name, "us": microseconds}
            softmax = peers.softmax_decode(WIDTHS[model], CONTEXT_BATCH, context)
            yield row | {"implementation": "FlashAttention-2", "us": softmax}


def print_rows(rows: list[Row]) -> None:
    """One line for each shape and size, one column for each way, and ratios to ours and to the floor."""
    for op, keys in (("decode", ["batch"]), ("prefill", ["spans", "length"]), ("context", ["batch", "context"])):
        chosen = [row for row in rows if row["op"] == op]
        if not chosen:
            continue
        names = list(dict.fromkeys(str(row["implementation"]) for row in chosen))
        lines = pivot(chosen, ["shape", *keys], "implementation", "us")
        firsts = [row for row in chosen if row["implementation"] == names[0]]
        extra = []
        for line, first in zip(lines, firsts, strict=True):
            own = first["us"]
            assert isinstance(own, float)
            for name in ("GB/s", "ns/token"):
                if name in first:
                    line[name] = first[name]
                    extra.append(name)
            if isinstance(floor := first.get("floor us"), float):
                line["x floor"] = own / floor
                extra.append("x floor")
            for name in names[1:]:
                if isinstance(theirs := line.get(name), float):
                    line[f"{name} / ours"] = theirs / own
                    extra.append(f"{name} / ours")
        print(f"\n{op}: microseconds; further columns are of {names[0]}, or relate to it")
        print_table(lines, ["shape", *keys, *names, *dict.fromkeys(extra)])


def sweep(shapes: list[str]) -> Iterator[dict[str, object]]:
    """One row for each candidate of sizes; those that do not fit the device are left out."""
    for model in shapes:
        _, _, head_k, head_v = HEADS[model]
        chosen_decode = decode.plan_decode(head_k, head_v)
        for block_v, warps in itertools.product((16, 32, 64, 128), (2, 4, 8)):
            if not 1024 <= head_k * block_v // warps <= 4096:
                continue
            decode_plan = replace(chosen_decode, block_v=block_v, num_warps=warps)
            times = {f"{batch}": time_decode(model, batch, in_place=True, plan=decode_plan)[0] for batch in (1, 16, 32)}
            yield {"op": "decode", "shape": model, **times, "plan": f"{decode_plan}"}
        yield from _sweep_buffered(model)
        yield from _sweep_prefill(model)


def _sweep_prefill(model: str) -> Iterator[dict[str, object]]:
    heads, kv_heads, head_k, head_v = HEADS[model]
    _, shared_memory = prefill._device_limits(torch.device("cuda", 0))
    chosen = prefill.plan_prefill(head_k, head_v, heads // kv_heads, 2, shared_memory)
    plans = [replace(chosen, prepare_registers=registers) for registers in (None, 168, 128)]
    for chunk, stages, (block_v, transposed, warps) in itertools.product((16, 32), (2, 3, 4), prefill.WALK_TILES):
        sizes = {"chunk": chunk, "walk_stages": stages, "block_v": block_v}
        plans.append(replace(chosen, **sizes, transposed=transposed, walk_warps=warps))
    candidates = [(plan, None) for plan in plans] + [(chosen, length) for length in (128, 256, 512, 1024, 2048)]
    for plan, segment_length in candidates:
        try:
            times = {
                f"{n} x {length}": time_prefill(model, n, length, plan, segment_length) for n, length in SWEEP_BATCHES
            }
        except triton.runtime.errors.OutOfResources:
            continue
        yield {"op": "prefill", "shape": model, **times, "plan": f"{plan}", "segment": f"{segment_length}"}


def _sweep_buffered(model: str) -> Iterator[dict[str, object]]:
    heads, kv_heads, head_k, head_v = HEADS[model]
    for dtype, state_dtype in STATE_DTYPES.items():
        held_dtype = SPLIT if dtype == "float32" else state_dtype
        chosen = buffered.plan_buffered(head_k, head_v, heads // kv_heads, held_dtype)
        plans = [
            replace(chosen, read_k=read_k, read_v=read_v, read_warps=warps, read_stages=stages)
            for read_k, read_v, warps, stages in ((16, 128, 1, 4), (16, 128, 1, 3), (32, 64, 2, 3), (32, 128, 2, 3))
        ]
        plans += [replace(chosen, score_c=entries, score_warps=warps) for entries, warps in ((4, 1), (8, 4), (16, 4))]
        if dtype != "int8":
            plans += [
                replace(chosen, fold_k=32, fold_warps=4),
                replace(chosen, fold_k=64, fold_v=64, fold_warps=4),
                *(replace(chosen, fold_programs=programs) for programs in (2, 4, 8, 16)),
            ]
        plans += [replace(chosen, fold_part=part, fold_stages=stages) for part, stages in ((64, 3), (128, 1), (256, 3))]
        for plan in plans:
            times = {f"{batch}": time_decode(model, batch, dtype, in_place=False, plan=plan)[0] for batch in (32, 256)}
            yield {"op": f"decode {dtype}", "shape": model, **times, "plan": f"{plan}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other sizes than those chosen by shape")
    parser.add_argument("--shapes", default=",".join(HEADS), help="which of them, by default %(default)s")
    parser.add_argument("--ops", default="decode,prefill,context", help="which of them, by default %(default)s")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--peer-seconds", type=float, default=60, help="for compiling fla; by default %(default)s")
    add_output_flags(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    env = environment()
    shapes, ops = args.shapes.split(","), args.ops.split(",")
    if args.sweep:
        for row in sweep(shapes):
            cells = (f"{k} {v:9.2f}" if isinstance(v, float) else f"{v!s:>9}" for k, v in row.items())
            print("  ".join(cells), flush=True)
        return
    with_peers = not args.no_peers
    with_fla = with_peers and peers.fla_is_installed()
    if with_fla:
        batches = sorted({spans for spans, _ in PREFILL_BATCHES})
        touch = functools.partial(peers.touch_kernels, [HEADS[shape] for shape in shapes], batches)
        seconds = peers.precompile(touch, seconds=args.peer_seconds)
        peers.quicken_tuning()
        print(f"fla's kernels compiled in {seconds:.0f} s")
    copy, read, product = copy_rate(), read_rate(), product_rate()
    print(f"{env['device']}; copy {copy:.0f} GB/s, read {read:.0f} GB/s, bfloat16 product {product:.0f} TFLOP/s")
    rows: list[Row] = []
    if "decode" in ops:
        rows += decode_rows(shapes, copy=copy, with_fla=with_fla)
    if "prefill" in ops:
        rows += prefill_rows(shapes, copy=copy, product=product, with_fla=with_fla, with_peers=with_peers)
    if "context" in ops and with_peers:
        rows += context_rows(shapes)
    print_rows(rows)
    rates = {"copy GB/s": copy, "read GB/s": read, "product TFLOP/s": product}
    finish(args, "kernels", env, {"rates": rates, "rows": rows})


if __name__ == "__main__":
    main()
