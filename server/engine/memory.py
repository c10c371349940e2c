"""Loads the model and sizes the state pool to the memory that is left, exactly and once.

States are the only memory that grows with the number of users, and their size is known before the
first request: so the server finds out at start how many requests it can hold and never runs out later.
"""

import copy
import ctypes
import logging
import os
import platform
import time
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from server.component_settings import CHUNK, EngineConfig, StateCacheConfig
from server.engine.batch import ModelInputs
from server.engine.capture import capture_steps, graph_bytes
from server.engine.checkpoint import load_model
from server.engine.config import GLAConfig
from server.engine.constraints import mask_words
from server.engine.model import GLAModel, Hidden
from server.engine.runner import Runner
from server.engine.sampler import SamplePlan, Sampler
from server.engine.scoring import SCORED_ROWS, score_rows
from server.engine.snapshot import (
    fold_slot,
    fork_slot,
    parked_bytes,
    restore_snapshot,
    shrink,
    take_snapshot,
    to_host,
)
from server.engine.snapshot_store import MAX_LEAVING
from server.engine.state_pool import NULL_SLOT, StateTensors, allocate_states, state_bytes
from server.engine.step import StepModel
from server.engine.step_shapes import MAX_ROWS, PromptLimit
from server.engine.swap import MAX_LEAVING as MAX_SWAPPING
from server.engine.swap import SwapSpace
from server.engine.tiers import Tier
from server.errors import CheckpointError, SettingsError
from server.kernels import STATE_DTYPES, RingRows, folds_every_token

logger = logging.getLogger(__name__)

