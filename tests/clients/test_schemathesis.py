"""Thousands of requests made from the OpenAPI document, valid and invalid: no 5xx, and nothing the document denies.

``tests/api/test_openapi_cases.py`` runs a few hundred of them in the ordinary suite.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import KEY, TEMPLATE
from tests.e2e.running import RunningServer

EXAMPLES_PER_OPERATION = 300
FEWEST_CASES = 2000
# What the document cannot say, a field of the answer does: token ids beyond the vocabulary, a prompt that is too
# long. So a body that fits the document may still be refused, with a 400.
EXCLUDED = "positive_data_acceptance"


@pytest.mark.timeout(1500)
def test_thousands_of_cases(
    tmp_path_factory: pytest.TempPathFactory, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path_factory.mktemp("schemathesis")
    # Answers are short, so that the cases are many.
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    flags = (
        "--api-key",
        KEY,
        "--chat-template",
        str(template),
        "--max-model-len",
        "48",
        "--max-num-seqs",
        "16",
        "--max-num-queued-reqs",
        "16",
    )
    with RunningServer(folder, *flags) as server:
        command = [str(Path(sys.executable).with_name("st")), "run", f"{server.base_url}/openapi.json"]
        # One worker: CPython 3.11 may raise SystemError where several threads build syntax trees (its issue 106905).
        command += ["--header", f"Authorization: Bearer {KEY}", "--seed", "1", "--workers", "1"]
        command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES_PER_OPERATION)]
        command += ["--continue-on-failure", "--exclude-checks", EXCLUDED, "--suppress-health-check", "all"]
        command += ["--request-timeout", "60", "--report", "json", "--report-json-path", str(folder / "report.json")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=1400)
        assert "Traceback" not in server.log
    assert done.returncode == 0, done.stdout
    report = json.loads((folder / "report.json").read_text())
    assert report["operations"]["tested"] == report["operations"]["total"]
    assert report["test_cases"]["generated"] >= FEWEST_CASES
    record_property("cases", report["test_cases"]["generated"])
    record_property("operations", report["operations"]["tested"])
