"""Matrices for float32 products on the CPU, held in half the memory: FBGEMM's packed float16.

The weights are widened to float32 as they are read, and products are summed in float32; only what is read from memory
is half as much, laid out for the vector units beforehand. Most checkpoints are bfloat16, whose values float16 holds:
for them nothing is lost. A row's result does not depend on how many rows are multiplied with it, which cannot be said
of a general matrix product.
"""

import warnings

import torch
from torch import Tensor

_ROUNDING = 2.0**-24
"""A float32 is this exact, relatively."""


class PackedMatrix:
    """A float32 matrix [N, K] that float16 holds.

    Args:
        packed: what FBGEMM made of it, an opaque handle.
        shape: N, K.

    Attributes:
        shape: as above.
    """

    __slots__ = ("_packed", "_zeros_N", "shape")

    def __init__(self, packed: Tensor, shape: torch.Size) -> None:
        self._packed = packed
        self._zeros_N = torch.zeros(shape[0])  # for the bias that the operation wants
        self.shape = shape

    @classmethod
    def pack(cls, weight_NK: Tensor) -> "PackedMatrix | None":
        """Pack a matrix, or return None where that would not pay.

        Args:
            weight_NK: any strides.

        Returns:
            None if the matrix is not float32 on a CPU that FBGEMM is made for, or if float16 does not hold it:
            rounding must not change it by more than rounding to float32 would.
        """
        if weight_NK.device.type != "cpu" or weight_NK.dtype != torch.float32:
            return None
        # FBGEMM is for x86 with AVX2; PyTorch names it or what contains it only where it runs.
        if torch.backends.quantized.engine not in ("fbgemm", "x86") or not hasattr(
            torch, "fbgemm_pack_gemm_matrix_fp16"
        ):
            return None
        error = torch.linalg.vector_norm(weight_NK.half().float() - weight_NK)
        if not error <= _ROUNDING * torch.linalg.vector_norm(weight_NK):
            return None
        with warnings.catch_warnings():
            # Called deprecated since 2022, yet PyTorch's ahead-of-time compiler relies on them; said once, at the first
            # use. The operations meant to follow them take ten times as long to call, with objects instead of tensors.
            warnings.filterwarnings("ignore", message="fbgemm_.* is deprecated")
            matrix = cls(torch.fbgemm_pack_gemm_matrix_fp16(weight_NK.contiguous()), weight_NK.shape)
            matrix.multiply(weight_NK[:1])
        return matrix

    def multiply(self, x_TK: Tensor) -> Tensor:
        """x @ weight.T.

        Args:
            x_TK: float32 [T, K]; any strides.

        Returns:
            float32 [T, N], contiguous.
        """
        return torch.fbgemm_linear_fp16_weight_fp32_activation(x_TK, self._packed, self._zeros_N)
