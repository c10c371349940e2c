"""The state pool: every sequence's recurrent state, in one preallocated block addressed by slot.

A slot holds all layers' states of one sequence. Slot 0 is the null slot: rows whose result must not
count (a sequence that ended while its next step was already launched) are pointed at it.
"""

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.config import GLAConfig

NULL_SLOT = 0


@dataclass(frozen=True, slots=True)
class StateTensors:
    """The pool's memory; the kernels read and write it in place.

    Attributes:
        recurrent_LSGKV: float32 [layers, slots, kv_heads, head_k, head_v].
        conv_LSWD: model dtype [layers, slots, conv_size - 1, q + k + v channels]: the last inputs of the
            short convolutions, oldest first; None for a model without them.
    """

    recurrent_LSGKV: Tensor
    conv_LSWD: Tensor | None


def allocate_states(
    config: GLAConfig, num_slots: int, *, device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype
) -> StateTensors:
    """Reserve ``num_slots`` slots and the null slot.

    The memory is not cleared: a new lease starts from zero because its first span says so, never
    because somebody wiped the slot.
    """
    slots = num_slots + 1
    recurrent = torch.empty(
        (config.num_hidden_layers, slots, config.num_kv_heads, config.head_k, config.head_v),
        dtype=state_dtype,
        device=device,
    )
    conv = None
    if config.use_short_conv:
        channels = config.key_dim + config.kv_key_dim + config.kv_value_dim
        conv = torch.empty(
            (config.num_hidden_layers, slots, config.conv_size - 1, channels), dtype=dtype, device=device
        )
    return StateTensors(recurrent, conv)


def state_bytes(config: GLAConfig, *, dtype: torch.dtype, state_dtype: torch.dtype) -> int:
    """Bytes of one sequence's state: all layers, recurrent part and convolution inputs."""
    recurrent = config.num_hidden_layers * config.num_kv_heads * config.head_k * config.head_v * state_dtype.itemsize
    conv = 0
    if config.use_short_conv:
        channels = config.key_dim + config.kv_key_dim + config.kv_value_dim
        conv = config.num_hidden_layers * (config.conv_size - 1) * channels * dtype.itemsize
    return recurrent + conv


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
