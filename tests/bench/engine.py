"""Throughput of the bare engine: no HTTP, no processes.

    python -m tests.bench.engine [--model FOLDER] [--load-format dummy] [--batch 1,32,256] [--json FILE]

For each batch size: that many prompts are absorbed, then everybody decodes. Decode figures are over the
steps in which all sequences decode; prefill figures over the steps before.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from server.engine.engine import Engine
from server.settings import EngineConfig
from server.types import GenerateRequest, SamplingParams, pack_tokens

DEFAULT_MODEL = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"


def measure(engine: Engine, batch: int, prompt_length: int, steps: int, sampling: dict[str, float]) -> dict[str, float]:
    """One run; figures in tokens per second and milliseconds."""
    rng = random.Random(0)
    # Without an end: whoever was absorbed first has decoded through all other prompts, and must not leave early.
    params = SamplingParams(max_tokens=None, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    for request_id in range(batch):
        prompt = [rng.randrange(engine.info.vocab_size) for _ in range(prompt_length)]
        engine.submit(
            b"bench",
            GenerateRequest(
                request_id=request_id, prompts=(pack_tokens(prompt),), params=params, arrived=time.monotonic()
            ),
        )
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    start = time.perf_counter()
    while engine.scheduler.waiting or any(seq.prompt_remaining for seq in engine.scheduler.running):
        engine.step()
    synchronize()
    prefill = time.perf_counter() - start
    # Two steps settle the pipeline before the clock starts.
    engine.step()
    engine.step()
    times = []
    for _ in range(steps):
        before = time.perf_counter()
        engine.step()
        engine.take_outputs()
        times.append(time.perf_counter() - before)
    assert len(engine.scheduler.running) == batch, "a sequence ended while the clock ran"
    engine.cancel(b"bench", range(batch))
    while engine.has_work():
        engine.step()
    engine.take_outputs()
    return {
        "batch": batch,
        "prefill_tokens_per_s": batch * prompt_length / prefill,
        "decode_tokens_per_s": batch * steps / sum(times),
        "step_ms_median": statistics.median(times) * 1e3,
        "step_ms_p99": sorted(times)[int(len(times) * 0.99)] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    batches = [int(size) for size in args.batch.split(",")]
    engine = Engine(
        EngineConfig(
            model_folder=args.model,
            tokenizer_folder=None,
            device=args.device,
            dtype=args.dtype,
            state_dtype="float32",
            max_num_seqs=max(batches),
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=None,
            gpu_memory_utilization=0.9,
            max_num_queued_reqs=4096,
            max_logprobs=20,
            generation_config="none",
            load_format=args.load_format,
            seed=0,
        )
    )
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    measure(engine, min(batches), 64, 4, sampling)  # warm-up
    rows = [measure(engine, size, args.prompt_length, args.steps, sampling) for size in batches]
    print(f"{engine.info.device}, {engine.info.dtype} weights, prompts of {args.prompt_length}, {args.steps} steps")
    print(f"{'batch':>6} {'prefill tok/s':>14} {'decode tok/s':>13} {'step ms':>9} {'p99 ms':>8}")
    for row in rows:
        print(
            f"{row['batch']:6.0f} {row['prefill_tokens_per_s']:14,.0f} {row['decode_tokens_per_s']:13,.0f} "
            f"{row['step_ms_median']:9.3f} {row['step_ms_p99']:8.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"device": engine.info.device, "dtype": engine.info.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
