"""The low-rank gate, from its inner projection to log decays.

The rank is 16, so the product is a handful of additions per channel, in float32. The kernels that decode do it
themselves (:func:`log_decays_of`), a token at a time; for prompts it is a kernel, which takes many tokens at once.
"""

# Triton's decorator has no types, and a kernel's arguments are pointers and integers of no Python type.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.pdl import await_previous, launches_early, start_next
from server.kernels.shapes import FLOAT32_PRODUCT, next_power_of_2
from server.kernels.state import LowRankGate

_BLOCK_T, _BLOCK_D = 64, 64


@dataclass(frozen=True, slots=True)
class GateArguments:
    """What a decode kernel takes of the decays: themselves, or what they are computed from."""

    tensors: tuple[Tensor, Tensor | None, Tensor | None]
    """Decays [N, G, K], or the inner projection [N, R], its weight and its bias."""
    strides: tuple[int, int]
    """Of a row and a head."""
    scalars: tuple[float, float]
    """1 / normalizer, lower bound."""
    rank: int
    """0: the decays themselves."""

    @classmethod
    def of(cls, gate: Tensor | LowRankGate) -> "GateArguments":
        """Of either form of the gate."""
        if isinstance(gate, Tensor):
            return cls((gate, None, None), (gate.stride(0), gate.stride(1)), (1.0, 0.0), 0)
        clamp_min = -float("inf") if gate.clamp_min is None else gate.clamp_min
        return cls(
            (gate.low_rank_TR, gate.weight_DR, gate.bias_D),
            (gate.low_rank_TR.stride(0), 0),
            (1 / gate.normalizer, clamp_min),
            gate.low_rank_TR.shape[1],
        )


def log_decay(
    low_rank_TR: Tensor, weight_DR: Tensor, bias_D: Tensor, *, normalizer: float, clamp_min: float | None
) -> Tensor:
    """See :func:`server.kernels.log_decay`, which has checked the arguments."""
    tokens, rank = low_rank_TR.shape
    channels = bias_D.shape[0]
    g_TD = torch.empty((tokens, channels), dtype=torch.float32, device=bias_D.device)
    if tokens == 0:
        return g_TD
    early = launches_early(low_rank_TR.device)
    with torch.cuda.device_of(low_rank_TR):
        log_decay_kernel[(triton.cdiv(channels, _BLOCK_D), triton.cdiv(tokens, _BLOCK_T))](
            low_rank_TR,
            weight_DR,
            bias_D,
            g_TD,
            tokens,
            low_rank_TR.stride(0),
            1 / normalizer,
            -float("inf") if clamp_min is None else clamp_min,
            D=channels,
            R=rank,
            BR=max(16, next_power_of_2(rank)),  # the least that a product takes
            BT=_BLOCK_T,
            BD=_BLOCK_D,
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )
    return g_TD


@triton.jit(do_not_specialize=["tokens"])
def log_decay_kernel(
    p_x,
    p_weight,
    p_bias,
    p_g,
    tokens,
    stride_xt,
    factor,
    clamp_min,
    D: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (channel tiles, token tiles)."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    o_r = tl.arange(0, BR)
    m_d = o_d < D
    m_t = o_t < tokens
    m_r = o_r < R
    start_next(EARLY)
    b_weight = tl.load(p_weight + o_d[None, :] * R + o_r[:, None], mask=m_d[None, :] & m_r[:, None], other=0.0)
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    await_previous(EARLY)
    b_x = tl.load(p_x + o_t[:, None] * stride_xt + o_r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0)
    b_logits = tl.dot(b_x.to(tl.float32), b_weight, input_precision=FLOAT32_PRODUCT) + b_bias[None, :]
    b_g = _log_decays(b_logits, factor, clamp_min)
    tl.store(p_g + o_t[:, None] * D + o_d[None, :], b_g, mask=m_t[:, None] & m_d[None, :])


@triton.jit
def log_decays_of(b_x, b_weight, b_bias, factor, clamp_min):
    """Log decays [BD] of one token's inner projection [BR], by weights [BD, BR] and a bias [BD], all float32."""
    return _log_decays(tl.sum(b_weight * b_x[None, :], axis=1) + b_bias, factor, clamp_min)


@triton.jit
def _log_decays(b_logits, factor, clamp_min):
    # logsigmoid(x) = min(x, 0) - log(1 + e), where e = exp(-|x|); a small e, lost in 1 + e, takes the series.
    b_e = tl.exp(-tl.abs(b_logits))
    b_series = b_e * (1.0 - b_e * (1 / 2 - b_e * (1 / 3 - b_e * (1 / 4))))
    b_log = tl.where(b_e < 0.03, b_series, tl.log(1.0 + b_e))
    return tl.maximum((tl.minimum(b_logits, 0.0) - b_log) * factor, clamp_min, propagate_nan=tl.PropagateNan.ALL)
