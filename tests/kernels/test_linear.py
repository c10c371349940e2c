"""Products of a few rows with norm, activation and addition, and greedy picking, against float64 on both backends."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server import kernels
from server.kernels import linear, pick, reference, skinny
from tests.kernels.cases import TOLERANCE, TRITON_DEVICE, poisoned_memory, relative_error
from tests.kernels.test_elementwise import BACKENDS, DTYPES, random

if TRITON_DEVICE == "cpu":
    # Triton's interpreter cuts float32 to bfloat16 instead of rounding it: twice the error.
    TOLERANCE = TOLERANCE | {torch.bfloat16: 2 * TOLERANCE[torch.bfloat16]}

# One row is a kernel of its own; inputs and outputs are no multiples of its tiles, and rows are a part of wider ones.
SHAPES = pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 2048, 40), (1, 100, 37), (1, 5632, 6), (1, 17, 9), (3, 100, 37), (0, 16, 8)]
)


def run(backend: str, op: str, *args: Any, **options: Any) -> Any:
    with poisoned_memory():
        return getattr(linear if backend == "triton" else reference, op)(*args, **options)


def inputs_of(rows: int, inputs: int, outputs: int, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, the norm's weight, and a projection whose results are near 1."""
    x = random(rows, inputs + 5, dtype=dtype, backend=backend)[:, :inputs]
    norm = random(inputs, dtype=dtype, backend=backend, seed=1)
    weight = (random(outputs, inputs, backend=backend, seed=2) * inputs**-0.5).to(dtype)
    return x, norm, weight


def normed(x: Tensor, norm: Tensor) -> Tensor:
    return F.rms_norm(x.double(), norm.shape, norm.double(), 1e-6)


@BACKENDS
@DTYPES
@SHAPES
@pytest.mark.parametrize("to_float32", [True, False])
def test_norm_linear(backend: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int, to_float32: bool) -> None:
    x, norm, weight = inputs_of(rows, inputs, outputs, dtype, backend)
    if rows != 1 and TRITON_DEVICE == "cpu" and backend == "triton":
        return  # the matrix library of CUDA
    out_dtype = torch.float32 if to_float32 else dtype
    y = x.new_full((rows, outputs), torch.nan, dtype=out_dtype)
    run(backend, "norm_linear", x, norm, weight, y, eps=1e-6)
    truth = normed(x, norm) @ weight.double().t()
    if rows:
        assert relative_error(y, truth) < TOLERANCE[dtype]


@BACKENDS
@DTYPES
@SHAPES
def test_norm_swiglu(backend: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x, norm, weight = inputs_of(rows, inputs, 2 * outputs, dtype, backend)
    y = run(backend, "norm_swiglu", x, norm, weight, eps=1e-6)
    gate, up = (normed(x, norm) @ weight.double().t()).chunk(2, dim=1)
    truth = F.silu(gate) * up
    assert (y.shape, y.dtype, y.is_contiguous()) == (truth.shape, dtype, True)
    if rows:
        # Three products in 16 bits one after the other, where one row keeps all sums in float32.
        assert relative_error(y, truth) < TOLERANCE[dtype] * (1 if rows == 1 and backend == "triton" else 3)


@BACKENDS
@DTYPES
@SHAPES
def test_linear_add(backend: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    o, _, weight = inputs_of(rows, inputs, outputs, dtype, backend)
    x = random(rows, outputs, dtype=dtype, backend=backend, seed=3)
    truth = x.double() + o.double() @ weight.double().t()
    run(backend, "linear_add_", x, o, weight)
    if rows:
        assert relative_error(x, truth) < TOLERANCE[dtype]


# The interpreter multiplies the raw bits of bfloat16.
SKINNY_DTYPES = [torch.float16, torch.bfloat16] if TRITON_DEVICE == "cuda" else [torch.float16]


@pytest.mark.parametrize("dtype", SKINNY_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(2, 64, 8), (5, 104, 130), (8, 512, 64), (17, 1024, 70), (70, 256, 70), (130, 256, 130)],
)
def test_skinny_products(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    """Sums in one part and in several, tiles cut off on every side, padded rows."""
    wide, _, weight = inputs_of(rows, inputs + 8, 2 * outputs, dtype, "triton")
    x, weight = wide[:, :inputs].contiguous(), weight[:, :inputs].contiguous()
    product = x.double() @ weight.double().t()
    for out_dtype in (dtype, torch.float32):
        out = x.new_full((rows, 2 * outputs), torch.nan, dtype=out_dtype)
        skinny.linear(x, weight, out)
        assert relative_error(out, product) < TOLERANCE[dtype]
    with poisoned_memory():
        out = skinny.swiglu(x, weight)
    gate, up = product.chunk(2, dim=1)
    assert (out.shape, out.dtype) == ((rows, outputs), dtype)
    assert relative_error(out, F.silu(gate) * up) < TOLERANCE[dtype]
    with poisoned_memory():
        parts = skinny.linear_parts(x, weight)
    assert (parts.shape[1:], parts.dtype) == ((rows, 2 * outputs), torch.float32)
    assert relative_error(parts.sum(0), product) < TOLERANCE[dtype]


def picking(rows: int, vocab_size: int, backend: str) -> dict[str, Tensor]:
    slots = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(4))[:rows]
    tables = {
        "logits_RV": random(rows, vocab_size, backend="reference"),
        "slots_R": slots,
        "flags_SV": torch.randint(0, 4, (rows + 3, vocab_size), generator=torch.Generator().manual_seed(5)).byte(),
        "last_token_S": torch.full((rows + 3,), -7),
        "done_S": torch.zeros(rows + 3, dtype=torch.bool),
    }
    return {name: table.to(TRITON_DEVICE if backend == "triton" else "cpu") for name, table in tables.items()}


def run_pick(backend: str, tables: dict[str, Tensor]) -> Tensor:
    with poisoned_memory():
        tokens: Tensor = (pick if backend == "triton" else reference).pick_greedy(**tables, stop_flag=2)
    return tokens


@BACKENDS
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 512), (5, 100), (3, 20000), (0, 8)])
def test_pick_greedy(backend: str, rows: int, vocab_size: int) -> None:
    tables = picking(rows, vocab_size, backend)
    others = [slot for slot in range(rows + 3) if slot not in tables["slots_R"].tolist()]
    tokens = run_pick(backend, tables)
    assert (tokens.shape, tokens.dtype) == ((rows,), torch.int64)
    assert torch.equal(tokens, tables["logits_RV"].argmax(-1))
    slots = tables["slots_R"]
    assert torch.equal(tables["last_token_S"][slots], tokens)
    assert torch.equal(tables["done_S"][slots], (tables["flags_SV"][slots, tokens] & 2) != 0)
    assert (tables["last_token_S"][others] == -7).all()
    assert not tables["done_S"][others].any()


