"""The examples in ``clients/examples`` that need what the ordinary test environment lacks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import KEY

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"


def run(command: list[str], v1: str, folder: Path = EXAMPLES) -> str:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"OPENAI_BASE_URL": v1, "OPENAI_API_KEY": KEY, "PATH": binaries}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | variables, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_langchain(v1: str) -> None:
    shown = run([sys.executable, "langchain_chain.py"], v1)
    one, batch, stream, choice = (part.split("\n", 1)[1].strip() for part in shown.split("# ")[1:])
    assert one and stream
    assert len(batch.splitlines()) == 3
    assert choice in ("smiled.", "wept.", "ran away.")


def test_lm_eval(v1: str) -> None:
    shown = run(["./lm_eval.sh"], v1)
    [row] = [line for line in shown.splitlines() if line.startswith("|endings|")]
    accuracy = float(row.split("|")[7])
    assert accuracy > 0.75, "sense is likelier than nonsense"


def test_node(v1: str, tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node or no npm")
    for name in ("package.json", "openai_node.mjs"):
        shutil.copy(EXAMPLES / name, tmp_path)
    install = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=30000"]
    installed = subprocess.run(install, capture_output=True, text=True, cwd=tmp_path, timeout=150, check=False)
    if installed.returncode != 0 and any(word in installed.stderr for word in ("ENOTFOUND", "ECONN", "ETIMEDOUT")):
        pytest.skip("npm reaches no registry")
    assert installed.returncode == 0, installed.stderr
    shown = run(["node", "openai_node.mjs"], v1, tmp_path)
    assert "The old man looked at the sea and the sea." in shown
    # Behind the state, no more than its last token is read.
    [*_, prompt] = re.findall(r"prompt_tokens: (\d+)", shown)
    [*_, cached] = re.findall(r"cached_tokens: (\d+)", shown)
    assert int(prompt) - int(cached) <= 1 < int(prompt) and "deleted: true" in shown
    assert "400, temperature: " in shown
