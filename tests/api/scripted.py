"""A scripted engine behind the real EngineClient, and the application on a real socket.

The engine's answer is a function of the prompt and the choice alone, so tests can compute it: choice j
of a prompt continues ``SCRIPT`` from position ``len(prompt) + j``, one byte per token.
"""

import asyncio
import itertools
import re
import socket
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import httpx
import msgspec
import uvicorn

from server.api.app import create_app
from server.api.chat_template import ChatTemplate
from server.api.client import EngineClient
from server.api.sleep import SleepSwitch
from server.component_settings import ApiSettings
from server.engine.detokenizer import StopMatcher
from server.engine.named_states import NamedState, NamedStates, StateLimits
from server.engine.state_requests import Later, context_of, obey, reserve, unknown
from server.keys import ApiKey, hash_key
from server.types import (
    Cancel,
    ClientMessage,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Extend,
    FinishReason,
    GenerateRequest,
    Hello,
    HistogramSnapshot,
    PromptLogprobs,
    Refusal,
    RefusalReason,
    SamplingParams,
    StateAction,
    StateCommand,
    StateInfo,
    StepOutput,
    TokenLogprobs,
    pack_tokens,
    unpack_tokens,
)
from tests.made_up import engine_stats

SCRIPT = "Grüße, naïve 世界! It was 🌊 and then. ".encode()
BOS, EOS, ALIAS, VOCAB = 256, 257, 258, 300
"""Ids 0..255 are bytes, ALIAS is the text "aß", the rest up to VOCAB has no text."""

INFO = EngineInfo(
    vocab_size=VOCAB,
    eos_token_ids=(EOS,),
    max_model_len=2000,
    max_num_seqs=8,
    max_num_queued_reqs=8,
    max_request_choices=16,
    max_logprobs=5,
    default_sampling={"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    num_parameters=1_000_000,
    state_bytes=1024,
    state_file_bytes=4096,
    dtype="float32",
    state_dtype="float32",
    device="scripted",
    fingerprint="fp_scripted",
)


class ByteTokenizer:
    """One token per byte."""

    vocab_size = 259
    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS

    special_tokens: ClassVar[dict[str, str]] = {"bos_token": "<s>", "eos_token": "</s>"}

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = False) -> list[int]:
        ids = [BOS] * add_special_tokens
        for stretch in re.split("(</?s>)", text) if parse_special_tokens else [text]:
            ids += {"<s>": [BOS], "</s>": [EOS]}.get(stretch, list(stretch.encode()))
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        table = self.token_bytes()
        return b"".join(table[token] for token in token_ids if token < len(table)).decode(errors="replace")

    def encode_continuation(self, text: str, *, parse_special_tokens: bool = False) -> list[int]:
        return self.encode(text, add_special_tokens=False, parse_special_tokens=parse_special_tokens)

    def encode_within(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)

    def token_bytes(self, *, special: bool = False) -> list[bytes]:
        named = [b"<s>", b"</s>"] if special else [b"", b""]
        return [bytes([value]) for value in range(256)] + named + ["aß".encode()]


def script(prompt_length: int, choice: int) -> Iterator[int]:
    """What choice ``choice`` of a prompt of so many tokens is answered with, for ever."""
    return (SCRIPT[position % len(SCRIPT)] for position in itertools.count(prompt_length + choice))


def script_tokens(prompt_length: int, choice: int, count: int) -> list[int]:
    """The first tokens of it."""
    return list(itertools.islice(script(prompt_length, choice), count))


def script_text(prompt_length: int, choice: int, count: int) -> str:
    """The text of these tokens."""
    return bytes(script_tokens(prompt_length, choice, count)).decode(errors="replace")


def score(position: int, token: int, num_top: int) -> tuple[float, int, list[tuple[int, float]]]:
    """Log-probability, rank and alternatives of the token at a position of a prompt, from 1 on."""
    top = [(ALIAS, -0.5), (token, -position / 8), (65, -20.0), (66, -21.0), (67, float("-inf"))]
    return -position / 8, position % 7 + 1, top[:num_top]


def prompt_pieces(prompt: Sequence[int], num_top: int, length: int = 5) -> Iterator[PromptLogprobs]:
    """What the engine says of a prompt, so many tokens at a time."""
    for start in range(1, len(prompt), length):
        scores = [score(i, prompt[i], num_top) for i in range(start, min(start + length, len(prompt)))]
        yield PromptLogprobs(
            array("f", [logprob for logprob, _, _ in scores]).tobytes(),
            array("i", [rank for _, rank, _ in scores]).tobytes(),
            array("i", [token for _, _, top in scores for token, _ in top]).tobytes(),
            array("f", [logprob for _, _, top in scores for _, logprob in top]).tobytes(),
        )


