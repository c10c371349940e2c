"""How many server-sent events one API process carries.

    python -m tests.bench.http_events [--streams 256] [--tokens 400]

An engine without a model answers every stream with one token per step, as fast as the event loop goes
round; its messages are decoded from msgpack as the real engine's are. A second process reads the
streams from their sockets and counts. Printed is also the rate per second of the API process's own CPU
time, which is what remains comparable on a busy machine.
"""

import argparse
import asyncio
import selectors
import socket
import sys
import time
from collections.abc import Callable
from unittest import mock

import msgspec
import uvicorn

from server.api.app import create_app
from server.api.client import EngineClient
from server.types import (
    Cancel,
    ClientMessage,
    EngineMessage,
    FinishReason,
    GenerateRequest,
    Hello,
    StepOutput,
)
from tests.api.scripted import INFO, ByteTokenizer, api_settings


class Source:
    """Takes the place of the channel to the engine process."""

    def __init__(self, streams: int, tokens: int) -> None:
        self._streams = streams
        self._tokens = tokens
        self._requests: list[int] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)

    def connect(self, address: str, receive: Callable[[list[EngineMessage]], None]) -> "Source":
        self._receive = receive
        return self

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def close(self) -> None:
        pass

    def send(self, message: ClientMessage) -> bool:
        if isinstance(message, Hello):
            info = msgspec.structs.replace(INFO, max_num_seqs=self._streams)
            self._loop.call_soon(lambda: self._receive([info]))
        elif isinstance(message, GenerateRequest):
            self._requests.append(message.request_id)
            if len(self._requests) == self._streams:
                self._loop.call_soon(self._begin)
        else:
            assert isinstance(message, Cancel)
        return True

    def _begin(self) -> None:
        self._receive([StepOutput(accepted=self._requests)])
        self._cpu = time.process_time()
        self._step(1)

    def _step(self, number: int) -> None:
        reason = FinishReason.LENGTH if number == self._tokens else FinishReason.RUNNING
        output = StepOutput(
            request_ids=self._requests,
            choices=[0] * self._streams,
            token_ids=[number] * self._streams,
            texts=[b" word"] * self._streams,
            finish_reasons=[reason] * self._streams,
        )
        self._receive([self._decoder.decode(self._encoder.encode(output))])
        if number < self._tokens:
            self._loop.call_soon(self._step, number + 1)
        else:
            # Behind the wake-ups of this step's readers.
            self._loop.call_later(0.2, self._report)

    def _report(self) -> None:
        cpu = time.process_time() - self._cpu
        events = self._streams * self._tokens
        print(f"{events} events, {events / cpu:,.0f} per second of CPU time of the API process")


def read(port: int, streams: int) -> None:
    """Open the streams, count their events, print count and seconds."""
    body = b'{"prompt": "a", "max_tokens": 100000, "stream": true}'
    selector = selectors.DefaultSelector()
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        connection.sendall(head + body)
        selector.register(connection, selectors.EVENT_READ)
    events, started = 0, 0.0
    while selector.get_map():
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(1 << 16)
            events += data.count(b"data: {")
            if not started and events:
                started = time.perf_counter()
            if not data:
                selector.unregister(key.fileobj)
    seconds = time.perf_counter() - started
    print(f"{events} chunks read in {seconds:.2f} s: {events / seconds:,.0f} per second")


async def run(streams: int, tokens: int) -> None:
    """Serve until the reader has seen every stream's end."""
    with mock.patch("server.api.client.ClientChannel", Source(streams, tokens).connect):
        client = EngineClient("source")
    await client.start()
    app = create_app(api_settings(max_model_len=None), client, ByteTokenizer())  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    command = (sys.executable, "-m", "tests.bench.http_events", "--read", str(port), "--streams", str(streams))
    reader = await asyncio.create_subprocess_exec(*command)
    await reader.wait()
    server.should_exit = True
    await serving


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--read", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read(arguments.read, arguments.streams)
        return
    config = uvicorn.Config("", loop="auto")
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run(arguments.streams, arguments.tokens))


if __name__ == "__main__":
    main()
