"""The door to the kernels: arguments are checked, the backend is chosen, and nothing is imported too early."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from server import kernels
from tests.kernels.cases import (
    TRITON_DEVICE,
    Case,
    check_against_recurrence,
    gla_recurrence,
    make_case,
    relative_error,
)


def prefill_arguments(case: Case) -> dict[str, Any]:
    names = ("q_THK", "k_TGK", "v_TGV", "slots_N", "from_zero_N", "cu_seqlens")
    others = {
        "gate": case.g_TGK,
        "state": kernels.LayerState(case.state_SGKV.clone()),
        "scale": case.scale,
        "max_length": max(case.lengths),
    }
    return {name: getattr(case, name) for name in names} | others


def decode_arguments(case: Case) -> dict[str, Any]:
    arguments = prefill_arguments(case)
    del arguments["cu_seqlens"], arguments["max_length"]
    return {name.replace("_T", "_N"): value for name, value in arguments.items()}


def low_rank_gate(tokens: int, channels: int, rank: int = 16, columns: int | None = None) -> kernels.LowRankGate:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))

    low_rank = random(tokens, rank if columns is None else columns)
    return kernels.LowRankGate(low_rank, random(channels, rank), random(channels), normalizer=16, clamp_min=-0.04)


def with_values(state: kernels.LayerState, change: Callable[[torch.Tensor], torch.Tensor]) -> kernels.LayerState:
    return replace(state, values_SGKV=change(state.values_SGKV))


def test_prefill_and_decode_compute() -> None:
    for device in {"cpu", TRITON_DEVICE}:
        case = make_case([3, 20], heads=4, kv_heads=2, device=device)
        arguments = prefill_arguments(case)
        check_against_recurrence(case, kernels.gla_prefill(**arguments), arguments["state"].values_SGKV)
        case = make_case([1, 1], heads=4, kv_heads=2, device=device)
        arguments = decode_arguments(case)
        check_against_recurrence(case, kernels.gla_decode(**arguments), arguments["state"].values_SGKV)


def test_the_gate_may_be_what_decays_are_computed_from() -> None:
    for device in {"cpu", TRITON_DEVICE}:
        for lengths, op in (([3, 20], kernels.gla_prefill), ([1, 1], kernels.gla_decode)):
            case = make_case(lengths, heads=4, kv_heads=2, device=device)
            gate = low_rank_gate(sum(lengths), 2 * 16)
            tensors = (getattr(gate, name).to(device) for name in ("low_rank_TR", "weight_DR", "bias_D"))
            gate = kernels.LowRankGate(*tensors, gate.normalizer, gate.clamp_min)
            decays = kernels.log_decay(
                gate.low_rank_TR, gate.weight_DR, gate.bias_D, normalizer=gate.normalizer, clamp_min=gate.clamp_min
            )
            case.g_TGK.copy_(decays.view(case.k_TGK.shape))
            arguments = prefill_arguments(case) if op == kernels.gla_prefill else decode_arguments(case)
            check_against_recurrence(case, op(**arguments | {"gate": gate}), arguments["state"].values_SGKV)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[:, 0], "q: must have 3 dimensions"),
        ("q", lambda x: x[:, :3], "q: its 3 heads are not a multiple of the state's 2 kv heads"),
        ("q", lambda x: x.double(), "q: must be torch.float32 or torch.bfloat16 or torch.float16, is torch.float64"),
        ("k", lambda x: x[:, :, :8], "k: must have shape"),
        ("k", lambda x: x.bfloat16(), "k: must be torch.float32, is torch.bfloat16"),
        ("v", lambda x: x[:1], "v: must have shape"),
        ("v", lambda x: x.mT.contiguous().mT, "v: its last dimension must be contiguous, its stride is 2"),
        ("gate", lambda x: x.half(), "gate: must be torch.float32, is torch.float16"),
        ("gate", lambda x: x.to("meta"), "gate: must be on cpu as q is, is on meta"),
        ("gate", lambda x: low_rank_gate(x.shape[0], 2 * 16, rank=x.shape[0], columns=8), "low_rank: must have shape"),
        ("gate", lambda x: low_rank_gate(x.shape[0], 16), "weight: must have shape"),
        ("state", lambda x: with_values(x, lambda v: v[0]), "state: must have 4 dimensions"),
        ("state", lambda x: with_values(x, torch.Tensor.double), "state: must be .* is torch.float64"),
        ("state", lambda x: with_values(x, torch.Tensor.byte), "state: uint8 values, and no others, have scales"),
        ("state", lambda x: with_values(x, lambda v: v.repeat(1, 1, 1, 2)[..., :32]), "state: its last three"),
        ("slots", lambda x: x.int(), "slots: must be torch.int64, is torch.int32"),
        ("slots", lambda x: x[:, None], "slots: must have 1 dimension"),
        ("from_zero", lambda x: x.int(), "from_zero: must be torch.bool, is torch.int32"),
        ("from_zero", lambda x: x[:1], "from_zero: must have shape"),
        ("cu_seqlens", lambda x: x[1:], "cu_seqlens: must have shape"),
        ("cu_seqlens", lambda x: x.long(), "cu_seqlens: must be torch.int32, is torch.int64"),
        ("max_length", lambda x: -x, "max_length: must not be negative, is -1"),
    ],
)
def test_wrong_arguments_are_named(name: str, change: Any, message: str) -> None:
    case = make_case([1, 1], heads=4, kv_heads=2)
    for op, arguments in (
        (kernels.gla_prefill, prefill_arguments(case)),
        (kernels.gla_decode, decode_arguments(case)),
    ):
        for key in [key for key in arguments if key == name or key.rpartition("_")[0] == name]:
            with pytest.raises(ValueError, match=f"^{message}"):
                op(**arguments | {key: change(arguments[key])})


def test_decode_wants_a_slot_for_every_row() -> None:
    arguments = decode_arguments(make_case([1, 1]))
    arguments |= {"slots_N": arguments["slots_N"][:1], "from_zero_N": arguments["from_zero_N"][:1]}
    with pytest.raises(ValueError, match=r"^slots: must have one slot per row of q, 2, has 1"):
        kernels.gla_decode(**arguments)


def test_cpu_tensors_never_import_triton() -> None:
    program = (
        "import sys, torch; from server import kernels; x = torch.ones(1, 1, 16);"
        "state = kernels.LayerState(torch.ones(1, 1, 16, 16)); slots = torch.zeros(1, dtype=torch.int64);"
        "kernels.gla_decode(x, x, x, -x, state, slots, slots.bool(), scale=1.0); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_checks_read_no_contents() -> None:
    """On a GPU they would have to wait for it; tensors on the meta device have none."""
    case = make_case([1, 1])
    for op, arguments in ((kernels.gla_prefill, prefill_arguments(case)), (kernels.gla_decode, decode_arguments(case))):
        on_meta = {key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
        on_meta["state"] = with_values(arguments["state"], lambda values: values.to("meta"))
        on_meta["from_zero_N"] = arguments["from_zero_N"]  # checked last
        with pytest.raises(ValueError, match=r"^from_zero: must be on meta"):
            op(**on_meta)


@pytest.mark.parametrize(
    ("rows", "dtype", "message"),
    [
        (None, torch.float32, "rows: a state with a ring, and no other, needs them"),
        (kernels.RingRows(torch.zeros(2, dtype=torch.int32), None), torch.float32, "pending: must be torch.int64"),
        (kernels.RingRows(torch.zeros(2).long(), torch.zeros(2).long()), torch.float32, "num_folding: must have shape"),
        (
            kernels.RingRows(torch.zeros(2).long(), None),
            torch.bfloat16,
            "num_folding: torch.bfloat16 states must not fold",
        ),
        (kernels.RingRows(torch.zeros(2).long(), None), torch.float32, "num_folding: needed on the CPU"),
    ],
)
def test_wrong_rings_are_named(rows: kernels.RingRows | None, dtype: torch.dtype, message: str) -> None:
    case = make_case([1, 1])
    slots = case.state_SGKV.shape[0]
    ring = kernels.Ring(
        torch.zeros((slots, 2, 16, 16)), torch.zeros((slots, 2, 16, 32)), torch.zeros((slots, 2, 16, 16))
    )
    arguments = decode_arguments(case) | {"state": kernels.LayerState(case.state_SGKV.to(dtype), None, ring)}
    with pytest.raises(ValueError, match=f"^{message}"):
        kernels.gla_decode(**arguments, rows=rows)


def test_rows_without_a_ring_are_refused() -> None:
    rows = kernels.RingRows(torch.zeros(2).long(), None)
    with pytest.raises(ValueError, match=r"^rows: a state with a ring, and no other"):
        kernels.gla_decode(**decode_arguments(make_case([1, 1])), rows=rows)


@pytest.mark.parametrize(("name", "tolerance"), [("bfloat16", 4e-3), ("int8", 2e-2)])
def test_prefill_rounds_small_states_once(name: str, tolerance: float) -> None:
    for device in {"cpu", TRITON_DEVICE}:
        case = make_case([3, 20, 0, 70], heads=4, kv_heads=2, device=device)
        slots, kv_heads, head_k, _ = case.state_SGKV.shape
        state = kernels.LayerState(
            torch.zeros_like(case.state_SGKV, dtype=kernels.STATE_DTYPES[name]),
            torch.full((slots, kv_heads, head_k), torch.nan, device=device) if name == "int8" else None,
        )
        everything = torch.arange(slots, device=device)
        state.store(everything, case.state_SGKV.nan_to_num())
        case = replace(case, state_SGKV=state.load(everything))
        o = kernels.gla_prefill(**prefill_arguments(case) | {"state": state})
        true_o, true_pool = gla_recurrence(case)
        assert relative_error(o, true_o) < 1e-5  # computed from float32 copies
        held = state.load(case.slots_N)
        assert 0 < relative_error(held, true_pool[case.slots_N]) < tolerance
