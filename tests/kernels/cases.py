"""Random inputs for the kernels, the truth they are held to, and the two backends behind one interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from server.kernels import SPLIT, LayerState, held_shape, reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

GATES: dict[str, Callable[[Tensor], Tensor]] = {  # of a uniform sample
    "slow": lambda u: -1e-4 * u,
    "trained": lambda u: -0.4 * u.log().square(),  # median 0.2, 1% above 8, 0.1% above 19
    "strong": lambda u: torch.full_like(u, -20.0),
    # Every channel has runs of slow gates between brutal ones.
    "mixed": lambda u: torch.where(u < 0.3, -60.0 * u, -1e-3 * u),
    "none": torch.zeros_like,
}


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of gla_prefill; those of gla_decode where each span is one token."""

    q_THK: Tensor
    k_TGK: Tensor
    v_TGV: Tensor
    g_TGK: Tensor
    state_SGKV: Tensor
    slots_N: Tensor
    from_zero_N: Tensor
    cu_seqlens: Tensor

    @property
    def scale(self) -> float:
        return self.q_THK.shape[2] ** -0.5

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    def prefill(self, backend: ModuleType, *, split: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
        """Output and pool afterwards; self stays as it is."""
        pool, state = self._pool(split=split)
        max_length = max(self.lengths, default=0)
        with poisoned_memory():
            o = backend.gla_prefill(
                self.q_THK,
                self.k_TGK,
                self.v_TGV,
                self.g_TGK,
                state,
                self.slots_N,
                self.from_zero_N,
                self.cu_seqlens,
                scale=self.scale,
                max_length=max_length,
                **options,
            )
        return o, state.load(torch.arange(len(pool), device=pool.device)) if split else pool

    def decode(self, backend: ModuleType, *, split: bool = False) -> tuple[Tensor, Tensor]:
        """Output and pool afterwards; self stays as it is."""
        pool, state = self._pool(split=split)
        with poisoned_memory():
            o = backend.gla_decode(
                self.q_THK,
                self.k_TGK,
                self.v_TGV,
                self.g_TGK,
                state,
                self.slots_N,
                self.from_zero_N,
                scale=self.scale,
            )
        return o, state.load(torch.arange(len(pool), device=pool.device)) if split else pool

    def _pool(self, *, split: bool) -> tuple[Tensor, LayerState]:
        """A pool with the case's states; it as a layer that holds them whole, or a layer that holds them split."""
        pool = self.state_SGKV.clone()
        return pool, split_states(pool) if split else LayerState(pool)

    def span(self, n: int, start: int = 0, stop: int | None = None) -> Case:
        """Rows start:stop of span n, alone; a span that is continued reads its slot."""
        first, last = self.cu_seqlens[n : n + 2].tolist()
        last = last if stop is None else first + stop
        first += start
        return replace(
            self,
            q_THK=self.q_THK[first:last],
            k_TGK=self.k_TGK[first:last],
            v_TGV=self.v_TGV[first:last],
            g_TGK=self.g_TGK[first:last],
            slots_N=self.slots_N[n : n + 1],
            from_zero_N=self.from_zero_N[n : n + 1] & (start == 0),
            cu_seqlens=self.cu_seqlens.new_tensor([0, last - first]),
        )


def split_states(states_SGKV: Tensor) -> LayerState:
    """A layer that holds these float32 states as two halves."""
    slots, *sizes = states_SGKV.shape
    held = torch.empty((slots, *held_shape(*sizes, SPLIT)), dtype=SPLIT, device=states_SGKV.device)
    state = LayerState.of(held)
    state.store(torch.arange(slots, device=states_SGKV.device), states_SGKV.clone())
    return state


def make_case(
    lengths: Sequence[int],
    *,
    heads: int = 2,
    kv_heads: int = 2,
    head_k: int = 16,
    head_v: int = 32,
    gates: str = "trained",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """A case whose inputs are slices of one projection, with slots in random order, every second span starting from
    zero over a slot full of NaN, and NaN in the null slot."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, spans = sum(lengths), len(lengths)
    widths = [heads * head_k, kv_heads * head_k, kv_heads * head_v, 5]
    projection = torch.randn((tokens, sum(widths)), generator=generator, device=device).to(dtype)
    q, k, v, _ = projection.split(widths, dim=1)
    uniform = torch.rand((tokens, kv_heads * head_k + 3), generator=generator, device=device).clamp_min(1e-8)
    g = GATES[gates](uniform)[:, 3:]
    state = torch.randn((spans + 4, kv_heads, head_k, head_v), generator=generator, device=device)
    slots = 1 + torch.randperm(spans + 3, generator=torch.Generator().manual_seed(seed))[:spans].to(device)
    from_zero = torch.arange(spans, device=device) % 2 == 0
    state[slots[from_zero]] = torch.nan
    state[0] = torch.nan
    return Case(
        q_THK=q.unflatten(1, (heads, head_k)),
        k_TGK=k.unflatten(1, (kv_heads, head_k)),
        v_TGV=v.unflatten(1, (kv_heads, head_v)),
        g_TGK=g.unflatten(1, (kv_heads, head_k)),
        state_SGKV=state,
        slots_N=slots,
        from_zero_N=from_zero,
        cu_seqlens=torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32),
    )


def gla_recurrence(case: Case) -> tuple[Tensor, Tensor]:
    """The definition, token by token in float64: output [T, H, V] and pool afterwards."""
    q, k, v, g = (x.double() for x in (case.q_THK, case.k_TGK, case.v_TGV, case.g_TGK))
    repeats = q.shape[1] // k.shape[1]
    pool = case.state_SGKV.double()
    o = torch.zeros((q.shape[0], q.shape[1], v.shape[2]), dtype=torch.float64, device=q.device)
    bounds = case.cu_seqlens.tolist()
    for n, (slot, from_zero) in enumerate(zip(case.slots_N.tolist(), case.from_zero_N.tolist(), strict=True)):
        state = torch.zeros_like(pool[slot]) if from_zero else pool[slot].clone()
        for t in range(bounds[n], bounds[n + 1]):
            state = g[t].exp()[:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
            o[t] = case.scale * (q[t].unflatten(0, (-1, repeats)) @ state).flatten(0, 1)
        pool[slot] = state
    return o, pool


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth||; NaN if anything is."""
    return float((actual.double() - truth.double()).norm() / truth.double().norm())


def check_against_recurrence(case: Case, o: Tensor, pool: Tensor) -> None:
    """Assert output and states to be right, and every other slot to be bit for bit what it was."""
    true_o, true_pool = gla_recurrence(case)
    tolerance = TOLERANCE[case.v_TGV.dtype]
    assert o.shape == true_o.shape
    assert o.dtype == case.v_TGV.dtype
    if o.numel():
        assert relative_error(o, true_o) < tolerance
    assert relative_error(pool[case.slots_N], true_pool[case.slots_N]) < tolerance
    others = torch.ones(pool.shape[0], dtype=torch.bool, device=pool.device)
    others[case.slots_N] = False
    assert torch.equal(pool[others].view(torch.int32), case.state_SGKV[others].view(torch.int32))


def backends() -> dict[str, tuple[ModuleType, str]]:
    """The modules that implement prefill, each with the device it is tested on."""
    from server.kernels import prefill

    return {"reference": (reference, "cpu"), "triton": (prefill, TRITON_DEVICE)}


def decode_backends() -> dict[str, tuple[ModuleType, str]]:
    """The modules that implement decode, each with the device it is tested on."""
    from server.kernels import decode

    return {"reference": (reference, "cpu"), "triton": (decode, TRITON_DEVICE)}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all memory that torch allocates uninitialized with NaN, so that what is not written is seen."""
    torch.use_deterministic_algorithms(True)  # its fill_uninitialized_memory is on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
