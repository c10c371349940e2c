"""Copies of states in fewer bits: what LayerState.load and store do, bit for bit, and nothing of slot 0."""

import pytest
import torch

from server.kernels import STATE_DTYPES, LayerState, copies
from tests.kernels.cases import TRITON_DEVICE

# Both sides of a choice are computed: of rows that are zero, the reciprocal of their scale, too.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")
SLOTS = 6


def make_state(dtype: str, head_k: int, head_v: int) -> LayerState:
    generator = torch.Generator(TRITON_DEVICE).manual_seed(0)
    shape = (SLOTS, 2, head_k, head_v)
    values = torch.empty(shape, dtype=STATE_DTYPES[dtype], device=TRITON_DEVICE)
    scales = torch.empty(shape[:3], device=TRITON_DEVICE) if dtype == "int8" else None
    state = LayerState(values, scales)
    states = torch.randn(shape, generator=generator, device=TRITON_DEVICE)
    states[2, 0, 1] = 0.0  # a row whose scale is zero
    state.store(torch.arange(SLOTS, device=TRITON_DEVICE), states)
    return state


@pytest.mark.parametrize(("head_k", "head_v"), [(16, 32), (24, 40), (48, 512)])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_copies_are_those_of_the_reference(dtype: str, head_k: int, head_v: int) -> None:
    slots = torch.tensor([3, 0, 5, 2, 0], device=TRITON_DEVICE)
    live = slots > 0
    state, expected = make_state(dtype, head_k, head_v), make_state(dtype, head_k, head_v)
    copy, places = copies.load(state, slots)
    assert places.tolist() == [1, 0, 3, 4, 0]
    assert torch.equal(copy[places[live]], expected.load(slots[live]))

    generator = torch.Generator(TRITON_DEVICE).manual_seed(1)
    copy.normal_(generator=generator)
    copy[4, 1, 2] = 0.0
    null = state.values_SGKV[0].clone()
    copies.store(state, slots, copy, places)
    expected.store(slots[live], copy[places[live]].clone())
    if dtype == "bfloat16" and TRITON_DEVICE == "cpu":  # where the interpreter cuts bits off instead of rounding
        torch.testing.assert_close(state.values_SGKV[1:], expected.values_SGKV[1:], rtol=2**-7, atol=0.0)
    else:
        assert torch.equal(state.values_SGKV[1:], expected.values_SGKV[1:])
    assert torch.equal(state.values_SGKV[0], null)
    if state.scales_SGK is not None and expected.scales_SGK is not None:
        assert torch.equal(state.scales_SGK[1:], expected.scales_SGK[1:])


def test_no_spans() -> None:
    state = make_state("int8", 16, 32)
    copy, places = copies.load(state, torch.zeros(0, dtype=torch.int64, device=TRITON_DEVICE))
    copies.store(state, places, copy, places)
    assert copy.shape == (1, 2, 16, 32)
