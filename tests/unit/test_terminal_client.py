"""``gale chat`` and ``gale complete``, in a terminal and in a pipe, against a server that plays a script."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.unit.scripted_http import ScriptedServer, scripted_server
from tests.unit.typist import SECONDS, command, terminal


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


def test_a_chat_with_an_answer_that_is_stopped(scripted: ScriptedServer) -> None:
    with terminal(scripted.url, "chat", "--system", "Be brief.", "--temperature", "0.5") as (typist, process):
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
    with terminal(scripted.url, "complete") as (typist, process):
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
        command(scripted.url, "complete"),
        input="From a pipe",
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "abc\n")
    assert "3 tokens" in done.stderr
    assert scripted.bodies[0]["prompt"] == "From a pipe"


@pytest.mark.parametrize(("script", "message"), [("refuse", "'max_tokens' is too large"), ("cut", "without [DONE]")])
def test_failures_are_told(scripted: ScriptedServer, script: str, message: str) -> None:
    scripted.script = script
    done = subprocess.run(
        command(scripted.url, "complete", "x"), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr


def complete(url: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | variables
    return subprocess.run(
        command(url, "complete", *arguments), capture_output=True, text=True, timeout=SECONDS, env=environment
    )


def test_a_wrong_key_is_told_with_where_it_comes_from(scripted: ScriptedServer) -> None:
    scripted.script = "key"
    done = complete(scripted.url, "x", OPENAI_API_KEY="wrong")
    assert done.returncode == 1
    assert done.stderr.startswith("gale: error: 401: no such key")
    assert "OPENAI_API_KEY" in done.stderr and done.stderr.count("\n") == 1
    assert scripted.keys == ["Bearer wrong"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense"])
def test_no_server_is_told_with_what_to_do(url: str) -> None:
    done = complete(url, "x")
    assert done.returncode == 1
    assert f"no server answers at {url}" in done.stderr and "--base-url" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_server_without_states_is_told(scripted: ScriptedServer) -> None:
    for flags in (("x", "--load", "book"), ("x", "--save", "book")):
        done = complete(scripted.url, *flags)
        assert done.returncode == 1
        assert "saves no states: that takes Gale" in done.stderr
    with terminal(scripted.url, "chat") as (typist, process):
        typist.expect("> ")
        for line in ("/states", "/load book", "/delete book"):
            typist.type(f"{line}\n")
            typist.expect("saves no states")
            typist.expect("> ")
        typist.type("Hello\n")
        typist.expect("3 tokens")
        typist.expect("> ")
        typist.type("/save talk\n")
        typist.expect("saves no states")
        typist.expect("> ")
        typist.type("\x04")
        assert process.wait(SECONDS) == 0


def test_nobody_reads_the_output_any_more(scripted: ScriptedServer) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(
            command(scripted.url, "complete", "x"), stdout=out, stderr=subprocess.PIPE, text=True, timeout=SECONDS
        )
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "Broken pipe" not in done.stderr


def test_an_answer_that_is_stopped_says_so_in_its_exit_code(scripted: ScriptedServer) -> None:
    scripted.script = "stall"
    with terminal(scripted.url, "complete", "x") as (typist, process):
        typist.expect("a")
        typist.type("\x03")
        typist.expect("stopped")
        assert process.wait(SECONDS) == 130
