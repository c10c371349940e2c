"""``gale bench`` against a real server."""

import json
import subprocess
import sys
from pathlib import Path


def test_every_answer_has_its_length_and_the_report_is_written(base_url: str, tmp_path: Path) -> None:
    flags = "--num-prompts 6 --random-input-len 20 --random-output-len 9 --max-concurrency 1,3 --goodput e2el:60000"
    command = [sys.executable, "-m", "server", "bench", "--base-url", base_url, *flags.split()]
    command += ["--output", str(tmp_path / "runs.json"), "--report", str(tmp_path / "runs.html")]
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
