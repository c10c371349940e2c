"""Saved states in the terminal client, against a real server."""

import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.running import delete_states
from tests.unit.typist import SECONDS, Typist, command, terminal


@pytest.fixture
def states(base_url: str) -> Iterator[str]:
    """Where the server's states are, of which there are none before and behind a test."""
    delete_states(base_url)
    yield f"{base_url}/v1/states"
    delete_states(base_url)


def named(url: str) -> dict[str, Any]:
    return {state["name"]: state for state in httpx.get(url).json()["data"]}


def type_all(typist: Typist, *lines: tuple[str, str]) -> None:
    """Type lines and see what each shows."""
    for line, shown in lines:
        typist.type(f"{line}\n")
        typist.expect(shown)
        typist.expect("> ")


def once(base_url: str, *arguments: str) -> str:
    done = subprocess.run(
        command(base_url, "complete", *arguments, "--temperature", "0", "--max-tokens", "8"),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def test_saving_loading_and_forking(base_url: str, states: str) -> None:
    with terminal(base_url, "complete", "--temperature", "0", "--max-tokens", "8") as (typist, process):
        typist.expect("> ")
        type_all(
            typist,
            ("/save", "needs a name"),
            ("/save sea", "nothing to save"),
            ("/load sea", "there is no state 'sea'"),
            ("/go", "no text to continue"),
            ("The old man looked at the", "8 tokens"),
            ("/save sea", "saved as sea, 15 tokens"),
            ("/load sea", "goes on from sea, 15 tokens"),
            ("/go", "8 tokens"),
            # In another name's place, the first one stays as it was.
            ("/fork ship", "saved as ship, 23 tokens"),
            (" The ship", "8 tokens"),
            ("/save", "saved as ship, 33 tokens"),
            ("/states", "ship"),
            ("/load ship", "goes on from ship, 33 tokens"),
            ("/delete ship", "begins anew"),
            ("/save a/b", "nothing to save"),
        )
        typist.type("\x04")
        assert process.wait(SECONDS) == 0
    assert {name: state["num_tokens"] for name, state in named(states).items()} == {"sea": 15}


def test_a_text_that_goes_on_from_a_state_is_the_whole_texts(base_url: str, states: str) -> None:
    beginning = "The old man looked at the sea and"
    first = once(base_url, beginning, "--save", "sea")
    parts = [once(base_url, "--load", "sea", "--save", "sea") for _ in range(2)]
    answer = httpx.post(
        f"{base_url}/v1/completions", json={"prompt": beginning, "temperature": 0, "max_tokens": 24}, timeout=60
    ).json()
    assert first + "".join(parts) == answer["choices"][0]["text"]
    assert named(states)["sea"]["num_tokens"] == answer["usage"]["total_tokens"]


def answered(typist: Typist, line: str) -> list[str]:
    """The lines of the answer to one that is typed."""
    typist.type(f"{line}\n")
    typist.expect(f"{line}\r\n")
    *answer, _figures = typist.expect(" · first after").split("\r\n")
    typist.expect("> ")
    return answer


def test_a_chat_goes_on_from_a_state_as_from_its_history(base_url: str, states: str) -> None:
    flags = ("chat", "--temperature", "0", "--max-tokens", "8", "--stop", '"')
    with terminal(base_url, *flags, "--system", "They met on the bridge.") as (typist, process):
        typist.expect("> ")
        assert answered(typist, "Where have you been?") != [""]
        type_all(typist, ("/save talk", "saved as talk"))
        from_history = answered(typist, "And then?")
        typist.type("\x04")
        assert process.wait(SECONDS) == 0
    assert named(states)["talk"]["turn"] == "assistant"
    with terminal(base_url, *flags, "--load", "talk") as (typist, process):
        typist.expect("talk> ")
        type_all(typist, ("/go", "no text to continue"))
        assert answered(typist, "And then?") == from_history
        type_all(typist, ("/save", "saved as talk"), ("/fork other", "saved as other"))
        typist.type("\x04")
        assert process.wait(SECONDS) == 0
    kept = named(states)
    assert set(kept) == {"talk", "other"} and kept["talk"]["num_tokens"] == kept["other"]["num_tokens"]
