"""Throughput over HTTP: many streams at once, read from their sockets as clients read them.

    python -m tests.bench.http --base-url http://127.0.0.1:8000 [--streams 1,16] [--tokens 256]
    python -m tests.bench.http --model FOLDER --streams 256 --api-server-count 6 [--json FILE] [--plot FILE]

With ``--base-url`` a running server is measured. Without it the bench starts one itself, and measures also

* the bare engine at the same work, in a process of its own before the server starts (``tests.bench.engine``,
  operation workload): tokens per second from the submission of all requests to the last token, on both sides, and
  steady, that is while every stream decodes;
* the time from starting ``gale serve`` to the first streamed token, twice: with an empty folder for Triton's compiled
  kernels, and with what that start left there. The weights were written just before or are read for the first time;
  whether they lie in the page cache is the machine's business.

``--checkpoint RECIPE`` writes a checkpoint of that shape with random weights into a temporary folder and serves it.

The clients are bare socket readers in processes of their own (``--clients``), so that they do not hold the server up:
the printed share of their time that they spent waiting says whether they did. Every stream must end with [DONE] and
have all its tokens.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench.common import Row, add_output_flags, environment, finish, print_table

SHIPPED = "classics-11m"
STARTING_SECONDS = 120


@dataclass(slots=True)
class Stream:
    """One request and what came of it; times by ``time.monotonic``, one clock for all processes."""

    sent: float
    first: float = 0.0
    ended: float = 0.0
    tail: bytes = b""

    def take(self, data: bytes) -> None:
        if not self.first and b"data: " in data:
            self.first = time.monotonic()
        self.tail = (self.tail + data)[-2000:]

    def tokens(self) -> int:
        """As the usage says."""
        if b"data: [DONE]" not in self.tail:
            raise RuntimeError(f"a stream was cut off: {self.tail!r}")
        *_, last = (line for line in self.tail.split(b"\n") if line.startswith(b"data: {") and b'"usage":{' in line)
        return int(json.loads(last[len(b"data: ") :])["usage"]["completion_tokens"])


def send(host: str, port: int, body: dict[str, object]) -> tuple[socket.socket, Stream]:
    """Open a connection and send a request."""
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    connection = socket.create_connection((host, port))
    stream = Stream(time.monotonic())
    connection.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    return connection, stream


def read_streams(
    host: str, port: int, streams: int, body: dict[str, object]
) -> tuple[list[tuple[float, float, float, int]], float]:
    """All of one client process: (sent, first chunk, end, tokens) of each, and the share of time spent waiting."""
    selector = selectors.DefaultSelector()
    opened: list[Stream] = []
    start, cpu = time.monotonic(), time.process_time()
    for _ in range(streams):
        connection, stream = send(host, port, body)
        selector.register(connection, selectors.EVENT_READ, stream)
        opened.append(stream)
    while selector.get_map():
        for key, _ in selector.select():
            connection, stream = key.fileobj, key.data
            assert isinstance(connection, socket.socket)
            data = connection.recv(1 << 16)
            if data:
                stream.take(data)
            else:
                stream.ended = time.monotonic()
                selector.unregister(connection)
                connection.close()
    waited = 1 - (time.process_time() - cpu) / (time.monotonic() - start)
    return [(stream.sent, stream.first, stream.ended, stream.tokens()) for stream in opened], waited


def measure(pool: ProcessPoolExecutor, clients: int, url: str, streams: int, body: dict[str, object]) -> Row:
    """So many streams at once, spread over the client processes."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    shares = [len(range(index, streams, clients)) for index in range(min(clients, streams))]
    answers = [pool.submit(read_streams, host, port, share, body) for share in shares]
    results = [result for answer in answers for result in answer.result()[0]]
    sent, first, ended, tokens = zip(*results, strict=True)
    times = [(end - begin) / max(1, count - 1) for begin, end, count in zip(first, ended, tokens, strict=True)]
    return {
        "streams": streams,
        "tokens/s": sum(tokens) / (max(ended) - min(sent)),
        "steady tokens/s": sum(1 / time for time in times),
        "TTFT ms": statistics.median(begin - at for begin, at in zip(first, sent, strict=True)) * 1e3,
        "TPOT ms": statistics.median(times) * 1e3,
        "clients waited": min(answer.result()[1] for answer in answers),
    }


class Server:
    """``gale serve`` on a port of its own choice; killed at the end.

    Attributes:
        url: where it listens.
        started: when it was started, by ``time.monotonic``.
    """

    def __init__(self, flags: list[str], log: Path, triton_cache: Path) -> None:
        self._log = log
        environ = os.environ | {"TRITON_CACHE_DIR": str(triton_cache)}
        self.started = time.monotonic()
        command = [sys.executable, "-m", "server", "serve", "--port", "0", *flags]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(command, stderr=stderr, env=environ)
        while "listening on " not in (text := log.read_text()):
            self._check()
        self.url = text.split("listening on ")[1].split()[0]

    def first_token_seconds(self, body: dict[str, object]) -> float:
        """From the start of the process to the first chunk of a stream, asked for again and again from the start."""
        parts = urlsplit(self.url)
        while True:
            connection, _ = send(str(parts.hostname), int(parts.port or 0), body)
            with connection:
                answer = b""
                while data := connection.recv(1 << 16):
                    answer += data
                    if b"data: {" in answer:
                        return time.monotonic() - self.started
            self._check()

    def _check(self) -> None:
        """Wait a moment; give up if nothing more can be expected."""
        time.sleep(0.02)
        if self._process.poll() is not None or time.monotonic() > self.started + STARTING_SECONDS:
            raise SystemExit(f"the server did not start:\n{self._log.read_text()}")

    def stop(self) -> None:
        """Stop as a person would."""
        self._process.terminate()
        self._process.wait(60)


