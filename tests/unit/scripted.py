"""An engine without a model, behind the real loop and real sockets, for tests of what surrounds it."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from server.child import Heartbeat
from server.engine.process import EngineLoop
from server.ipc import EngineChannel
from server.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Refusal,
    RefusalReason,
    StepOutput,
    TokenLogprobs,
)
from tests.made_up import engine_stats

INFO = EngineInfo(
    vocab_size=256,
    eos_token_ids=(0,),
    max_model_len=None,
    max_num_seqs=4,
    max_num_queued_reqs=8,
    max_request_choices=12,
    max_logprobs=5,
    default_sampling={},
    num_parameters=1_000_000,
    state_bytes=1024,
    state_file_bytes=4096,
    dtype="float32",
    state_dtype="float32",
    device="cpu",
    fingerprint="fp_scripted",
)
FAILING_TOKEN = 255
"""A prompt that begins with this token ends in an error after its first token."""


class ScriptedEngine:
    """Answers every choice with the tokens 1, 2, 3 ... up to ``max_tokens``, one per step.

    Attributes:
        running: remaining work by (client, request id, choice): tokens sent so far.
        max_choices: more at once are refused.
        hold: while set, steps produce nothing.
    """

    def __init__(self, *, max_choices: int = 1_000_000) -> None:
        self.info = INFO
        self.running: dict[tuple[bytes, int, int], int] = {}
        self.requests: dict[tuple[bytes, int], GenerateRequest] = {}
        self.max_choices = max_choices
        self.hold = threading.Event()
        self.steps = 0
        self.finished = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self._outputs: dict[bytes, StepOutput] = {}

    def submit(self, client: bytes, request: GenerateRequest) -> None:
        output = self._outputs.setdefault(client, StepOutput())
        if len(self.running) + request.num_choices > self.max_choices:
            output.rejected[request.request_id] = Refusal(RefusalReason.QUEUE_FULL, "the queue is full")
            return
        output.accepted.append(request.request_id)
        self.requests[client, request.request_id] = request
        for choice in range(request.num_choices):
            self.running[client, request.request_id, choice] = 0

    def cancel(self, client: bytes, request_ids: Iterable[int]) -> None:
        wanted = {(client, request_id) for request_id in request_ids}
        for key in [key for key in self.running if key[:2] in wanted]:
            self._row(key, -1, b"", FinishReason.CANCELLED)

    def forget_client(self, client: bytes) -> None:
        self.cancel(client, [key[1] for key in self.running if key[0] == client])
        self._outputs.pop(client, None)

    def close(self) -> None:
        self.running.clear()

    def has_work(self) -> bool:
        return bool(self.running) and not self.hold.is_set()

    def step(self) -> None:
        self.steps += 1
        for key, sent in list(self.running.items()):
            request = self.requests[key[:2]]
            token = sent + 1
            self.running[key] = token
            failing = request.prompts[key[2] // request.n].startswith(FAILING_TOKEN.to_bytes(4, "little"))
            if failing and sent == 1:
                self._row(key, -1, b"", FinishReason.ERROR, error="the model's output is not a number")
            else:
                last = token == request.params.max_tokens
                self._row(key, token, b"t%d " % token, FinishReason.LENGTH if last else FinishReason.RUNNING)

    def take_outputs(self) -> dict[bytes, StepOutput]:
        outputs, self._outputs = self._outputs, {}
        return outputs

    def stats(self) -> EngineStats:
        return engine_stats(
            running=len(self.running),
            slots_used=len(self.running),
            slots_total=4,
            generated_tokens=self.steps,
            finished=dict(self.finished),
        )

    def _row(
        self, key: tuple[bytes, int, int], token: int, text: bytes, reason: FinishReason, error: str | None = None
    ) -> None:
        client, request_id, choice = key
        output = self._outputs.setdefault(client, StepOutput())
        row = len(output.request_ids)
        output.request_ids.append(request_id)
        output.choices.append(choice)
        output.token_ids.append(token)
        output.texts.append(text)
        output.finish_reasons.append(reason)
        if error is not None:
            output.errors[row] = error
        if token >= 0 and self.requests[key[:2]].params.logprobs is not None:
            output.logprobs[row] = TokenLogprobs(-0.5 * token, [token], [-0.5 * token])
        if reason is not FinishReason.RUNNING:
            self.finished[reason.name.lower()] += 1
            del self.running[key]


@contextlib.contextmanager
def serving(engine: ScriptedEngine, folder: Path, *, outbox: int = 4096) -> Iterator[str]:
    """Run the engine's loop in a thread; yields the address to connect to."""
    address = f"ipc://{folder}/engine"
    stop = threading.Event()

    def run() -> None:
        channel = EngineChannel(address, outbox=outbox)
        loop = EngineLoop(engine, channel, Heartbeat())
        while not stop.is_set():
            loop.turn(timeout=0.01)
        channel.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield address
    finally:
        stop.set()
        thread.join(timeout=10)
        assert not thread.is_alive()
