"""Starts real servers for tests: ``python -m server serve`` as a person would."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

PYTHON = os.environ.get("SERVER_PYTHON", sys.executable)
"""The interpreter that Gale is installed for; tests/clients run in an environment without it."""
READY_SECONDS = 90
"""Generous: a busy machine takes many times the usual three seconds."""


class RunningServer:
    """A server process and what it wrote to stderr.

    Args:
        folder: for the log and the server's temporary files.
        flags: of ``serve``; ``--port 0`` is added.
        wait_ready: False returns as soon as the port is bound, while the model is loading.

    Attributes:
        base_url: e.g. ``http://127.0.0.1:45123``.
        children: every process below the launcher, as of the last look.
    """

    def __init__(self, folder: Path, *flags: str, wait_ready: bool = True) -> None:
        self.temporary = folder / "t"
        self.temporary.mkdir(parents=True)
        self._log = folder / "stderr"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-m", "server", "serve", "--port", "0", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": str(self.temporary)},
                start_new_session=True,
            )
        self.children: list[psutil.Process] = []
        try:
            self.base_url = self.wait_for_log(r"listening on (http://[^\s\"]+)").group(1)
            if wait_ready:
                self.wait_for_log(r"ready after")
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for_log(self, pattern: str, *, seconds: float = READY_SECONDS) -> re.Match[str]:
        """The first match in the log; fails at once if the server ends."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            if found := re.search(pattern, self.log):
                return found
            assert not ended, f"the server ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"no {pattern!r} within {seconds} s:\n{self.log}"
            time.sleep(0.02)

    def find_children(self) -> list[psutil.Process]:
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        return self.children

    def child(self, name: str) -> psutil.Process:
        """The child process of this name: ``gale-engine``, ``gale-api-0`` ..."""
        found = [child for child in self.find_children() if child.name() == name]
        assert len(found) == 1, [child.name() for child in self.children]
        return found[0]

    def signal(self, signum: signal.Signals) -> None:
        """Signal the launcher alone; remembers the children for :meth:`wait_end`."""
        self.find_children()
        self.process.send_signal(signum)

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT for every process of the group."""
        self.find_children()
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_end(self, *, seconds: float = 20) -> int:
        """The exit code, once nothing of the server is left: no process, no file."""
        code = self.process.wait(seconds)
        deadline = time.monotonic() + 5
        while orphans := [child for child in self.children if _lives(child)]:
            assert time.monotonic() < deadline, f"orphans: {orphans}"
            time.sleep(0.01)
        if code != -signal.SIGKILL:
            assert list(self.temporary.iterdir()) == []
        return code

    def kill(self) -> None:
        """End everything, without a trace; harmless if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def metric(self, name: str) -> float:
        """The value of a metric, its labels given as they are shown."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{self.base_url}/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def complete(self, max_tokens: int, **fields: Any) -> dict[str, Any]:
        """The answer of a greedy completion that runs to ``max_tokens``."""
        answer = httpx.post(f"{self.base_url}/v1/completions", json=_body(max_tokens, **fields), timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()


def delete_states(base_url: str) -> None:
    """Delete every saved state of a server without keys: other tests may have left some."""
    for state in httpx.get(f"{base_url}/v1/states").json()["data"]:
        httpx.delete(f"{base_url}/v1/states/{state['id']}")


class Stream:
    """A completion being streamed: its events one by one.

    Attributes:
        done: whether ``[DONE]`` has come.
    """

    def __init__(self, base_url: str, max_tokens: int, *, headers: dict[str, str] | None = None) -> None:
        self._client = httpx.Client(timeout=30, headers=headers)
        body = _body(max_tokens, stream=True)
        self._context = self._client.stream("POST", f"{base_url}/v1/completions", json=body)
        self.done = False

    def __enter__(self) -> "Stream":
        self._response = self._context.__enter__()
        assert self._response.status_code == 200, self._response.read()
        self._lines = self._response.iter_lines()
        return self

    def __exit__(self, *_: object) -> None:
        self._context.__exit__(None, None, None)
        self._client.close()

    @property
    def port(self) -> int:
        """The client's end of the connection."""
        _, port = self._response.extensions["network_stream"].get_extra_info("client_addr")
        assert isinstance(port, int)
        return port

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        for line in self._lines:
            if line == "data: [DONE]":
                self.done = True
            elif line:
                assert not self.done
                return json.loads(line.removeprefix("data: "))
        raise StopIteration


def run_to_end(*flags: str, seconds: float = 60) -> tuple[int, str]:
    """Exit code and stderr of a server that is expected not to start."""
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", *flags], capture_output=True, text=True, timeout=seconds
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _body(max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": "It was", "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0} | fields
