"""A server under mixed load for a long time: flat memory, no failure, steady latency, nothing left behind.

    python -m tests.ops.soak [--minutes 30] [--model FOLDER] [--output FOLDER] [-- --flag-of-gale-serve ...]
    python -m tests.ops.soak --base-url http://127.0.0.1:8000 [--pid LAUNCHER]

Starts a server of its own, or loads one that runs. Clients stream, chat, ask for several choices, share beginnings,
save, fork, continue and delete states, score prompts, ask for structures, send nonsense, and hang up at any time
(``tests/ops/soak/traffic.py``); every answer is checked. Without a tokenizer (``--load-format dummy``) all prompts are
token ids. A server whose caches of states are not full after a third of the run is not flat yet: with a model of your
own, or another server, choose ``--state-cache-gpu`` and ``--state-cache-host`` accordingly.

At the end, ``report.py`` puts what was seen to its checks. The exit code is 1 if one fails. ``soak.json``, ``soak.md``,
the server's log and, where there is matplotlib, ``soak.png`` lie in the output folder then.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tests.e2e.conftest import CHAT_TEMPLATE
from tests.e2e.running import RunningServer
from tests.ops.soak import report
from tests.ops.soak.traffic import STATE_SECONDS, Traffic
from tests.ops.soak.watch import GAUGES, Sample, Watch
from tests.waiting import wait_until

SHIPPED_FLAGS = ("--api-server-count", "2", "--max-num-seqs", "16", "--state-cache-host", "0.25")
"""Of the server that is started: caches that are full within the first third of a short run."""
LOOK_SECONDS = 2.0


def main() -> int:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    with server(args) as (base_url, pid):
        found = asyncio.run(soak(args, base_url, pid))
    (args.output / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    page = report.markdown(found)
    (args.output / "soak.md").write_text(page)
    print(page)
    try:
        report.draw(found, args.output / "soak.png")
    except ImportError as error:
        print(f"no picture: {error}")
    return 0 if all(check["passed"] for check in found["checks"]) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.ops.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--window", type=float, default=60.0, help="seconds; shorter in runs of under nine windows")
    parser.add_argument("--clients", type=int, default=12, help="that ask side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--p99-factor", type=float, default=2.0, help="last third against the first")
    parser.add_argument("--model", help="folder of the server that is started; default: the shipped model")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--base-url", help="load this server instead; its key is taken from OPENAI_API_KEY")
    parser.add_argument("--pid", type=int, help="its launcher, to watch its memory")
    parser.add_argument("--output", type=Path, default=Path("build/soak"))
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="behind --: of gale serve")
    args = parser.parse_args()
    args.window = min(args.window, args.minutes * 60 / 9)
    return args


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """The address of the server to load, and its launcher."""
    if args.base_url:
        yield args.base_url.rstrip("/"), args.pid
        return
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        if args.load_format == "dummy":
            flags = ["--load-format", "dummy", "--skip-tokenizer-init"]
        else:
            (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
            flags = ["--chat-template", str(folder / "chat.jinja")]
        flags += ["--model", args.model] if args.model else SHIPPED_FLAGS
        with RunningServer(folder, *flags, *args.flags) as running:
            try:
                yield running.base_url, running.process.pid
            finally:
                (args.output / "server.log").write_text(running.log)


async def soak(args: argparse.Namespace, base_url: str, pid: int | None) -> dict[str, Any]:
    """Load, watch, check."""
    key = os.environ.get("OPENAI_API_KEY") if args.base_url else None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    watch = Watch(base_url, headers, pid)
    model = ask(base_url, headers, "GET", "/v1/models")["data"][0]["id"]
    text = ask(base_url, headers, "POST", "/tokenize", {"prompt": "a"}) is not None
    chat_body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    chat = ask(base_url, headers, "POST", "/v1/chat/completions", chat_body) is not None
    exact = args.model is None and args.base_url is None
    traffic = Traffic(base_url, headers, text=text, chat=chat, exact=exact)
    before = await asyncio.to_thread(watch.look)
    watch.samples.clear()

    began = time.monotonic()
    load = asyncio.create_task(traffic.run(args.clients, args.seed))
    rows = []
    while not load.done() and (len(rows) + 0.5) * args.window < args.minutes * 60:
        end = began + (len(rows) + 1) * args.window
        seen = len(watch.samples)
        while not load.done() and time.monotonic() < end:
            await asyncio.to_thread(watch.look)
            await asyncio.sleep(min(LOOK_SECONDS, max(0.0, end - time.monotonic())))
        rows.append(report.window_row(len(rows) + 1, traffic.record, watch.samples[seen:]))
        print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
        if len(rows) * args.window < args.minutes * 60 - args.window / 2:
            traffic.begin_window()
    traffic.stopped = True
    await load
    samples = list(watch.samples)
    after = await asyncio.to_thread(settle, watch, before)
    states = ask(base_url, headers, "GET", "/v1/states")["data"]
    found = report.checks(
        traffic.records,
        samples,
        (before, after),
        traffic.choices,
        traffic.cached,
        len(states),
        args.p99_factor,
    )
    return {
        "about": about(args, model, rows),
        "checks": [asdict(check) for check in found],
        "wrong": traffic.wrong,
        "kinds": dict(report.merge(traffic.records).kinds),
        "statuses": dict(report.merge(traffic.records).statuses),
        "windows": rows,
        "samples": [
            {
                "seconds": round(sample.seconds, 2),
                "mib": {name: round(size / report.MIB, 1) for name, size in sample.bytes.items()},
                **{name: sample.metrics.get(name, 0.0) for name in GAUGES},
            }
            for sample in samples
        ],
    }


def ask(base_url: str, headers: dict[str, str], method: str, path: str, body: object = None) -> Any:
    """The answer, or None where the server cannot do it."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"{base_url}{path}", data, {"Content-Type": "application/json", **headers}, method=method)
    try:
        with urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except HTTPError as error:
        if error.code != 400:
            raise
        return None


def settle(watch: Watch, before: Sample) -> Sample:
    """Wait until nothing runs and what clients saved without learning its name has expired."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: all(watch.metrics()[name] == before.metrics[name] for name in GAUGES), seconds=60)
    states = ask(watch.base_url, dict(watch.headers), "GET", "/v1/states")["data"]
    if states:
        time.sleep(STATE_SECONDS + 1)
    return watch.look()


def about(args: argparse.Namespace, model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": model,
        "minutes": args.minutes,
        "window seconds": args.window,
        "clients": args.clients,
        "seed": args.seed,
        "requests": sum(row["requests"] for row in rows),
        "flags": " ".join(args.flags),
        "processors": os.cpu_count(),
        "niceness": os.nice(0),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


if __name__ == "__main__":
    sys.exit(main())
