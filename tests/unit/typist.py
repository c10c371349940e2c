"""A program in a terminal, and somebody who types."""

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

SECONDS = 60


class Typist:
    """A program in a terminal: what it shows, and what is typed."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def expect(self, text: str) -> str:
        """Read until this has been shown; what came before it, and is done with."""
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
        before, self.shown = self.shown.split(text, 1)
        return before


def command(url: str, *arguments: str) -> list[str]:
    """One of Gale's clients, for the server at this address."""
    return [sys.executable, "-m", "server", *arguments, "--base-url", url]


@contextmanager
def terminal(url: str, *arguments: str) -> Iterator[tuple[Typist, "subprocess.Popen[bytes]"]]:
    """Run a client in a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(url, *arguments),
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
