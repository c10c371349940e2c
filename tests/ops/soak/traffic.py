"""The load of a soak: clients that do, one thing after the other, what clients do, and check every answer."""

import asyncio
import json
import random
import time
from array import array
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from clients.server import FAILURES

STATE_SECONDS = 60
"""For which states are saved: those whose name a client never learnt, having hung up, expire."""
_VOCABULARY = range(3, 8000)
"""Token ids that every tokenizer has."""
_MOVED_BYTES = 1 << 20
"""Of each saved state, on average: of large ones, few are downloaded, or the load would be nothing else."""
_WRONG_KEPT = 20


@dataclass(slots=True)
class Record:
    """What came of the requests of one window of time. Seconds.

    Attributes:
        outcomes: ``answered``, ``refused`` (with the status that was meant to come), ``left`` (the client hung up, as
            it meant to), ``wrong`` (anything else).
        kinds: requests by what they were for.
        statuses: of HTTP answers.
        first: from sending a streamed request to its first chunk.
        gaps: between chunks of one choice.
        lag: by which the clients' own timer was late: theirs, not the server's.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    first: "array[float]" = field(default_factory=lambda: array("d"))
    gaps: "array[float]" = field(default_factory=lambda: array("d"))
    lag: "array[float]" = field(default_factory=lambda: array("d"))


class WrongAnswer(Exception):
    """An answer that must not have come, or none where one had to."""


@dataclass(slots=True)
class Traffic:
    """Clients, and what became of their requests.

    Args:
        base_url: of the server.
        headers: of every request: the key.
        text: whether the server has a tokenizer.
        chat: whether it has a chat template.
        exact: whether the same greedy request must have the same answer every time.

    Attributes:
        records: one per window, the last one being filled.
        wrong: the first answers that must not have come.
        choices: ``answered`` in full, and ``perhaps``, of clients that hung up and others that may have been no more
            than accepted.
        cached: prompt tokens that answers said to have come from parked states.
    """

    base_url: str
    headers: dict[str, str]
    text: bool
    chat: bool
    exact: bool
    records: list[Record] = field(default_factory=lambda: [Record()])
    wrong: list[str] = field(default_factory=list)
    choices: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    stopped: bool = False
    _greedy: str | None = None
    _prefixes: deque[list[int]] = field(default_factory=lambda: deque(maxlen=8))

    @property
    def record(self) -> Record:
        return self.records[-1]

    def begin_window(self) -> None:
        self.records.append(Record())

    async def run(self, clients: int, seed: int) -> None:
        """Until ``stopped``; every request that was begun is ended."""
        limits = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=120)
        async with aiohttp.ClientSession(
            self.base_url, headers=self.headers, connector=limits, timeout=timeout
        ) as http:
            rngs = [random.Random(f"{seed}-{number}") for number in range(clients)]
            lag = asyncio.create_task(self._lag())
            await asyncio.gather(*(Client(self, http, rng).run() for rng in rngs))
            lag.cancel()

    def note_wrong(self, kind: str, reason: str) -> None:
        self.record.outcomes["wrong"] += 1
        if len(self.wrong) < _WRONG_KEPT:
            self.wrong.append(f"{kind}: {reason}")

    def same_greedy(self, text: str) -> None:
        """Compare with what the same request was answered before."""
        self._greedy = self._greedy or text
        if self.exact and text != self._greedy:
            raise WrongAnswer(f"{text!r} where {self._greedy!r} came before")

    def prefix(self, rng: random.Random) -> list[int]:
        """The beginning of a prompt that others begin with too; now and then a new one."""
        if not self._prefixes or rng.random() < 0.05:
            self._prefixes.append(tokens(rng, 100, 700))
        return rng.choice(self._prefixes)

    async def _lag(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.1)
            self.record.lag.append(time.perf_counter() - began - 0.1)


def tokens(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.choice(_VOCABULARY) for _ in range(rng.randint(low, high))]


class Client:
    """One user: a request after the other, each of a kind drawn at random."""

    def __init__(self, traffic: Traffic, http: aiohttp.ClientSession, rng: random.Random) -> None:
        self._traffic, self._http, self._rng = traffic, http, rng
        kinds: list[tuple[int, str, Callable[[], Awaitable[None]]]] = [
            (20, "stream", self._stream),
            (10, "completion", self._completion),
            (6, "choices", self._choices),
            (10, "reuse", self._reuse),
            (8, "states", self._states),
            (6, "scores", self._scores),
            (4, "the same", self._same),
            (10, "refused", self._refused),
            (10, "hangs up in a stream", self._hang_up),
            (4, "hangs up before", self._hang_up_before),
            (3, "looks around", self._look),
        ]
        if traffic.text:
            kinds += [(6, "structured", self._structured), (3, "tokenize", self._tokenize)]
        if traffic.chat:
            kinds += [(10, "chat", self._chat)]
        self._weights = [weight for weight, _, _ in kinds]
        self._kinds = [(kind, act) for _, kind, act in kinds]

    async def run(self) -> None:
        while not self._traffic.stopped:
            [(kind, act)] = self._rng.choices(self._kinds, self._weights)
            self._traffic.record.kinds[kind] += 1
            try:
                await act()
            except WrongAnswer as error:
                self._traffic.note_wrong(kind, str(error))
            except FAILURES as error:
                self._traffic.note_wrong(kind, f"{type(error).__name__}: {error}")
            await asyncio.sleep(self._rng.random() * 0.1)

    # What clients do.

    async def _stream(self) -> None:
        # Now and then an urgent one, which may take another's slot.
        priority = self._rng.choice([0, 0, 0, -1])
        await self._generate(prompt=tokens(self._rng, 1, 300), stream=True, priority=priority)

    async def _completion(self) -> None:
        await self._generate(prompt=tokens(self._rng, 1, 300))

    async def _choices(self) -> None:
        prompts = [tokens(self._rng, 1, 60) for _ in range(self._rng.randint(1, 2))]
        await self._generate(prompt=prompts, n=self._rng.randint(2, 3), stream=self._rng.random() < 0.5)

    async def _reuse(self) -> None:
        prompt = self._traffic.prefix(self._rng) + tokens(self._rng, 1, 20)
        answer = await self._generate(prompt=prompt)
        self._traffic.cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def _states(self) -> None:
        """Read, go on and save, fork, download, upload, go on, delete."""
        ttl = STATE_SECONDS
        read = await self._ask("POST", "/v1/states/prefill", 201, prompt=tokens(self._rng, 20, 200), ttl=ttl)
        answer = await self._generate(state=read["id"], prompt=tokens(self._rng, 1, 20), save_state=True, state_ttl=ttl)
        saved = answer["state"]["id"]
        fork = await self._ask("POST", f"/v1/states/{saved}/fork", 201, ttl=ttl)
        states = [read["id"], saved, fork["id"]]
        if self._rng.random() < _MOVED_BYTES / max(1, read["bytes"]):
            states.append((await self._move(fork["id"]))["id"])
        await self._generate(state=states[-1], prompt=tokens(self._rng, 1, 20), stream=True)
        for state in states:
            await self._ask("DELETE", f"/v1/states/{state}", 200)

    async def _move(self, state: str) -> Any:
        """Download a state and upload it again."""
        # Should its snapshot be gone, a choice that generates nothing absorbs it.
        self._traffic.choices["perhaps"] += 1
        async with self._http.get(f"/v1/states/{state}/content") as answer:
            content = await answer.read()
            self._expect(answer.status, 200, content[:300].decode(errors="replace"))
        kind = {"Content-Type": "application/octet-stream"}
        async with self._http.post(f"/v1/states?ttl={STATE_SECONDS}", data=content, headers=kind) as answer:
            text = await answer.text()
            self._expect(answer.status, 201, text)
        self._traffic.record.outcomes["answered"] += 2
        return json.loads(text)

    async def _scores(self) -> None:
        prompt = tokens(self._rng, 2, 300)
        answer = await self._ask("POST", "/v1/completions", 200, prompt=prompt, max_tokens=0, prompt_logprobs=2)
        if len(answer["choices"][0]["prompt_logprobs"]) != len(prompt):
            raise WrongAnswer("not a log-probability for each token of the prompt")
        self._traffic.choices["answered"] += 1

    async def _same(self) -> None:
        answer = await self._generate(prompt=[5, 6, 7], max_tokens=8, temperature=0, return_token_ids=True)
        self._traffic.same_greedy(str(answer["choices"][0]["token_ids"]))

    async def _structured(self) -> None:
        form = {"regex": r" [A-Z][a-z]{1,8}, [0-9]{1,4}\."}
        answer = await self._generate(prompt="His name and age:", structured_outputs=form, max_tokens=40)
        if not answer["choices"][0]["text"].endswith("."):
            raise WrongAnswer(f"not of its structure: {answer['choices'][0]['text']!r}")

    async def _chat(self) -> None:
        messages = [{"role": "user", "content": "word " * self._rng.randint(1, 60)}]
        await self._generate("/v1/chat/completions", messages=messages, stream=self._rng.random() < 0.7)

    async def _tokenize(self) -> None:
        text = "What is in a name? " * self._rng.randint(1, 20)
        found = await self._ask("POST", "/tokenize", 200, prompt=text)
        await self._ask("POST", "/detokenize", 200, tokens=found["tokens"])

    async def _look(self) -> None:
        for path in ("/v1/models", "/v1/states", "/health", "/metrics"):
            await self._ask("GET", path, 200)

    async def _refused(self) -> None:
        status, path, body = self._rng.choice(
            [
                (400, "/v1/completions", {"prompt": [5], "temperature": -1}),
                (400, "/v1/completions", {"prompt": [5], "no_such_field": 1}),
                (400, "/v1/completions", {"prompt": [1 << 30]}),
                (400, "/v1/completions", {"prompt": "a" * 100_000, "max_tokens": "many"}),
                (400, "/v1/chat/completions", {"messages": 7}),
                (404, "/v1/completions", {"prompt": [5], "model": "no-such-model"}),
                (404, "/v1/completions", {"prompt": [5], "state": "no-such-state"}),
                (404, "/v1/no-such-route", {}),
            ]
        )
        await self._ask("POST", path, status, **body)

    async def _hang_up(self) -> None:
        fields = {"prompt": tokens(self._rng, 1, 300), "n": self._rng.randint(1, 2), "save_state": True}
        body = fields | {"max_tokens": 200, "ignore_eos": True, "stream": True, "state_ttl": STATE_SECONDS}
        self._traffic.choices["perhaps"] += fields["n"]
        async with self._http.post("/v1/completions", json=body) as answer:
            self._expect(answer.status, 200, "")
            for _ in range(self._rng.choice([0, 1, 5, 20])):
                await answer.content.readline()
            answer.close()
        self._traffic.record.outcomes["left"] += 1

    async def _hang_up_before(self) -> None:
        body = {"prompt": tokens(self._rng, 1, 700), "max_tokens": 200, "ignore_eos": True}
        self._traffic.choices["perhaps"] += 1
        try:
            async with (
                asyncio.timeout(self._rng.random() * 0.2),
                self._http.post("/v1/completions", json=body) as answer,
            ):
                await answer.read()
        except TimeoutError:
            pass
        self._traffic.record.outcomes["left"] += 1

    # How they ask.

    def _expect(self, status: int, expected: int, text: str) -> None:
        self._traffic.record.statuses[status] += 1
        if status != expected:
            raise WrongAnswer(f"status {status} instead of {expected}: {text[:300]}")

    async def _ask(self, method: str, path: str, status: int, **body: Any) -> Any:
        """One whole answer of the expected status; None where it is no JSON."""
        async with self._http.request(method, path, json=body if method == "POST" else None) as answer:
            text = await answer.text()
            self._expect(answer.status, status, text)
            found = json.loads(text) if answer.content_type == "application/json" else None
        if status >= 400 and not (found and found["error"]["message"]):
            raise WrongAnswer(f"status {status} without an error's form: {text[:300]}")
        self._traffic.record.outcomes["refused" if status >= 400 else "answered"] += 1
        return found

    async def _generate(self, path: str = "/v1/completions", **fields: Any) -> Any:
        """An answer to the end; of a stream, None."""
        body = {"max_tokens": self._rng.randint(1, 40), "ignore_eos": "structured_outputs" not in fields, **fields}
        prompt = fields.get("prompt")
        wanted = fields.get("n", 1) * (len(prompt) if prompt and isinstance(prompt[0], list) else 1)
        if fields.get("stream"):
            await self._read_stream(path, body, wanted)
            found = None
        else:
            found = await self._ask("POST", path, 200, **body)
            ends = [choice["finish_reason"] for choice in found["choices"]]
            if len(ends) != wanted or not set(ends) <= {"stop", "length"}:
                raise WrongAnswer(f"{wanted} choices were asked for, and ended so: {ends}")
        self._traffic.choices["answered"] += wanted
        return found

    async def _read_stream(self, path: str, body: dict[str, Any], wanted: int) -> None:
        last: dict[int, float] = {}
        ends: Counter[int] = Counter()
        began, done = time.perf_counter(), False
        record = self._traffic.record  # the window in which the request was sent
        async with self._http.post(path, json=body) as answer:
            self._expect(answer.status, 200, "" if answer.status == 200 else await answer.text())
            async for line in answer.content:
                if not (line := line.strip()):
                    continue
                if done:
                    raise WrongAnswer(f"something came after [DONE]: {line[:200]!r}")
                if line == b"data: [DONE]":
                    done = True
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise WrongAnswer(f"a stream failed: {event['error']}")
                now = time.perf_counter()
                if not last:
                    record.first.append(now - began)
                for choice in event["choices"]:
                    index = choice["index"]
                    if index in last:
                        record.gaps.append(now - last[index])
                    last[index] = now
                    ends[index] += choice["finish_reason"] is not None
        if not done or ends != Counter(range(wanted)):
            raise WrongAnswer(f"a stream of {wanted} choices ended so: {dict(ends)}, [DONE]: {done}")
        record.outcomes["answered"] += 1
