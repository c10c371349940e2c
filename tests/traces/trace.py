"""Two small engines under random operations on states, whose every answer is held against uninterrupted runs.

One trace does everything that can be done with states, while other requests run: saves, with names and without, goes on
from what was saved, forks, deletes, lets expire, cancels, swaps, fills the tiers, feeds texts in pieces, moves states
between the engines, and ends engines in an orderly way or by a crash, of which a copy of the folder at that moment is
what remains.
"""

import contextlib
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from server.component_settings import StateCacheConfig
from server.engine.engine import Engine
from server.engine.saved_files import FOLDER
from server.types import FinishReason, RefusalReason, StateAction, StateInfo
from tests.engine.driving import FIXTURES, Driver, engine_config, random_prompt

VOCAB: Final = 512
OPERATIONS: Final = 60
"""Of each trace."""
_MODELS: Final = ("base", "conv", "gqa")
_LONGEST: Final = 12
"""Tokens of an answer."""
_STOPS: Final = tuple(range(3, VOCAB, 9))
_MOST_STATES: Final = 10
"""Of an engine: few enough for any of the budgets."""
_KEY: Final = b"sixteen bytes or more"
_GREEDY: Final[dict[str, Any]] = {"temperature": 0.0, "ignore_eos": True}


@dataclass(frozen=True)
class Saved:
    """What is known of an acknowledged state."""

    tenant: str
    name: str | None
    tokens: list[int]
    expires: float


@dataclass
class Asked:
    """A request under way. ``rest`` is what is still to come of a text that comes in pieces; ``known`` is how much of
    its context need not be absorbed again."""

    tenant: str
    state: str | None
    context: list[int]
    new: list[int]
    n: int
    save: bool
    name: str | None
    stops: bool
    grows: bool = False
    rest: list[int] = field(default_factory=list)
    known: int = 0

    @property
    def prompt(self) -> list[int]:
        return self.context + self.new


@cache
def _cold(model: str, mode: tuple[str, bool]) -> Driver:
    return Driver(Engine(engine_config(FIXTURES / model, device=mode[0]), overlap=mode[1]))


@cache
def parked_bytes(model: str, device: str) -> int:
    """Of one state: on a GPU, with its ring."""
    return _cold(model, (device, False)).engine._runner.parked_bytes


