"""The role of a child process: what it ignores, how it ends and what it says last."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker

import pytest

from server.child import SIGNALS, ChildContext, Failed, Ready
from server.errors import CheckpointError, SettingsError
from server.logs import LogSettings

spawn = multiprocessing.get_context("spawn")


def play(context: ChildContext, error: Exception | None) -> None:
    with context.role():
        context.tell(Ready())
        if error is not None:
            raise error


def wait_for_a_message(context: ChildContext) -> None:
    with context.role():
        context.tell(Ready())
        context.control.recv()


class Child:
    """A spawned child and the launcher's end of its pipe."""

    def __init__(self, target: Callable[..., None], *arguments: object, launcher_pid: int | None = None) -> None:
        self.control, theirs = spawn.Pipe()
        context = ChildContext("engine", launcher_pid or os.getpid(), "", theirs, LogSettings("info", "text"))
        self.process = spawn.Process(target=target, args=(context, *arguments))
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()

    def hear(self) -> object:
        assert self.control.poll(30)
        return self.control.recv()

    def end(self) -> int | None:
        self.process.join(30)
        return self.process.exitcode


@pytest.fixture(scope="module", autouse=True)
def tracker() -> None:
    """Python's helper process unblocks signals when it starts: start it before."""
    resource_tracker.ensure_running()


@pytest.mark.parametrize(
    ("error", "last_words"),
    [
        (CheckpointError("config.json: no such file"), Failed("config.json: no such file", 1)),
        (SettingsError("--device cuda: no GPU"), Failed("--device cuda: no GPU", 2)),
        (ValueError("first line\nsecond"), Failed("the engine process failed: ValueError: first line", 1)),
    ],
)
def test_failure_is_told_in_one_line(capfd: pytest.CaptureFixture[str], error: Exception, last_words: Failed) -> None:
    child = Child(play, error)
    assert child.hear() == Ready()
    assert child.hear() == last_words
    assert child.end() == 1
    assert ("Traceback" in capfd.readouterr().err) == isinstance(error, ValueError)


def test_success_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    child = Child(play, None)
    assert child.hear() == Ready()
    assert child.end() == 0
    with pytest.raises(EOFError):
        child.hear()
    assert capfd.readouterr().err == ""


def test_signals_are_the_launchers_business() -> None:
    child = Child(wait_for_a_message)
    for signum in SIGNALS:
        os.kill(child.process.pid, signum)  # While it starts ...
    assert child.hear() == Ready()
    for signum in SIGNALS:
        os.kill(child.process.pid, signum)  # ... and while it runs.
    time.sleep(0.1)
    assert child.process.is_alive()
    child.control.send("go")
    assert child.end() == 0


def test_child_of_a_launcher_that_is_gone_ends() -> None:
    child = Child(play, None, launcher_pid=1 << 22)
    assert child.end() == 1