_MiB = 1 << 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROFILE_SLOTS = 4
_CACHE_BYTES = 4 << 30
_SWAP_BYTES = 1 << 30
_CACHE_SHARE = 8
"""Parked states, and swapped ones, take at most one in so many bytes of free memory, unless a flag says how many."""
_TOKEN_BUDGETS = {"cuda": 8192, "cpu": 2048}
"""Most tokens of a step, unless a flag says how many: on an H200, 37 milliseconds of a model of 1.3 billion parameters.
Larger steps would absorb prompts some 4% faster, but a new request would wait twice as long for its first step."""
_SHORT_STEPS = (2, 17, 33)
"""Tokens of steps whose products are kernels of their own, not the matrix library's: one for each kind of them."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_MALLOC_KEEP = 1 << 30


@dataclass(frozen=True, slots=True)
class BuiltRunner:
    """A runner and what was decided while building it.

    Attributes:
        num_slots: sequences that can run at once.
        max_num_batched_tokens: most tokens of a step.
        state_bytes: one sequence's state.
        dtype: of the weights, by name.
        device_name: for people.
        prompt_limits: how many prompt tokens a step should absorb; empty: no such limits.
        ring_size: tokens of a state's ring, 0: there are no rings.
        num_parameters: numbers of the checkpoint.
        cache_bytes: room for parked states, by tier.
    """

    runner: Runner
    device: torch.device
    num_slots: int
    max_num_batched_tokens: int
    state_bytes: int
    dtype: str
    device_name: str
    prompt_limits: tuple[PromptLimit, ...]
    ring_size: int
    num_parameters: int
    cache_bytes: dict[Tier, int] = field(default_factory=dict)


def build_runner(config: EngineConfig, model_config: GLAConfig) -> BuiltRunner:
    """Load the weights, measure a worst-case step, and give the rest of the memory to states.

    Raises:
        CheckpointError: the weights cannot be loaded.
        SettingsError: CUDA is asked for and absent, not even one state fits, or a flag does not fit the model.
    """
    if config.max_logprobs > model_config.vocab_size:
        raise SettingsError(
            f"--max-logprobs {config.max_logprobs}: the model's vocabulary has {model_config.vocab_size} tokens"
        )
    device = _resolve_device(config.device)
    dtype_name = config.dtype
    if dtype_name == "auto":
        dtype_name = "float32" if device.type == "cpu" else model_config.dtype
    dtype, state_dtype = _DTYPES[dtype_name], STATE_DTYPES[config.state_dtype]
    if device.type == "cuda":
        # Imported here: it brings Triton, which a CPU server does without.
        from server.kernels.shapes import MAX_HEAD_K

        if model_config.head_k > MAX_HEAD_K:
            raise CheckpointError(
                f"{config.model_folder / 'config.json'}: head_k is {model_config.head_k}; "
                f"the CUDA kernels take at most {MAX_HEAD_K}"
            )
    model = load_model(
        config.model_folder,
        model_config,
        device=device,
        dtype=dtype,
        load_format=config.load_format,
        seed=config.seed,
    )
    weights = model.checkpoint_tensors().values()
    weight_bytes = sum(view.nbytes for view in weights)
    num_parameters = sum(view.numel() for view in weights)
    del weights  # views of what is packed now
    model.pack()
    per_state = state_bytes(model_config, on_cuda=device.type == "cuda", dtype=dtype, state_dtype=state_dtype)
    per_slot = per_state + Sampler.bytes_per_slot(model_config.vocab_size)
    profile = allocate_states(model_config, _PROFILE_SLOTS, device=device, dtype=dtype, state_dtype=state_dtype)
    max_tokens = _token_budget(config, device)
    _run_worst_case(model, profile, config, max_tokens, model_config.vocab_size, device)
    available = _available_bytes(device, config.gpu_memory_utilization)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        probe = StepModel(model, profile, Sampler(_PROFILE_SLOTS, model_config.vocab_size, device=device))
        max_rows = min(config.max_num_seqs, available // per_slot, MAX_ROWS)
        available -= graph_bytes(probe, max_rows=max_rows, max_tokens=max_tokens, stream=stream)
        del probe
    del profile
    cache_bytes = _cache_bytes(config.state_cache, device, available)
    if cache_bytes[Tier.DEVICE]:
        available -= cache_bytes[Tier.DEVICE] + MAX_LEAVING * (per_state + 4 * model_config.vocab_size)
    swap_bytes = config.swap_bytes
    if swap_bytes is None:
        swap_bytes = min(_SWAP_BYTES, _free_host_bytes() // _CACHE_SHARE)
    if swap_bytes and device.type == "cuda":
        available -= MAX_SWAPPING * per_state
    # The null slot takes memory too.
    num_slots = min(config.max_num_seqs, available // per_slot - 1)
    if num_slots < 1:
        raise SettingsError(
            f"no memory for a single sequence: each needs {per_slot / _MiB:.1f} MiB for its state and sampling tables, "
            f"{max(available, 0) / _MiB:.1f} MiB are left on {device.type} within --gpu-memory-utilization "
            f"{config.gpu_memory_utilization}"
        )
    states = allocate_states(model_config, num_slots, device=device, dtype=dtype, state_dtype=state_dtype)
    step = StepModel(model, states, Sampler(num_slots + 1, model_config.vocab_size, device=device))
    swapped_bytes = parked_bytes(states, None, 0)
    num_swapped = swap_bytes // swapped_bytes
    if num_swapped:
        logger.info("swap: room for the states of %d sequences that have to wait", num_swapped)
    graphs = None
    prompt_limits: tuple[PromptLimit, ...] = ()
    if stream is not None:
        graphs, prompt_limits = capture_steps(
            step, max_rows=min(num_slots, MAX_ROWS), max_tokens=max_tokens, stream=stream
        )
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    logger.info(
        "%s: %s weights, %.1f MiB; one request's state is %.2f MiB, constant at any length",
        device_name,
        dtype_name,
        weight_bytes / _MiB,
        per_state / _MiB,
    )
    logger.info(
        "%d slots of %.2f MiB (%.1f MiB of %.1f MiB available; memory alone would allow %d)",
        num_slots,
        per_slot / _MiB,
        (num_slots + 1) * per_slot / _MiB,
        available / _MiB,
        available // per_slot - 1,
    )
    return BuiltRunner(
        runner=Runner(
            step,
            graphs,
            parked_dtype=STATE_DTYPES.get(config.state_cache.dtype),
            swap=SwapSpace(states, num_swapped, swapped_bytes) if num_swapped else None,
        ),
        device=device,
        num_slots=num_slots,
        max_num_batched_tokens=max_tokens,
        state_bytes=per_state,
        dtype=dtype_name,
        device_name=device_name,
        prompt_limits=prompt_limits,
        ring_size=states.ring_size,
        num_parameters=num_parameters,
        cache_bytes=cache_bytes,
    )


def _token_budget(config: EngineConfig, device: torch.device) -> int:
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    return max(_TOKEN_BUDGETS[device.type], config.max_num_seqs + CHUNK)


def _cache_bytes(config: StateCacheConfig, device: torch.device, available: int) -> dict[Tier, int]:
    """Room for parked states, by tier. A CPU has no memory but the host's.

    Args:
        available: what states may take on the device.
    """
    gpu, host = config.gpu_bytes, config.host_bytes
    if gpu is None:
        gpu = max(0, min(_CACHE_BYTES, available // _CACHE_SHARE))
    if host is None:
        host = min(_CACHE_BYTES, _free_host_bytes() // _CACHE_SHARE)
    return {
        Tier.DEVICE: gpu if device.type == "cuda" else 0,
        Tier.HOST: host,
        Tier.DISK: 0 if config.folder is None else config.disk_bytes,
    }


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError("--device cuda: PyTorch finds no CUDA device here (try --device cpu)")
        device = torch.device("cuda", torch.cuda.current_device())
        torch.backends.cuda.matmul.allow_tf32 = False
        return device
    _prepare_cpu()
    return torch.device(name)


def _prepare_cpu() -> None:
    """Settings of this process that CPU inference is much faster with.

    One core is left to the API processes: PyTorch's threads wait for each other at every operation, so a
    single one that has to share its core holds all of them up. OMP_NUM_THREADS overrides this. And freed
    memory is kept: otherwise every activation of a long prompt is mapped and faulted in anew.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _MALLOC_KEEP)
        mallopt(_M_MMAP_THRESHOLD, _MALLOC_KEEP)


