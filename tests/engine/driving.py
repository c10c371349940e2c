"""Drives an :class:`Engine` directly and keeps the books that every test wants to see balanced."""

import random
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import torch

from server.component_settings import EngineConfig
from server.engine.engine import Engine
from server.types import (
    Extend,
    FinishReason,
    GenerateRequest,
    PromptLogprobs,
    Refusal,
    SamplingParams,
    StateAction,
    StateCommand,
    StateInfo,
    TokenLogprobs,
    pack_tokens,
)
from tests.engine import invariants

FIXTURES = Path(__file__).parent.parent / "fixtures"
CLASSICS = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"
CLIENT = b"api-0"
EOS = 2
"""The end-of-sequence token of every fixture."""


def engine_config(folder: Path = FIXTURES / "base", *, tokenizer: bool = False, **changes: object) -> EngineConfig:
    """A small engine's settings on one of the fixtures."""
    values: dict[str, object] = {
        "model_folder": folder,
        "tokenizer_folder": folder if tokenizer else None,
        "device": "cpu",
        "dtype": "float32",
        "state_dtype": "float32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "max_model_len": None,
        "gpu_memory_utilization": 0.9,
        "max_num_queued_reqs": 1000,
        "max_concurrent_seqs_per_key": None,
        "several_keys": False,
        "max_logprobs": 20,
        "generation_config": "none",
        "load_format": "auto",
        "seed": 0,
    }
    return EngineConfig(**(values | changes))  # type: ignore[arg-type]


@dataclass
class Answer:
    """What one choice produced."""

    token_ids: list[int] = field(default_factory=list)
    text: bytes = b""
    pieces: list[bytes] = field(default_factory=list)
    """The text as it came, event by event."""
    finish_reason: FinishReason = FinishReason.RUNNING
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None
    unsaved: str | None = None
    cached_tokens: int = 0
    state: StateInfo | None = None


@dataclass
class PromptScores:
    """What became known of a prompt's tokens from the second on."""

    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)
    top: list[float] = field(default_factory=list)

    def add(self, piece: PromptLogprobs) -> None:
        self.logprobs += array("f", piece.logprobs)
        self.ranks += array("i", piece.ranks)
        self.top_ids += array("i", piece.top_ids)
        self.top += array("f", piece.top)


class Driver:
    """One API process's view of an engine, without the process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.answers: dict[tuple[int, int], Answer] = {}
        self.prompts: dict[tuple[int, int], PromptScores] = {}
        self.accepted: set[int] = set()
        self.rejected: dict[int, Refusal] = {}
        self.contexts: dict[int, int] = {}
        self.told: dict[int, list[StateInfo]] = {}
        self.progress: dict[int, int] = {}
        self._next_id = 0

    def submit(
        self,
        prompts: list[list[int]],
        n: int = 1,
        *,
        priority: int = 0,
        tenant: str = "",
        checkpoint_at: tuple[int, ...] = (),
        state: str | None = None,
        session: str | None = None,
        more: bool = False,
        save: bool = False,
        name: str | None = None,
        ttl: float | None = None,
        turn: str | None = None,
        **params: object,
    ) -> int:
        request_id = self._next_id
        self._next_id += 1
        request = GenerateRequest(
            request_id=request_id,
            prompts=tuple(map(pack_tokens, prompts)),
            n=n,
            params=SamplingParams(**params),  # type: ignore[arg-type]
            arrived=time.monotonic(),
            priority=priority,
            tenant=tenant,
            checkpoint_at=checkpoint_at,
            state=state,
            save_state=save,
            state_name=name,
            state_ttl=ttl,
            state_turn=turn,
            session=session,
            more=more,
        )
        self.engine.submit(CLIENT, request)
        self.collect()
        return request_id

    def command(
        self,
        action: StateAction,
        state: str = "",
        *,
        tenant: str = "",
        name: str | None = None,
        ttl: float | None = None,
        path: Path = Path(),
        convert: bool = False,
    ) -> list[StateInfo] | Refusal:
        """What the engine tells of saved states, or why it does not."""
        request_id = self._next_id
        self._next_id += 1
        command = StateCommand(
            request_id=request_id,
            tenant=tenant,
            action=action,
            state=state,
            name=name,
            ttl=ttl,
            path=str(path),
            convert=convert,
        )
        self.engine.command(CLIENT, command)
        self.collect()
        while request_id not in self.rejected and request_id not in self.told:
            self.step()
        return self.rejected[request_id] if request_id in self.rejected else self.told[request_id]

    def extend(self, request_id: int, tokens: list[int], *, last: bool = False) -> None:
        """More of a prompt."""
        self.engine.extend(CLIENT, Extend(request_id=request_id, tokens=pack_tokens(tokens), last=last))

    def cancel(self, request_id: int) -> None:
        self.engine.cancel(CLIENT, [request_id])
        self.collect()

    def step(self) -> None:
        self.engine.step()
        self.collect()
        invariants.check(self.engine)

    def run(self, limit: int = 100_000) -> None:
        for _ in range(limit):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError(f"the engine still has work after {limit} steps")

    def collect(self) -> None:
        for client, message in self.engine.take_outputs().items():
            assert client == CLIENT
            self.accepted.update(message.accepted)
            self.rejected.update(message.rejected)
            self.contexts.update(message.contexts)
            for request_id, absorbed in message.progress.items():
                assert absorbed > self.progress.get(request_id, 0)
                self.progress[request_id] = absorbed
            self.told.update(message.states_told)
            for request_id, choice, piece in message.prompt_logprobs:
                self.prompts.setdefault((request_id, choice), PromptScores()).add(piece)
            columns = (message.request_ids, message.choices, message.token_ids, message.texts, message.finish_reasons)
            for row, (request_id, choice, token_id, text, reason) in enumerate(zip(*columns, strict=True)):
                assert request_id in self.accepted, "an event for a request that was never accepted"
                answer = self.answers.setdefault((request_id, choice), Answer())
                assert answer.finish_reason is FinishReason.RUNNING, "an event after the terminal event"
                if token_id >= 0:
                    answer.token_ids.append(token_id)
                answer.text += text
                answer.pieces.append(text)
                answer.finish_reason = FinishReason(reason)
                answer.stop_reason = message.stop_reasons.get(row)
                answer.error = message.errors.get(row)
                answer.unsaved = message.unsaved.get(row)
                answer.cached_tokens += message.cached_tokens.get(row, 0)
                answer.state = message.states.get(row)
                if row in message.logprobs:
                    answer.logprobs.append(message.logprobs[row])

    def complete(self, prompt: list[int], **params: object) -> Answer:
        """One choice, alone in the engine, to its end."""
        request_id = self.submit([prompt], **params)
        self.run()
        return self.answers[request_id, 0]


def random_prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, vocab_size) for _ in range(length)]


def states_of(engine: Engine, slot: int) -> torch.Tensor:
    """One slot's recurrent states [L, G, K, V]."""
    slots = torch.tensor([slot], device=engine._runner._step.states.device)
    return torch.cat([layer.load(slots) for layer in engine._runner._step.states.layers])
