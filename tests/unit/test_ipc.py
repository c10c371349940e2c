"""The channel between engine and API processes: what happens to one that does not read."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from server.api.client import EngineClient
from server.api.engine_status import EngineStatus
from server.child import Heartbeat
from server.engine.process import EngineLoop
from server.errors import EngineUnavailableError
from server.ipc import ClientChannel, EngineChannel
from server.types import ClientReset, EngineMessage, GenerateRequest, Hello, SamplingParams, StepOutput, pack_tokens
from tests.unit.scripted import ScriptedEngine, serving


def request(request_id: int, max_tokens: int, *, n: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        n=n,
        prompts=(pack_tokens([1, 2, 3]),),
        params=SamplingParams(max_tokens=max_tokens),
        arrived=time.monotonic(),
    )


Closing: TypeAlias = Callable[[Any], Any]


class Reader:
    """A client channel without an event loop: it reads only when told to."""

    def __init__(self, address: str, *, inbox: int = 4) -> None:
        self.messages: list[EngineMessage] = []
        self.channel = ClientChannel(address, self.messages.extend, inbox=inbox)

    def read(self) -> None:
        loop = asyncio.new_event_loop()
        try:
            self.channel._loop = loop
            self.channel._read()
        finally:
            self.channel._loop = None
            loop.close()

    def close(self) -> None:
        self.channel.close()

    def tokens(self) -> list[int]:
        return [token for m in self.messages if isinstance(m, StepOutput) for token in m.token_ids]


@pytest.fixture
def closing() -> Iterator[Closing]:
    """Closes at the end, also of a failed test: an open socket would block its context's clean-up for ever."""
    with contextlib.ExitStack() as stack:

        def close_later(end: Any) -> Any:
            stack.callback(end.close)
            return end

        yield close_later


def turn_until(loop: EngineLoop, condition: Callable[[], object], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        loop.turn(timeout=0.01)


def test_stalled_reader_loses_only_its_own_requests(tmp_path: Path, closing: Closing) -> None:
    address = f"ipc://{tmp_path}/engine"
    engine, channel = ScriptedEngine(), closing(EngineChannel(address, outbox=64))
    loop = EngineLoop(engine, channel, Heartbeat())
    stalled, lively = closing(Reader(address)), closing(Reader(address))
    stalled.channel.send(request(7, 100_000, n=64))
    turn_until(loop, lambda: len(engine.running) == 64)
    lively.channel.send(request(7, 100_000))
    turn_until(loop, lambda: len(engine.running) == 65)

    def turn_and_read() -> float:
        started = time.monotonic()
        loop.turn(timeout=0)
        seconds = time.monotonic() - started
        while len(lively.tokens()) < engine.running[lively_key]:
            lively.read()
        return seconds

    lively_key = list(engine.running)[-1]
    # The stalled one's outbox, its inbox and the socket between them fill up; then it loses its request.
    longest = 0.0
    while len(engine.running) > 1:
        longest = max(longest, turn_and_read())
        assert engine.steps < 50_000
    assert list(engine.running) == [lively_key]
    assert longest < 5

    # The other one goes on, without a gap.
    for _ in range(50):
        turn_and_read()
    assert lively.tokens() == list(range(1, engine.running[lively_key] + 1))

    # Once the stalled one reads, it finds all that was queued for it, then the reset, and may go on.
    engine.cancel(lively_key[0], [7])
    turn_until(loop, lambda: stalled.read() or any(isinstance(m, ClientReset) for m in stalled.messages))
    sent = sorted(stalled.tokens())
    assert sent == sorted(list(range(1, len(sent) // 64 + 1)) * 64)
    stalled.messages.clear()
    stalled.channel.send(request(9, 3))
    turn_until(loop, lambda: stalled.read() or stalled.tokens() == [1, 2, 3])


def test_reset_fails_the_clients_requests(tmp_path: Path) -> None:
    engine = ScriptedEngine()

    async def main(address: str) -> None:
        client = EngineClient(address)
        await client.start()
        await client.wait_for(EngineStatus.READY)
        mailbox = await client.submit(prompts=[[1]], n=1, params=SamplingParams(max_tokens=10_000_000), tenant="")
        while len(engine.running):  # The event loop must not run: it would read.
            time.sleep(0.01)
        with pytest.raises(EngineUnavailableError, match="dropped"):
            async for _ in mailbox:
                pass
        again = await client.submit(prompts=[[1]], n=1, params=SamplingParams(max_tokens=3), tenant="")
        assert [event.token_ids[-1] async for batch in again for event in batch][-1] == 3
        await client.close()

    with serving(engine, tmp_path, outbox=4) as address:
        asyncio.run(asyncio.wait_for(main(address), 30))


def test_vanished_client_is_forgotten(tmp_path: Path, closing: Closing) -> None:
    address = f"ipc://{tmp_path}/engine"
    engine, channel = ScriptedEngine(), closing(EngineChannel(address))
    loop = EngineLoop(engine, channel, Heartbeat())
    gone, new = Reader(address), closing(Reader(address))
    gone.channel.send(request(1, 1_000_000))
    turn_until(loop, lambda: engine.running)
    gone.close()
    turn_until(loop, lambda: not engine.running)
    assert not channel.clients
    # A process that starts anew has a new identity: request ids of its predecessor mean nothing.
    new.channel.send(Hello())
    new.channel.send(request(1, 2))
    turn_until(loop, lambda: new.read() or new.tokens() == [1, 2])


def test_malformed_message_is_dropped(tmp_path: Path, closing: Closing, caplog: pytest.LogCaptureFixture) -> None:
    address = f"ipc://{tmp_path}/engine"
    engine, channel = ScriptedEngine(), closing(EngineChannel(address))
    loop = EngineLoop(engine, channel, Heartbeat())
    reader = closing(Reader(address))
    reader.channel._socket.send(b"\xc1 no msgpack")
    reader.channel._socket.send(b"\x80")
    reader.channel.send(request(1, 1))
    turn_until(loop, lambda: reader.read() or reader.tokens() == [1])
    assert ["malformed message" in record.message for record in caplog.records] == [True, True]
