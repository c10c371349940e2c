"""Decoding with rings against the float64 recurrence, on both backends: token by token, folds at absolute positions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels import (
    SPLIT,
    STATE_DTYPES,
    LayerState,
    LowRankGate,
    Ring,
    RingRows,
    held_shape,
    reference,
    ring_size,
)
from tests.kernels.cases import GATES, TRITON_DEVICE, Case, gla_recurrence, make_case, poisoned_memory, relative_error

HELD_DTYPES = {**STATE_DTYPES, "split": SPLIT}
OUTPUT_TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3, "int8": 2e-2, "split": 4e-3}
"""Of float32 inputs: what rounding the state once in C tokens costs, or rounding what is read of it."""
ON_EACH_BACKEND = pytest.mark.parametrize("backend", ["reference", "triton"])


def device_of(backend: str) -> str:
    return "cpu" if backend == "reference" else TRITON_DEVICE


class Rows:
    """Sequences that decode side by side, one for each span of a case, each from its own position on.

    The states, rounded to their type, are the case's; rings and slots that start from zero are full of NaN.
    """

    def __init__(self, case: Case, dtype: str, positions: list[int]) -> None:
        self.case = case
        slots, kv_heads, head_k, head_v = case.state_SGKV.shape
        device = case.state_SGKV.device
        held_dtype = HELD_DTYPES[dtype]
        size = ring_size(held_dtype)

        def garbage(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.full(shape, torch.nan, dtype=kind, device=device)

        inputs = case.q_THK.dtype
        held_sizes = held_shape(kv_heads, head_k, head_v, held_dtype)
        self.state = LayerState.of(
            torch.zeros((slots, *held_sizes), dtype=held_dtype, device=device),
            garbage(slots, kv_heads, head_k) if dtype == "int8" else None,
            Ring(
                garbage(slots, kv_heads, size, head_k, kind=inputs),
                garbage(slots, kv_heads, size, head_v, kind=inputs),
                garbage(slots, kv_heads, size, head_k),
            ),
        )
        self.state.store(torch.arange(slots, device=device), case.state_SGKV.clone())
        self.start = self.state.load(torch.arange(slots, device=device))
        self.positions = positions
        self.folded = positions[:]
        self.size = size

    def step(self, backend: str, index: int, *, in_place: bool = False, gate: LowRankGate | None = None) -> Tensor:
        """Token ``index`` of every span: what it reads. The gate, if there is one, is of all tokens."""
        case = self.case
        from_zero = case.from_zero_N if index == 0 else torch.zeros_like(case.from_zero_N)
        pending: list[int] = []
        folding: list[int] = []
        others: list[int] = []
        for n, position in enumerate(self.positions):
            pending.append(position - self.folded[n])
            folds = in_place or (position + 1) % self.size == 0 or bool(from_zero[n])
            (folding if folds else others).append(n)
            self.folded[n] = position + 1 if folds else self.folded[n]
            self.positions[n] += 1

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=from_zero.device)

        order = tensor(folding + others)
        rows = RingRows(tensor(pending)[order], tensor([len(folding)]))
        slots, from_zero = case.slots_N[order], from_zero[order]
        row = case.cu_seqlens[:-1].long()[order] + index
        decays = case.g_TGK[row] if gate is None else replace(gate, low_rank_TR=gate.low_rank_TR[row])
        inputs = (case.q_THK[row], case.k_TGK[row], case.v_TGV[row], decays)
        with poisoned_memory():
            if in_place:
                from server.kernels import decode

                o = decode.gla_decode(
                    *(*inputs, self.state, slots, from_zero), scale=case.scale, pending_N=rows.pending_N
                )
            else:
                o = decoder(backend)(*inputs, self.state, slots, from_zero, rows, scale=case.scale)
        return o[order.argsort()]

    def check(self, outputs: list[Tensor], tolerance: float) -> None:
        """Assert outputs, each step's [N, H, V], and, where the ring is empty, states to be right."""
        case = self.case
        true_o, true_pool = gla_recurrence(
            Case(*(getattr(case, n) for n in ("q_THK", "k_TGK", "v_TGV", "g_TGK")), self.start, case.slots_N,
                 case.from_zero_N, case.cu_seqlens)
        )  # fmt: skip
        o = torch.stack(outputs, 1).flatten(0, 1)
        assert relative_error(o, true_o) < tolerance
        empty = [n for n, position in enumerate(self.positions) if self.folded[n] == position]
        if empty:
            slots = case.slots_N[empty]
            # Of a split state, only what is read is rounded.
            kept = (1e-5 if case.k_TGK.dtype == torch.float32 else 4e-3) if self.state.is_exact else tolerance
            assert relative_error(self.state.load(slots), true_pool[slots]) < kept
        others = torch.ones(len(self.start), dtype=torch.bool, device=slots_device(case))
        others[case.slots_N] = False
        held = self.state.load(others.nonzero().flatten())
        assert torch.equal(held.nan_to_num(nan=7.0), self.start[others].nan_to_num(nan=7.0))


