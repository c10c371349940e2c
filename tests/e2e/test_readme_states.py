"""The worked examples of README's "Saved states", as they stand there, against two servers."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.e2e.conftest import CHAT_TEMPLATE
from tests.e2e.running import RunningServer

README = Path(__file__).parents[2] / "README.md"


def test_the_worked_examples(tmp_path: Path) -> None:
    section = README.read_text().split("\n## Saved states\n")[1].split("\n### ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    (tmp_path / "book.txt").write_text("It was a dark night, and the old man walked along the shore. " * 40)
    flags = ("--chat-template", str(tmp_path / "chat.jinja"))
    with RunningServer(tmp_path / "one", *flags) as one, RunningServer(tmp_path / "two", *flags) as two:
        answers = [run(block, tmp_path, one, two) for block in blocks]
    (book, first, second), (twig, leaf, states), (moved, elsewhere), chats = answers
    assert (book["name"], book["expires"] - book["created"]) == ("book", 604800)
    for answer in (first, second):
        usage = answer["usage"]
        assert usage["prompt_tokens"] > usage["prompt_tokens_details"]["cached_tokens"] == book["num_tokens"]
    branches = json.loads((tmp_path / "branches.json").read_text())
    assert len({branch["id"] for branch in branches["state"]}) == 3
    assert twig["num_tokens"] == branches["state"][1]["num_tokens"]
    assert leaf["usage"]["prompt_tokens_details"]["cached_tokens"] == twig["num_tokens"]
    assert {state["name"] for state in states["data"]} == {"book", None, "twig", "leaf"}
    assert moved["num_tokens"] == leaf["state"]["num_tokens"]
    assert elsewhere["usage"]["prompt_tokens_details"]["cached_tokens"] == moved["num_tokens"]
    # Behind a stop string, the answer is absorbed once more.
    assert 0 < chats[1]["usage"]["prompt_tokens_details"]["cached_tokens"] <= chats[0]["state"]["num_tokens"]


def run(block: str, folder: Path, one: RunningServer, two: RunningServer) -> list[dict[str, Any]]:
    """The answers that a block's commands print, against the first server and the second in place of their ports."""
    script = block.replace("http://127.0.0.1:8000", one.base_url).replace("http://127.0.0.1:8001", two.base_url)
    script = re.sub(r"\bcurl\b", "curl -sSf", script)
    done = subprocess.run(["bash", "-e", "-c", script], cwd=folder, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    decoder, answers, rest = json.JSONDecoder(), [], done.stdout.strip()
    while rest:
        answer, end = decoder.raw_decode(rest)
        answers.append(answer)
        rest = rest[end:].strip()
    return answers
