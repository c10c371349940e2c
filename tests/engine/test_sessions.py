"""Sessions: the state at the end of a named conversation's newest answer outlasts others, within bounds."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from server.component_settings import StateCacheConfig
from server.engine.engine import Engine
from server.engine.sessions import MAX_SESSIONS, SESSION_SECONDS, Sessions
from server.engine.tiers import Tier
from server.types import pack_tokens
from tests.engine.driving import FIXTURES, Driver, engine_config, random_prompt
from tests.engine.test_prefix_cache import Cached, count

VOCAB = 512
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@dataclass
class Favours:
    """Notes which snapshots are favoured, in place of a cache; the snapshot of tokens is their name."""

    favoured: list[bytes] = field(default_factory=list)

    def favour(self, tenant: str, tokens: bytes) -> Any:
        if not tokens:
            return None
        self.favoured.append(tokens)
        return tokens

    def unfavour(self, entry: Any) -> None:
        self.favoured.remove(entry)


def test_a_session_favours_its_newest_answer() -> None:
    now, parking = 0.0, Favours()
    sessions = Sessions(parking, lambda: now)
    sessions.note("a", "x", b"1")
    sessions.note("b", "x", b"2")
    sessions.note("a", "x", b"3")
    assert sorted(parking.favoured) == [b"2", b"3"] and len(sessions) == 2
    sessions.note("b", "x", b"")
    assert parking.favoured == [b"3"], "its newest answer has left nothing"
    now = SESSION_SECONDS - 1
    sessions.note("a", "y", b"4")
    sessions.expire()
    assert len(sessions) == 2
    now = SESSION_SECONDS
    sessions.expire()
    assert parking.favoured == [b"4"]


def test_a_tenant_has_so_many_sessions() -> None:
    parking = Favours()
    sessions = Sessions(parking, lambda: 0.0)
    sessions.note("b", "s0", b"theirs")
    for number in range(MAX_SESSIONS + 2):
        sessions.note("a", f"s{number}", b"%d" % number)
        sessions.note("a", "s0", b"0")  # stays the newest
    assert len(sessions) == MAX_SESSIONS + 1
    assert b"theirs" in parking.favoured and b"0" in parking.favoured
    assert b"1" not in parking.favoured and b"2" not in parking.favoured


def test_what_sessions_need_is_given_up_last() -> None:
    cached = Cached({Tier.DEVICE: 2, Tier.HOST: 2, Tier.DISK: 0})
    cache = cached.cache
    entries = []
    for number in range(4):
        cached.run(count(100 * number, 10))
        entry = cache.favour("", pack_tokens(count(100 * number, 10)))
        assert entry is not None
        entries.append(entry)
    cache.unfavour(entries[1])
    cached.run(count(500, 10))
    assert [entry.nbytes for entry in entries] == [1, 0, 1, 1], "the only one that nobody favours made room"
    cached.run(count(600, 10))
    assert [entry.nbytes for entry in entries] == [1, 0, 1, 1], "the newcomer that nobody favours made room"
    for entry in entries[2:]:
        cache.unfavour(entry)
    cached.run(count(700, 10))
    cached.run(count(800, 10))
    assert entries[0].nbytes == 1
    # Where there is nothing else, they make room in their order.
    crowded = Cached({Tier.DEVICE: 2, Tier.HOST: 0, Tier.DISK: 0})
    for number in range(3):
        crowded.run(count(100 * number, 10))
        assert crowded.cache.favour("", pack_tokens(count(100 * number, 10))) is not None
    assert [crowded.run(count(100 * number, 10))[0] for number in (1, 2)] == [10, 10]


def test_a_better_snapshot_takes_the_place_of_one_that_is_held() -> None:
    cached = Cached()
    tokens = pack_tokens(count(0, 10))
    cached.cache.keep("", tokens, cached.shelf.park("", tokens, complete=False), Tier.DEVICE, 1, complete=False)
    held = cached.cache.hold("", tokens)
    assert held is not None and not held.complete
    assert cached.run(count(0, 10)) == (0, [10])
    assert held.complete and held.payload.complete
    assert cached.run(count(0, 10)) == (10, [])
    assert len(cached.shelf.held) == 1


@pytest.mark.parametrize("session", ["talk", None])
def test_a_named_conversation_outlasts_a_storm(session: str | None) -> None:
    """Also where strangers use its name, and whatever else begins and ends."""
    size = Engine(engine_config(FIXTURES / "base")).info.state_bytes
    cache = StateCacheConfig(host_bytes=4 * (size + 4 * VOCAB + 4096))
    driver = Driver(Engine(engine_config(FIXTURES / "base", state_cache=cache)))
    prompt = random_prompt(50, VOCAB, 1)

    def turn(prompt: list[int]) -> list[int]:
        request = driver.submit([prompt], tenant="a", session=session, max_tokens=8, **GREEDY)
        driver.run()
        answer = driver.answers[request, 0]
        cached.append(answer.cached_tokens)
        return prompt + answer.token_ids + random_prompt(5, VOCAB, len(prompt))

    cached: list[int] = []
    for number in range(3):
        length = len(prompt)
        prompt = turn(prompt)
        for other in range(6):
            stranger = random_prompt(30, VOCAB, 100 * number + other)
            driver.submit([stranger], tenant="ab"[other % 2], session=None, max_tokens=3, **GREEDY)
            driver.submit([stranger], tenant="b", session="talk", max_tokens=3, **GREEDY)
            driver.run()
        assert length < len(prompt)
    # Of an answer that ends for its length, the last token has not been absorbed.
    assert cached == ([0, 57, 70] if session else [0, 0, 0])