@dataclass
class Running:
    """A choice in the scripted engine."""

    request: GenerateRequest
    choice: int
    prompt: bytes
    matcher: StopMatcher | None
    tokens: Iterator[int]
    sent: int = 0
    grows: bool = False
    """Whether more of the prompt is to come."""
    absorbed: int = 0
    """Of a prompt that comes in pieces."""


class NoParking:
    """Holds no snapshots: the scripted engine needs none."""

    def hold(self, state: NamedState) -> None:
        return None

    def release(self, entry: object) -> None:
        raise AssertionError("nothing was held")

    def file_written(self, state: NamedState) -> None:
        raise AssertionError("there are no files")

    def file_removed(self, state: NamedState) -> None:
        raise AssertionError("there are no files")

    def set_aside(self, nbytes: int) -> None:
        raise AssertionError("there are no files")


@dataclass
class ScriptedEngine:
    """Takes the place of the channel to the engine process.

    Attributes:
        info: what it says of itself.
        paused: no tokens are produced while set.
        mute: requests are not even accepted while set.
        requests: everything ever submitted.
        running: choices not yet ended, by request id and choice.
    """

    info: EngineInfo = INFO
    paused: bool = False
    mute: bool = False
    requests: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    running: dict[tuple[int, int], Running] = field(default_factory=dict)
    generated: int = 0
    fail_after: int | None = None
    """A choice ends with an error after so many tokens."""
    max_per_tenant: int | None = None
    """Choices that one tenant may have running."""
    logprob_of_choice: dict[int, float] = field(default_factory=dict)
    dead_ends: set[int] = field(default_factory=set)
    """Choices for which there is no token."""
    cached_tokens: int = 0
    """What it says of every prompt."""
    absorbed_per_step: int = 4096
    """Of a prompt that comes in pieces."""
    most_pending: int = 0
    """Tokens of such a prompt that it had to keep beside those that it had absorbed."""
    states: NamedStates | None = field(default_factory=lambda: NamedStates(NoParking(), StateLimits(1 << 40, 1 << 10)))
    """What clients have saved."""
    stop_after: int | None = None
    """A choice comes to its end of sequence after so many tokens."""

    def connect(self, address: str, receive: Callable[[list[EngineMessage]], None]) -> "ScriptedEngine":
        self._receive = receive
        return self

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def close(self) -> None:
        self.running.clear()

    def send(self, message: ClientMessage) -> bool:
        if isinstance(message, Hello):
            self.loop.call_soon(lambda: self._receive([self.info]))
        elif isinstance(message, Extend):
            self.loop.call_soon(self._extend, message)
        elif isinstance(message, Cancel):
            self.cancelled += message.request_ids
            for key in [key for key in self.running if key[0] in message.request_ids]:
                del self.running[key]
        elif isinstance(message, StateCommand):
            if not self.mute:
                self.loop.call_soon(self._obey, message)
        elif not self.mute:
            self.loop.call_soon(self._submit, message)
        return True

    def _extend(self, message: Extend) -> None:
        running = self.running.get((message.request_id, 0))
        if running is not None:
            assert running.grows and message.tokens
            running.prompt += message.tokens
            running.grows = not message.last

    def _obey(self, command: StateCommand) -> None:
        told = self._transfer(command) if command.path else obey(self.states, command)
        assert not isinstance(told, Later), "there are no files"
        if isinstance(told, Refusal):
            self._receive([StepOutput(rejected={command.request_id: told})])
        else:
            self._receive([StepOutput(states_told={command.request_id: told})])

    def _transfer(self, command: StateCommand) -> list[StateInfo] | Refusal:
        """A file is the transcript and nothing else."""
        if self.states is None:
            return obey(None, command)  # type: ignore[return-value]
        path = Path(command.path)
        if command.action is StateAction.DOWNLOAD:
            state = self.states.find(command.tenant, command.state)
            if state is None:
                return unknown(command.state)
            path.write_bytes(state.tokens)
            return [msgspec.structs.replace(state.info, digest="d" * 64)]
        tokens = path.read_bytes()
        if len(tokens) % 4 or not tokens:
            return Refusal(RefusalReason.BAD_FILE, "the file is no state for this server", "state_invalid")
        self.states.reserve(command.tenant, 1)
        saving = self.states.save(command.tenant, command.name, command.ttl, tokens)
        return [self.states.complete(saving).info]

    def _submit(self, request: GenerateRequest) -> None:
        refusal, context = self._refusal(request), b""
        if refusal is None and request.state is not None:
            found = context_of(self.states, request, request.state, self.info.max_model_len)
            context, refusal = (b"", found) if isinstance(found, Refusal) else (found.tokens, None)
        if refusal is None and request.save_state:
            refusal = reserve(self.states, request.tenant, request.num_choices)
        if refusal is not None:
            self._receive([StepOutput(rejected={request.request_id: refusal})])
            return
        self.requests.append(request)
        idle = not self.running
        for choice in range(request.num_choices):
            prompt = context + request.prompts[choice // request.n]
            tokens = script(len(unpack_tokens(prompt)), choice % request.n)
            matcher = self._matcher(request.params)
            self.running[request.request_id, choice] = Running(
                request, choice, prompt, matcher, tokens, grows=request.more
            )
        contexts = {request.request_id: len(unpack_tokens(context))} if context else {}
        self._receive([StepOutput(accepted=[request.request_id], contexts=contexts)])
        if idle:
            self.loop.call_soon(self._tick)

    def _refusal(self, request: GenerateRequest) -> Refusal | None:
        if len(self.running) + request.num_choices > self.info.max_request_choices:
            return Refusal(RefusalReason.QUEUE_FULL, "the queue is full")
        own = sum(running.request.tenant == request.tenant for running in self.running.values())
        if self.max_per_tenant is not None and own + request.num_choices > self.max_per_tenant:
            return Refusal(RefusalReason.TENANT_LIMIT, "too much of this key's is running")
        return None

    @staticmethod
    def _matcher(params: SamplingParams) -> StopMatcher | None:
        return StopMatcher(params.stop, include=params.include_stop_str_in_output) if params.stop else None

    def _tick(self) -> None:
        if self.running:
            if not self.paused:
                self.step()
            self.loop.call_later(0.001 if self.paused else 0, self._tick)

    def steps(self, count: int) -> None:
        """Several steps within one turn of the event loop."""
        for _ in range(count):
            self.step()

    def step(self) -> None:
        """One token for every choice."""
        output = StepOutput(stats=self.stats())
        for key, running in list(self.running.items()):
            self._advance(output, key, running)
        self._receive([output])

    def _advance(self, output: StepOutput, key: tuple[int, int], running: Running) -> None:
        params = running.request.params
        if running.request.more:
            length = len(running.prompt) // 4
            if running.absorbed < length:
                running.absorbed = min(length, running.absorbed + self.absorbed_per_step)
                output.progress[key[0]] = running.absorbed
                self.most_pending = max(self.most_pending, length - running.absorbed)
            if running.grows or running.absorbed < length:
                return
        if running.sent == 0 and key[1] % running.request.n == 0 and params.prompt_logprobs is not None:
            prompt = unpack_tokens(running.request.prompts[key[1] // running.request.n])
            output.prompt_logprobs += [(*key, piece) for piece in prompt_pieces(prompt, params.prompt_logprobs)]
        if params.max_tokens == 0 or key[1] in self.dead_ends:
            self._end(output, key)
            output.request_ids.append(key[0])
            output.choices.append(key[1])
            output.token_ids.append(-1)
            output.texts.append(b"")
            output.finish_reasons.append(FinishReason.LENGTH if params.max_tokens == 0 else FinishReason.ABORT)
            return
        token = next(running.tokens)
        running.sent += 1
        self.generated += 1
        row = len(output.request_ids)
        text, reason = bytes([token]), FinishReason.RUNNING
        if token in params.stop_token_ids:
            text, reason = b"", FinishReason.STOP
            output.stop_reasons[row] = token
        elif running.matcher is not None:
            text, found = running.matcher.feed(text)
            if found is not None:
                reason = FinishReason.STOP
                output.stop_reasons[row] = found
        if reason is FinishReason.RUNNING and running.sent == params.max_tokens:
            reason = FinishReason.LENGTH
            text += running.matcher.flush() if running.matcher is not None else b""
        if self.stop_after == running.sent:
            reason = FinishReason.STOP
        if self.fail_after == running.sent:
            reason = FinishReason.ERROR
            output.errors[row] = "the scripted engine failed"
        if self.cached_tokens and running.sent == 1 and key[1] % running.request.n == 0:
            output.cached_tokens[row] = self.cached_tokens
        if params.logprobs is not None:
            # ALIAS first, then the sampled token, then a byte that is no text of its own.
            top = [(ALIAS, -0.5), (token, -1.0), (0xE2, float("-inf")), (65, -20.0), (66, -21.0)][: params.logprobs]
            output.logprobs[row] = TokenLogprobs(
                self.sampled_logprob(key[1]), [item[0] for item in top], [item[1] for item in top]
            )
        if reason is not FinishReason.RUNNING:
            self._end(output, key)
        output.request_ids.append(key[0])
        output.choices.append(key[1])
        output.token_ids.append(token)
        output.texts.append(text)
        output.finish_reasons.append(reason)

    def _end(self, output: StepOutput, key: tuple[int, int]) -> None:
        """End a choice in the row that comes next; of its state, all that was sent is a part."""
        running = self.running.pop(key)
        request = running.request
        if request.save_state and self.states is not None:
            prompt = unpack_tokens(running.prompt)
            sent = script_tokens(len(prompt), key[1] % request.n, running.sent)
            tokens = running.prompt + pack_tokens(sent)
            saving = self.states.save(request.tenant, request.state_name, request.state_ttl, tokens, request.state_turn)
            output.states[len(output.request_ids)] = self.states.complete(saving).info

    def sampled_logprob(self, choice: int) -> float:
        """Of every token that a choice samples."""
        return self.logprob_of_choice.get(choice, -1.0)

    def stats(self) -> EngineStats:
        return engine_stats(
            HistogramSnapshot((0.1, 1.0), [1, 2, 3], 12.5),
            running=len(self.running),
            slots_used=len(self.running),
            slots_total=self.info.max_num_seqs,
            prompt_tokens=7,
            generated_tokens=self.generated,
            finished={"stop": 1, "length": 2, "cancelled": 3, "error": 0},
        )


class Web(uvicorn.Server):
    """Uvicorn that stops when told to, not at its next tick."""

    stop: asyncio.Event

    async def main_loop(self) -> None:
        self.stop = asyncio.Event()
        await self.stop.wait()


class Server:
    """The application on a real socket, in a thread, with its scripted engine.

    Attributes:
        engine: the scripted engine; touch it through :meth:`call` while requests run.
        client: the engine client in the application.
        http: an httpx client bound to the server.
        port: where it listens, on 127.0.0.1.
    """

    engine: ScriptedEngine
    client: EngineClient
    http: httpx.Client
    port: int
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the server's event loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def complete(self, prompt: Any = "abc", **fields: Any) -> httpx.Response:
        """POST a completion; the default engine answers 16 tokens."""
        return self.http.post("/v1/completions", json={"prompt": prompt, **fields})

    def chat(self, messages: Any = "abc", **fields: Any) -> httpx.Response:
        """POST a chat completion; a text is a single message of the user's."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, **fields})

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """What comes over a bare connection, until this has come."""
    answer = b""
    while end not in answer:
        received = connection.recv(4096)
        assert received, answer
        answer += received
    return answer


def api_settings(**changes: Any) -> ApiSettings:
    """Settings of a server of one model with two names."""
    fields: dict[str, Any] = {
        "served_model_names": ("scripted", "org/scripted"),
        "revision": "v1.2",
        "api_keys": (),
        "protect_all_routes": False,
        "allowed_origins": (),
        "tokenizer_folder": None,
        "chat_template": None,
        "max_model_len": 2000,
        "max_body_bytes": 100_000,
        "sleep_mode": False,
        "max_log_len": 0,
        "created": 1_700_000_000,
    }
    keys = changes.pop("keys", ())
    fields["api_keys"] = tuple(ApiKey(f"key-{number}", hash_key(key)) for number, key in enumerate(keys, 1))
    return ApiSettings(**{**fields, **changes})


@contextmanager
def serve(
    engine: ScriptedEngine | None = None,
    *,
    tokenizer: Any = ByteTokenizer,
    chat_template: str | None = None,
    sleep_switch: SleepSwitch | None = None,
    **changes: Any,
) -> Iterator[Server]:
    """Run the application until the block ends.

    Args:
        engine: default: a fresh one.
        tokenizer: its class; None: serve without one.
        chat_template: Jinja; None: the model has none.
        sleep_switch: None: nobody may send the engine to sleep.
        changes: of :func:`api_settings`.
    """
    server = Server()
    server.engine = engine or ScriptedEngine()
    # With the protocol named, asyncio turns Nagle's algorithm off; else every answer is 40 ms late.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server.port = listener.getsockname()[1]
    ready = threading.Event()

    async def main(web: Web) -> None:
        server.loop = asyncio.get_running_loop()
        await server.client.start()
        serving = asyncio.ensure_future(web.serve([listener]))
        while not web.started:
            await asyncio.sleep(0.001)
        ready.set()
        await serving
        await server.client.close()

    folder = tempfile.TemporaryDirectory()
    with mock.patch("server.api.client.ClientChannel", server.engine.connect):
        server.client = EngineClient(f"ipc://{folder.name}/engine")
    template = None if chat_template is None else ChatTemplate(chat_template, ByteTokenizer.special_tokens)
    app = create_app(api_settings(**changes), server.client, tokenizer and tokenizer(), template, sleep_switch)
    web = Web(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(main(web)), name="server")
    thread.start()
    try:
        assert ready.wait(10)
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=10) as server.http:
            yield server
    finally:
        server.loop.call_soon_threadsafe(web.stop.set)
        thread.join(10)
        listener.close()
        folder.cleanup()
    assert not thread.is_alive()
