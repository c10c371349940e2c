"""``gale chat`` and ``gale complete``, in a terminal and in a pipe, against a server that plays a script."""

import codecs
import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.unit.scripted_http import ScriptedServer, scripted_server

SECONDS = 60


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


class Typist:
    """A program in a terminal: what it shows, and what is typed."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def expect(self, text: str) -> None:
        """Read until this has been shown; what came before it is done with."""
        deadline = time.monotonic() + SECONDS
        while text not in self.shown:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.shown!r}"
            try:
                data = os.read(self._terminal, 4096)
            except OSError:  # the program has ended
                data = b""
            assert data, f"the program ended; no {text!r} in {self.shown!r}"
            self.shown += self._decoder.decode(data)
        self.shown = self.shown.split(text, 1)[1]


def command(server: ScriptedServer, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "server", *arguments, "--base-url", server.url]


@contextmanager
def terminal(server: ScriptedServer, *arguments: str) -> Iterator[tuple[Typist, "subprocess.Popen[bytes]"]]:
    """Run a client in a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(server, *arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
    )
    os.close(theirs)
    try:
        yield Typist(ours), process
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_chat_with_an_answer_that_is_stopped(scripted: ScriptedServer) -> None:
    with terminal(scripted, "chat", "--system", "Be brief.", "--temperature", "0.5") as (typist, process):
        typist.expect("scripted")
        typist.expect("> ")
        typist.type("Hello\n")
        typist.expect("abc")
        typist.expect("3 tokens")
        typist.expect("> ")
        scripted.script = "stall"
        typist.type("Again\n")
        typist.expect("Again")
        typist.expect("a")
        typist.type("\x03")
        typist.expect("stopped")
        typist.expect("> ")
        scripted.released.set()
        scripted.script = ""
        typist.type("/retry\n")
        typist.expect("abc")
        typist.expect("> ")
        typist.type("/show\n")
        typist.expect("Again")
        typist.expect("> ")
        typist.type("/nonsense\n")
        typist.expect("/help lists them")
        typist.expect("> ")
        typist.type("\x04")
        assert process.wait(SECONDS) == 0
    first, second, third = (body["messages"] for body in scripted.bodies)
    assert [message["role"] for message in first] == ["system", "user"]
    assert second[:2] == first and second[2] == {"role": "assistant", "content": "abc"}
    assert second[3] == {"role": "user", "content": "Again"}
    assert third == second, "the answer that was stopped has been taken back"
    assert all(body["temperature"] == 0.5 for body in scripted.bodies)


def test_a_text_grows_and_settings_change(scripted: ScriptedServer) -> None:
    with terminal(scripted, "complete") as (typist, process):
        typist.expect("> ")
        for line, answered in (
            ("Once ", True),
            ("/set max_tokens 7", False),
            ("upon", True),
            ("/undo", False),
            ("a\\\ntime", True),
            ("/new", False),
            ("x", True),
        ):
            typist.type(f"{line}\n")
            if answered:
                typist.expect("3 tokens")
            typist.expect("> ")
        typist.type("/quit\n")
        assert process.wait(SECONDS) == 0
    assert [body["prompt"] for body in scripted.bodies] == ["Once ", "Once abcupon", "Once abca\ntime", "x"]
    assert [body["max_tokens"] for body in scripted.bodies] == [256, 7, 7, 7]


def test_in_a_pipe_only_the_text_is_on_standard_output(scripted: ScriptedServer) -> None:
    done = subprocess.run(
        command(scripted, "complete"), input="From a pipe", capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stdout) == (0, "abc\n")
    assert "3 tokens" in done.stderr
    assert scripted.bodies[0]["prompt"] == "From a pipe"


@pytest.mark.parametrize(("script", "message"), [("refuse", "'max_tokens' is too large"), ("cut", "without [DONE]")])
def test_failures_are_told(scripted: ScriptedServer, script: str, message: str) -> None:
    scripted.script = script
    done = subprocess.run(
        command(scripted, "complete", "x"), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr
