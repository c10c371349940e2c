"""Tiles of states as kernels load and store them: as they are, or float32 numbers split into two halves.

See :data:`server.kernels.state.SPLIT`. The lower halves lie as far from their beginning as the upper ones from theirs.
"""

# Triton's decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def load_tile(p_state, p_residues, o_tile, m_tile):
    """Numbers of states as float32, of the tile's shape; zeros where masked.

    Args:
        p_state: float32, bfloat16 or uint8; of split states the upper halves, bfloat16.
        p_residues: int16, the lower halves; None: there are none.
        o_tile: int64, where the numbers lie behind both pointers.
        m_tile: which of them there are.
    """
    b_state = tl.load(p_state + o_tile, mask=m_tile, other=0)
    if p_residues is None:
        return b_state.to(tl.float32)
    else:
        b_upper = b_state.to(tl.int16, bitcast=True).to(tl.int32) << 16
        b_lower = tl.load(p_residues + o_tile, mask=m_tile, other=0).to(tl.int32)
        return (b_upper + b_lower).to(tl.float32, bitcast=True)


@triton.jit
def store_tile(p_state, p_residues, o_tile, b_state, m_tile):
    """Store float32 numbers of states as they are held; the arguments are those of :func:`load_tile`."""
    if p_residues is None:
        tl.store(p_state + o_tile, b_state.to(p_state.dtype.element_ty), mask=m_tile)
    else:
        # A NaN, which rounding might turn into something else, is held as the one that has no lower half.
        b_bits = tl.where(b_state == b_state, b_state.to(tl.int32, bitcast=True), 0x7FC00000)
        b_upper = (b_bits + 0x8000) >> 16
        b_values = b_upper.to(tl.int16).to(p_state.dtype.element_ty, bitcast=True)
        tl.store(p_state + o_tile, b_values, mask=m_tile)
        tl.store(p_residues + o_tile, (b_bits - (b_upper << 16)).to(tl.int16), mask=m_tile)
