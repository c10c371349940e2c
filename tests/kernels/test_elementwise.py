"""The small operations around the recurrence against float64, on both backends."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server import kernels
from server.kernels import gate, mlp, norm, reference
from tests.kernels.cases import TOLERANCE, TRITON_DEVICE, poisoned_memory, relative_error

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


def random(*shape: int, dtype: torch.dtype = torch.float32, backend: str = "triton", seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(TRITON_DEVICE if backend == "triton" else "cpu")


def run(backend: str, op: str, *args: Any, **options: Any) -> Tensor:
    module = (
        {"log_decay": gate, "norm_gate": norm, "add_rms_norm": norm, "swiglu": mlp}[op]
        if backend == "triton"
        else reference
    )
    with poisoned_memory():
        result: Tensor = getattr(module, op)(*args, **options)
    return result


@BACKENDS
@DTYPES
@pytest.mark.parametrize("clamp_min", [None, -0.05])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 128), (3, 20), (9, 200), (0, 16)])
def test_log_decay(backend: str, dtype: torch.dtype, clamp_min: float | None, tokens: int, channels: int) -> None:
    columns = random(tokens, 40, dtype=dtype, backend=backend)
    weight, bias = (random(channels, *rank, backend=backend, seed=len(rank) + 1) for rank in ((16,), ()))
    x = columns[:, 8:24]  # as in the model: a part of one projection's columns
    g = run(backend, "log_decay", x, weight, bias, normalizer=16, clamp_min=clamp_min)
    truth = F.logsigmoid(x.double() @ weight.double().T + bias.double()) / 16
    truth = truth if clamp_min is None else truth.clamp_min(clamp_min)
    assert (g.shape, g.dtype, g.is_contiguous()) == (truth.shape, torch.float32, True)
    if tokens:
        assert relative_error(g, truth) < 1e-6
        assert float(g.max()) <= 0


@BACKENDS
def test_log_decay_at_the_ends_of_its_range(backend: str) -> None:
    """Each value to a relative 1e-5: a slow channel's decay adds up over thousands of tokens."""
    logits = torch.tensor([-300.0, -90.0, -20.0, -1.0, 0.0, 1.0, 3.4, 3.6, 5.0, 6.9, 7.0, 20.0, 80.0, torch.nan])
    weight = torch.zeros(14, 16)
    x, weight, bias = (t.to(random(1, backend=backend).device) for t in (torch.zeros(1, 16), weight, logits))
    g = run(backend, "log_decay", x, weight, bias, normalizer=16, clamp_min=None)[0].cpu()
    truth = F.logsigmoid(logits.double()) / 16
    assert bool(((g[:-1] - truth[:-1]).abs() <= 1e-5 * truth[:-1].abs() + 1e-37).all())
    assert bool(g[-1].isnan())


@BACKENDS
@DTYPES
@pytest.mark.parametrize("with_gate", [True, False])
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "head_v"), [(1, 4, 512), (5, 2, 24), (3, 1, 128), (0, 1, 16)])
def test_norm_gate(
    backend: str, dtype: torch.dtype, with_gate: bool, with_weight: bool, tokens: int, heads: int, head_v: int
) -> None:
    o = random(tokens, heads, head_v, dtype=dtype, backend=backend)
    weight = random(head_v, dtype=dtype, backend=backend, seed=1) if with_weight else None
    columns = random(tokens, heads * head_v + 7, dtype=dtype, backend=backend, seed=2)
    output_gate = columns[:, 7:] if with_gate else None
    out = run(backend, "norm_gate", o, weight, output_gate, eps=1e-6)
    truth = F.rms_norm(o.double(), (head_v,), None if weight is None else weight.double(), 1e-6).flatten(1)
    if output_gate is not None:
        truth = truth * F.silu(output_gate.double())
    assert (out.shape, out.dtype, out.is_contiguous()) == (truth.shape, dtype, True)
    if tokens:
        assert relative_error(out, truth) < TOLERANCE[dtype]


@BACKENDS
@DTYPES
@pytest.mark.parametrize("parts", [0, 1, 4])
@pytest.mark.parametrize("rows", [None, [3, 0]])
@pytest.mark.parametrize(("tokens", "channels"), [(4, 2048), (5, 100), (0, 16)])
def test_rms_norm(
    backend: str, dtype: torch.dtype, tokens: int, channels: int, parts: int, rows: list[int] | None
) -> None:
    """Of x plus what is still to be added to it, which then is in x."""
    if rows is not None and not tokens:
        return
    x = random(tokens, channels + 5, dtype=dtype, backend=backend)[:, :channels]
    weight = random(channels, dtype=dtype, backend=backend, seed=1)
    addends = random(parts, tokens, channels, backend=backend, seed=2) if parts else None
    wanted = None if rows is None else torch.tensor(rows, device=x.device)
    total = x.double() if addends is None else x.double() + addends.double().sum(0)
    truth = F.rms_norm(total, (channels,), weight.double(), 1e-6)
    truth = truth if wanted is None else truth[wanted]
    if backend == "triton":
        out = run(backend, "add_rms_norm", x, addends, weight, eps=1e-6, rows_R=wanted)
    else:
        identity = torch.eye(channels, dtype=dtype)
        out = torch.full_like(truth, torch.nan, dtype=dtype)
        reference.norm_linear(x, weight, identity, out, eps=1e-6, addends_STD=addends, rows_R=wanted)
    assert (out.shape, out.dtype, out.is_contiguous()) == (truth.shape, dtype, True)
    if tokens:
        # The sum is rounded, as x is.
        assert relative_error(out, truth) < TOLERANCE[dtype] * (2 if parts else 1)
        if rows is None:
            assert relative_error(x, total) < TOLERANCE[dtype]


