"""A minute of the soak: that its load is mixed, that every answer is right, and that nothing stays behind.

Whether memory and latency are steady takes longer to tell: ``make soak``.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ops


@pytest.mark.timeout(400)
def test_a_minute_of_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ops.soak", "--minutes", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=350)
    assert (tmp_path / "soak.json").exists(), done.stderr
    report = json.loads((tmp_path / "soak.json").read_text())
    assert len(report["kinds"]) == 14
    lasting = [check for check in report["checks"] if not check["name"].endswith(("stable", "flat"))]
    assert all(check["passed"] for check in lasting), (lasting, report["wrong"])
    assert "Traceback" not in (tmp_path / "server.log").read_text()