def _more_decodes(kv_heads: int) -> int:
    """The least number of decodes whose kernels differ from those of a few, on a GPU."""
    # Imported here: it brings Triton, which a CPU server does without.
    from server.kernels.buffered import FEW_HEADS

    return FEW_HEADS // kv_heads + 1


@torch.inference_mode()
def _run_worst_case(
    model: GLAModel, states: StateTensors, config: EngineConfig, max_tokens: int, vocab_size: int, device: torch.device
) -> None:
    """The step that takes most memory: a full budget of tokens, every row sampled with everything on.

    It also compiles the kernels and fills the allocator's pools before the first request. On the CPU,
    where memory is not the limit, a short one does.
    """
    steps = _steps(states, config.max_num_seqs, max_tokens, device)
    if device.type == "cuda":
        from server.kernels.compiling import compile_together

        start = time.monotonic()
        # Two layers have all kernels: the first layer's and those behind another. No sampling: it looks values up.
        shallow, few = copy.copy(model), slice(2)
        shallow.layers = model.layers[few]
        shallow_states = StateTensors(
            {name: part_LS[few] for name, part_LS in states.parts.items()}, states.layers[few]
        )
        count = compile_together(lambda: [shallow.forward(inputs, shallow_states) for inputs in steps], device)
        logger.info("%d kernels compiled, or found compiled, in %.2f s", count, time.monotonic() - start)
    for inputs in steps:
        logits = model.forward(inputs, states)
        step_rows = inputs.output_rows_R
        # Where prompts fork, the logits are in memory three times, and sequences to be saved keep those of two steps.
        forked = logits.repeat(4, 1)
        plan = SamplePlan(0, 0, len(step_rows), True, True, True, config.max_logprobs)
        sampler = Sampler(_PROFILE_SLOTS, vocab_size, device=device)
        masks = torch.full((len(step_rows), mask_words(vocab_size)), -1, dtype=torch.int32, device=device)
        sampler.sample(logits, torch.ones_like(step_rows), torch.zeros_like(step_rows), plan, masks)
        del forked
    num_tokens = max(len(inputs.token_ids_T) for inputs in steps)
    hidden = Hidden(torch.zeros((num_tokens, model.config.hidden_size), dtype=model.dtype, device=device))
    scored = torch.arange(num_tokens, device=device)[:SCORED_ROWS]
    score_rows(model, hidden, scored, torch.zeros_like(scored), config.max_logprobs)
    snapshot = take_snapshot(states, 1, logits[0], num_tokens=1, num_folded=1)
    restore_snapshot(states, to_host(snapshot), [2, 3])
    fork_slot(states, 2, [1])
    if states.ring_size:
        fold_slot(states, 1, 1)
    if (parked_dtype := STATE_DTYPES.get(config.state_cache.dtype)) is not None:
        restore_snapshot(states, shrink(snapshot, parked_dtype), [2, 3])


