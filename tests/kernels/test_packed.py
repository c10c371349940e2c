"""Matrices packed as float16: when they are, and that nothing is lost by it."""

import warnings

import pytest
import torch

from server.kernels import PackedMatrix

pytestmark = pytest.mark.skipif(
    torch.backends.quantized.engine not in ("fbgemm", "x86"), reason="FBGEMM is for x86 with AVX2"
)


def bfloat16_matrix(outputs: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs + inputs)
    return (torch.randn((outputs, inputs), generator=generator) * 0.02).bfloat16().float()


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 13), (33, 5), (784, 256), (256, 768)])
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 65])
def test_a_product_is_float32s(outputs: int, inputs: int, rows: int) -> None:
    weight = bfloat16_matrix(outputs, inputs)
    matrix = PackedMatrix.pack(weight)
    assert matrix is not None
    x = torch.randn((rows, inputs), generator=torch.Generator().manual_seed(rows))
    product = matrix.multiply(x)
    assert product.dtype == torch.float32 and product.shape == (rows, outputs)
    expected = x.double() @ weight.double().T
    # Each term of a sum of n rounds to 2^-24 of it; the weights' own rounding is below that.
    bound = (inputs + 2) * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    assert ((product.double() - expected).abs() <= bound).all()


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    matrix = PackedMatrix.pack(bfloat16_matrix(300, 700))
    assert matrix is not None
    x = torch.randn((97, 700), generator=torch.Generator().manual_seed(0))
    whole = matrix.multiply(x)
    for start, stop in ((0, 1), (5, 7), (13, 29), (96, 97), (1, 97)):
        assert torch.equal(matrix.multiply(x[start:stop]), whole[start:stop])


def test_strides_do_not_matter() -> None:
    weight = bfloat16_matrix(96, 64)
    by_columns = PackedMatrix.pack(weight.t().contiguous().t())
    by_rows = PackedMatrix.pack(weight)
    assert by_columns is not None and by_rows is not None
    x = torch.randn((3, 200), generator=torch.Generator().manual_seed(0))[:, 100:164]
    assert torch.equal(by_columns.multiply(x), by_rows.multiply(x.contiguous()))


def test_not_a_number_stays_in_its_row() -> None:
    matrix = PackedMatrix.pack(bfloat16_matrix(96, 64))
    assert matrix is not None
    x = torch.ones((3, 64))
    x[1, 5] = torch.nan
    assert matrix.multiply(x).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.full((4, 4), 1 / 3), id="more digits than float16 has"),
        pytest.param(torch.full((4, 4), 2.0**17), id="too large"),
        pytest.param(torch.full((4, 4), 2.0**-30), id="too small"),
        pytest.param(torch.full((4, 4), torch.nan), id="no numbers"),
        pytest.param(torch.ones((4, 4), dtype=torch.bfloat16), id="not float32"),
        pytest.param(torch.ones((4, 4), device="meta"), id="not on the CPU"),
    ],
)
def test_what_float16_does_not_hold_is_not_packed(weight: torch.Tensor) -> None:
    assert PackedMatrix.pack(weight) is None


def test_packing_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = PackedMatrix.pack(bfloat16_matrix(8, 8))
        assert matrix is not None
        matrix.multiply(torch.ones((1, 8)))
