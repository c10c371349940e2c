"""The kernels on GPUs that are not there: they compile, and fit the shared memory of each."""

import pytest

from tests.kernels.targets import SHARED_MEMORY, compile_apart


@pytest.mark.parametrize("capability", [80, 86, 120])
def test_every_kernel_fits(capability: int) -> None:
    variants = compile_apart(capability, "1.3B")
    kernels = {variant.kernel for variant in variants}
    assert {"decode_kernel", "score_kernel", "read_kernel", "fold_kernel", "matvec_kernel", "walk_kernel"} <= kernels
    assert [v for v in variants if v.shared > SHARED_MEMORY[capability]] == []
