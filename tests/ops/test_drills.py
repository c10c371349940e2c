"""Fault drills under load: what is thrown at a server in public, and what it must have forgotten afterwards.

Clients run beside every drill and note how each of their requests ends. After it, figures and memory must be back.
"""

import asyncio
import contextlib
import json
import random
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from server.api.protocol import HEAD_SECONDS
from tests.e2e.running import RunningServer, Stream
from tests.waiting import wait_until

pytestmark = pytest.mark.ops

CLIENTS = 6
ENDLESS = 1_000_000
TOLERANCE = 32 << 20
"""Bytes by which a process may be larger after a drill. The allocator keeps some of what a peak has needed (12 MiB were
seen, in the engine); what a drill is after would be much more: 10,000 connections that leave 4 kB each, a gigabyte."""
FLAGS = ("--api-server-count", "2", "--max-num-seqs", "8", "--state-cache-host", "0.0625")


class Load:
    """Clients that stream short answers, one after the other, until told to stop.

    Attributes:
        outcomes: how requests have ended: ``answered``, ``error`` (an event that says so), ``refused`` (a status of its
            own), ``cut`` and ``broken`` (the connection, within an answer and before it), ``unreachable``, and
            ``wrong``, which must not happen.
    """

    def __init__(self, base_url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[list[str]] = []
        self._url = f"{base_url}/v1/completions"
        self._ended = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self._thread.start()
        wait_until(lambda: self.outcomes["answered"] >= CLIENTS)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join(120)
        assert not self._thread.is_alive(), "a request has no end"
        assert not self.wrong, self.wrong

    async def _run(self) -> None:
        # A connection for each request: none is sent on one that its server is about to close.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            await asyncio.gather(*(self._client(client, random.Random(seed)) for seed in range(CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        while not self._ended:
            try:
                outcome = await self._ask(client, rng)
            except httpx.ConnectError:
                outcome = "unreachable"
            except httpx.TransportError:
                outcome = "broken"
            self.outcomes[outcome] += 1
            if outcome in ("unreachable", "broken", "refused"):
                await asyncio.sleep(0.05)

    async def _ask(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        body = {"prompt": [rng.randrange(3, 8000) for _ in range(rng.randint(1, 90))], "stream": True}
        body |= {"max_tokens": rng.randint(1, 30), "ignore_eos": True}
        async with client.stream("POST", self._url, json=body) as response:
            if response.status_code != 200:
                assert "error" in json.loads(await response.aread())
                return "refused"
            try:
                lines = [line async for line in response.aiter_lines() if line]
            except httpx.TransportError:
                return "cut"
        outcome = terminal(lines)
        if outcome == "wrong":
            self.wrong.append(lines[-3:])
        return outcome


def terminal(lines: list[str]) -> str:
    """How a stream has ended."""
    if not lines or lines[-1] != "data: [DONE]":
        return "wrong"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    ends = ["answered" for event in events for one in event.get("choices", ()) if one["finish_reason"] is not None]
    ends += ["error" for event in events if "error" in event]
    return ends[0] if len(ends) == 1 else "wrong"


def sizes(server: RunningServer) -> dict[str, int]:
    """Resident bytes by the name of the process."""
    processes = [psutil.Process(server.process.pid), *server.find_children()]
    named = {process.name(): process.memory_info().rss for process in processes if "gale" in process.name()}
    return named | {"launcher": processes[0].memory_info().rss}


class Drilled:
    """A server that has been under load, and its size then."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        for _ in range(2):
            with Load(server.base_url):
                time.sleep(3)
        self.settle()
        self.sizes = sizes(server)
        assert {"launcher", "gale-engine", "gale-api-0", "gale-api-1"} <= set(self.sizes)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.server.base_url)
        assert parts.hostname is not None and parts.port is not None
        return parts.hostname, parts.port

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)

    def settle(self) -> None:
        """Requests are served, and nothing is left of those that were."""
        wait_until(lambda: httpx.get(f"{self.server.base_url}/health").status_code == 200)
        assert self.server.complete(4)["usage"]["completion_tokens"] == 4
        for name in ("gale_slots_used", "gale_requests_running", "gale_requests_waiting"):
            wait_until(lambda name=name: self.server.metric(name) == 0)  # type: ignore[misc]
        wait_until(lambda: self.server.metric("gale_http_requests_in_progress") == 1)  # this one

    def check(self) -> None:
        self.settle()

        def grown() -> dict[str, float]:
            now = sizes(self.server)
            return {name: (now[name] - size) / 2**20 for name, size in self.sizes.items()}

        with contextlib.suppress(AssertionError):
            wait_until(lambda: max(grown().values()) * 2**20 < TOLERANCE, seconds=10)
        assert max(grown().values()) * 2**20 < TOLERANCE, f"MiB more than before: {grown()}"


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drilled]:
    with RunningServer(tmp_path_factory.mktemp("drills"), *FLAGS) as server:
        yield Drilled(server)


def only_answers(load: Load) -> None:
    assert set(load.outcomes) == {"answered"}, load.outcomes


def request(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def reset(connection: socket.socket) -> None:
    """Close at once, with a reset, so that no port stays taken."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_ten_thousand_connections_opened_and_dropped(drilled: Drilled) -> None:
    whole = request({"prompt": "It was", "max_tokens": 50, "ignore_eos": True})
    sent = [b"", b"POST /v1/completions HT", whole[:-9], b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"]
    with Load(drilled.server.base_url) as load:
        for number in range(10_000):
            connection = drilled.connect()
            # Every hundredth leaves a request behind.
            if data := whole if number % 100 == 0 else sent[number % len(sent)]:
                connection.sendall(data)
            reset(connection)
    only_answers(load)
    drilled.check()


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "in pieces"])
def test_a_body_of_a_gigabyte(drilled: Drilled, declared: bool) -> None:
    piece, pieces = b" " * (1 << 20), 1 << 10
    framing = f"Content-Length: {len(piece) * pieces}" if declared else "Transfer-Encoding: chunked"
    with Load(drilled.server.base_url) as load, drilled.connect() as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
        answer = bytearray()
        reader = threading.Thread(target=read_all, args=(connection, answer))
        reader.start()
        sent = 0
        # The server may stop reading where it likes; it has to answer first.
        with contextlib.suppress(ConnectionError):
            for _ in range(pieces):
                connection.sendall(piece if declared else b"%x\r\n%b\r\n" % (len(piece), piece))
                sent += 1
        reader.join(60)
        assert not reader.is_alive()
        assert answer.startswith(b"HTTP/1.1 413 "), (sent, bytes(answer[:200]))
        assert b'"error"' in answer
    only_answers(load)
    drilled.check()


def read_all(connection: socket.socket, answer: bytearray) -> None:
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            answer += data


def test_clients_that_read_a_byte_a_second(drilled: Drilled) -> None:
    slow = []
    for _ in range(4):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(drilled.address)
        connection.sendall(request({"prompt": "It was", "max_tokens": ENDLESS, "ignore_eos": True, "stream": True}))
        slow.append(connection)
    with Load(drilled.server.base_url) as load:
        for _ in range(10):
            for connection in slow:
                assert len(connection.recv(1)) == 1
            time.sleep(1)
        assert drilled.server.metric("gale_requests_running") >= 4, "they were meant to be running"
        for connection in slow:
            reset(connection)
    only_answers(load)
    drilled.check()


def test_heads_that_come_a_byte_at_a_time(drilled: Drilled) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Filler: " + b"a" * 10_000
    with Load(drilled.server.base_url) as load, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(drilled.connect()) for _ in range(300)]
        began = time.monotonic()
        opened, position = set(slow), 0
        while opened and time.monotonic() - began < HEAD_SECONDS + 20:
            for connection in tuple(opened):
                try:
                    connection.sendall(head[position : position + 1])
                except ConnectionError:
                    opened.remove(connection)
            position += 1
            time.sleep(0.5)
        assert not opened, f"{len(opened)} are still open"
        assert time.monotonic() - began > HEAD_SECONDS - 1
    only_answers(load)
    drilled.check()