def slots_device(case: Case) -> torch.device:
    return case.slots_N.device


def decoder(backend: str):  # type: ignore[no-untyped-def]
    if backend == "reference":
        return reference.gla_decode_buffered
    from server.kernels import buffered

    return buffered.gla_decode


@ON_EACH_BACKEND
@pytest.mark.parametrize("dtype", HELD_DTYPES)
@pytest.mark.parametrize("gates", GATES)
def test_matches_the_recurrence(backend: str, gates: str, dtype: str) -> None:
    """Over more than two folds, in whatever phase each ring is."""
    case = make_case([70] * 4, gates=gates, device=device_of(backend))
    rows = Rows(case, dtype, [0, 5, 0, 37])
    # Channels that never forget keep each rounding of the state; 70 tokens see up to five of them.
    slack = 2 if gates in ("none", "slow", "mixed") and dtype in ("bfloat16", "int8") else 1
    rows.check([rows.step(backend, i) for i in range(70)], slack * OUTPUT_TOLERANCE[dtype])


@ON_EACH_BACKEND
@pytest.mark.parametrize("dtype", HELD_DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_k", "head_v"),
    [(1, 1, 64, 128), (4, 2, 16, 32), (3, 1, 48, 96), (2, 2, 20, 24), (8, 2, 128, 40)],
)
def test_head_sizes(backend: str, heads: int, kv_heads: int, head_k: int, head_v: int, dtype: str) -> None:
    case = make_case([9] * 2, heads=heads, kv_heads=kv_heads, head_k=head_k, head_v=head_v, device=device_of(backend))
    rows = Rows(case, dtype, [11, 28])
    rows.check([rows.step(backend, i) for i in range(9)], 2 * OUTPUT_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["split", "int8"])
def test_folds_go_through_strips_of_several_tiles(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one strip, the last of them not full."""
    from server.kernels import buffered

    plan = buffered.plan_buffered

    def narrow(*arguments: object) -> buffered.BufferedPlan:
        return replace(plan(*arguments), fold_part=32)  # type: ignore[arg-type]

    monkeypatch.setattr(buffered, "plan_buffered", narrow)
    case = make_case([35] * 2, head_k=80, head_v=24, device=TRITON_DEVICE)
    rows = Rows(case, dtype, [0, 9])
    rows.check([rows.step("triton", i) for i in range(35)], OUTPUT_TOLERANCE[dtype])


@ON_EACH_BACKEND
@pytest.mark.parametrize("head_v", [8, 24, 32])
def test_folding_nothing_changes_no_scale(backend: str, head_v: int) -> None:
    """Neither decay nor a new token: whatever is beyond the last column must not find its way into a scale."""
    case = make_case([32 * 6] * 2, head_k=16, head_v=head_v, gates="none", device=device_of(backend))
    case.k_TGK.zero_()
    case.from_zero_N.fill_(False)
    case.state_SGKV.nan_to_num_()
    rows = Rows(case, "int8", [0, 7])
    for i in range(32 * 6):
        rows.step(backend, i)
    assert relative_error(rows.state.load(case.slots_N), rows.start[case.slots_N].double()) < 1e-5


@ON_EACH_BACKEND
@pytest.mark.parametrize(
    ("inputs", "dtype"), [(torch.bfloat16, "split"), (torch.bfloat16, "float32"), (torch.float16, "float32")], ids=str
)
def test_16_bit_inputs(backend: str, inputs: torch.dtype, dtype: str) -> None:
    case = make_case([40] * 3, dtype=inputs, device=device_of(backend))
    rows = Rows(case, dtype, [0, 3, 9])
    outputs = [rows.step(backend, i) for i in range(40)]
    assert outputs[0].dtype == inputs
    rows.check(outputs, 4e-3)


@pytest.mark.parametrize(("in_place", "dtype"), [(True, "float32"), (True, "split"), (False, "float32")])
@pytest.mark.parametrize(("kv_heads", "head_k", "clamp_min"), [(2, 16, None), (1, 20, -0.05)])
def test_the_kernels_compute_the_gate(
    kv_heads: int, head_k: int, clamp_min: float | None, in_place: bool, dtype: str
) -> None:
    """From a part of one projection's columns, as in the model."""
    case = make_case([20] * 3, heads=2, kv_heads=kv_heads, head_k=head_k, device=TRITON_DEVICE)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(TRITON_DEVICE)

    weight, bias = random(kv_heads * head_k, 16), random(kv_heads * head_k)
    gate = LowRankGate(random(60, 40)[:, 8:24], weight, bias, normalizer=16, clamp_min=clamp_min)
    logits = gate.low_rank_TR.double() @ weight.double().T + bias.double()
    decays = (F.logsigmoid(logits) / 16).clamp_min(-torch.inf if clamp_min is None else clamp_min)
    case.g_TGK.copy_(decays.view(-1, kv_heads, head_k))
    rows = Rows(case, dtype, [0, 5, 11])
    rows.check([rows.step("triton", i, in_place=in_place, gate=gate) for i in range(20)], 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "split"])