class Server:
    """One engine, and what it must know.

    Args:
        trace: which it is a part of.
        folder: for states; None: they are kept in memory.
        rooms: parked states that the device and the host hold.
    """

    def __init__(self, trace: "Trace", folder: Path | None, rooms: tuple[int, int]) -> None:
        self.trace = trace
        self.folder = folder
        self.rooms = rooms
        self.book: dict[str, Saved] = {}
        self.start()

    def start(self) -> None:
        trace, one = self.trace, parked_bytes(self.trace.model, self.trace.mode[0])
        device, host = (count * one for count in self.rooms)
        states = StateCacheConfig(
            gpu_bytes=device,
            host_bytes=host,
            folder=self.folder,
            disk_bytes=4 * _MOST_STATES * one,
            signing_key=trace.key,
        )
        config = engine_config(
            FIXTURES / trace.model,
            device=trace.mode[0],
            state_cache=states,
            max_num_seqs=trace.slots,
            swap_bytes=64 << 20,
            several_keys=True,
        )
        self.driver = Driver(Engine(config, overlap=trace.mode[1]))
        assert self.driver.engine._states is not None
        self.driver.engine._states._clock = lambda: trace.now
        self.asked: dict[int, Asked] = {}
        self.absorbed = self.cancelled = 0

    def absorb(self) -> None:
        """Look at the answers that have ended."""
        for request, asked in list(self.asked.items()):
            answers = [self.driver.answers.get((request, choice)) for choice in range(asked.n)]
            if any(answer is None or not answer.finish_reason for answer in answers):
                continue
            del self.asked[request]
            if any(answer is not None and answer.finish_reason is FinishReason.CANCELLED for answer in answers):
                self.cancelled += len(asked.prompt)
            else:
                assert answers[0] is not None
                self.absorbed += len(asked.prompt) - answers[0].cached_tokens
                # Whose state ends while it waits in the queue has the transcript absorbed again.
                assert self.driver.engine._states is not None
                if asked.state in self.driver.engine._states._states:
                    assert answers[0].cached_tokens >= asked.known, "what a state holds is not absorbed again"
            for answer in answers:
                assert answer is not None
                self.check(asked, answer)

    def check(self, asked: Asked, answer: Any) -> None:
        """Hold an answer, and the state that it leaves, against what an uninterrupted run says."""
        assert answer.error is None and answer.unsaved is None
        expected = [] if asked.grows else self.trace.expected(asked.prompt)
        end = next((i + 1 for i, token in enumerate(expected) if asked.stops and token in _STOPS), len(expected))
        assert answer.token_ids == expected[:end][: len(answer.token_ids)]
        if answer.finish_reason is FinishReason.CANCELLED:
            assert answer.state is None
            return
        self.trace.counts["answers"] += 1
        self.trace.counts["tokens"] += len(answer.token_ids)
        if not asked.save:
            return
        stopped = answer.finish_reason is FinishReason.STOP
        kept = answer.token_ids[:-1] if stopped else answer.token_ids
        self.enter(answer.state, asked.tenant, asked.name, asked.prompt + kept)

    def enter(self, state: StateInfo, tenant: str, name: str | None, tokens: list[int]) -> None:
        """Note an acknowledged state, which takes its name over."""
        assert (state.name, state.num_tokens) == (name, len(tokens))
        for other, saved in list(self.book.items()):
            if name is not None and (saved.tenant, saved.name) == (tenant, name):
                del self.book[other]
        self.book[state.id] = Saved(tenant, name, tokens, state.expires)
        self.expire()  # it may have been on its way for long

    def expire(self) -> None:
        self.book = {state: saved for state, saved in self.book.items() if saved.expires > self.trace.now}

    def listed(self) -> dict[str, StateInfo]:
        told = [self.driver.command(StateAction.LIST, tenant=tenant) for tenant in "ab"]
        assert isinstance(told[0], list) and isinstance(told[1], list)
        return {state.id: state for state in told[0] + told[1]}

    def drain(self) -> None:
        """Let everything end that can end."""
        for request, asked in self.asked.items():
            if asked.rest:
                self.driver.cancel(request)
        self.driver.run()
        self.absorb()
        assert not self.asked
        stats = self.driver.engine.stats()
        told = self.absorbed, stats.prompt_tokens, self.absorbed + self.cancelled
        assert told[0] <= told[1] <= told[2], f"nothing is absorbed twice: {told}"
        assert stats.slots_used == stats.swapped == stats.running == stats.waiting == 0
        assert {state: info.num_tokens for state, info in self.listed().items()} == {
            state: len(saved.tokens) for state, saved in self.book.items()
        }

    def close(self) -> None:
        counts, stats = self.trace.counts, self.driver.engine.stats()
        counts["swaps"] += stats.swaps_out
        counts["evictions"] += stats.states_evicted
        counts["hits"] += stats.prefix_hits
        assert self.driver.engine._states is not None
        counts["expired"] += self.driver.engine._states.counts["expire"]
        self.driver.engine.close()

    def crash(self) -> None:
        """Start again with what is on the disk at some moment."""
        assert self.folder is not None
        remains = self.folder.with_name(f"{self.folder.name}-")
        (remains / FOLDER).mkdir(parents=True)
        for path in sorted((self.folder / FOLDER).iterdir()):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(path, remains / FOLDER)
        self.close()
        self.folder = remains
        self.start()
        self.expire()
        listed = self.listed()
        for state in listed.keys() - self.book.keys():
            # It was about to be acknowledged, and may have taken over a name.
            tenant = next(tenant for tenant in "ab" if self.owns(tenant, state))
            name = listed[state].name
            self.book = {
                other: saved
                for other, saved in self.book.items()
                if name is None or (saved.tenant, saved.name) != (tenant, name)
            }
            assert isinstance(self.driver.command(StateAction.DELETE, state, tenant=tenant), list)
        assert {state: info.num_tokens for state, info in self.listed().items()} == {
            state: len(saved.tokens) for state, saved in self.book.items()
        }

    def owns(self, tenant: str, state: str) -> bool:
        return isinstance(self.driver.command(StateAction.DESCRIBE, state, tenant=tenant), list)

    def end(self) -> None:
        """Nothing is left behind."""
        self.drain()
        for state, saved in self.book.items():
            assert isinstance(self.driver.command(StateAction.DELETE, state, tenant=saved.tenant), list)
        engine = self.driver.engine
        assert engine._states is not None and engine._reuse is not None
        assert not len(engine._states) and not engine._states.nbytes and not engine._states._reserved.total()
        assert set(engine._reuse.held().values()) == {(0, 0)}
        cache = engine._reuse._cache
        assert not cache._active and not any(entry.pins or entry.holds for entry in cache.tiers)
        self.close()
        if self.folder is not None:
            assert [path.name for path in self.folder.rglob("*") if path.is_file()] == ["lock"]


