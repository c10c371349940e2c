"""Copies of slots are exact, touch nobody else, and hold everything."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine.arrivals import Arrivals
from server.engine.config import GLAConfig
from server.engine.pinned import PinnedPieces
from server.engine.snapshot import fork_slot, parked_bytes, restore_snapshot, take_snapshot, to_device, to_host
from server.engine.state_pool import StateTensors, allocate_states, state_bytes
from server.kernels import STATE_DTYPES
from tests.engine.driving import FIXTURES

ON_EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ON_EACH_POOL = pytest.mark.parametrize(("name", "dtype"), [("base", "float32"), ("gqa", "bfloat16"), ("conv", "int8")])
SLOTS = 5


def random_pool(folder: Path, device: str, dtype: str, layers: int | None = None) -> tuple[GLAConfig, StateTensors]:
    """A pool of any bits, numbers or not; ``layers``: as many instead of the checkpoint's."""
    config = GLAConfig.from_folder(folder)
    if layers is not None:
        config = replace(config, num_hidden_layers=layers)
    states = allocate_states(
        config, SLOTS, device=torch.device(device), dtype=torch.bfloat16, state_dtype=STATE_DTYPES[dtype]
    )
    for part in states.parts.values():
        bits(part).random_(0, 256)
    return config, states


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def copies(states: StateTensors) -> dict[str, Tensor]:
    return {name: bits(part).clone() for name, part in states.parts.items()}


@ON_EACH_DEVICE
@ON_EACH_POOL
@pytest.mark.parametrize("way", ["device", "host", "host and back"])
def test_a_snapshot_is_what_the_slot_held(name: str, dtype: str, device: str, way: str) -> None:
    """But for what lies in the ring behind the six tokens that wait there, which was other requests', or nobody's."""
    config, states = random_pool(FIXTURES / name, device, dtype)
    before = copies(states)
    for part, copy in before.items():
        if part.startswith("ring_"):
            copy[:, 2, :, 6:] = 0
    logits_V = torch.randn(config.vocab_size, device=device)
    wanted = logits_V.clone()
    snapshot = take_snapshot(states, 2, logits_V, num_tokens=70, num_folded=64)
    if way != "device":
        snapshot = to_host(snapshot)
    on_host = way == "host"
    if way == "host and back":
        snapshot = to_device(snapshot, torch.device(device))
    # Whatever happens to the slot and the logits now, the snapshot keeps what they were.
    logits_V.fill_(torch.nan)
    for part in states.parts.values():
        bits(part).random_(0, 256)
    between = copies(states)
    snapshot.wait()
    assert {part.device.type for part in snapshot.parts.values()} == {"cpu" if on_host else device}
    if on_host and device == "cuda":
        assert all(tensor.is_pinned() for tensor in snapshot.tensors().values())
    assert (snapshot.num_tokens, snapshot.num_folded) == (70, 64)
    size = state_bytes(config, on_cuda=device == "cuda", dtype=torch.bfloat16, state_dtype=STATE_DTYPES[dtype])
    assert snapshot.nbytes == size + 4 * config.vocab_size
    logits = restore_snapshot(states, snapshot, [1, 4])
    assert logits is not None and torch.equal(logits, wanted) and logits.device.type == device
    for part, tensor in states.parts.items():
        for slot in range(SLOTS + 1):
            expected = before[part][:, 2] if slot in (1, 4) else between[part][:, slot]
            assert torch.equal(bits(tensor)[:, slot], expected), (part, slot)


@pytest.mark.gpu
@ON_EACH_POOL
@pytest.mark.parametrize("layers", [1, 2, 24])
def test_a_snapshot_arrives_layer_by_layer(name: str, dtype: str, layers: int) -> None:
    """All of it, in its own slot, and nothing else."""
    config, states = random_pool(FIXTURES / name, "cuda", dtype, layers)
    nbytes = parked_bytes(states, None, config.vocab_size)
    snapshot = take_snapshot(states, 2, None, num_tokens=64, num_folded=64)
    snapshot = to_host(snapshot, PinnedPieces(nbytes, nbytes).take())
    snapshot.wait()
    for part in states.parts.values():
        bits(part).random_(0, 256)
    expected = copies(states)
    for part, copy in expected.items():
        if not part.startswith("ring_"):
            copy[:, 3] = bits(snapshot.parts[part]).to(copy.device)
    arrivals = Arrivals(states)
    assert arrivals.takes(snapshot, [3])
    assert not arrivals.takes(snapshot, [3, 4])
    arrivals.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(arrivals.stream):
        arrivals.bring(snapshot, 3)
    torch.cuda.synchronize()
    for part, copy in copies(states).items():
        assert torch.equal(copy, expected[part]), part


@ON_EACH_DEVICE
@ON_EACH_POOL
def test_a_fork_copies_one_slot_to_others(name: str, dtype: str, device: str) -> None:
    _, states = random_pool(FIXTURES / name, device, dtype)
    before = copies(states)
    fork_slot(states, 3, [5, 1])
    for part, tensor in states.parts.items():
        for slot in range(SLOTS + 1):
            assert torch.equal(bits(tensor)[:, slot], before[part][:, 3 if slot in (1, 5) else slot]), (part, slot)


def test_a_fork_of_a_model_of_one_layer() -> None:
    config = replace(GLAConfig.from_folder(FIXTURES / "base"), num_hidden_layers=1)
    kind = torch.float32
    states = allocate_states(config, SLOTS, device=torch.device("cpu"), dtype=kind, state_dtype=kind)
    states.parts["recurrent"].normal_()
    fork_slot(states, 2, [1])
    assert torch.equal(states.parts["recurrent"][:, 1], states.parts["recurrent"][:, 2])
