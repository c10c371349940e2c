"""gla_prefill against the float64 recurrence, on both backends; Triton in its interpreter where there is no GPU."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from server.kernels import LayerState
from tests.kernels.cases import (
    GATES,
    TRITON_DEVICE,
    backends,
    check_against_recurrence,
    gla_recurrence,
    make_case,
    poisoned_memory,
    relative_error,
)

# Above the diagonal of a block, scores may overflow before they are masked; NumPy, in the interpreter, says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> tuple[ModuleType, str]:
    return backends()[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gates", GATES)
def test_matches_the_recurrence(backend: tuple[ModuleType, str], gates: str, dtype: torch.dtype) -> None:
    module, device = backend
    case = make_case([70, 0, 1, 17], gates=gates, dtype=dtype, device=device)
    check_against_recurrence(case, *case.prefill(module))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_k", "head_v"),
    [(1, 1, 64, 128), (4, 2, 16, 32), (3, 1, 48, 96), (2, 2, 20, 24), (2, 1, 128, 40)],
)
def test_head_sizes(backend: tuple[ModuleType, str], heads: int, kv_heads: int, head_k: int, head_v: int) -> None:
    module, device = backend
    case = make_case([66, 5], heads=heads, kv_heads=kv_heads, head_k=head_k, head_v=head_v, device=device)
    check_against_recurrence(case, *case.prefill(module))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 129])
def test_lengths(backend: tuple[ModuleType, str], length: int) -> None:
    module, device = backend
    case = make_case([length], heads=1, kv_heads=1, gates="mixed", device=device, seed=length)
    check_against_recurrence(case, *case.prefill(module))


@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("gates", ["trained", "strong", "mixed"])
def test_every_chunk_size_of_triton_in_float32(gates: str, chunk: int) -> None:
    """So that the products between blocks, which 16-bit inputs alone use by default, meet float32's tolerance."""
    from server.kernels import prefill

    case = make_case([75, 64], heads=2, kv_heads=1, gates=gates, device=TRITON_DEVICE)
    plan = replace(prefill.plan_prefill(16, 32, 2, 4, 101376), chunk=chunk)
    check_against_recurrence(case, *case.prefill(prefill, plan=plan))


def test_only_empty_spans(backend: tuple[ModuleType, str]) -> None:
    module, device = backend
    case = make_case([0, 0], device=device)
    o, pool = case.prefill(module)
    assert o.shape == (0, 2, 32)
    assert (pool[case.slots_N[0]] == 0).all()  # started from zero
    assert torch.equal(pool[case.slots_N[1]], case.state_SGKV[case.slots_N[1]])


def test_no_spans(backend: tuple[ModuleType, str]) -> None:
    module, device = backend
    case = make_case([], device=device)
    o, pool = case.prefill(module)
    assert o.shape == (0, 2, 32)
    assert torch.equal(pool[1:], case.state_SGKV[1:])


def test_padding_changes_nothing(backend: tuple[ModuleType, str]) -> None:
    """Rows behind the last span, empty spans of the null slot and a longest span that might be longer: as in a captured
    step that holds more than the batch has."""
    module, device = backend
    case = make_case([70, 17], gates="mixed", device=device)
    o, pool = case.prefill(module)
    padded = [torch.cat((x, torch.full_like(x[:60], torch.nan))) for x in (case.q_THK, case.k_TGK, case.v_TGV)]
    decays = torch.cat((case.g_TGK, torch.full_like(case.g_TGK[:60], torch.nan)))
    padded_pool = case.state_SGKV.clone()
    with poisoned_memory():
        padded_o = module.gla_prefill(
            *padded,
            decays,
            LayerState(padded_pool),
            torch.nn.functional.pad(case.slots_N, (0, 3)),
            torch.nn.functional.pad(case.from_zero_N, (0, 3), value=True),
            torch.nn.functional.pad(case.cu_seqlens, (0, 3), value=87),
            scale=case.scale,
            max_length=147,
        )
    assert torch.equal(padded_o[:87], o)
    assert torch.equal(padded_pool[1:], pool[1:])


