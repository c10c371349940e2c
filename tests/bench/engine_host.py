"""What one step costs the engine process beside the device: scheduling, texts, messages.

    python -m tests.bench.engine_host [--batch 256] [--apis 4] [--steps 1000] [--profile]

The engine is the real one, but its runner computes nothing: every token is there at once. Its outputs go over
ZeroMQ to as many processes as asked for, which decode them and drop them. Times are CPU time of the engine's
thread per step, by part of the loop; on a GPU they hide behind the device as long as their sum is below its step.
"""

import argparse
import contextlib
import cProfile
import multiprocessing
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import msgspec
import torch
import zmq

from server.child import Heartbeat
from server.component_settings import EngineConfig
from server.engine import engine as engine_module
from server.engine.batch import Batch
from server.engine.copy_clock import CopyClock
from server.engine.engine import Engine
from server.engine.memory import BuiltRunner
from server.engine.process import EngineLoop
from server.engine.runner import PendingStep, _plan
from server.engine.sampler import Sampled
from server.engine.state_file import Part
from server.ipc import EngineChannel
from server.types import EngineMessage, GenerateRequest, Hello, SamplingParams, pack_tokens

MODEL = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"


class StubRunner:
    """Samples a token for every row without a device; what the host has to find out of a batch it does find out."""

    swap = None
    pool_layout: ClassVar[dict[str, Part]] = {"recurrent": Part(torch.float32, (10, 2, 64, 128))}

    def __init__(self) -> None:
        self.copies = CopyClock(torch.device("cpu"))

    def launch(self, batch: Batch) -> PendingStep:
        rows, _, _ = _plan(batch.spans)
        sampled = Sampled(torch.full((len(rows),), 300, dtype=torch.int64), None, None, None)
        return PendingStep(batch, rows, sampled, on_cuda=False)


def stub_engine(batch: int) -> Engine:
    """An engine with the shipped model's tokenizer, and no model."""
    config = EngineConfig(
        model_folder=MODEL,
        tokenizer_folder=MODEL,
        device="cpu",
        dtype="float32",
        state_dtype="float32",
        max_num_seqs=batch,
        max_num_batched_tokens=8192,
        max_model_len=None,
        gpu_memory_utilization=0.9,
        max_num_queued_reqs=4096,
        max_concurrent_seqs_per_key=None,
        several_keys=False,
        max_logprobs=20,
        generation_config="none",
        load_format="auto",
        seed=0,
    )
    built = BuiltRunner(StubRunner(), torch.device("cpu"), batch, 8192, 0, "float32", "stub", (), 0, 0)  # type: ignore[arg-type]
    with mock.patch.object(engine_module, "build_runner", lambda *_: built):
        return Engine(config, overlap=True)


def reader(address: str, requests: range) -> None:
    """One API process's end: submits its requests, then decodes whatever comes."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(EngineMessage).decode
    socket.send(encode(Hello()))
    params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    for request_id in requests:
        prompt = (pack_tokens([5] * 16),)
        socket.send(encode(GenerateRequest(request_id=request_id, prompts=prompt, params=params, arrived=0.0)))
    while True:
        decode(socket.recv())


@contextlib.contextmanager
def readers(address: str, batch: int, apis: int) -> Iterator[None]:
    share = -(-batch // apis)
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=reader, args=(address, range(first, min(first + share, batch))), daemon=True)
        for first in range(0, batch, share)
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--apis", type=int, default=4, help="processes that the streams are spread over")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, by function")
    args = parser.parse_args()
    engine = stub_engine(args.batch)
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/engine"
        channel = EngineChannel(address)
        loop = EngineLoop(engine, channel, Heartbeat())
        with readers(address, args.batch, args.apis):
            while len(engine.scheduler.running) < args.batch:
                loop.turn(timeout=0.1)
            for _ in range(20):
                loop.turn()
            parts: dict[str, list[float]] = {"schedule": [], "launch": [], "step": [], "turn": []}
            profile = cProfile.Profile()
            if args.profile:
                profile.enable()
            else:
                engine.scheduler.schedule = timed(engine.scheduler.schedule, parts["schedule"])  # type: ignore
                engine._runner.launch = timed(engine._runner.launch, parts["launch"])  # type: ignore
                engine.step = timed(engine.step, parts["step"])  # type: ignore
            turn = timed(loop.turn, parts["turn"])
            for _ in range(args.steps):
                turn()
            profile.disable()
        channel.close()
    if args.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    for name, quantile in (("median", 0.5), ("best tenth", 0.1)):
        us = {part: sorted(times)[int(quantile * len(times))] * 1e6 for part, times in parts.items()}
        retire, messages = us["step"] - us["schedule"] - us["launch"], us["turn"] - us["step"]
        print(
            f"batch {args.batch}, {args.apis} API processes, {name}: {us['turn']:.0f} us per step: schedule "
            f"{us['schedule']:.0f}, launch {us['launch']:.0f}, retire {retire:.0f}, messages {messages:.0f}"
        )


def timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    """The function, noting the CPU time of each call."""

    def call(*arguments: Any) -> Any:
        start = time.thread_time()
        result = function(*arguments)
        times.append(time.thread_time() - start)
        return result

    return call


if __name__ == "__main__":
    main()
