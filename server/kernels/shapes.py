"""What both Triton operations decide by shape: element types of products, tile sizes, and fitting shared memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT32_PRODUCT = tl.constexpr("tf32x3")
"""How float32 matrices are multiplied: on tensor cores, at nearly the precision of float32."""
MAX_HEAD_K = 256
"""A program holds a state tile of all head_k rows in registers."""


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1; Triton's blocks have such sizes."""
    return 1 << (n - 1).bit_length()


def check_head_k(head_k: int) -> None:
    """Raise ValueError if the kernels cannot hold a tile of this many rows."""
    if head_k > MAX_HEAD_K:
        raise ValueError(f"q: head_k must be at most {MAX_HEAD_K} on CUDA, is {head_k}")


def is_interpreted(kernel: object) -> bool:
    """Whether Triton runs this kernel in its interpreter (TRITON_INTERPRET=1), on the CPU."""
    return not isinstance(kernel, triton.JITFunction)


def product_dtype(q: Tensor, kernel: object) -> tuple[torch.dtype, tl.dtype]:
    """The type in which the kernels multiply matrices, for torch and for Triton.

    float32 inputs are multiplied in float32. Both 16-bit types are multiplied in bfloat16, with float32 sums: keys and
    states times a decay need its range, and float16's ends at 65,504. The interpreter multiplies in float32 always,
    since its bfloat16 product multiplies raw bits.
    """
    if q.dtype == torch.float32 or is_interpreted(kernel):
        return torch.float32, tl.float32
    return torch.bfloat16, tl.bfloat16