@BACKENDS
def test_pick_greedy_refuses_logits_that_are_not_finite_and_takes_the_first_of_equals(backend: str) -> None:
    tables = picking(7, 9000, backend)
    logits = tables["logits_RV"].clamp_(max=4.0)
    logits[0, 8999] = logits[1, 3] = torch.nan
    logits[2, 8500] = torch.inf
    logits[3] = -torch.inf
    logits[4, 5] = -torch.inf  # not the largest
    logits[5, [8998, 8000, 40]] = 5.0
    logits[6] = torch.nan
    tokens = run_pick(backend, tables)
    assert tokens[:4].tolist() == [-1] * 4
    assert tokens[4] == logits[4].argmax()
    assert tokens[5] == 40
    assert tokens[6] == -1
    noted = tables["last_token_S"][tables["slots_R"]]
    assert bool(((noted >= 0) & (noted < 9000)).all()), "the next step looks the token up"


def test_the_door_computes() -> None:
    for backend in ("reference", "triton") if TRITON_DEVICE == "cuda" else ("reference",):
        for dtype in (torch.float32, torch.bfloat16):
            x, norm, weight = inputs_of(1, 64, 32, dtype, backend)
            options: dict[str, Any] = {"eps": 1e-6}
            ours = kernels.norm_linear(x, norm, weight, **options)
            expected = torch.full_like(ours, torch.nan)
            run(backend, "norm_linear", x, norm, weight, expected, **options)
            assert torch.equal(ours, expected)
            logits = x.new_full((1, 32), torch.nan, dtype=torch.float32)
            assert kernels.norm_linear(x, norm, weight, out_RN=logits, **options) is logits
            assert relative_error(logits, expected) < TOLERANCE[dtype]
            ours = kernels.norm_swiglu(x, norm, weight, **options)
            assert torch.equal(ours, run(backend, "norm_swiglu", x, norm, weight, **options))
            sums = [x.new_ones(1, 32) for _ in range(2)]
            assert kernels.linear_add_(sums[0], x, weight) is None
            run(backend, "linear_add_", sums[1], x, weight)
            assert torch.equal(sums[0], sums[1])
        assert torch.equal(
            kernels.pick_greedy(**picking(2, 64, backend), stop_flag=2).cpu(),
            picking(2, 64, "reference")["logits_RV"].argmax(-1),
        )


def test_weights_stored_by_columns_are_multiplied_on_the_cpu() -> None:
    x, norm, weight = inputs_of(2, 16, 24, torch.float32, "reference")
    by_columns = weight.t().contiguous().t()
    ours, expected = (kernels.norm_linear(x, norm, w, eps=1e-6) for w in (by_columns, weight))
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kernels.norm_linear(x[0], x[0], x, eps=1e-6), "x: must have 2 dimensions"),
        (lambda x: kernels.norm_linear(x, x[0, :3], x, eps=1e-6), "norm: must have shape"),
        (lambda x: kernels.norm_linear(x, x[0], x[:, :3], eps=1e-6), "weight: must have shape"),
        (lambda x: kernels.norm_linear(x, x[0], x.half(), eps=1e-6), "weight: must be torch.float32"),
        (lambda x: kernels.norm_linear(x, x[0], x, eps=1e-6, out_RN=x[:, :4].half()), "out: must be torch.float32"),
        (lambda x: kernels.norm_swiglu(x, x[0], x[:3], eps=1e-6), "weight: must have an even number of rows, has 3"),
        (lambda x: kernels.linear_add_(x[:, :3], x, x), "x: must have shape"),
        (lambda x: kernels.linear_add_(x.repeat(1, 2)[:, :16], x, torch.ones(16, 16)), "x: must be contiguous"),
        (lambda x: kernels.linear_add_(x[:, :4], x[0], x), "o: must have 2 dimensions"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call(torch.ones(4, 16))


@pytest.mark.parametrize(("inputs", "element_size"), [(16, 4), (64, 2), (2048, 2), (2048, 4), (5632, 2), (16384, 4)])
@pytest.mark.parametrize("gated", [True, False])
def test_a_tile_of_weights_fits_into_registers(inputs: int, element_size: int, gated: bool) -> None:
    plan = linear.plan_matvec(inputs, element_size, gated=gated)
    assert 1 <= plan.num_warps <= 8
    per_thread = plan.block_n * inputs * element_size * (2 if gated else 1) / (plan.num_warps * 32)
    assert per_thread <= 128 * 4