def test_disconnects_in_mid_stream(drilled: Drilled) -> None:
    rng = random.Random(0)
    with Load(drilled.server.base_url) as load:
        for _ in range(150):
            body = {"prompt": "It was", "n": rng.randint(1, 3), "stream": True, "max_tokens": 200, "ignore_eos": True}
            connection = drilled.connect()
            connection.sendall(request(body))
            for _ in range(rng.choice([0, 0, 1, 3, 8])):
                connection.recv(256)
            reset(connection) if rng.random() < 0.5 else connection.close()
    assert set(load.outcomes) <= {"answered", "refused"}
    assert load.outcomes["answered"] > load.outcomes["refused"]
    drilled.check()


def test_the_engine_is_killed(drilled: Drilled) -> None:
    server = drilled.server
    deaths = server.metric("gale_engine_deaths_total")
    with Load(server.base_url) as load, Stream(server.base_url, ENDLESS) as stream:
        next(stream)
        server.child("gale-engine").kill()
        assert list(stream)[-1]["error"]["type"] == "service_unavailable"
        assert stream.done
        wait_until(lambda: server.metric("gale_engine_deaths_total") == deaths + 1)
        wait_until(lambda: httpx.get(f"{server.base_url}/health").status_code == 200)
        answered = load.outcomes["answered"]
        wait_until(lambda: load.outcomes["answered"] > answered + CLIENTS)
    assert load.outcomes["error"] + load.outcomes["refused"] > 0
    assert set(load.outcomes) <= {"answered", "error", "refused"}, load.outcomes
    drilled.check()


