"""EngineClient and Mailbox against a scripted engine over real sockets, on both event loops."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from server.api.client import EngineClient
from server.api.engine_status import EngineStatus
from server.api.mailbox import ChoiceEvent, Mailbox
from server.errors import EngineUnavailableError, InternalError, QueueFullError
from server.types import FinishReason, SamplingParams
from tests.unit.scripted import FAILING_TOKEN, INFO, ScriptedEngine, serving

LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def run(main: Awaitable[None], new_loop: LoopFactory = asyncio.new_event_loop) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main, 20)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(bounded())


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[EngineClient]:
    client = EngineClient(address)
    await client.start()
    try:
        await client.wait_for(EngineStatus.READY)
        yield client
    finally:
        await client.close()


async def eventually(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def tokens(max_tokens: int, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **fields)


async def collect(mailbox: Mailbox) -> dict[int, list[ChoiceEvent]]:
    events: dict[int, list[ChoiceEvent]] = {}
    async with mailbox:
        async for batch in mailbox:
            for event in batch:
                events.setdefault(event.choice, []).append(event)
    return events


@LOOPS
def test_every_choice_gets_its_tokens_and_one_end(tmp_path: Path, new_loop: LoopFactory) -> None:
    async def main(address: str) -> None:
        async with connected(address) as client:
            assert client.info == INFO
            mailbox = await client.submit(prompts=[[1, 2], [3]], n=2, tenant="", params=tokens(7, logprobs=1))
            assert mailbox.num_choices == 4
            events = await collect(mailbox)
        assert sorted(events) == [0, 1, 2, 3]
        for parts in events.values():
            assert [token for part in parts for token in part.token_ids] == [1, 2, 3, 4, 5, 6, 7]
            assert b"".join(part.text for part in parts) == b"t1 t2 t3 t4 t5 t6 t7 "
            assert [lp.top_ids for part in parts for lp in part.logprobs] == [[token] for token in range(1, 8)]
            assert [part.finish_reason for part in parts if part.finish_reason] == [FinishReason.LENGTH]
            assert parts[-1].finish_reason is FinishReason.LENGTH

    with serving(ScriptedEngine(), tmp_path) as address:
        run(main(address), new_loop)


@LOOPS
def test_many_requests_at_once(tmp_path: Path, new_loop: LoopFactory) -> None:
    """Sends and arrivals interleave, so a swallowed wake-up of the socket would hang this test."""

    async def one(client: EngineClient, index: int) -> None:
        events = await collect(await client.submit(prompts=[[1]], n=1, tenant="", params=tokens(1 + index % 50)))
        assert sum(len(event.token_ids) for event in events[0]) == 1 + index % 50

    async def main(address: str) -> None:
        async with connected(address) as client:
            for _ in range(3):
                await asyncio.gather(*(one(client, index) for index in range(300)))
            assert client._mailboxes == {}

    with serving(ScriptedEngine(), tmp_path) as address:
        run(main(address), new_loop)


def test_slow_reader_gets_joined_events(tmp_path: Path) -> None:
    async def main(address: str) -> None:
        async with (
            connected(address) as client,
            await client.submit(prompts=[[1]], n=1, tenant="", params=tokens(100)) as mailbox,
        ):
            await eventually(lambda: client._mailboxes == {})
            batches = [batch async for batch in mailbox]
        assert [event.token_ids for batch in batches for event in batch] == [list(range(1, 101))]

    with serving(ScriptedEngine(), tmp_path) as address:
        run(main(address))


def test_reader_that_never_reads_loses_its_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.client._MAX_UNREAD_TOKENS", 50)
    engine = ScriptedEngine()

    async def main(address: str) -> None:
        async with connected(address) as client:
            mailbox = await client.submit(prompts=[[1]], n=1, tenant="", params=tokens(1_000_000))
            await eventually(lambda: engine.finished["cancelled"] == 1)
            assert not engine.running
            assert len((await anext(mailbox))[0].token_ids) > 50
            with pytest.raises(EngineUnavailableError, match="too slowly"):
                await anext(mailbox)

    with serving(engine, tmp_path) as address:
        run(main(address))


def test_closing_cancels_and_ends_the_iteration(tmp_path: Path) -> None:
    engine = ScriptedEngine()

    async def main(address: str) -> None:
        async with connected(address) as client:
            mailbox = await client.submit(prompts=[[1]], n=3, tenant="", params=tokens(1_000_000))
            await anext(mailbox)
            mailbox.close()
            mailbox.close()
            assert [batch async for batch in mailbox] == []
            await eventually(lambda: client.stats.finished["cancelled"] == 3)
            assert client.stats.running == 0
            assert not engine.running

    with serving(engine, tmp_path) as address:
        run(main(address))


def test_cancelled_submit_cancels_at_the_engine(tmp_path: Path) -> None:
    engine = ScriptedEngine()

    async def main(address: str) -> None:
        async with connected(address) as client:
            task = asyncio.create_task(client.submit(prompts=[[1]], n=1, tenant="", params=tokens(1_000_000)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await eventually(lambda: engine.finished["cancelled"] == 1)

    with serving(engine, tmp_path) as address:
        run(main(address))


def test_full_queue_refuses_the_whole_request(tmp_path: Path) -> None:
    async def main(address: str) -> None:
        async with connected(address) as client:
            held = await client.submit(prompts=[[1]], n=3, tenant="", params=tokens(1_000_000))
            with pytest.raises(QueueFullError):
                await client.submit(prompts=[[1]], n=2, tenant="", params=tokens(1))
            assert len(await collect(await client.submit(prompts=[[1]], n=1, tenant="", params=tokens(1)))) == 1
            held.close()

    with serving(ScriptedEngine(max_choices=4), tmp_path) as address:
        run(main(address))


def test_error_comes_after_what_was_generated(tmp_path: Path) -> None:
    async def main(address: str) -> None:
        async with connected(address) as client:
            mailbox = await client.submit(prompts=[[FAILING_TOKEN]], n=1, tenant="", params=tokens(5))
            await eventually(lambda: client._mailboxes == {})
            assert [event.token_ids for event in await anext(mailbox)] == [[1]]
            with pytest.raises(InternalError, match="not a number"):
                await anext(mailbox)

    with serving(ScriptedEngine(), tmp_path) as address:
        run(main(address))


def test_engine_death_ends_open_requests_and_refuses_new_ones(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    engine.hold.set()

    async def main(address: str) -> None:
        async with connected(address) as client:
            mailbox = await client.submit(prompts=[[1]], n=2, tenant="", params=tokens(5))
            reader = asyncio.create_task(collect(mailbox))
            await asyncio.sleep(0.01)
            client.engine_died(1)
            with pytest.raises(EngineUnavailableError, match="died"):
                await reader
            assert client.status is EngineStatus.DEAD
            with pytest.raises(EngineUnavailableError):
                await client.submit(prompts=[[1]], n=1, tenant="", params=tokens(5))

    with serving(engine, tmp_path) as address:
        run(main(address))


def test_drain_lets_open_requests_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    engine = ScriptedEngine()

    async def main(address: str) -> None:
        async with connected(address) as client:
            engine.hold.set()
            mailbox = await client.submit(prompts=[[1]], n=1, tenant="", params=tokens(5))
            client.drain()
            with pytest.raises(EngineUnavailableError, match="shutting down"):
                await client.submit(prompts=[[1]], n=1, tenant="", params=tokens(5))
            engine.hold.clear()
            assert (await collect(mailbox))[0][-1].finish_reason is FinishReason.LENGTH

    with serving(engine, tmp_path) as address:
        run(main(address))


def test_requests_before_the_engine_is_up_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        client = EngineClient(f"ipc://{tmp_path}/engine")
        await client.start()
        with pytest.raises(EngineUnavailableError, match="loading"):
            await client.submit(prompts=[[1]], n=1, tenant="", params=tokens(5))
        with serving(ScriptedEngine(), tmp_path):
            await client.wait_for(EngineStatus.READY)
            assert client.status is EngineStatus.READY
            assert await collect(await client.submit(prompts=[[1]], n=1, tenant="", params=tokens(5)))
        await client.close()

    run(main())
