"""Decode of a whole model with flash-linear-attention's own modules, as its users run it; for tests.bench.engine.

    python -m tests.bench.fla_model --model RECIPE [--batch 1,32,256] [--json FILE]

Random bfloat16 weights, greedy, one forward per token with the model's cache; transformers' ``generate`` does more per
step. Needs ``pip install flash-linear-attention``. Prompts have 64 tokens, which fla absorbs with the kernels of its
decode, so that nothing else has to be compiled and tuned.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.bench.common import Row, print_table
from tests.bench.peers import FLA, precompile, quicken_tuning

PROMPT = 64
WARMUP_STEPS = 4


def build_model(folder: Path, **changes: object) -> torch.nn.Module:
    """fla's causal language model of a checkpoint's configuration, on the GPU."""
    from fla.models import GLAConfig, GLAForCausalLM

    values = json.loads((folder / "config.json").read_text())
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return GLAForCausalLM(GLAConfig(**(values | changes))).eval()


def touch_model(folder: Path, batches: Sequence[int]) -> None:
    """All kernels of the model, for :func:`tests.bench.peers.precompile`."""
    model = build_model(folder, num_hidden_layers=1)
    list(decode_rows(model, model.config.vocab_size, batches, 1))


@torch.inference_mode()
def decode_rows(model: torch.nn.Module, vocab_size: int, batches: Sequence[int], steps: int) -> Iterator[Row]:
    """Tokens per second by batch size."""
    for batch in batches:
        tokens = torch.randint(vocab_size, (batch, PROMPT), device="cuda")
        cache = None
        times = []
        for _ in range(1 + WARMUP_STEPS + steps):
            start = time.perf_counter()
            answer = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens = answer.past_key_values, answer.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        times = times[1 + WARMUP_STEPS :]
        median = statistics.median(times) * 1e3
        yield {
            "op": "decode",
            "implementation": FLA,
            "batch": batch,
            "tokens/s": batch * steps / sum(times),
            "ms median": median,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", default="1,32,256")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile-seconds", type=float, default=60, help="most for compiling in advance")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    batches = [int(size) for size in args.batch.split(",")]
    seconds = precompile(functools.partial(touch_model, args.model, batches), seconds=args.compile_seconds)
    print(f"compiled in {seconds:.0f} s", flush=True)
    quicken_tuning()
    model = build_model(args.model)
    rows: list[Row] = []
    for row in decode_rows(model, model.config.vocab_size, batches, args.steps):
        rows.append(row)
        print_table([row], ["batch", "tokens/s", "ms median"])
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
