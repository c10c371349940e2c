"""Float32 states held as two halves: bit for bit what they were, and as good as whole ones wherever they are used."""

import math

import pytest
import torch

from server.kernels import SPLIT, LayerState, folds_every_token, held_shape, is_split_finite
from tests.kernels.cases import (
    GATES,
    TRITON_DEVICE,
    check_against_recurrence,
    make_case,
    relative_error,
    split_states,
)


def numbers() -> torch.Tensor:
    """Float32 numbers of every kind, NaN not among them: [4000]."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
    special = torch.tensor([0.0, 1.0, math.inf, 1e-45, 3.4e38, 1 + 2**-8, 1 + 2**-9, 1 - 2**-9])
    found = torch.cat((special, -special, bits.view(torch.float32)))
    return found[~found.isnan()][:4000]


def test_every_number_comes_back() -> None:
    states = numbers().view(5, 1, 20, 40)
    state = split_states(states)
    loaded = state.load(torch.arange(5))
    assert torch.equal(loaded.view(torch.int32), states.view(torch.int32))
    usual = states.abs() < 3e38
    read, nearest = state.values_SGKV[usual].float(), states[usual].bfloat16().float()
    assert ((read - states[usual]).abs() <= (nearest - states[usual]).abs()).all()


def test_nan_stays_nan() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000], dtype=torch.int32)
    state = split_states(bits.view(torch.float32).view(1, 1, 1, 5))
    assert state.values_SGKV.isnan().all()
    assert state.load(torch.arange(1)).isnan().all()


def test_what_is_finite() -> None:
    def halves(*values: float) -> torch.Tensor:
        state = split_states(torch.tensor(values).view(1, 1, 1, -1))
        assert state.residues_SGKV is not None
        return torch.stack((state.values_SGKV[0].view(SPLIT), state.residues_SGKV[0]))

    assert is_split_finite(halves(0.0, -0.0, 1.5, -3.1e38, 1e-45))
    assert is_split_finite(halves()[:, :, :, :0])
    for value in (math.inf, -math.inf, math.nan):
        assert not is_split_finite(halves(1.0, value))
    below_zero = halves(0.0, 1.0)
    below_zero[1, 0, 0, 0] = -1  # no float32 number is split so: together they would be a NaN
    assert not is_split_finite(below_zero)


@pytest.mark.parametrize("segment_length", [None, 64])
@pytest.mark.parametrize("gates", GATES)
def test_prefill(gates: str, segment_length: int | None) -> None:
    """Tensor cores are given the same numbers: bit for bit what whole states give."""
    from server.kernels import prefill

    case = make_case([129, 3, 70], gates=gates, dtype=torch.bfloat16, device=TRITON_DEVICE)
    o, pool = case.prefill(prefill, segment_length=segment_length)
    split_o, split_pool = case.prefill(prefill, split=True, segment_length=segment_length)
    check_against_recurrence(case, split_o, split_pool)
    assert torch.equal(split_o, o)
    assert torch.equal(split_pool[case.slots_N], pool[case.slots_N])


@pytest.mark.parametrize(("kv_heads", "head_k", "head_v"), [(2, 16, 32), (1, 20, 24), (2, 48, 96)])
def test_decoding_in_place(kv_heads: int, head_k: int, head_v: int) -> None:
    from server.kernels import decode

    case = make_case([1] * 5, heads=2, kv_heads=kv_heads, head_k=head_k, head_v=head_v, device=TRITON_DEVICE)
    o, pool = case.decode(decode)
    split_o, split_pool = case.decode(decode, split=True)
    check_against_recurrence(case, split_o, split_pool)
    assert torch.equal(split_o, o)
    assert torch.equal(split_pool[case.slots_N], pool[case.slots_N])


@pytest.mark.gpu
@pytest.mark.parametrize(("head_k", "head_v"), [(256, 512), (128, 256), (128, 128), (192, 320)])
def test_prefill_of_published_shapes_on_gpu(head_k: int, head_v: int) -> None:
    from server.kernels import prefill

    case = make_case([700, 64, 1, 2048], head_k=head_k, head_v=head_v, dtype=torch.bfloat16, device="cuda")
    for segment_length in (None, 256):
        o, pool = case.prefill(prefill, segment_length=segment_length)
        split_o, split_pool = case.prefill(prefill, split=True, segment_length=segment_length)
        assert relative_error(split_o, o.double()) < 1e-6
        assert relative_error(split_pool[case.slots_N], pool[case.slots_N].double()) < 1e-6
        check_against_recurrence(case, split_o, split_pool)


def test_other_layers_are_held_as_they_are() -> None:
    whole = torch.zeros((3, *held_shape(2, 4, 8, torch.float32)))
    assert LayerState.of(whole).values_SGKV is whole
    assert LayerState.of(whole).is_exact
    assert not LayerState(whole.bfloat16()).is_exact
    assert split_states(whole).is_exact


def test_fewer_split_states_than_whole_ones_are_updated_in_place() -> None:
    whole = LayerState(torch.empty((1, 4, 256, 512), device="meta"))
    split = LayerState.of(torch.empty((1, *held_shape(4, 256, 512, SPLIT)), dtype=SPLIT, device="meta"))
    assert [folds_every_token(rows, whole) for rows in (1, 4, 5)] == [True, True, False]
    assert [folds_every_token(rows, split) for rows in (1, 2)] == [True, False]
    assert not folds_every_token(1, LayerState(whole.values_SGKV.bfloat16()))
