"""The engine's loop: what it sends, to whom, and when it ends."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.child import ChildContext, Heartbeat, Ready, Stop
from server.engine.process import EngineLoop, serve
from server.ipc import EngineChannel
from server.logs import LogSettings
from server.types import Cancel, EngineInfo, EngineStats, Hello, StepOutput
from tests.unit.scripted import INFO, ScriptedEngine
from tests.unit.test_ipc import Reader, request, turn_until


class World:
    """An engine, its loop and two API processes."""

    def __init__(self, address: str) -> None:
        self.engine = ScriptedEngine()
        self.channel = EngineChannel(address)
        self.loop = EngineLoop(self.engine, self.channel, Heartbeat())
        self.a, self.b = Reader(address), Reader(address)
        for reader in (self.a, self.b):
            reader.channel.send(Hello())
        turn_until(self.loop, lambda: stats(self.a) and stats(self.b))

    def turn(self) -> None:
        """One turn whose messages, and those it answers, have arrived."""
        time.sleep(0.03)
        self.loop.turn(timeout=0)
        time.sleep(0.03)
        self.a.read()
        self.b.read()

    def forget(self) -> None:
        self.a.messages.clear()
        self.b.messages.clear()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(f"ipc://{tmp_path}/engine")
    yield world
    for end in (world.a.channel, world.b.channel, world.channel):
        end.close()


def stats(reader: Reader) -> list[EngineStats]:
    reader.read()
    return [m.stats for m in reader.messages if isinstance(m, StepOutput) and m.stats is not None]


def test_hello_is_answered(world: World) -> None:
    for reader in (world.a, world.b):
        assert [message for message in reader.messages if isinstance(message, EngineInfo)] == [INFO]
        assert stats(reader)[0].running == 0


def test_one_message_per_turn_with_all_that_happened(world: World) -> None:
    world.forget()
    world.a.channel.send(request(1, 2, n=3))
    world.a.channel.send(request(2, 2))
    world.turn()
    first, *others = world.a.messages
    assert others == []
    assert first.accepted == [1, 2]
    assert list(zip(first.request_ids, first.choices, first.token_ids, strict=True)) == [
        *((1, 0, 1), (1, 1, 1), (1, 2, 1), (2, 0, 1))
    ]


def test_figures_reach_every_api_process_when_a_choice_ends(world: World) -> None:
    world.a.channel.send(request(1, 2))
    world.b.channel.send(request(1, 1000))
    world.turn()
    world.forget()
    world.turn()
    assert [figures.finished["length"] for figures in stats(world.a)] == [1]
    assert [figures.finished["length"] for figures in stats(world.b)] == [1]


def test_figures_come_now_and_then_while_busy_and_once_when_idle(world: World) -> None:
    world.a.channel.send(request(1, 1_000_000))
    world.turn()
    world.forget()
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        world.loop.turn(timeout=0)
        time.sleep(0.005)
    assert 2 <= len(stats(world.b)) <= 3
    world.forget()
    world.a.channel.send(Cancel(request_ids=(1,)))
    world.turn()
    assert [figures.running for figures in stats(world.b)] == [0]
    world.forget()
    world.turn()
    assert world.b.messages == []


@pytest.mark.parametrize("orderly", [True, False], ids=["stop", "launcher gone"])
def test_serving_ends(tmp_path: Path, orderly: bool) -> None:
    ours, theirs = multiprocessing.Pipe()
    context = ChildContext("engine", 0, "", theirs, LogSettings("info", "text"))
    engine = ScriptedEngine()
    channel = EngineChannel(f"ipc://{tmp_path}/engine")
    thread = threading.Thread(target=serve, args=(context, engine, channel, Heartbeat()))
    thread.start()
    assert ours.poll(10)
    assert ours.recv() == Ready(INFO)
    if orderly:
        ours.send(Stop())
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
    theirs.close()
