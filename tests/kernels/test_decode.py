"""gla_decode against the float64 recurrence, on both backends; Triton in its interpreter where there is no GPU."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from server.kernels import LayerState
from tests.kernels.cases import (
    GATES,
    TRITON_DEVICE,
    check_against_recurrence,
    decode_backends,
    gla_recurrence,
    make_case,
    relative_error,
)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> tuple[ModuleType, str]:
    return decode_backends()[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gates", GATES)
def test_matches_the_recurrence(backend: tuple[ModuleType, str], gates: str, dtype: torch.dtype) -> None:
    module, device = backend
    case = make_case([1] * 12, gates=gates, dtype=dtype, device=device)
    check_against_recurrence(case, *case.decode(module))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_k", "head_v"),
    [(1, 1, 64, 128), (4, 2, 16, 32), (3, 1, 48, 96), (2, 2, 20, 24), (8, 2, 128, 40)],
)
def test_head_sizes(backend: tuple[ModuleType, str], heads: int, kv_heads: int, head_k: int, head_v: int) -> None:
    module, device = backend
    case = make_case([1] * 3, heads=heads, kv_heads=kv_heads, head_k=head_k, head_v=head_v, device=device)
    check_against_recurrence(case, *case.decode(module))


@pytest.mark.parametrize("slots", [[1, 2, 3, 4], [4, 3, 2, 1], [2, 3, 6, 7], [7, 1, 2, 5], [3, 1, 7, 5]], ids=str)
def test_slots_in_any_order(backend: tuple[ModuleType, str], slots: list[int]) -> None:
    module, device = backend
    case = make_case([1] * 4, device=device)
    case = replace(case, slots_N=case.slots_N.new_tensor(slots))
    case.state_SGKV.copy_(torch.randn_like(case.state_SGKV))
    case.state_SGKV[case.slots_N[case.from_zero_N]] = torch.nan
    check_against_recurrence(case, *case.decode(module))


def test_inputs_with_the_heads_first(backend: tuple[ModuleType, str]) -> None:
    """Only the last dimension has to be contiguous."""
    module, device = backend
    case = make_case([1] * 3, heads=4, kv_heads=2, device=device)
    inputs = (case.q_THK, case.k_TGK, case.v_TGV, case.g_TGK)
    q, k, v, g = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
    case = replace(case, q_THK=q, k_TGK=k, v_TGV=v, g_TGK=g)
    check_against_recurrence(case, *case.decode(module))


def test_many_tokens_one_after_the_other(backend: tuple[ModuleType, str]) -> None:
    """A sequence decoded token by token gives what the recurrence gives for it as one span."""
    module, device = backend
    case = make_case([30], heads=2, kv_heads=1, device=device)
    state, outputs = case.state_SGKV, []
    for t in range(30):
        o, state = replace(case.span(0, t, t + 1), state_SGKV=state).decode(module)
        outputs.append(o)
    check_against_recurrence(case, torch.cat(outputs), state)


def test_rows_may_share_the_null_slot(backend: tuple[ModuleType, str]) -> None:
    module, device = backend
    case = make_case([1] * 5, device=device)
    padded = replace(case, slots_N=case.slots_N * torch.tensor([0, 1, 0, 1, 0], device=device))
    o, pool = padded.decode(module)
    live = slice(1, 5, 2)
    true_o, true_pool = gla_recurrence(case)
    assert relative_error(o[live], true_o[live]) < 1e-5
    assert relative_error(pool[case.slots_N[live]], true_pool[case.slots_N[live]]) < 1e-5
    untouched = case.slots_N[0::2]
    assert torch.equal(pool[untouched].view(torch.int32), case.state_SGKV[untouched].view(torch.int32))


def test_no_rows(backend: tuple[ModuleType, str]) -> None:
    module, device = backend
    o, _ = make_case([], device=device).decode(module)
    assert o.shape == (0, 2, 32)


def test_a_row_is_the_same_in_any_batch() -> None:
    """Bit for bit, from the Triton kernel: its tile depends on the head's size alone."""
    from server.kernels import decode

    case = make_case([1] * 9, device=TRITON_DEVICE)
    o, pool = case.decode(decode)
    o_alone, pool_alone = case.span(4).decode(decode)
    assert torch.equal(o[4], o_alone[0])
    assert torch.equal(pool[case.slots_N[4]], pool_alone[case.slots_N[4]])


def test_head_k_above_256_is_refused_by_triton() -> None:
    from server.kernels import decode

    with pytest.raises(ValueError, match="head_k must be at most 256"):
        make_case([1], head_k=272, device=TRITON_DEVICE).decode(decode)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_v", [32, 64, 96, 128, 256, 512])
@pytest.mark.parametrize("head_k", [16, 32, 64, 128, 192, 256])
def test_all_head_sizes_on_gpu(head_k: int, head_v: int, dtype: torch.dtype) -> None:
    from server.kernels import decode

    case = make_case([1] * 37, head_k=head_k, head_v=head_v, gates="mixed", dtype=dtype, device="cuda")
    check_against_recurrence(case, *case.decode(decode))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_k", "head_v"),
    [(4, 4, 256, 512), (4, 4, 128, 256), (32, 8, 128, 128), (8, 1, 64, 128)],
    ids=["1.3B", "340M", "7B", "grouped_8"],
)
def test_published_shapes_on_gpu(heads: int, kv_heads: int, head_k: int, head_v: int, dtype: torch.dtype) -> None:
    from server.kernels import decode

    case = make_case([1] * 33, heads=heads, kv_heads=kv_heads, head_k=head_k, head_v=head_v, dtype=dtype, device="cuda")
    o, pool = case.decode(decode)
    check_against_recurrence(case, o, pool)
    o_alone, pool_alone = case.span(17).decode(decode)
    assert torch.equal(o[17], o_alone[0])
    assert torch.equal(pool[case.slots_N[17]], pool_alone[case.slots_N[17]])


@pytest.mark.gpu
def test_a_pool_of_more_than_2_31_elements_on_gpu() -> None:
    from server.kernels import decode

    case = make_case([1], heads=4, kv_heads=4, head_k=256, head_v=512, device="cuda")
    true_o, true_pool = gla_recurrence(case)
    slots = 2**31 // (4 * 256 * 512) + 5
    pool = torch.empty((slots, 4, 256, 512), device="cuda")
    o = decode.gla_decode(
        *(case.q_THK, case.k_TGK, case.v_TGV, case.g_TGK, LayerState(pool)),
        case.slots_N.new_tensor([slots - 1]),
        case.from_zero_N,
        scale=case.scale,
    )
    assert relative_error(o, true_o) < 1e-5
    assert relative_error(pool[slots - 1], true_pool[case.slots_N[0]]) < 1e-5