class Trace:
    """One trace, and how often what was done in it.

    Args:
        seed: decides everything but what threads do first.
        folder: for files.
        device: of the engines.
    """

    def __init__(self, seed: int, folder: Path, device: str = "cpu") -> None:
        self.rng = rng = random.Random(seed)
        self.model = _MODELS[seed % len(_MODELS)]
        self.mode = (device, device == "cuda" or rng.random() < 0.5)
        self.slots = rng.choice([1, 2, 4])
        self.key = _KEY if rng.random() < 0.5 else None
        self.now = time.time()
        self.counts: Counter[str] = Counter()
        self._path = folder / "moving"
        self._expected: dict[tuple[int, ...], list[int]] = {}
        self._texts = 0
        self.servers = []
        for number in range(2):
            # Without files, half of the room must hold what is saved.
            with_files = rng.random() < 0.75
            least = 0 if with_files else 2 * _MOST_STATES
            rooms = (rng.choice([0, 2]), rng.choice([1, 2, 5]) + least)
            self.servers.append(Server(self, folder / f"{seed}-{number}" if with_files else None, rooms))

    def run(self) -> None:
        """Do everything, and look whether all is as it must be."""
        operations = {self._ask: 10, self._step: 6, self._text: 1, self._feed: 3, self._cancel: 1, self._fork: 1}
        operations |= {self._delete: 1, self._move: 2, self._pass_time: 0.5, self._flood: 1, self._restart: 1}
        for _ in range(OPERATIONS):
            (operation,) = self.rng.choices(list(operations), list(operations.values()))
            server = self.rng.choice(self.servers)
            if operation(server) is not False:
                self.counts[operation.__name__.removeprefix("_")] += 1
            for one in self.servers:
                one.absorb()
        for server in self.servers:
            server.end()

    def expected(self, prompt: list[int]) -> list[int]:
        """What comes after a prompt that nothing interrupts."""
        key = tuple(prompt)
        if key not in self._expected:
            answer = _cold(self.model, self.mode).complete(prompt, max_tokens=_LONGEST, **_GREEDY)
            self._expected[key] = answer.token_ids
        return self._expected[key]

    def _pick(self, server: Server, tenant: str | None = None) -> str | None:
        states = [state for state, saved in server.book.items() if tenant in (None, saved.tenant)]
        return self.rng.choice(states) if states else None

    def _save(self, server: Server, tenant: str, n: int) -> dict[str, Any]:
        """Whether and how to save what a request leads to."""
        rng = self.rng
        under_way = sum(asked.n for asked in server.asked.values() if asked.save)
        if len(server.book) + under_way + n > _MOST_STATES or rng.random() < 0.3:
            return {}
        name = rng.choice([None, "x", "y"]) if n == 1 else None
        if any((asked.tenant, asked.name) == (tenant, name) for asked in server.asked.values()):
            name = None
        return {"save": True, "name": name, "ttl": rng.choice([None, 1000.0])}

    def _ask(self, server: Server) -> None:
        rng = self.rng
        tenant = rng.choice("aab")
        state = self._pick(server, tenant) if rng.random() < 0.6 else None
        saved = None if state is None else server.book[state]
        context = [] if saved is None else saved.tokens
        beginning = [] if state is not None or rng.random() < 0.5 else random_prompt(90, VOCAB, rng.randrange(2))
        new = beginning + random_prompt(rng.choice([0 if state else 1, 1, 5, 70]), VOCAB, rng.randrange(30))
        n = rng.choice([1, 1, 1, 2, 3])
        save = self._save(server, tenant, n)
        stops = rng.random() < 0.3
        reference = state if saved is None or saved.name is None or rng.random() < 0.5 else saved.name
        request = server.driver.submit(
            [new],
            n,
            tenant=tenant,
            state=reference,
            priority=rng.randrange(3),
            session=rng.choice([None, None, "s"]),
            checkpoint_at=tuple(sorted(rng.sample(range(1, len(new) + 1), min(len(new), rng.choice([0, 0, 2]))))),
            max_tokens=rng.randrange(0 if save else 1, _LONGEST + 1),
            stop_token_ids=_STOPS if stops else (),
            **save,
            **_GREEDY,
        )
        if request in server.driver.rejected:
            # A fork shares its snapshot; what it leads to does not, so that there may be no room for all of these.
            assert server.driver.rejected[request].reason is RefusalReason.STATES_FULL and save
            self.counts["refused"] += 1
            return
        known = len(context)
        if state is not None and not new and not self._has_logits(server, state):
            # As where a token was taken back: whoever adds nothing has the last one absorbed again, for its logits.
            known = 0
        server.asked[request] = Asked(tenant, state, context, new, n, bool(save), save.get("name"), stops, known=known)

    def _has_logits(self, server: Server, state: str) -> bool:
        """Whether a state's snapshot has the logits of its last token."""
        assert server.driver.engine._states is not None
        entry = server.driver.engine._states._states[state].entry
        return entry is not None and entry.complete

    def _step(self, server: Server) -> None:
        for _ in range(self.rng.randrange(1, 9)):
            if server.driver.engine.has_work():
                server.driver.step()

    def _text(self, server: Server) -> bool | None:
        """Begin with a text that comes in pieces."""
        if not self._save(server, "a", 1) or any(asked.grows for asked in server.asked.values()):
            return False
        self._texts += 1
        text = random_prompt(self.rng.randrange(150, 400), VOCAB, self._texts)
        start = self.rng.randrange(1, 140)
        request = server.driver.submit([text[:start]], tenant="a", more=True, save=True, priority=1, max_tokens=0)
        if request in server.driver.rejected:
            return False
        server.asked[request] = Asked("a", None, [], text, 1, True, None, False, grows=True, rest=text[start:])
        return None

    def _feed(self, server: Server) -> bool:
        for request, asked in server.asked.items():
            if asked.rest:
                length = self.rng.randrange(1, 200)
                server.driver.extend(request, asked.rest[:length], last=length >= len(asked.rest))
                asked.rest = asked.rest[length:]
                return True
        return False

    def _cancel(self, server: Server) -> bool:
        if not server.asked:
            return False
        server.driver.cancel(self.rng.choice(list(server.asked)))
        return True

    def _fork(self, server: Server) -> bool:
        state = self._pick(server)
        if state is None or not self._save(server, "a", 1):
            return False
        saved = server.book[state]
        told = server.driver.command(StateAction.FORK, state, tenant=saved.tenant)
        assert isinstance(told, list), told
        server.absorb()
        server.enter(told[0], saved.tenant, None, saved.tokens)
        return True

    def _delete(self, server: Server) -> bool:
        state = self._pick(server)
        if state is None:
            return False
        assert isinstance(server.driver.command(StateAction.DELETE, state, tenant=server.book[state].tenant), list)
        del server.book[state]
        return True

    def _move(self, server: Server) -> bool:
        """Let the other engine have a state, too, for either tenant."""
        other = self.servers[server is self.servers[0]]
        state = self._pick(server)
        if state is None or not self._save(other, "a", 1):
            return False
        saved, tenant = server.book[state], self.rng.choice("ab")
        told = server.driver.command(StateAction.DOWNLOAD, state, tenant=saved.tenant, path=self._path)
        if not isinstance(told, list):
            # Another one that was on its way has just taken over its name.
            assert told.reason is RefusalReason.UNKNOWN_STATE and not server.owns(saved.tenant, state), told
            return False
        told = other.driver.command(StateAction.UPLOAD, tenant=tenant, path=self._path)
        other.absorb()
        if not isinstance(told, list):
            assert told.reason is RefusalReason.STATES_FULL
            return False
        other.enter(told[0], tenant, None, saved.tokens)
        return True

    def _pass_time(self, _: Server) -> None:
        self.now += 600
        for server in self.servers:
            server.expire()

    def _flood(self, server: Server) -> None:
        """Prompts that have nothing to do with others push their states out."""
        for _ in range(6):
            new = random_prompt(self.rng.randrange(1, 100), VOCAB, self.rng.randrange(1 << 30))
            request = server.driver.submit([new], tenant="b", priority=-1, max_tokens=2, **_GREEDY)
            server.asked[request] = Asked("b", None, [], new, 1, False, None, False)

    def _restart(self, server: Server) -> None:
        if server.folder is not None and self.rng.random() < 0.6:
            server.crash()
            return
        server.drain()
        server.close()
        if server.folder is None:
            server.book.clear()
        server.start()
        assert {state: info.num_tokens for state, info in server.listed().items()} == {
            state: len(saved.tokens) for state, saved in server.book.items()
        }
