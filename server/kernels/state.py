"""What one layer remembers of every slot: its recurrent state, and the tokens waiting to be absorbed into it. And what
decides how fast it forgets."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
"""How states are held, by name. An int8 value is stored plus 128: a kernel turns that into a float32 with one bitwise
operation and one addition."""

SPLIT = torch.int16
"""How a pool of a bfloat16 model on CUDA holds float32 states: each number as the bfloat16 number nearest to it, and by
what it differs from that.

The first is all that buffered decoding reads; where a state changes, both are read and written.
In bits, a float32 number is its upper half times 2^16 plus its lower half, both signed numbers of 16 bits: where
rounding to nearest made the upper half one more than the number's first 16 bits, the lower half is negative."""

_RING_SIZES = {torch.float32: 16, torch.bfloat16: 16, torch.uint8: 32, SPLIT: 16}
"""Measured: larger rings cost more to read than folding more seldom saves. int8 needs the few roundings."""

_LARGEST = 127.0


def ring_size(dtype: torch.dtype) -> int:
    """Tokens between two folds, C, for states held in this type; it divides the chunk of prefill, 64."""
    return _RING_SIZES[dtype]


def state_itemsize(dtype: torch.dtype) -> int:
    """Bytes of one number of a state that is held in one of :data:`STATE_DTYPES`' types, or :data:`SPLIT`."""
    return 4 if dtype == SPLIT else dtype.itemsize


@dataclass(frozen=True, slots=True)
class LowRankGate:
    """What T tokens' log decays [T, D] are computed from.

    They are max(logsigmoid(weight @ low_rank + bias) / normalizer, clamp_min).

    Attributes:
        low_rank_TR: the gate's inner projection, float32, bfloat16 or float16; rows may be strided.
        weight_DR: float32, contiguous.
        bias_D: float32.
        normalizer: > 0.
        clamp_min: <= 0; None: no bound.
    """

    low_rank_TR: Tensor
    weight_DR: Tensor
    bias_D: Tensor
    normalizer: float
    clamp_min: float | None

    def __getitem__(self, tokens: slice) -> "LowRankGate":
        """Those of some tokens."""
        return replace(self, low_rank_TR=self.low_rank_TR[tokens])


@dataclass(frozen=True, slots=True)
class Ring:
    """The tokens that a slot's state has yet to absorb, oldest first; how many they are, the caller knows.

    Attributes:
        keys_SGCK: [slots, kv_heads, C, head_k], of the keys' dtype.
        values_SGCV: [slots, kv_heads, C, head_v], of the values' dtype.
        decays_SGCK: float32 [slots, kv_heads, C, head_k], natural logarithms of the decay from the last fold to the
            entry's token, that token's own included.
    """

    keys_SGCK: Tensor
    values_SGCV: Tensor
    decays_SGCK: Tensor

    @property
    def size(self) -> int:
        """C."""
        return self.keys_SGCK.shape[2]


@dataclass(frozen=True, slots=True)
class RingRows:
    """Where the rings of a batch of rows stand.

    Attributes:
        pending_N: int64 [N], tokens in each row's ring before this one, 0 to C - 1.
        num_folding: int64 [1], how many rows, the first ones, fold their ring with this token. Those whose ring is full
            with it must be among them, and those that start from zero. None: every row folds, with every token.
    """

    pending_N: Tensor
    num_folding: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerState:
    """One layer of the pool; any stride between slots, the rest contiguous.

    Attributes:
        values_SGKV: float32, bfloat16 or uint8 [slots, kv_heads, head_k, head_v].
        scales_SGK: float32 [slots, kv_heads, head_k] of uint8 values: the state is (values - 128) * scales. Else None.
        ring: tokens waiting to be folded into the values; None: every token is absorbed at once.
        residues_SGKV: int16, as the values, with the same stride between slots: the lower halves of float32 states
            whose upper halves are the values, bfloat16 (:data:`SPLIT`). Else None.
    """

    values_SGKV: Tensor
    scales_SGK: Tensor | None = None
    ring: Ring | None = None
    residues_SGKV: Tensor | None = None

    @classmethod
    def of(cls, held_S: Tensor, scales_SGK: Tensor | None = None, ring: Ring | None = None) -> "LayerState":
        """The layer whose states are held in a tensor as :func:`held_shape` says."""
        if held_S.dtype == SPLIT:
            return cls(held_S[:, 0].view(torch.bfloat16), scales_SGK, ring, held_S[:, 1])
        return cls(held_S, scales_SGK, ring)

    @property
    def is_exact(self) -> bool:
        """Whether all bits of float32 states are held."""
        return self.values_SGKV.dtype == torch.float32 or self.residues_SGKV is not None

    def load(self, slots_N: Tensor) -> Tensor:
        """A float32 copy of some slots' states, without their rings: [N, kv_heads, head_k, head_v]."""
        if self.residues_SGKV is not None:
            upper = self.values_SGKV[slots_N].view(torch.int16).int()
            return upper.bitwise_left_shift_(16).add_(self.residues_SGKV[slots_N]).view(torch.float32)
        values_NGKV = self.values_SGKV[slots_N].float()
        if self.scales_SGK is None:
            return values_NGKV
        return values_NGKV.sub_(128.0).mul_(self.scales_SGK[slots_N].unsqueeze(-1))

    def store(self, slots_N: Tensor, states_NGKV: Tensor) -> None:
        """Round float32 states [N, kv_heads, head_k, head_v] to nearest and write them to their slots.

        What is passed is used as scratch, and holds anything afterwards.
        """
        if self.residues_SGKV is not None:
            # A NaN, which rounding might turn into something else, is held as the one that has no lower half.
            bits = states_NGKV.masked_fill_(states_NGKV.isnan(), torch.nan).view(torch.int32)
            upper = (bits + (1 << 15)).bitwise_right_shift_(16)
            self.values_SGKV[slots_N] = upper.to(torch.int16).view(torch.bfloat16)
            self.residues_SGKV[slots_N] = bits.sub_(upper.bitwise_left_shift_(16)).to(torch.int16)
            return
        if self.scales_SGK is not None:
            scales_NGK = states_NGKV.abs().amax(-1).mul_(1 / _LARGEST)
            self.scales_SGK[slots_N] = scales_NGK
            factors_NGK = torch.where(scales_NGK > 0, 1 / scales_NGK, 0.0)
            states_NGKV.mul_(factors_NGK.unsqueeze(-1)).add_(128.5)  # the cast cuts off
        self.values_SGKV[slots_N] = states_NGKV.to(self.values_SGKV.dtype)


def held_shape(kv_heads: int, head_k: int, head_v: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of one slot's states as they are held in a type: upper halves before lower ones, if they are split."""
    shape = (kv_heads, head_k, head_v)
    return (2, *shape) if dtype == SPLIT else shape


def is_split_finite(halves_2: Tensor) -> bool:
    """Whether all numbers whose halves these are, int16 [2, ...], are finite.

    The largest ones, from 3.39e38 on, are not: as bfloat16 numbers, which is how they are read, they are infinite.
    """
    upper, lower = halves_2
    magnitudes = upper & 0x7FFF
    if not magnitudes.numel():
        return True
    least, most = torch.aminmax(magnitudes)
    # From 0x7F80 on there are infinities and NaN; below a zero there is nothing.
    return bool(most < 0x7F80) and not (bool(least == 0) and bool(((magnitudes == 0) & (lower < 0)).any()))
