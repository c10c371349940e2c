"""The examples in ``clients/examples`` whose packages are here, as a user runs them; the others: ``tests/clients``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import delete_states

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"


def run(name: str, base_url: str, key: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, name] if name.endswith(".py") else [f"./{name}"]
    variables = {"OPENAI_BASE_URL": f"{base_url}/v1", **({"OPENAI_API_KEY": key} if key else {})}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=EXAMPLES, env=environment | variables, timeout=120, check=False
    )


def output(name: str, base_url: str) -> str:
    delete_states(base_url)
    done = run(name, base_url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert httpx.get(f"{base_url}/v1/states").json()["data"] == [], "it cleans up behind itself"
    return done.stdout


def test_curl(base_url: str) -> None:
    shown = output("curl.sh", base_url)
    *chunks, done = re.findall(r"^data: (.*)$", shown, re.MULTILINE)
    assert done == "[DONE]"
    # Tokens that came together are one chunk.
    streamed = "".join(choice["text"] for chunk in chunks for choice in json.loads(chunk)["choices"])
    assert streamed == " the sea.\n" and json.loads(chunks[-1])["usage"]["completion_tokens"] == 4
    assert re.search(r'"text":" 1[78]\d\d\."', shown)
    # The prompt behind the state is all that is read.
    [(prompt, cached)] = re.findall(r'"prompt_tokens":(\d+).*"cached_tokens":(\d+)', shown.split("# ... and")[1])
    assert 0 < int(prompt) - int(cached) < 5 < int(cached)


def test_curl_shows_the_servers_own_words(base_url: str) -> None:
    done = run("curl.sh", f"{base_url}/nowhere")
    assert done.returncode != 0
    assert '"error"' in done.stdout and "404" in done.stderr


def test_openai_sync(base_url: str) -> None:
    shown = output("openai_sync.py", base_url)
    assert shown.startswith("# classics-11m: a completion\nThe old man looked at the sea and the sea.")
    assert all(f"\n{index}: '" in shown for index in range(3))
    assert re.search(r'\n\{"name":"[A-Z][a-z]{2,9}","age":\d\d\}\n', shown)
    assert "\n400, temperature: " in shown


def test_openai_async(base_url: str) -> None:
    shown = output("openai_async.py", base_url)
    assert shown.count("24 tokens in ") == 8
    assert re.search(r"\n192 tokens in [\d.]+ s, \d+ tokens/s\n$", shown)


def test_states(base_url: str) -> None:
    shown = output("states.py", base_url)
    contexts = [(int(all_), int(read)) for all_, read in re.findall(r"context of (\d+) tokens, (\d+) of", shown)]
    # Only the beginning of the story is read as a whole; behind a state, no more than what is new.
    assert len(contexts) == 11 and sum(read > 8 for _, read in contexts) == 0
    story = [context for context, _ in contexts[-3:]]
    assert story == [story[0], story[0] + 24, story[0] + 48]
    listed = shown.split("# What is saved\n")[1].splitlines()
    assert [line.split()[1] for line in listed] == ["book", "-", "north", "story"]


@pytest.mark.parametrize("name", ["openai_sync.py", "openai_async.py", "states.py"])
def test_examples_say_how_to_run_them(name: str) -> None:
    assert f"python clients/examples/{name}" in (EXAMPLES / name).read_text()
