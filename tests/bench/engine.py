"""Speed of the bare engine: no HTTP, no processes.

    python -m tests.bench.engine [--model FOLDER] [--load-format dummy] [--ops decode,mixed] [--json FILE] [--plot FILE]

decode      so many sequences decode at once (``--batch``): the time of a step, tokens per second
prefill     prompts of several lengths, one token sampled from each: prompt tokens per second
mixed       running requests while prompts of 8192 tokens arrive one behind the other: the time between their tokens,
            against the same without arrivals
context     one sequence after contexts of 1,000 to 1,000,000 tokens: the time per token; the first one again at the end
fla         only if named, since its kernels take a minute or more to compile: decode of flash-linear-attention's own
            model, see :mod:`tests.bench.fla_model`
profile     only if named: the device time of every kernel in a decoding step, by batch size, and in a step that is
            full of prompts
gaps        only if named: how long the device idles from one step's last kernel to the next one's first, by batch size,
            while all decode, and with prompts as in mixed
workload    ``--streams`` requests at once from submission to the last token, as :mod:`tests.bench.http` sends them

Steps are timed on the host, from one return of ``Engine.step`` to the next.
"""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from server.child import keep_loaded
from server.component_settings import EngineConfig
from server.engine.engine import Engine
from server.settings import Settings
from server.types import GenerateRequest, SamplingParams, pack_tokens
from tests.bench.common import Row, add_output_flags, environment, finish, print_table

DEFAULT_MODEL = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"
CLIENT = b"bench"
SETTLING_STEPS = 3
ARRIVING_PROMPT = 8192


class Bench:
    """An engine, and what the operations share.

    Args:
        engine: nothing runs in it.
        sampling: fields of :class:`SamplingParams` for every request.
    """

    def __init__(self, engine: Engine, sampling: dict[str, float]) -> None:
        self.engine = engine
        self._sampling = sampling
        self._ids = itertools.count()
        self._rng = random.Random(0)

    def submit(self, prompt_length: int, max_tokens: int | None) -> int:
        """Queue a request with a random prompt; its id."""
        request_id = next(self._ids)
        prompt = self._rng.choices(range(self.engine.info.vocab_size), k=prompt_length)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **self._sampling)  # type: ignore[arg-type]
        request = GenerateRequest(
            request_id=request_id, prompts=(pack_tokens(prompt),), params=params, arrived=time.monotonic()
        )
        self.engine.submit(CLIENT, request)
        return request_id

    def step(self) -> None:
        self.engine.step()
        self.engine.take_outputs()

    def absorb(self) -> None:
        """Step until no prompt is left, and a little further, so that steps overlap as they do in the long run."""
        while self.engine.scheduler.waiting or any(seq.prompt_remaining for seq in self.engine.scheduler.running):
            self.step()
        for _ in range(SETTLING_STEPS):
            self.step()

    def times(self, go_on: Callable[[int], bool]) -> list[float]:
        """Seconds of each step; ``go_on`` is asked before each, with the number of steps made."""
        times: list[float] = []
        last = time.perf_counter()
        while go_on(len(times)):
            self.step()
            now = time.perf_counter()
            times.append(now - last)
            last = now
        return times

    def decode_times(self, steps: int) -> list[float]:
        """Seconds of so many steps, in which whoever runs decodes and nobody may leave."""
        running = len(self.engine.scheduler.running)
        times = self.times(lambda done: done < steps)
        assert len(self.engine.scheduler.running) == running, "a sequence ended while the clock ran"
        return times

    def drain(self) -> None:
        """Step until nothing is left to do."""
        while self.engine.has_work():
            self.step()

    def clear(self) -> None:
        """End everything."""
        self.engine.cancel(CLIENT, [seq.request_id for seq in [*self.engine.scheduler.running]])
        self.drain()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(times: Sequence[float]) -> Row:
    """Median and 99th percentile."""
    ordered = sorted(times)
    return {"ms median": statistics.median(ordered) * 1e3, "ms p99": ordered[int(len(ordered) * 0.99)] * 1e3}


def decode_rows(bench: Bench, batches: Sequence[int], prompt_length: int, steps: int) -> Iterator[Row]:
    """Tokens per second by batch size."""
    for batch in batches:
        for _ in range(batch):
            bench.submit(prompt_length, None)
        bench.absorb()
        times = bench.decode_times(steps)
        bench.clear()
        yield {"op": "decode", "batch": batch, "tokens/s": batch * steps / sum(times), **milliseconds(times)}


