"""The state pool: every sequence's recurrent state, in one preallocated block addressed by slot.

A slot holds all layers' states of one sequence. Slot 0 is the null slot: rows whose result must not
count (a sequence that ended while its next step was already launched) are pointed at it.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.config import GLAConfig
from server.kernels import SPLIT, LayerState, Ring, held_shape, ring_size

NULL_SLOT = 0


@dataclass(frozen=True, slots=True)
class StateTensors:
    """The pool's memory; the kernels read and write it in place.

    Attributes:
        parts: all that is kept of a slot, by name, [layers, slots, ...] each. On CUDA, of all but the rings, a slot's
            layers are contiguous.
        layers: of every layer, a view of its recurrent states and what belongs to them.
    """

    parts: Mapping[str, Tensor]
    layers: tuple[LayerState, ...]

    @property
    def device(self) -> torch.device:
        """Where the pool lies."""
        return self.parts["recurrent"].device

    @property
    def conv_LSWD(self) -> Tensor | None:
        """The last inputs of the short convolutions, oldest first; None for a model without them.

        Model dtype [layers, slots, conv_size - 1, q + k + v channels].
        """
        return self.parts.get("conv")

    @property
    def ring_size(self) -> int:
        """Tokens that a ring takes between two folds; 0: there are no rings."""
        ring = self.layers[0].ring
        return 0 if ring is None else ring.size


def allocate_states(
    config: GLAConfig, num_slots: int, *, device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype
) -> StateTensors:
    """Reserve ``num_slots`` slots and the null slot.

    The memory is not cleared: a new lease starts from zero because its first span says so, never
    because somebody wiped the slot.

    Args:
        dtype: of keys, values and the convolutions' inputs.
        state_dtype: one of :data:`server.kernels.STATE_DTYPES`.
    """
    shapes = _shapes(config, on_cuda=device.type == "cuda", dtype=dtype, state_dtype=state_dtype)
    num_layers = config.num_hidden_layers
    parts = {}
    for name, (shape, part_dtype) in shapes.items():
        if name.startswith("ring_") or device.type == "cpu":
            parts[name] = torch.empty((num_layers, num_slots + 1, *shape), dtype=part_dtype, device=device)
        else:
            # All layers of a slot in one piece, which goes over the bus at once.
            part_SL = torch.empty((num_slots + 1, num_layers, *shape), dtype=part_dtype, device=device)
            parts[name] = part_SL.transpose(0, 1)

    def layer(index: int) -> LayerState:
        part = {name: tensor[index] for name, tensor in parts.items()}
        ring = Ring(part["ring_keys"], part["ring_values"], part["ring_decays"]) if "ring_keys" in part else None
        return LayerState.of(part["recurrent"], part.get("scales"), ring)

    return StateTensors(parts, tuple(map(layer, range(config.num_hidden_layers))))


def state_bytes(config: GLAConfig, *, on_cuda: bool, dtype: torch.dtype, state_dtype: torch.dtype) -> int:
    """Bytes of one sequence's state: all layers, recurrent part, ring and convolution inputs."""
    shapes = _shapes(config, on_cuda=on_cuda, dtype=dtype, state_dtype=state_dtype)
    return config.num_hidden_layers * sum(math.prod(shape) * part.itemsize for shape, part in shapes.values())


def held_dtype(state_dtype: torch.dtype, dtype: torch.dtype, *, on_cuda: bool) -> torch.dtype:
    """How a pool holds states: in their type, but float32 ones of a bfloat16 model on CUDA split.

    Outputs of decoding are rounded to the model's type anyway: with bfloat16, rounding what is read of the states adds
    an error of the same size; a float16 model's outputs are more exact than that.
    """
    return SPLIT if on_cuda and state_dtype == torch.float32 and dtype == torch.bfloat16 else state_dtype


def _shapes(
    config: GLAConfig, *, on_cuda: bool, dtype: torch.dtype, state_dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What one layer keeps of one slot: part -> shape and type."""
    kv_heads, head_k, head_v = config.num_kv_heads, config.head_k, config.head_v
    held = held_dtype(state_dtype, dtype, on_cuda=on_cuda)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "recurrent": (held_shape(kv_heads, head_k, head_v, held), held),
    }
    if state_dtype == torch.uint8:
        shapes["scales"] = ((kv_heads, head_k), torch.float32)
    # A CPU computes on float32 states in its caches: there is no traffic to save.
    if on_cuda or held != torch.float32:
        size = ring_size(held)
        shapes["ring_keys"] = ((kv_heads, size, head_k), dtype)
        shapes["ring_values"] = ((kv_heads, size, head_v), dtype)
        shapes["ring_decays"] = ((kv_heads, size, head_k), torch.float32)
    if config.use_short_conv:
        channels = config.key_dim + config.kv_key_dim + config.kv_value_dim
        shapes["conv"] = ((config.conv_size - 1, channels), dtype)
    return shapes


class SlotAllocator:
    """Which slots are free. The lowest free slot is leased first, which keeps running slots dense."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(1, num_slots + 1))
        self._leased: set[int] = set()

    @property
    def num_free(self) -> int:
        """Slots that can be leased now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Slots leased now."""
        return len(self._leased)

    def lease(self) -> int:
        """Take the lowest free slot.

        Raises:
            RuntimeError: no slot is free; the scheduler has to ask ``num_free`` first.
        """
        if not self._free:
            raise RuntimeError("no free slot to lease")
        slot = heapq.heappop(self._free)
        self._leased.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a leased slot back. No launched step may still refer to it.

        Raises:
            RuntimeError: the slot is not leased.
        """
        if slot not in self._leased:
            raise RuntimeError(f"slot {slot} released but not leased")
        self._leased.remove(slot)
        heapq.heappush(self._free, slot)