def test_a_long_span_of_one_token_repeated(backend: tuple[ModuleType, str]) -> None:
    """The state grows steadily where gates hardly decay, and settles where they do."""
    module, device = backend
    length = 5000 if module.__name__.endswith("reference") or device == "cuda" else 300
    case = make_case([length], heads=1, kv_heads=1, device=device)
    first = [x[:1].expand(length, -1, -1) for x in (case.q_THK, case.k_TGK, case.v_TGV)]
    gates = torch.logspace(-7, 0.5, case.g_TGK.shape[2], device=device).neg().expand(length, 1, -1)
    case = replace(case, q_THK=first[0], k_TGK=first[1], v_TGV=first[2], g_TGK=gates)
    check_against_recurrence(case, *case.prefill(module))


@pytest.mark.parametrize("segment_length", [None, 128])
def test_a_decay_next_to_1_does_not_round_to_the_same_number_again_and_again(segment_length: int | None) -> None:
    """Of 512 tokens that add nothing to a float32 state, each decaying it by the same."""
    from server.kernels import prefill

    # The one whose decay over a chunk of 16 is farthest from its float32.
    gates = -torch.linspace(5e-7, 6e-7, 1001, dtype=torch.float64).float()
    decays = torch.exp(16 * gates.double())
    gate = float(gates[(decays.float().double() - decays).abs().argmax()])
    case = make_case([1, 512], heads=1, kv_heads=1, device=TRITON_DEVICE)  # the second span continues
    case.k_TGK.zero_()
    case.g_TGK.fill_(gate)
    _, pool = case.prefill(prefill, segment_length=segment_length)
    slot = case.slots_N[1]
    assert not case.from_zero_N[1]
    assert relative_error(pool[slot], case.state_SGKV[slot].double() * torch.tensor(512 * gate).double().exp()) < 5e-7


def test_split_at_chunks_is_the_same(backend: tuple[ModuleType, str]) -> None:
    """A span taken in pieces gives what it gives whole: bit for bit from Triton, if it walks it whole."""
    module, device = backend
    case = make_case([200], heads=1, kv_heads=1, gates="mixed", device=device)
    o, pool = case.prefill(module)
    pieces, state = [], case.state_SGKV
    for start, stop in ((0, 64), (64, 192), (192, 200)):
        o_piece, state = replace(case.span(0, start, stop), state_SGKV=state).prefill(module)
        pieces.append(o_piece)
    if module.__name__.endswith("reference"):
        assert relative_error(torch.cat(pieces), o.double()) < 1e-6
        assert relative_error(state[case.slots_N], pool[case.slots_N].double()) < 1e-6
    else:
        assert torch.equal(torch.cat(pieces), o)
        assert torch.equal(state[case.slots_N], pool[case.slots_N])


@pytest.mark.parametrize("gates", GATES)
def test_segments_change_nothing_but_the_order_of_sums(gates: str) -> None:
    """Also of spans that are shorter than a segment, or empty, or that end with one."""
    from server.kernels import prefill

    case = make_case([100, 0, 64, 1, 32, 31, 65], gates=gates, device=TRITON_DEVICE)
    o, pool = case.prefill(prefill, segment_length=1024)
    segmented_o, segmented_pool = case.prefill(prefill, segment_length=32)
    check_against_recurrence(case, segmented_o, segmented_pool)
    assert relative_error(segmented_o, o.double()) < 1e-6
    assert relative_error(segmented_pool[case.slots_N], pool[case.slots_N].double()) < 1e-6


def test_a_brutal_gate_among_slow_ones() -> None:
    """A decay of e^-300 between tokens that hardly decay: what is behind it is as exact as without."""
    from server.kernels import prefill

    case = make_case([64, 64], heads=2, kv_heads=1, gates="slow", device=TRITON_DEVICE)
    case.g_TGK[37, 0, 5] = -300.0
    case.g_TGK[64] = -90.0
    plan = replace(prefill.plan_prefill(16, 32, 2, 4, 101376), chunk=32)
    check_against_recurrence(case, *case.prefill(prefill, plan=plan))


def test_split_anywhere_is_nearly_the_same(backend: tuple[ModuleType, str]) -> None:
    module, device = backend
    case = make_case([90], heads=1, kv_heads=1, device=device)
    o, pool = case.prefill(module)
    o_start, state = case.span(0, 0, 37).prefill(module)
    o_end, state = replace(case.span(0, 37), state_SGKV=state).prefill(module)
    assert relative_error(torch.cat((o_start, o_end)), o.double()) < 1e-6
    assert relative_error(state[case.slots_N], pool[case.slots_N].double()) < 1e-6


