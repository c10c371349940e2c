"""Snapshots that come from elsewhere: from an earlier run with other flags, or from another server.

What a slot holds depends on where it lies and how it is held: rings are kept on a GPU and for smaller types only, and
the types are set by flags. A snapshot is converted as far as that loses nothing: tokens that wait in a ring which does
not fit here are folded, and smaller types become larger ones. What would have to be rounded is refused, unless the
client has asked for it.

Letters: L layers, G kv heads, K and V sizes of a head's keys and values, P tokens of a ring, X vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from server.engine.snapshot import Snapshot, fold_slot, hold_as
from server.engine.state_file import Part, StateFileError, describe
from server.engine.state_pool import StateTensors
from server.kernels import SPLIT, STATE_DTYPES, held_shape, state_itemsize

TRANSCRIPT: Final = "transcript"
"""The tensor of a saved state's tokens, beside the parts of its snapshot."""
_RING: Final = ("ring_keys", "ring_values", "ring_decays")
LONGEST_RING: Final = 64
"""Tokens: more than any ring takes."""
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


class RoundingError(StateFileError):
    """A snapshot holds more than can be held here."""


def num_folded(snapshot: Snapshot) -> int:
    """Tokens that a snapshot's recurrent states hold: all, where there are no rings."""
    return snapshot.num_folded if _RING[0] in snapshot.parts else snapshot.num_tokens


def pool_layout(states: StateTensors, vocab_size: int) -> dict[str, Part]:
    """What a snapshot of a pool looks like, its logits included."""
    parts = {name: _part(part_LS[:, 0]) for name, part_LS in states.parts.items()}
    return {**parts, "logits": Part(torch.float32, (vocab_size,))}


def adapt(snapshot: Snapshot, pool: Mapping[str, Part], *, exact: bool) -> Snapshot:
    """What a snapshot on the host is in this pool.

    Args:
        snapshot: of any pool; its memory may be written to.
        pool: see :func:`pool_layout`.
        exact: whether nothing may be rounded.

    Raises:
        RoundingError: something would have to be.
        StateFileError: it is of another model.
    """
    _check(snapshot, pool)
    parts = dict(snapshot.parts)
    dtype, target = parts["recurrent"].dtype, pool["recurrent"].dtype
    pending = snapshot.num_tokens - snapshot.num_folded
    fits = dtype == target and all(name in parts and pool.get(name) == _part(parts[name]) for name in _RING)
    if pending and not fits:
        parts = _fold(parts, pending)
        pending = 0
    if not fits:
        for name in _RING:
            parts.pop(name, None)
    smaller = state_itemsize(target) < state_itemsize(dtype)
    if smaller and exact:
        raise RoundingError(
            f"its recurrent states are {_held(_part(snapshot.parts['recurrent']))}; this server holds them as "
            f"{_held(pool['recurrent'])} and would have to round them"
        )
    held_as = parts["recurrent"].dtype
    if held_as != target and state_itemsize(held_as) >= state_itemsize(target):
        parts = hold_as(parts, target)
    if "conv" in parts:
        parts["conv"] = _convert(parts["conv"], pool["conv"].dtype, exact=exact)
    return replace(snapshot, parts=parts, num_folded=snapshot.num_tokens - pending)


def _check(snapshot: Snapshot, pool: Mapping[str, Part]) -> None:
    """Whether the parts are those of a snapshot of this model, of whatever types."""
    parts = snapshot.tensors()
    if missing := {"recurrent", *({"conv"} & pool.keys())} - parts.keys():
        raise StateFileError(f"holds no {min(missing)}: a state of another kind of model")
    layers, *_, heads, head_k, head_v = pool["recurrent"].shape
    ring_size = parts[_RING[0]].shape[2] if _RING[0] in parts and parts[_RING[0]].dim() == 4 else 0
    shapes = {
        "recurrent": (layers, *held_shape(heads, head_k, head_v, parts["recurrent"].dtype)),
        "scales": (layers, heads, head_k),
        "ring_keys": (layers, heads, ring_size, head_k),
        "ring_values": (layers, heads, ring_size, head_v),
        "ring_decays": (layers, heads, ring_size, head_k),
        "conv": pool["conv"].shape if "conv" in pool else None,
        "logits": pool["logits"].shape,
    }
    dtypes = {
        "recurrent": (*STATE_DTYPES.values(), SPLIT),
        "ring_keys": _FLOATS,
        "ring_values": _FLOATS,
        "conv": _FLOATS,
    }
    for name, tensor in parts.items():
        shape = shapes.get(name)
        if shape is None:
            raise StateFileError(f"holds {name}: a state of another kind of model")
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes.get(name, (torch.float32,)):
            raise StateFileError(
                f"{name} is {describe(_part(tensor))}; this model has {list(shape)} there: a state of another model"
            )
    if ("scales" in parts) != (parts["recurrent"].dtype == torch.uint8):
        raise StateFileError("scales belong to recurrent states of type U8, and to no others")
    pending = snapshot.num_tokens - snapshot.num_folded
    rings = [name for name in _RING if name in parts]
    if (rings and (len(rings) < len(_RING) or ring_size > LONGEST_RING)) or pending > ring_size:
        raise StateFileError(f"{pending} tokens wait to be folded, and there is no ring that holds them")
    if pending and bool((parts["ring_decays"][:, :, :pending] > 0).any()):
        raise StateFileError("ring_decays holds logarithms above 0: a state only ever forgets")


def _fold(parts: Mapping[str, Tensor], pending: int) -> dict[str, Tensor]:
    """The same with float32 recurrent states that have absorbed what waited in the ring."""
    folded = hold_as(parts, torch.float32)
    fold_slot(StateTensors({name: part.unsqueeze(1) for name, part in folded.items()}, ()), 0, pending)
    return folded


def _convert(conv: Tensor, dtype: torch.dtype, *, exact: bool) -> Tensor:
    if exact and conv.dtype not in (dtype, *((torch.bfloat16, torch.float16) if dtype == torch.float32 else ())):
        raise RoundingError(
            f"what it keeps of the short convolutions is {describe(_part(conv))}; this server holds it as "
            f"{describe(Part(dtype, tuple(conv.shape)))} and would have to round it"
        )
    return conv.to(dtype)


def _held(part: Part) -> str:
    return f"F32 in two halves, {describe(part)}" if part.dtype == SPLIT else describe(part)


def _part(tensor: Tensor) -> Part:
    return Part(tensor.dtype, tuple(tensor.shape))
