"""The system fingerprint: the same after a restart, another for another model."""

import re
import shutil
from pathlib import Path

import pytest

from server.engine import identity
from server.engine.identity import system_fingerprint

BASE = Path(__file__).parents[1] / "fixtures" / "base"


def test_it_names_what_answers_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = system_fingerprint(BASE, "float32", 0)
    assert re.fullmatch("fp_[0-9a-f]{12}", first)
    copy = Path(shutil.copytree(BASE, tmp_path / "copy"))
    assert system_fingerprint(copy, "float32", 0) == first
    others = {first, system_fingerprint(BASE, "bfloat16", 0), system_fingerprint(BASE, "float32", 1)}
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    others.add(system_fingerprint(copy, "float32", 0))
    monkeypatch.setattr(identity, "__version__", "999")
    others.add(system_fingerprint(BASE, "float32", 0))
    assert len(others) == 5


def test_it_sees_other_weights(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(BASE, tmp_path / "copy"))
    before = system_fingerprint(copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    for at in range(1000, len(data), len(data) // 100):
        data[at] ^= 1
    weights.write_bytes(data)
    assert system_fingerprint(copy) != before