def test_folding_every_token_takes_over_a_ring_that_waits(dtype: str) -> None:
    """As when a batch shrinks: the one kernel empties the ring, and the three find it empty."""
    case = make_case([40] * 3, device=TRITON_DEVICE)
    rows = Rows(case, dtype, [1, 6, 30])
    outputs = [rows.step("triton", i, in_place=i in (5, 6, 30)) for i in range(40)]
    rows.check(outputs, OUTPUT_TOLERANCE[dtype])


@ON_EACH_BACKEND
def test_rows_may_share_the_null_slot(backend: str) -> None:
    case = make_case([20] * 4, device=device_of(backend))
    case.slots_N[1::2] = 0
    rows = Rows(case, "float32", [0, 0, 7, 7])
    outputs = torch.stack([rows.step(backend, i) for i in range(20)], 1)
    alone = make_case([20] * 4, device=device_of(backend))
    true_o, _ = gla_recurrence(alone)
    live = true_o.view(4, 20, 2, 32)[0::2]
    assert relative_error(outputs[0::2], live) < 1e-5


@ON_EACH_BACKEND
def test_no_rows(backend: str) -> None:
    rows = Rows(make_case([], device=device_of(backend)), "float32", [])
    none = torch.zeros(1, dtype=torch.int64, device=device_of(backend))
    case = rows.case
    inputs = (case.q_THK, case.k_TGK, case.v_TGV, case.g_TGK)
    o = decoder(backend)(
        *inputs, rows.state, case.slots_N, case.from_zero_N, RingRows(none[:0], none), scale=case.scale
    )
    assert o.shape == (0, 2, 32)


def test_a_row_is_the_same_in_any_batch() -> None:
    """Bit for bit, from the Triton kernels: their tiles depend on the head's size alone."""
    case = make_case([20] * 5, device=TRITON_DEVICE)
    together = Rows(case, "bfloat16", [3] * 5)
    outputs = [together.step("triton", i)[2] for i in range(20)]
    alone = Rows(case.span(2), "bfloat16", [3])
    assert all(torch.equal(alone.step("triton", i)[0], outputs[i]) for i in range(20))
    slot = case.slots_N[2]
    assert torch.equal(alone.state.values_SGKV[slot], together.state.values_SGKV[slot])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HELD_DTYPES)
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_k", "head_v"),
    [(4, 4, 256, 512), (4, 4, 128, 256), (32, 8, 128, 128), (8, 1, 64, 128), (2, 2, 192, 320)],
    ids=["1.3B", "340M", "7B", "grouped_8", "odd"],
)
def test_published_shapes_on_gpu(
    heads: int, kv_heads: int, head_k: int, head_v: int, inputs: torch.dtype, dtype: str
) -> None:
    case = make_case(
        [40] * 37, heads=heads, kv_heads=kv_heads, head_k=head_k, head_v=head_v, dtype=inputs, device="cuda"
    )
    rows = Rows(case, dtype, list(range(37)))
    tolerance = max(OUTPUT_TOLERANCE[dtype], 1e-5 if inputs == torch.float32 else 4e-3)
    rows.check([rows.step("triton", i) for i in range(40)], tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 20, 40])
@pytest.mark.parametrize("dtype", ["float32", "split"])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16], ids=str)
def test_batches_that_read_ahead_and_others_on_gpu(inputs: torch.dtype, dtype: str, rows: int) -> None:
    case = make_case([35] * rows, heads=4, kv_heads=4, head_k=256, head_v=512, dtype=inputs, device="cuda")
    decoding = Rows(case, dtype, list(range(rows)))
    tolerance = max(OUTPUT_TOLERANCE[dtype], 1e-5 if inputs == torch.float32 else 4e-3)
    decoding.check([decoding.step("triton", i) for i in range(35)], tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "gate", "tolerance"),
    [("float32", None, 4e-3), ("split", None, 4e-3), ("bfloat16", -0.05, 1e-2), ("int8", -0.05, 2e-2)],
)
def test_one_token_repeated_on_gpu(dtype: str, gate: float | None, tolerance: float) -> None:
    """10,000 times. A float32 state grows far beyond float16, and stays right, while it hardly forgets. Smaller ones
    forget within 20 tokens, like most channels of a trained model: a sum to which each fold adds less than half of its
    last bit stops growing, which no ring of this size can help."""
    case = make_case([1], heads=2, kv_heads=1, head_k=64, head_v=64, gates="slow", dtype=torch.bfloat16, device="cuda")
    if gate is not None:
        case.g_TGK.fill_(gate)
    steps = 10_000
    repeated = Case(
        *(getattr(case, n).expand(steps, -1, -1) for n in ("q_THK", "k_TGK", "v_TGV", "g_TGK")),
        torch.zeros_like(case.state_SGKV),
        case.slots_N,
        case.from_zero_N,
        torch.tensor([0, steps], device="cuda", dtype=torch.int32),
    )
    rows = Rows(repeated, dtype, [0])
    outputs = [rows.step("triton", i) for i in range(steps)]
    rows.check(outputs, tolerance)
