"""Parked states on disk: what was written is read, whatever else happens to a file is found out."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from server.engine.state_file import Part, StateFileError, read_state, write_state

PARTS = {
    "recurrent": torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)),
    "scales": torch.arange(10, dtype=torch.float32),
    "values": torch.arange(7, dtype=torch.uint8),  # what follows begins at an odd offset, for its type
    "ring": torch.arange(12).view(3, 4).to(torch.bfloat16),
}
PARTS = {name: PARTS[name] for name in ("recurrent", "scales", "ring", "values")}
LAYOUT = {name: Part(part.dtype, tuple(part.shape)) for name, part in PARTS.items()}


def write(path: Path) -> Path:
    write_state(path, PARTS, {"num_tokens": "17"})
    return path


def assert_refused(path: Path, because: str) -> None:
    with pytest.raises(StateFileError, match=because):
        read_state(path, LAYOUT)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    parts, metadata = read_state(path, LAYOUT)
    assert metadata["num_tokens"] == "17"
    assert parts.keys() == PARTS.keys()
    assert all(torch.equal(parts[name], PARTS[name]) for name in PARTS)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_other_programs_can_read_it(tmp_path: Path) -> None:
    with safe_open(write(tmp_path / "a.safetensors"), framework="pt") as file:
        assert file.metadata()["num_tokens"] == "17"
        assert all(torch.equal(file.get_tensor(name), part) for name, part in PARTS.items())


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    rng = random.Random(0)
    for position in rng.sample(range(len(whole)), 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            parts, _ = read_state(path, LAYOUT)
        except StateFileError:
            continue
        # Between the JSON and the data lies padding, where one blank is as good as another character of JSON's.
        assert all(torch.equal(parts[name], PARTS[name]) for name in PARTS)
        assert whole[position] == ord(" ")
    for length in rng.sample(range(len(whole)), 100):
        path.write_bytes(whole[:length])
        assert_refused(path, "cut off|no JSON|not a state")


def test_states_of_other_models_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    with pytest.raises(StateFileError, match=r"recurrent is F32 \[2, 3, 4, 5\] in place of F32 \[2, 3, 4, 6\]"):
        read_state(path, LAYOUT | {"recurrent": Part(torch.float32, (2, 3, 4, 6))})
    with pytest.raises(StateFileError, match="in place of BF16"):
        read_state(path, LAYOUT | {"recurrent": Part(torch.bfloat16, (2, 3, 4, 5))})
    with pytest.raises(StateFileError, match="another kind of model"):
        read_state(path, {"recurrent": LAYOUT["recurrent"]})


@pytest.mark.parametrize("name", ["recurrent", "ring"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinite_states_are_refused(value: float, name: str, tmp_path: Path) -> None:
    spoiled = PARTS[name].clone()
    spoiled[1, 2] = value
    write_state(tmp_path / "a", PARTS | {name: spoiled}, {})
    assert_refused(tmp_path / "a", f"{name} holds values that are not finite")


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", "cannot be read: No such file")
    path = tmp_path / "a"
    for content in (b"", b"short", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]", (2).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        assert_refused(path, "not a state")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    (tmp_path / f"a.{os.getpid()}.tmp").mkdir()
    with pytest.raises(OSError):
        write_state(path, PARTS, {})
    assert read_state(path, LAYOUT)[1]["num_tokens"] == "17"


SAVER = """
import sys
from pathlib import Path
import torch
from server.engine.state_file import write_state

folder = Path(sys.argv[1])
for number in range(1000):
    part = torch.full((64, 64), float(number))
    write_state(folder / f"{number}.safetensors", {"part": part}, {"number": str(number)})
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 100])
def test_killed_in_the_middle_of_a_thousand_saves(tmp_path: Path, after: int) -> None:
    """Every state that was acknowledged is there, and none is there in part."""
    with subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as saver:
        assert saver.stdout is not None
        acknowledged = []
        for line in saver.stdout:
            acknowledged.append(int(line))
            if len(acknowledged) == after:
                saver.send_signal(signal.SIGKILL)
    assert saver.returncode == -signal.SIGKILL
    assert after <= len(acknowledged) < 1000
    layout = {"part": Part(torch.float32, (64, 64))}
    saved = {path.stem: read_state(path, layout) for path in tmp_path.glob("*.safetensors")}
    assert set(map(str, acknowledged)) <= saved.keys()
    for number, (parts, metadata) in saved.items():
        assert metadata["number"] == number
        assert torch.equal(parts["part"], torch.full((64, 64), float(number)))