@BACKENDS
@DTYPES
@pytest.mark.parametrize(("tokens", "inner"), [(1, 5632), (3, 100), (2, 512), (0, 8)])
def test_swiglu(backend: str, dtype: torch.dtype, tokens: int, inner: int) -> None:
    x = random(tokens, 2 * inner, dtype=dtype, backend=backend)
    out = run(backend, "swiglu", x)
    truth = F.silu(x[:, :inner].double()) * x[:, inner:].double()
    assert (out.shape, out.dtype, out.is_contiguous()) == (truth.shape, dtype, True)
    if tokens:
        assert relative_error(out, truth) < TOLERANCE[dtype]


def test_many_tokens() -> None:
    """So many that programs take several of them, the last one fewer than the others."""
    tokens, dtype = 1027, torch.bfloat16
    o, columns = random(tokens, 2, 24, dtype=dtype), random(tokens, 48 + 3, dtype=dtype, seed=1)
    out = run("triton", "norm_gate", o, None, columns[:, 3:], eps=1e-6)
    truth = F.rms_norm(o.double(), (24,), None, 1e-6).flatten(1) * F.silu(columns[:, 3:].double())
    assert relative_error(out, truth) < TOLERANCE[dtype]
    out = run("triton", "swiglu", columns[:, :50])
    truth = F.silu(columns[:, :25].double()) * columns[:, 25:50].double()
    assert relative_error(out, truth) < TOLERANCE[dtype]
    weight, bias = random(70, 16, seed=2), random(70, seed=3)
    g = run("triton", "log_decay", columns[:, :16], weight, bias, normalizer=16, clamp_min=None)
    truth = F.logsigmoid(columns[:, :16].double() @ weight.double().T + bias.double()) / 16
    assert relative_error(g, truth) < 1e-6


def test_a_row_is_the_same_in_any_batch() -> None:
    x, o = random(9, 16, dtype=torch.bfloat16), random(9, 2, 64, dtype=torch.bfloat16)
    weight, bias = random(40, 16, seed=1), random(40, seed=2)
    for together, alone in (
        *((gate.log_decay(x[rows], weight, bias, normalizer=16, clamp_min=None) for rows in (slice(9), slice(4, 5))),),
        *((norm.norm_gate(o[rows], None, o[rows].flatten(1), eps=1e-6) for rows in (slice(9), slice(4, 5))),),
        *((mlp.swiglu(x[rows]) for rows in (slice(9), slice(4, 5))),),
    ):
        assert torch.equal(together[4], alone[0])


def test_the_door_computes() -> None:
    for backend in ("reference", "triton") if TRITON_DEVICE == "cuda" else ("reference",):
        x, weight, bias = (random(*shape, backend=backend) for shape in ((2, 16), (8, 16), (8,)))
        options: dict[str, Any] = {"normalizer": 16, "clamp_min": -1.0}
        for ours, expected in (
            (kernels.log_decay(x, weight, bias, **options), run(backend, "log_decay", x, weight, bias, **options)),
            (
                kernels.norm_gate(x.view(2, 2, 8), bias, x, eps=1e-6),
                run(backend, "norm_gate", x.view(2, 2, 8), bias, x, eps=1e-6),
            ),
        ):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kernels.norm_gate(x, None, None, eps=1e-6), "o: must have 3 dimensions"),
        (lambda x: kernels.norm_gate(x[None], x[0, :3], None, eps=1e-6), "weight: must have shape"),
        (lambda x: kernels.norm_gate(x[None], None, x, eps=1e-6), "gate: must have shape"),
        (lambda x: kernels.log_decay(x[0], x, x[0], normalizer=16, clamp_min=None), "low_rank: must have 2"),
        (lambda x: kernels.log_decay(x, x[:, :8], x[:, 0], normalizer=16, clamp_min=None), "low_rank: must have shape"),
        (lambda x: kernels.log_decay(x, x.half(), x[:, 0], normalizer=16, clamp_min=None), "weight: must be torch"),
        (lambda x: kernels.log_decay(x, x[::2], x[0, :2], normalizer=16, clamp_min=None), "weight: must be contiguous"),
        (lambda x: kernels.log_decay(x, x, x[0], normalizer=16, clamp_min=None), "bias: must have shape"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call(torch.ones(4, 16))
