"""Copies of one slot: to go on from later, and to begin other sequences with.

A state cannot be truncated or rebuilt from a part, so a copy holds everything that the model needs to go on: of every
layer the recurrent state with its scales, the ring of tokens waiting to be folded into it, the short convolutions'
inputs, and the logits of the last position, from which a sequence that adds nothing samples its first token. All
copies are bit for bit.

On CUDA nothing here waits for the device. Copies take their place in the order of the current stream; what goes to
the host leaves the device on a stream of its own, so that the next step does not wait for the bus.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from server.engine.state_pool import StateTensors


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What a slot held after some tokens. Its memory is its own, and is not written again.

    Attributes:
        parts: by name as in :class:`StateTensors`, [layers, ...] each; on the pool's device, or on the host.
        logits_V: float32 [vocab_size], of the last token; on the same device as the parts.
        num_tokens: tokens of the transcript that the slot has absorbed.
        num_folded: of these, those that the recurrent state holds; the others are in the ring.
        copied: recorded when the parts are on the host; None: copied in the order of the stream.
    """

    parts: Mapping[str, Tensor]
    logits_V: Tensor
    num_tokens: int
    num_folded: int
    copied: torch.cuda.Event | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.logits_V.nbytes + sum(part.nbytes for part in self.parts.values())

    def wait(self) -> None:
        """Return once the host may read the parts of a snapshot on the host."""
        if self.copied is not None:
            self.copied.synchronize()


def take_snapshot(
    states: StateTensors, slot: int, logits_V: Tensor, *, num_tokens: int, num_folded: int, on_host: bool
) -> Snapshot:
    """Copy what a slot holds.

    Args:
        states: the pool.
        slot: which slot.
        logits_V: float32 [vocab_size], of the slot's last token, on the pool's device.
        num_tokens, num_folded: as in :class:`Snapshot`.
        on_host: copy to the host (pinned memory for a CUDA pool), else to the pool's device.
    """
    copies = {name: part_LS[:, slot].clone() for name, part_LS in states.parts.items()}
    logits_V = logits_V.clone()
    if not on_host or logits_V.device.type == "cpu":
        return Snapshot(copies, logits_V, num_tokens, num_folded, None)
    device = logits_V.device
    stream = _host_copies(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        hosts = {name: _to_pinned(copy, stream) for name, copy in copies.items()}
        logits_V = _to_pinned(logits_V, stream)
        copied = torch.cuda.Event()
        copied.record(stream)
    return Snapshot(hosts, logits_V, num_tokens, num_folded, copied)


def restore_snapshot(states: StateTensors, snapshot: Snapshot, slots: Sequence[int]) -> Tensor:
    """Let slots hold what the snapshot does.

    Returns:
        The snapshot's logits, float32 [vocab_size], on the pool's device.
    """
    device = states.recurrent_LSGKV.device
    if snapshot.copied is not None:
        torch.cuda.current_stream(device).wait_event(snapshot.copied)
    slots_N = _upload(slots, device)
    for name, part_LS in states.parts.items():
        _spread(part_LS, slots_N, snapshot.parts[name].to(device, non_blocking=True))
    return snapshot.logits_V.to(device, non_blocking=True)


def fork_slot(states: StateTensors, source: int, targets: Sequence[int]) -> None:
    """Let the target slots hold what the source slot does. The source must not be among them."""
    targets_N = _upload(targets, states.recurrent_LSGKV.device)
    for part_LS in states.parts.values():
        _spread(part_LS, targets_N, part_LS[:, source])


def _spread(part_LS: Tensor, slots_N: Tensor, value_L: Tensor) -> None:
    """Write one value [layers, ...] to several slots of a part."""
    part_LS.index_copy_(1, slots_N, value_L.unsqueeze(1).expand(-1, slots_N.shape[0], *value_L.shape[1:]))


def _upload(slots: Sequence[int], device: torch.device) -> Tensor:
    host = torch.tensor(slots, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _to_pinned(copy: Tensor, stream: torch.cuda.Stream) -> Tensor:
    host = torch.empty(copy.shape, dtype=copy.dtype, pin_memory=True)
    host.copy_(copy, non_blocking=True)
    # The copy was made on another stream, whose later work must not get its memory before it has left.
    copy.record_stream(stream)
    return host


@cache
def _host_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