def test_a_span_does_not_feel_its_neighbours(backend: tuple[ModuleType, str]) -> None:
    """Not even if they are full of NaN and infinity: the rows next to a span are never part of its sums."""
    module, device = backend
    case = make_case([33, 40, 7], device=device)
    alone, pool_alone = case.span(1).prefill(module)
    bad = case.q_THK.new_tensor([torch.nan, torch.inf])
    for x in (case.q_THK, case.k_TGK, case.v_TGV, case.g_TGK):
        x[:33], x[73:] = bad[0], bad[1] if x is not case.g_TGK else -bad[1]
    together, pool = case.prefill(module)
    slot = case.slots_N[1]
    if module.__name__.endswith("reference"):
        assert relative_error(together[33:73], alone.double()) < 1e-6
        assert relative_error(pool[slot], pool_alone[slot].double()) < 1e-6
    else:
        assert torch.equal(together[33:73], alone)
        assert torch.equal(pool[slot], pool_alone[slot])


def test_inputs_with_the_heads_first(backend: tuple[ModuleType, str]) -> None:
    """Only the last dimension has to be contiguous."""
    module, device = backend
    case = make_case([20, 3], heads=4, kv_heads=2, device=device)
    inputs = (case.q_THK, case.k_TGK, case.v_TGV, case.g_TGK)
    q, k, v, g = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
    case = replace(case, q_THK=q, k_TGK=k, v_TGV=v, g_TGK=g)
    check_against_recurrence(case, *case.prefill(module))


def test_slots_of_a_pool_with_any_stride(backend: tuple[ModuleType, str]) -> None:
    module, device = backend
    case = make_case([20, 3], device=device)
    slots, *rest = case.state_SGKV.shape
    wide = torch.full((slots, 3, *rest), torch.nan, device=device)
    wide[:, 1] = case.state_SGKV
    _, pool = case.prefill(module)
    module.gla_prefill(
        *(case.q_THK, case.k_TGK, case.v_TGV, case.g_TGK, LayerState(wide[:, 1])),
        *(case.slots_N, case.from_zero_N, case.cu_seqlens),
        scale=case.scale,
        max_length=20,
    )
    assert torch.equal(wide[case.slots_N, 1], pool[case.slots_N])
    assert wide[:, 0].isnan().all()
    assert wide[:, 2].isnan().all()


@pytest.mark.parametrize("shared_memory", [65536, 101376, 166912, 232448])
@pytest.mark.parametrize("repeats", [1, 2, 4, 8])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_plans(shared_memory: int, repeats: int, itemsize: int) -> None:
    from server.kernels.prefill import plan_prefill

    for head_k in (16, 48, 128, 256):
        for head_v in (32, 96, 512):
            plan = plan_prefill(head_k, head_v, repeats, itemsize, shared_memory)
            assert plan.chunk in (16, 32)
            assert plan.block_k >= head_k
            assert not plan.transposed or plan.block_v >= 64
            assert plan.walk_stages == 1 or plan.chunk * plan.block_k * plan.walk_stages * itemsize < shared_memory


