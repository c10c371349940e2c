"""Saved states in the terminal client, against a real server."""

import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.unit.typist import SECONDS, Typist, command, terminal


@pytest.fixture
def states(base_url: str) -> Iterator[str]:
    """Where the server's states are; those that a test leaves are deleted."""
    url = f"{base_url}/v1/states"
    yield url
    for state in httpx.get(url).json()["data"]:
        httpx.delete(f"{url}/{state['id']}")


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
