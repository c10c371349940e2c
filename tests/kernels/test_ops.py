"""The door to the kernels: arguments are checked, the backend is chosen, and nothing is imported too early."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from server import kernels
from tests.kernels.cases import TRITON_DEVICE, Case, check_against_recurrence, make_case


def prefill_arguments(case: Case) -> dict[str, Any]:
    names = ("q_THK", "k_TGK", "v_TGV", "g_TGK", "state_SGKV", "slots_N", "from_zero_N", "cu_seqlens")
    return {name: getattr(case, name) for name in names} | {"scale": case.scale, "max_length": max(case.lengths)}


def decode_arguments(case: Case) -> dict[str, Any]:
    arguments = prefill_arguments(case)
    del arguments["cu_seqlens"], arguments["max_length"]
    return {name.replace("_T", "_N"): value for name, value in arguments.items()}


def test_prefill_and_decode_compute() -> None:
    for device in {"cpu", TRITON_DEVICE}:
        case = make_case([3, 20], heads=4, kv_heads=2, device=device)
        arguments = prefill_arguments(case) | {"state_SGKV": case.state_SGKV.clone()}
        check_against_recurrence(case, kernels.gla_prefill(**arguments), arguments["state_SGKV"])
        case = make_case([1, 1], heads=4, kv_heads=2, device=device)
        arguments = decode_arguments(case) | {"state_SGKV": case.state_SGKV.clone()}
        check_against_recurrence(case, kernels.gla_decode(**arguments), arguments["state_SGKV"])


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
        ("g", lambda x: x.half(), "g: must be torch.float32, is torch.float16"),
        ("g", lambda x: x.to("meta"), "g: must be on cpu as q is, is on meta"),
        ("state", lambda x: x[0], "state: must have 4 dimensions"),
        ("state", lambda x: x.double(), "state: must be torch.float32, is torch.float64"),
        ("state", lambda x: x.repeat(1, 1, 1, 2)[..., :32], "state: its last three dimensions must be contiguous"),
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
        "kernels.gla_decode(x, x, x, -x, torch.ones(1, 1, 16, 16), torch.zeros(1, dtype=torch.int64),"
        "torch.zeros(1, dtype=torch.bool), scale=1.0); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_checks_read_no_contents() -> None:
    """On a GPU they would have to wait for it; tensors on the meta device have none."""
    case = make_case([1, 1])
    for op, arguments in ((kernels.gla_prefill, prefill_arguments(case)), (kernels.gla_decode, decode_arguments(case))):
        on_meta = {key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
        on_meta["from_zero_N"] = arguments["from_zero_N"]  # checked last
        with pytest.raises(ValueError, match=r"^from_zero: must be on meta"):
            op(**on_meta)