@pytest.mark.parametrize("spans", [1, 2, 4, 9, 100])
@pytest.mark.parametrize("programs", [1, 4, 16, 200])
def test_planned_segments(programs: int, spans: int) -> None:
    """Segments of equal spans are as many as the device runs at once, and none is shorter than it pays."""
    from server.kernels.prefill import MIN_SEGMENT, plan_segments

    for length in (0, 1, 64, 255, 2 * MIN_SEGMENT, 2047, 8192, 100_001):
        segment = plan_segments(spans * length, length, programs, 32, 132)
        assert segment % 32 == 0
        assert segment >= min(length, MIN_SEGMENT)
        segments = -(-length // segment)
        assert segments <= 1 or programs * spans * segments <= 132
        if programs * spans > 66 or length < 2 * MIN_SEGMENT:
            assert segments <= 1


def test_head_k_above_256_is_refused_by_triton() -> None:
    from server.kernels import prefill

    with pytest.raises(ValueError, match="head_k must be at most 256"):
        make_case([1], head_k=272, device=TRITON_DEVICE).prefill(prefill)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_v", [32, 64, 96, 128, 256, 512])
@pytest.mark.parametrize("head_k", [16, 32, 64, 128, 192, 256])
def test_all_head_sizes_on_gpu(head_k: int, head_v: int, dtype: torch.dtype) -> None:
    from server.kernels import prefill

    for gates in ("slow", "trained", "mixed"):
        case = make_case([130, 0, 64, 1], head_k=head_k, head_v=head_v, gates=gates, dtype=dtype, device="cuda")
        check_against_recurrence(case, *case.prefill(prefill))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_k", "head_v"),
    [(4, 4, 256, 512), (4, 4, 128, 256), (32, 8, 128, 128), (8, 4, 256, 256), (8, 1, 64, 128)],
    ids=["1.3B", "340M", "7B", "grouped_2", "grouped_8"],
)
def test_published_shapes_on_gpu(
    heads: int, kv_heads: int, head_k: int, head_v: int, gates: str, dtype: torch.dtype
) -> None:
    from server.kernels import prefill

    case = make_case(
        [300, 64, 1, 77],
        heads=heads,
        kv_heads=kv_heads,
        head_k=head_k,
        head_v=head_v,
        gates=gates,
        dtype=dtype,
        device="cuda",
    )
    o, pool = case.prefill(prefill)
    check_against_recurrence(case, o, pool)
    # Alone and in pieces, bit for bit.
    o_start, state = case.span(0, 0, 128).prefill(prefill)
    o_end, state = replace(case.span(0, 128), state_SGKV=state).prefill(prefill)
    assert torch.equal(torch.cat((o_start, o_end)), o[:300])
    assert torch.equal(state[case.slots_N[0]], pool[case.slots_N[0]])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_k", "head_v"),
    [(4, 4, 256, 512), (4, 4, 128, 256), (32, 8, 128, 128)],
    ids=["1.3B", "340M", "7B"],
)
def test_segments_of_published_shapes_on_gpu(
    heads: int, kv_heads: int, head_k: int, head_v: int, gates: str, dtype: torch.dtype
) -> None:
    """Aligned inputs are copied asynchronously, which others are not."""
    from server.kernels import prefill

    case = make_case(
        [1000, 1, 0, 577],
        heads=heads,
        kv_heads=kv_heads,
        head_k=head_k,
        head_v=head_v,
        gates=gates,
        dtype=dtype,
        device="cuda",
    )
    inputs = (x.contiguous() for x in (case.q_THK, case.k_TGK, case.v_TGV, case.g_TGK))
    for x in (case, replace(case, **dict(zip(("q_THK", "k_TGK", "v_TGV", "g_TGK"), inputs, strict=True)))):
        check_against_recurrence(x, *x.prefill(prefill, segment_length=256))
        check_against_recurrence(x, *x.prefill(prefill))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_thousand_times_the_same_token_on_gpu(dtype: torch.dtype) -> None:
    from server.kernels import prefill

    case = make_case([10_000], heads=1, kv_heads=1, head_k=64, head_v=128, dtype=dtype, device="cuda")
    first = [x[:1].expand(10_000, -1, -1) for x in (case.q_THK, case.k_TGK, case.v_TGV)]
    gates = torch.logspace(-7, 0.5, 64, device="cuda").neg().expand(10_000, 1, -1)
    case = replace(case, q_THK=first[0], k_TGK=first[1], v_TGV=first[2], g_TGK=gates)
    check_against_recurrence(case, *case.prefill(prefill))


@pytest.mark.gpu
def test_a_pool_of_more_than_2_31_elements_on_gpu() -> None:
    from server.kernels import prefill

    case = make_case([65], heads=4, kv_heads=4, head_k=256, head_v=512, dtype=torch.bfloat16, device="cuda")
    true_o, true_pool = gla_recurrence(case)
    slots = 2**31 // (4 * 256 * 512) + 5
    pool = torch.empty((slots, 4, 256, 512), device="cuda")
    o = prefill.gla_prefill(
        *(case.q_THK, case.k_TGK, case.v_TGV, case.g_TGK, LayerState(pool)),
        case.slots_N.new_tensor([slots - 1]),
        case.from_zero_N,
        case.cu_seqlens,
        scale=case.scale,
        max_length=65,
    )
    assert relative_error(o, true_o) < 4e-3
    assert relative_error(pool[slots - 1], true_pool[case.slots_N[0]]) < 4e-3
