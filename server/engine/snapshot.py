"""Copies of one slot: to go on from later, and to begin other sequences with.

A state cannot be truncated or rebuilt from a part, so a copy holds everything that the model needs to go on: of every
layer the recurrent state with its scales, the ring of tokens waiting to be folded into it, the short convolutions'
inputs, and the logits of the last position, from which a sequence that adds nothing samples its first token. All
copies are bit for bit.

On CUDA nothing here waits for the device. Copies take their place in the order of the current stream; what goes to
the host leaves the device on a stream of its own, so that the next step does not wait for the bus.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from server.engine.pinned import ALIGNMENT, PinnedPiece
from server.engine.state_pool import StateTensors
from server.kernels import SPLIT, LayerState, held_shape, state_itemsize


class RestoreError(Exception):
    """A snapshot could not be brought to its slot, though the device is well."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What a slot held after some tokens. Its memory is its own, and is not written again.

    Attributes:
        parts: by name as in :class:`StateTensors`, [layers, ...] each; on the pool's device, or on the host. Recurrent
            states may be held in another type than the pool's, and then have scales of their own.
        logits_V: float32 [vocab_size], of the last token; on the same device as the parts. None: they were not at hand,
            and whoever begins here has to absorb something first.
        num_tokens: tokens of the transcript that the slot has absorbed.
        num_folded: of these, those that the recurrent state holds; the others are in the ring.
        copied: recorded when the parts are on the host; None: copied in the order of the stream.
        piece: the memory that the parts lie in, if it is to be given back.
    """

    parts: Mapping[str, Tensor]
    logits_V: Tensor | None
    num_tokens: int
    num_folded: int
    copied: torch.cuda.Event | None
    piece: PinnedPiece | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The parts, and the logits as one more of them."""
        return dict(self.parts) if self.logits_V is None else {**self.parts, "logits": self.logits_V}

    def wait(self) -> None:
        """Return once the host may read the parts of a snapshot on the host."""
        if self.copied is not None:
            self.copied.synchronize()


def take_snapshot(
    states: StateTensors, slot: int, logits_V: Tensor | None, *, num_tokens: int, num_folded: int
) -> Snapshot:
    """Copy what a slot holds, on the pool's device.

    Args:
        states: the pool.
        slot: which slot.
        logits_V: float32 [vocab_size], of the slot's last token, on the pool's device; None: not at hand.
        num_tokens, num_folded: as in :class:`Snapshot`.
    """
    copies = {name: part_LS[:, slot].clone() for name, part_LS in states.parts.items()}
    for name, part_L in copies.items():
        if name.startswith("ring_"):
            # Behind what waits there is what the slot's earlier users have left, or memory that nobody has written.
            part_L[:, :, num_tokens - num_folded :].zero_()
    return Snapshot(copies, None if logits_V is None else logits_V.clone(), num_tokens, num_folded, None)


def shrink(snapshot: Snapshot, dtype: torch.dtype) -> Snapshot:
    """The same with the recurrent states rounded to a smaller type, one of :data:`server.kernels.STATE_DTYPES`.

    What waits in rings stays as it is. States that take no more than this already are returned as they are.
    """
    if state_itemsize(snapshot.parts["recurrent"].dtype) <= dtype.itemsize:
        return snapshot
    return replace(snapshot, parts=hold_as(snapshot.parts, dtype))