@contextlib.contextmanager
def serving(flags: list[str], folder: Path) -> Iterator[Server]:
    """A server, stopped at the end; its log is printed if something fails."""
    log = folder / "server.log"
    server = Server(flags, log, folder / "triton")
    try:
        yield server
    except BaseException:
        print(log.read_text())
        raise
    finally:
        server.stop()


def bare_engine(args: argparse.Namespace, model: Path, streams: int) -> Row:
    """The same work without HTTP, in another process, so that its memory is free again."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        flags = ["--ops", "workload", "--streams", f"{streams}", "--tokens", f"{args.tokens}", "--json", file.name]
        flags += ["--prompt-length", f"{args.prompt_ids}", "--model", f"{model}", "--state-dtype", args.state_dtype]
        flags += ["--temperature", f"{args.temperature}"]
        subprocess.run([sys.executable, "-m", "tests.bench.engine", *flags], check=True, stdout=subprocess.DEVNULL)
        row: Row = json.loads(Path(file.name).read_text())["rows"][0]
    return row


def whole_server(args: argparse.Namespace, pool: ProcessPoolExecutor, body: dict[str, object]) -> dict[str, object]:
    """Everything that needs a server of our own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model
        if args.checkpoint:
            model = folder / args.checkpoint.name
            subprocess.run(
                [sys.executable, "-m", "tests.bench.checkpoint", str(model), "--recipe", str(args.checkpoint)],
                check=True,
            )
        flags = [
            "--model",
            f"{model}",
            "--api-server-count",
            f"{args.api_server_count}",
            "--served-model-name",
            "bench",
        ]
        flags += ["--state-dtype", args.state_dtype]
        single = body | {"max_tokens": 16}
        starts: dict[str, float] = {}
        with serving(flags, folder) as server:
            starts["cold"] = server.first_token_seconds(single)
        print(f"start to first token, nothing compiled: {starts['cold']:.1f} s", flush=True)
        bare = {count: bare_engine(args, model, count) for count in args.streams if count == max(args.streams)}
        with serving(flags, folder) as server:
            starts["warm"] = server.first_token_seconds(single)
            print(f"start to first token, kernels compiled before: {starts['warm']:.1f} s", flush=True)
            rows = http_rows(args, pool, server.url, body)
        for row in rows:
            if (count := row["streams"]) in bare:
                row["bare engine tokens/s"] = bare[count]["tokens/s"]
                row["share"] = float(row["tokens/s"] or 0) / float(bare[count]["tokens/s"] or 1)
                row["steady share"] = float(row["steady tokens/s"] or 0) / float(bare[count]["steady tokens/s"] or 1)
    return {"rows": rows, "starts": starts, "api_server_count": args.api_server_count}


def http_rows(args: argparse.Namespace, pool: ProcessPoolExecutor, url: str, body: dict[str, object]) -> list[Row]:
    """A warm-up of every API process, then one row for each number of streams."""
    measure(pool, args.clients, url, max(args.streams), body | {"max_tokens": 16})
    return [measure(pool, args.clients, url, count, body) for count in args.streams]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="of a running server; by default one is started")
    parser.add_argument("--model", help="of the server to start, or the name that a running one serves")
    parser.add_argument("--checkpoint", type=Path, metavar="RECIPE", help="write one of this recipe and serve it")
    parser.add_argument("--api-server-count", type=int, default=min(6, len(os.sched_getaffinity(0))))
    parser.add_argument("--state-dtype", default="float32", help="of the server to start; by default %(default)s")
    parser.add_argument("--clients", type=int, default=4, help="client processes; by default %(default)s")
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16])
    parser.add_argument("--tokens", type=int, default=256, help="of each stream; by default %(default)s")
    parser.add_argument("--prompt-ids", type=int, default=64, help="tokens of each prompt; by default %(default)s")
    parser.add_argument("--temperature", type=float, help="default: the server's, or 0 where one is started")
    add_output_flags(parser)
    args = parser.parse_args()
    body: dict[str, object] = {
        "prompt": [5 + i % 200 for i in range(args.prompt_ids)],
        "max_tokens": args.tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if args.temperature is None and not args.base_url:
        args.temperature = 0.0
    if args.temperature is not None:
        body["temperature"] = args.temperature
    with ProcessPoolExecutor(args.clients, multiprocessing.get_context("spawn")) as pool:
        if args.base_url:
            figures: dict[str, object] = {"rows": http_rows(args, pool, args.base_url, body)}
        else:
            if args.model is None and args.checkpoint is None:
                args.model = f"{Path(__file__).parents[2] / 'server' / 'assets' / SHIPPED}"
            figures = whole_server(args, pool, body)
    rows = figures["rows"]
    assert isinstance(rows, list)
    print_table(rows, list(rows[-1]))
    if args.json or args.plot:
        setting = {
            "model": Path(f"{args.checkpoint or args.model}").name,
            "state dtype": args.state_dtype,
            "tokens": args.tokens,
        }
        finish(args, "http", environment(), {"setting": setting, **figures})


if __name__ == "__main__":
    main()
