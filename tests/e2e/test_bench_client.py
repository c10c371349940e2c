"""``gale bench`` against a real server."""

import json
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

from tests.e2e.running import delete_states


def test_every_answer_has_its_length_and_the_report_is_written(base_url: str, tmp_path: Path) -> None:
    flags = "--num-prompts 6 --random-input-len 20 --random-output-len 9 --max-concurrency 1,3 --goodput e2el:60000"
    command = [sys.executable, "-m", "server", "bench", "--base-url", base_url, *flags.split()]
    command += ["--output", str(tmp_path / "runs.json"), "--report", str(tmp_path / "runs.html")]
    command += ["--metric-percentiles", "50,95"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [run["max_concurrency"] for run in runs] == [1, 3]
    for run in runs:
        assert run["completed"] == 6 and run["model_id"] == "classics-11m"
        assert run["output_lens"] == [9] * 6 and run["input_lens"] == [20] * 6
        assert run["request_goodput"] == run["request_throughput"]
        assert 0 < run["median_ttft_ms"] <= run["median_e2el_ms"]
        assert run["max_concurrent_requests"] <= run["max_concurrency"]
    page = (tmp_path / "runs.html").read_text()
    assert page.count("<tr>") == 3 and "data:image/png;base64,iVBOR" in page


def test_conversations_by_state_and_by_history(base_url: str, tmp_path: Path) -> None:
    delete_states(base_url)
    flags = "--dataset-name multi-turn --num-turns 3 --num-prompts 4 --random-input-len 70 --random-output-len 5"
    command = [sys.executable, "-m", "server", "bench", "--base-url", base_url, *flags.split()]
    command += ["--history", "resend,state", "--output", str(tmp_path / "runs.json"), "--metric-percentiles", "90"]
    done = subprocess.run([*command, "--report", str(tmp_path / "r.png")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = " ".join(done.stdout.split())
    assert all(words in shown for words in ("history resent", "by state", "first token by turn"))
    resent, by_state = json.loads((tmp_path / "runs.json").read_text())
    for run in (resent, by_state):
        assert run["completed"] == 12 and sorted(run["turns"]) == [0] * 4 + [1] * 4 + [2] * 4
    # Behind a state, everything but its last token and what is new has been absorbed.
    states = zip(by_state["turns"], by_state["input_lens"], by_state["cached_lens"], strict=True)
    for turn, tokens, cached in states:
        assert cached == 0 if turn == 0 else tokens - cached < 150 < tokens
    assert json.loads(urlopen(f"{base_url}/v1/states", timeout=60).read())["data"] == []
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