def hold_as(parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The parts of a snapshot with the recurrent states held in another type, rounded to nearest where it is smaller.

    Args:
        parts: as in :class:`Snapshot`.
        dtype: one of the types of :data:`server.kernels.STATE_DTYPES`, or :data:`server.kernels.SPLIT`.

    Returns:
        New recurrent states, with scales if they are uint8; the other parts as they are.
    """
    recurrent = parts["recurrent"]
    held = {name: part for name, part in parts.items() if name != "scales"}
    if (recurrent.dtype, dtype) == (SPLIT, torch.bfloat16):
        return held | {"recurrent": recurrent[:, 0].view(dtype).clone()}
    if (recurrent.dtype, dtype) == (torch.bfloat16, SPLIT):
        upper = recurrent.view(SPLIT)
        return held | {"recurrent": torch.stack((upper, torch.zeros_like(upper)), 1)}
    layers_L = torch.arange(len(recurrent), device=recurrent.device)
    states_LGKV = LayerState.of(recurrent, parts.get("scales")).load(layers_L)
    if dtype == torch.float32:
        return held | {"recurrent": states_LGKV}
    num_layers, kv_heads, head_k, head_v = states_LGKV.shape
    held["recurrent"] = states_LGKV.new_empty((num_layers, *held_shape(kv_heads, head_k, head_v, dtype)), dtype=dtype)
    if dtype == torch.uint8:
        held["scales"] = states_LGKV.new_empty(states_LGKV.shape[:-1])
    LayerState.of(held["recurrent"], held.get("scales")).store(layers_L, states_LGKV)
    return held


def to_host(snapshot: Snapshot, piece: PinnedPiece | None = None) -> Snapshot:
    """A copy in pinned memory of a snapshot on a CUDA device; one on the host is returned as it is.

    Args:
        snapshot: to be copied.
        piece: memory that holds its tensors, each aligned; None: new memory.
    """
    device = snapshot.parts["recurrent"].device
    if device.type == "cpu":
        return snapshot
    stream = _host_copies(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        tensors = snapshot.tensors()
        hosts = (
            _carve(piece.memory, tensors)
            if piece is not None
            else {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in tensors.items()
            }
        )
        for name, tensor in tensors.items():
            hosts[name].copy_(tensor, non_blocking=True)
            # It was made on another stream, whose later work must not get its memory before it has left.
            tensor.record_stream(stream)
        copied = torch.cuda.Event()
        copied.record(stream)
    return Snapshot(hosts, hosts.pop("logits", None), snapshot.num_tokens, snapshot.num_folded, copied, piece)


def copy_from_device(snapshot: Snapshot, stream: torch.cuda.Stream | None) -> Snapshot:
    """A copy in ordinary memory of a snapshot on a CUDA device, for other threads than the engine's; waits for it.

    Args:
        stream: in whose order the snapshot was taken.
    """
    assert stream is not None
    device = snapshot.parts["recurrent"].device
    own = torch.cuda.Stream(device)
    own.wait_event(stream.record_event())
    with torch.cuda.stream(own):
        hosts = {name: tensor.cpu() for name, tensor in snapshot.tensors().items()}
    return Snapshot(hosts, hosts.pop("logits", None), snapshot.num_tokens, snapshot.num_folded, None)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _carve(memory: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Places for tensors of these types and shapes."""
    places = {}
    start = 0
    for name, tensor in tensors.items():
        places[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _aligned(tensor.nbytes)
    return places


def to_device(snapshot: Snapshot, device: torch.device) -> Snapshot:
    """A copy on a device of a snapshot on the host; one on the device is returned as it is."""
    if snapshot.parts["recurrent"].device.type == device.type:
        return snapshot
    if snapshot.copied is not None:
        torch.cuda.current_stream(device).wait_event(snapshot.copied)
    copies = {name: part.to(device, non_blocking=True) for name, part in snapshot.tensors().items()}
    return Snapshot(copies, copies.pop("logits", None), snapshot.num_tokens, snapshot.num_folded, None)


def parked_bytes(states: StateTensors, dtype: torch.dtype | None, vocab_size: int) -> int:
    """Bytes of a snapshot with logits, every tensor aligned.

    Args:
        states: the pool.
        dtype: to which recurrent states are rounded; None: they are not.
        vocab_size: number of logits.
    """
    sizes = {name: part_LS[:, 0].nbytes for name, part_LS in states.parts.items()}
    itemsize = state_itemsize(states.parts["recurrent"].dtype)
    if dtype is not None and dtype.itemsize < itemsize:
        numbers = sizes["recurrent"] // itemsize
        sizes["recurrent"] = numbers * dtype.itemsize
        if dtype == torch.uint8:
            sizes["scales"] = 4 * numbers // states.parts["recurrent"].shape[-1]
    return sum(map(_aligned, sizes.values())) + _aligned(4 * vocab_size)


def restore_snapshot(states: StateTensors, snapshot: Snapshot, slots: Sequence[int]) -> Tensor | None:
    """Let slots hold what the snapshot does.

    Returns:
        The snapshot's logits, if it has them, float32 [vocab_size], on the pool's device.
    """
    device = states.device
    parts = dict(snapshot.parts)
    if snapshot.num_folded == snapshot.num_tokens:
        # Nothing waits in the ring: what a slot's ring holds then is nobody's business.
        parts = {name: part for name, part in parts.items() if not name.startswith("ring_")}
    if parts["recurrent"].device.type != device.type:
        snapshot = to_device(replace(snapshot, parts=parts), device)
        parts = dict(snapshot.parts)
    held_dtype = states.parts["recurrent"].dtype
    if parts["recurrent"].dtype != held_dtype:
        parts = hold_as(parts, held_dtype)
    _spread(states, slots, parts)
    logits_V = snapshot.logits_V
    # A piece of memory goes to somebody else as soon as the snapshot in it is gone.
    return logits_V if logits_V is None or snapshot.piece is None else logits_V.clone()


def fold_slot(states: StateTensors, slot: int, num_pending: int) -> None:
    """Let a slot's recurrent state absorb the tokens that wait in its ring, of which there are ``num_pending``.

    A prompt is absorbed by the recurrent state alone, so whoever goes on with one needs an empty ring. The formula is
    that of :mod:`server.kernels.buffered`, of which this is a fold without a new token, of all layers at once.
    """
    parts = {name: part_LS[:, slot] for name, part_LS in states.parts.items()}
    keys_LGPK, values_LGPV, decays_LGPK = (
        parts[f"ring_{name}"][:, :, :num_pending].float() for name in ("keys", "values", "decays")
    )
    total_LGK = decays_LGPK[:, :, -1]
    keys_LGPK = keys_LGPK * (total_LGK.unsqueeze(2) - decays_LGPK).exp()
    state = LayerState.of(parts["recurrent"], parts.get("scales"))
    layers = torch.arange(len(total_LGK), device=total_LGK.device)
    states_LGKV = state.load(layers).mul_(total_LGK.exp().unsqueeze(-1))
    state.store(layers, states_LGKV.add_(keys_LGPK.transpose(2, 3) @ values_LGPV))


def fork_slot(states: StateTensors, source: int, targets: Sequence[int]) -> None:
    """Let the target slots hold what the source slot does. The source must not be among them."""
    # A copy: of a single layer, PyTorch sees that source and target share memory, and refuses.
    _spread(states, targets, {name: part_LS[:, source].clone() for name, part_LS in states.parts.items()})


def _spread(states: StateTensors, slots: Sequence[int], parts: Mapping[str, Tensor]) -> None:
    """Write parts [layers, ...] to several slots."""
    if len(slots) == 1:
        # For whom somebody may be waiting: no slot's number has to be on the device first.
        for name, part_L in parts.items():
            states.parts[name][:, slots[0]].copy_(part_L)
        return
    host = torch.tensor(slots, dtype=torch.int64, pin_memory=states.device.type == "cuda")
    slots_N = host.to(states.device, non_blocking=True)
    for name, part_L in parts.items():
        states.parts[name].index_copy_(1, slots_N, part_L.unsqueeze(1).expand(-1, len(slots), *part_L.shape[1:]))


@cache
def _host_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