def _steps(states: StateTensors, max_rows: int, max_tokens: int, device: torch.device) -> list[ModelInputs]:
    """The steps that take most memory, and one for every kernel that is chosen by a step's shape."""
    on_cuda = device.type == "cuda"
    num_tokens, num_rows = (max_tokens, max_rows) if on_cuda else (64, 1)
    rows = torch.arange(num_rows, device=device) % num_tokens
    steps: list[tuple[int, tuple[int, ...], Tensor]] = [
        (0, (num_tokens,), rows),
        (1, (num_tokens - 1,), rows),
    ]
    if on_cuda:
        steps += [(0, (length,), rows[:1].repeat(length)) for length in _SHORT_STEPS]
        steps.append((1, (), rows[:1]))
        steps.append((_more_decodes(states.layers[0].values_SGKV.shape[1]), (1,), rows[:1]))
        # Prompts few to many: their number decides about kernels and about the memory for float32 copies of smaller
        # states, which is largest beside a full budget of tokens.
        most = min(num_rows, num_tokens)
        numbers = {min(number, most) for i in range(most.bit_length()) for number in (1 << i, 3 << i >> 1)} | {most}
        for spans in sorted(numbers):
            # Beside a decode, the prompts' rows may be aligned otherwise.
            steps += [(num_decodes, (1,) * spans, rows % spans) for num_decodes in (0, 1)]
        steps.append((0, (num_tokens // most,) * most, rows))
    return [_inputs(states, device, *step) for step in steps]


def _inputs(
    states: StateTensors, device: torch.device, num_decodes: int, lengths: tuple[int, ...], output_rows_R: Tensor
) -> ModelInputs:
    """A step of so many decodes and of prompts of these lengths; without prompts, as it is captured."""
    spans = num_decodes + len(lengths)
    # A slot each while there are some, then the null slot.
    slots = torch.arange(1, spans + 1, device=device)
    slots = torch.where(slots <= _PROFILE_SLOTS, slots, NULL_SLOT)
    ring_rows = None
    if states.ring_size:
        none = torch.zeros(num_decodes + 1, dtype=torch.int64, device=device)
        every_token = not lengths and folds_every_token(num_decodes, states.layers[0])
        ring_rows = RingRows(pending_N=none[:-1], num_folding=None if every_token else none[-1:])
    return ModelInputs(
        token_ids_T=torch.zeros(num_decodes + sum(lengths), dtype=torch.int64, device=device),
        num_decodes=num_decodes,
        slots_N=slots,
        from_zero_N=torch.ones(spans, dtype=torch.bool, device=device),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        longest_prefill=max(lengths, default=0),
        output_rows_R=output_rows_R,
        ring_rows=ring_rows,
    )


def _available_bytes(device: torch.device, utilization: float) -> int:
    """Memory that states may take, what a step needs at its worst set aside."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        # Reserved, not allocated: what the allocator holds in pieces too small for the next request counts, too.
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        # Taken outside PyTorch's allocator: the CUDA context, kernels, other processes.
        other = total - free - torch.cuda.memory_reserved(device)
        return int(total * utilization) - other - peak
    return int(_free_host_bytes() * utilization)


def _free_host_bytes() -> int:
    """Host memory that can still be taken: the machine's, or the control group's limit if that is less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Files read lately are counted as used, but are given up when memory is wanted.
            used -= int(statistics["active_file"]) + int(statistics["inactive_file"])
            free = min(free, int(limit) - used)
    except (OSError, ValueError, KeyError):
        # No such files (another kernel, an older control group): the page count has to do.
        logger.debug("no control group limit found")
    return free


def _cpu_name() -> str:
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