def test_an_api_process_is_killed(drilled: Drilled) -> None:
    server = drilled.server
    serves = server.log.count("the api-1 process serves again")
    with Load(server.base_url) as load:
        server.child("gale-api-1").kill()
        wait_until(lambda: server.log.count("the api-1 process serves again") > serves)
        answered = load.outcomes["answered"]
        wait_until(lambda: load.outcomes["answered"] > answered + CLIENTS)
    # Its own requests broke off, each once; the others never noticed.
    assert set(load.outcomes) <= {"answered", "broken", "cut"}, load.outcomes
    assert load.outcomes["broken"] + load.outcomes["cut"] <= CLIENTS
    drilled.check()


def test_a_disk_that_takes_no_more_states(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    flags = ("--state-cache-host", "0.004", "--state-cache-dir", str(folder), "--state-cache-disk", "0.1")
    with RunningServer(tmp_path / "server", *FLAGS[:4], *flags) as server:

        def ask(tokens: range) -> list[str]:
            answers = [server.complete(4, prompt=[token] * 40) for token in tokens]
            return [answer["choices"][0]["text"] for answer in answers]

        expected = ask(range(5, 25))
        written = server.metric("gale_state_write_seconds_count")
        assert written > 0
        # As good as a full disk, and nobody else's: no file of the engine's may be as large as a state.
        state = min(path.stat().st_size for path in folder.glob("*.safetensors"))
        engine = server.child("gale-engine")
        engine.rlimit(psutil.RLIMIT_FSIZE, (state - 1, psutil.RLIM_INFINITY))
        with Load(server.base_url) as load:
            assert len(ask(range(30, 50))) == 20
            server.wait_for_log("a snapshot was not written")
            assert ask(range(5, 25)) == expected, "read from where they are, or absorbed again"
        only_answers(load)
        wait_until(lambda: not list(folder.glob("*.tmp")))
        assert all(path.stat().st_size >= state for path in folder.glob("*.safetensors")), "none is there in part"
        engine.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        written = server.metric("gale_state_write_seconds_count")
        assert ask(range(5, 25)) == expected
        wait_until(lambda: server.metric("gale_state_write_seconds_count") > written)
        server.signal(signal.SIGTERM)
        assert server.wait_end() == 0
        assert not list(folder.glob("*.safetensors"))


def test_saved_states_outlive_the_engine_and_a_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    with RunningServer(tmp_path / "server", *FLAGS, "--state-cache-dir", str(folder)) as server:

        def save(token: int) -> httpx.Response:
            body = {"prompt": [token] * 40, "max_tokens": 4, "temperature": 0, "save_state": True}
            return httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60)

        def rest(state: str) -> str:
            return server.complete(8, state=state, prompt=[7])["choices"][0]["text"]

        states = [save(token).json()["state"]["id"] for token in range(5, 15)]
        expected = {state: rest(state) for state in states}
        with Load(server.base_url) as load:
            server.child("gale-engine").kill()
            server.wait_for_log("the engine process serves again")
            wait_until(lambda: all(httpx.get(f"{server.base_url}/health").status_code == 200 for _ in range(6)))
            listed = httpx.get(f"{server.base_url}/v1/states").json()["data"]
            assert {state["id"] for state in listed} == set(states)
            assert {state: rest(state) for state in states} == expected
        assert set(load.outcomes) <= {"answered", "error", "refused"}, load.outcomes

        engine = server.child("gale-engine")
        engine.rlimit(psutil.RLIMIT_FSIZE, (4096, psutil.RLIM_INFINITY))
        with Load(server.base_url) as load:
            for token in range(20, 25):
                answer = save(token)
                assert (answer.status_code, answer.json()["error"]["code"]) == (507, "state_not_saved")
            assert {state: rest(state) for state in states} == expected
        only_answers(load)
        engine.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        assert save(20).status_code == 200
        assert len(httpx.get(f"{server.base_url}/v1/states").json()["data"]) == len(states) + 1


def test_it_drains_on_sigterm(drilled: Drilled) -> None:
    """The last of these: the server ends."""
    server = drilled.server
    with Load(server.base_url) as load, Stream(server.base_url, 60) as stream:
        next(stream)
        server.signal(signal.SIGTERM)
        events = list(stream)
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert stream.done
        # Whoever comes too late is refused, or finds the port closed.
        wait_until(lambda: load.outcomes["unreachable"] > 0)
        assert server.wait_end(seconds=60) == 0
    assert load.outcomes["error"] == load.outcomes["cut"] == 0, load.outcomes
