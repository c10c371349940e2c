"""What prefix reuse saves: the time to the first token behind a long prefix that is known, by where its state lies.

    python -m tests.bench.reuse [--model FOLDER] [--load-format dummy] [--prefix 100000] [--json FILE]

For every tier (on a CPU there is no device tier), an engine of its own absorbs the prefix once. Then short prompts that
begin with it alternate with fresh prompts of 64 tokens, one at a time: milliseconds from submission to the first token,
medians and 90th percentiles. With the disk tier, memory holds one state, so that the prefix is read from its file every
time. The copies' own times are the engine's figures, by the device's clock.
"""

import argparse
import gc
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from server.component_settings import EngineConfig, StateCacheConfig
from server.engine.engine import Engine
from server.types import GenerateRequest, HistogramSnapshot, SamplingParams, pack_tokens
from tests.bench.common import Row, environment, finish, print_table
from tests.bench.engine import DEFAULT_MODEL

CLIENT = b"bench"
SUFFIX = 8
SHORT = 64
PAUSE_SECONDS = 0.5
"""For files to be written."""


class Asker:
    """Asks an engine one thing at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ids = itertools.count()
        self._rng = random.Random(0)

    def prompt(self, length: int) -> list[int]:
        """Random tokens."""
        return self._rng.choices(range(3, self.engine.info.vocab_size), k=length)

    def seconds_to_first_token(self, prompt: list[int]) -> tuple[float, int]:
        """And the tokens that were not absorbed."""
        request = GenerateRequest(
            request_id=next(self._ids),
            prompts=(pack_tokens(prompt),),
            params=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
            arrived=time.monotonic(),
        )
        start = time.perf_counter()
        self.engine.submit(CLIENT, request)
        seconds, cached = 0.0, 0
        while self.engine.has_work():
            self.engine.step()
            for output in self.engine.take_outputs().values():
                if output.token_ids:
                    seconds = time.perf_counter() - start
                    cached = sum(output.cached_tokens.values())
        return seconds, cached


def caches(folder: Path, state_bytes: int, *, on_cuda: bool) -> dict[str, StateCacheConfig]:
    """A configuration for each tier alone."""
    many = 64 * state_bytes
    found = {"device": StateCacheConfig(gpu_bytes=many)} if on_cuda else {}
    found["host"] = StateCacheConfig(host_bytes=many)
    found["disk"] = StateCacheConfig(host_bytes=state_bytes, folder=folder, disk_bytes=many)
    return found


def build_engine(args: argparse.Namespace, cache: StateCacheConfig) -> Engine:
    """An engine of few slots."""
    return Engine(
        EngineConfig(
            model_folder=args.model,
            tokenizer_folder=None,
            device=args.device,
            dtype="auto",
            state_dtype=args.state_dtype,
            max_num_seqs=8,
            max_num_batched_tokens=2048,
            max_model_len=None,
            gpu_memory_utilization=0.8,
            max_num_queued_reqs=64,
            max_concurrent_seqs_per_key=None,
            several_keys=False,
            max_logprobs=1,
            generation_config="none",
            load_format=args.load_format,
            seed=0,
            state_cache=cache,
        )
    )


def tier_row(asker: Asker, tier: str, prefix_length: int, repeats: int) -> Row:
    """Measure one tier."""
    prefix = asker.prompt(prefix_length)
    absorbing, _ = asker.seconds_to_first_token(prefix)
    short: list[float] = []
    known: list[float] = []
    for repeat in range(repeats + 2):
        if tier == "disk":
            time.sleep(PAUSE_SECONDS)
        seconds, _ = asker.seconds_to_first_token(asker.prompt(SHORT))
        seconds_known, cached = asker.seconds_to_first_token(prefix + asker.prompt(SUFFIX))
        assert cached == prefix_length, f"{cached} of {prefix_length} tokens were known"
        if repeat >= 2:  # the first ones warm everything up
            short.append(1000 * seconds)
            known.append(1000 * seconds_known)
    stats = asker.engine.stats()
    return {
        "tier": tier,
        "prefix": prefix_length,
        "absorbed in s": absorbing,
        f"{SHORT} fresh tokens, ms": statistics.median(short),
        "p90": statistics.quantiles(short, n=10)[-1],
        "known prefix, ms": statistics.median(known),
        "p90 ": statistics.quantiles(known, n=10)[-1],
        "restore, ms": _mean(stats.state_restore),
        "save, ms": _mean(stats.state_save),
        "read, ms": _mean(stats.state_read),
        "write, ms": _mean(stats.state_write),
    }


def _mean(seconds: HistogramSnapshot) -> float | None:
    count = sum(seconds.counts)
    return 1000 * seconds.sum / count if count else None


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--state-dtype", default="float32", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--prefix", type=int, default=100_000, help="tokens of the known prefix")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiers", default="device,host,disk", help="which of them, by default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.set_defaults(plot=None)
    args = parser.parse_args()
    rows: list[Row] = []
    engine = build_engine(args, StateCacheConfig())
    parked_bytes = engine._runner.parked_bytes
    with tempfile.TemporaryDirectory() as folder:
        for tier, cache in caches(Path(folder), parked_bytes, on_cuda=args.device == "cuda").items():
            if tier not in args.tiers.split(","):
                continue
            # The next engine sizes its pool to the memory that is free.
            del engine
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            engine = build_engine(args, cache)
            rows.append(tier_row(Asker(engine), tier, args.prefix, args.repeats))
            engine.close()
    env = environment(engine.info.device)
    print(f"{env['device']}: {args.model.name}, {engine.info.state_dtype} states, {parked_bytes / 1e6:.2f} MB each")
    print_table(rows, list(rows[0]))
    finish(args, "reuse", env, {"rows": rows})


if __name__ == "__main__":
    main()