def prefill_rows(bench: Bench, lengths: Sequence[int], total: int) -> Iterator[Row]:
    """Prompt tokens per second by prompt length."""
    for length in lengths:
        count = -(-total // length)
        for _ in range(count):
            bench.submit(length, 1)
        synchronize()
        start = time.perf_counter()
        bench.drain()
        synchronize()
        seconds = time.perf_counter() - start
        yield {"op": "prefill", "prompts": count, "length": length, "tokens/s": count * length / seconds}


def mixed_rows(bench: Bench, batches: Sequence[int], prompts: int, steps: int) -> Iterator[Row]:
    """Time between the tokens of running requests, alone and while prompts arrive without a pause."""
    for batch in batches:
        for _ in range(batch):
            bench.submit(64, None)
        bench.absorb()
        quiet = bench.decode_times(steps)
        arrived = 0

        def arrive(_: int, batch: int = batch) -> bool:
            """Whether prompts still arrive or are absorbed; the next one arrives when the last is absorbed."""
            nonlocal arrived
            scheduler = bench.engine.scheduler
            if scheduler.waiting or any(seq.prompt_remaining for seq in scheduler.running):
                return True
            if arrived == prompts:
                return False
            arrived += 1
            bench.submit(ARRIVING_PROMPT, 16)
            return True

        start = time.perf_counter()
        loaded = bench.times(arrive)
        seconds = time.perf_counter() - start
        bench.clear()
        row: Row = {"op": "mixed", "running": batch, "quiet ms": statistics.median(quiet) * 1e3, **milliseconds(loaded)}
        row["p99 / quiet"] = float(row["ms p99"] or 0) / float(row["quiet ms"] or 1)
        yield row | {"prompt tokens/s": prompts * ARRIVING_PROMPT / seconds, "steps": len(loaded)}


def context_rows(bench: Bench, contexts: Sequence[int], steps: int) -> Iterator[Row]:
    """Time per token of one sequence after a long prompt."""
    first = 0.0
    for context in (*contexts, contexts[0]):
        bench.submit(context, None)
        start = time.perf_counter()
        bench.absorb()
        seconds = time.perf_counter() - start
        row = milliseconds(bench.decode_times(steps))
        bench.clear()
        median = float(row["ms median"] or 0)
        first = first or median
        yield {"op": "context", "context": context, **row, "ratio": median / first, "prompt s": seconds}


def workload_rows(bench: Bench, streams: int, prompt_length: int, tokens: int) -> Iterator[Row]:
    """All requests from submission to the last token; steady: from the last first token to the first end."""
    synchronize()
    start = time.perf_counter()
    for _ in range(streams):
        bench.submit(prompt_length, tokens)
    bench.absorb()
    decoding, before = time.perf_counter(), bench.engine.stats().generated_tokens
    while len(bench.engine.scheduler.running) == streams:
        bench.step()
    steady = (bench.engine.stats().generated_tokens - before) / (time.perf_counter() - decoding)
    bench.drain()
    rate = streams * tokens / (time.perf_counter() - start)
    row: Row = {"op": "workload", "streams": streams, "prompt": prompt_length, "tokens": tokens}
    yield row | {"tokens/s": rate, "steady tokens/s": steady}


def profile_rows(bench: Bench, batches: Sequence[int], prompt_length: int, steps: int) -> Iterator[Row]:
    """Microseconds of device time per step and the launches of each kernel, the longest first."""
    for batch in batches:
        for _ in range(batch):
            bench.submit(prompt_length, None)
        bench.absorb()
        yield from _kernels(bench, steps, {"op": "profile", "step": f"decode of {batch}"})
        bench.clear()
    bench.submit(1 << 20, 1)
    for _ in range(SETTLING_STEPS):
        bench.step()
    yield from _kernels(bench, steps, {"op": "profile", "step": "prefill"})
    bench.clear()


def _kernels(bench: Bench, steps: int, row: Row) -> Iterator[Row]:
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            bench.step()
        synchronize()
    events = sorted(profile.key_averages(), key=lambda event: event.device_time_total, reverse=True)
    for event in events:
        microseconds = event.device_time_total / steps
        if microseconds >= 1:
            yield row | {"us": microseconds, "launches": event.count / steps, "kernel": event.key[:80]}


def gap_rows(bench: Bench, batches: Sequence[int], steps: int) -> Iterator[Row]:
    """Microseconds without a kernel between steps, from a trace of the device."""
    for batch in batches:
        for _ in range(batch):
            bench.submit(64, None)
        bench.absorb()
        yield _gap_row(bench, steps, {"op": "gaps", "step": f"decode of {batch}"})
        bench.submit(1 << 20, 1)
        for _ in range(SETTLING_STEPS):
            bench.step()
        yield _gap_row(bench, steps, {"op": "gaps", "step": f"decode of {batch} and a prompt"})
        bench.clear()


def _gap_row(bench: Bench, steps: int, row: Row) -> Row:
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            bench.step()
        synchronize()
    kernels: list[tuple[float, float]] = []
    ends: list[float] = []
    for event in profile.events() or ():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        span = (event.time_range.start, event.time_range.end)
        # A step ends with the copy of its tokens to the host.
        if "DtoH" in event.name:
            ends.append(span[0])
        elif not event.name.startswith(("Memcpy", "Memset")):
            kernels.append(span)
    gaps = sorted(gaps_at(kernels, ends))
    return row | {
        "steps": len(gaps),
        "us median": statistics.median(gaps),
        "us p99": gaps[int(len(gaps) * 0.99)],
        "us most": gaps[-1],
        "above 100": sum(gap > 100 for gap in gaps),
    }


def gaps_at(kernels: Sequence[tuple[float, float]], moments: Sequence[float]) -> list[float]:
    """For each moment, how long no kernel runs around it, where there are kernels both before and behind it.

    Args:
        kernels: start and end of each.
        moments: between whose neighbouring kernels the gaps are sought.
    """
    starts = sorted(start for start, _ in kernels)
    by_start = sorted(kernels)
    latest_ends = list(itertools.accumulate((end for _, end in by_start), max))
    gaps = []
    for moment in moments:
        index = bisect_right(starts, moment)
        if 0 < index < len(starts):
            gaps.append(max(0.0, starts[index] - latest_ends[index - 1]))
    return gaps


def fla_rows(model: Path, seconds: float) -> list[Row]:
    """Decode with fla's modules, in a process of its own, which gives its memory back."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "tests.bench.fla_model", "--model", f"{model}", "--json", file.name]
        try:
            subprocess.run(command, check=True, timeout=seconds)
        except subprocess.SubprocessError as error:
            print(f"fla is left out: {error}")
            return []
        rows: list[Row] = json.loads(Path(file.name).read_text())
    return rows


def build_engine(args: argparse.Namespace, max_num_seqs: int) -> Engine:
    return Engine(
        EngineConfig(
            model_folder=args.model,
            tokenizer_folder=None,
            device=args.device,
            dtype=args.dtype,
            state_dtype=args.state_dtype,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=None,
            gpu_memory_utilization=0.9,
            max_num_queued_reqs=4096,
            max_concurrent_seqs_per_key=None,
            several_keys=False,
            max_logprobs=20,
            generation_config="none",
            load_format=args.load_format,
            seed=0,
        )
    )


def parse_arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--state-dtype", default=Settings.model_fields["state_dtype"].default)
    parser.add_argument("--ops", default="decode,prefill,mixed,context" if cuda else "decode,prefill")
    parser.add_argument("--peer-seconds", type=float, default=120, help="most that fla may take")
    parser.add_argument("--batch", type=_numbers, default=[1 << i for i in range(11)] if cuda else [1, 16])
    parser.add_argument("--prompt-length", type=int, default=64, help="of decode and workload")
    parser.add_argument("--steps", type=int, default=128, help="timed for each figure")
    parser.add_argument("--lengths", type=_numbers, default=[512, 2048, 8192, 32768] if cuda else [512])
    parser.add_argument("--prefill-tokens", type=int, default=1 << 17 if cuda else 1 << 13, help="in all, per length")
    parser.add_argument("--running", type=_numbers, default=[32, 256] if cuda else [4], help="of mixed")
    parser.add_argument("--prompts", type=int, default=24, help="of mixed, that arrive")
    parser.add_argument("--contexts", type=_numbers, default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--streams", type=int, default=256, help="of workload")
    parser.add_argument("--tokens", type=int, default=1024, help="of workload, per stream")
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    add_output_flags(parser)
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    args = parse_arguments()
    ops = args.ops.split(",")
    every: list[Row] = []
    if "fla" in ops:
        ops.remove("fla")
        print("fla")
        every += fla_rows(args.model, args.peer_seconds)
    most = {
        "decode": max(args.batch),
        "profile": max(args.batch),
        "gaps": max(args.batch) + 1,
        "mixed": max(args.running) + 2,
        "workload": args.streams,
    }
    start = time.perf_counter()
    engine = build_engine(args, max(most.get(op, 64) for op in ops))
    env = environment(engine.info.device)
    print(
        f"{env['device']}: {args.model.name}, {engine.info.dtype} weights, {engine.info.state_dtype} states, "
        f"{engine.scheduler.token_budget} tokens per step at most; ready after {time.perf_counter() - start:.1f} s"
    )
    keep_loaded()  # as the engine's process does
    bench = Bench(engine, {"temperature": args.temperature, "top_p": args.top_p})
    measure: dict[str, Callable[[], Iterator[Row]]] = {
        "decode": lambda: decode_rows(bench, args.batch, args.prompt_length, args.steps),
        "prefill": lambda: prefill_rows(bench, args.lengths, args.prefill_tokens),
        "mixed": lambda: mixed_rows(bench, args.running, args.prompts, args.steps),
        "context": lambda: context_rows(bench, args.contexts, args.steps),
        "profile": lambda: profile_rows(bench, args.batch, args.prompt_length, 32),
        "gaps": lambda: gap_rows(bench, args.batch, args.steps),
        "workload": lambda: workload_rows(bench, args.streams, args.prompt_length, args.tokens),
    }
    list(decode_rows(bench, [1], 300, 4))  # warm-up
    for op in ops:
        rows = [row | {"implementation": f"gale {engine.info.state_dtype}"} for row in measure[op]()]
        print(f"\n{op}")
        print_table(rows, [name for name in rows[0] if name not in ("op", "implementation")])
        every += rows
    setting = {
        "model": args.model.name,
        "dtype": engine.info.dtype,
        "state dtype": engine.info.state_dtype,
        "budget": engine.scheduler.token_budget,
    }
    finish(args, "engine", env, {"setting": setting, "rows": every})


if __name__ == "__main__":
    main()
