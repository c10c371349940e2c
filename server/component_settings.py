"""What each component gets of the settings, and nothing beyond: see :mod:`server.settings`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from server.keys import ApiKey

StateCacheDtype: TypeAlias = Literal["exact", "bfloat16", "int8"]
GenerationConfigSource: TypeAlias = Literal["auto", "none"]
LoadFormat: TypeAlias = Literal["auto", "dummy"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["text", "json"]

CHUNK = 64
"""Prompt chunks end on multiples of this many tokens, so a step must be able to take that many."""


@dataclass(frozen=True, slots=True)
class StateCacheConfig:
    """Where states that prompts can begin from may lie, and how much room they have.

    Attributes:
        gpu_bytes: on a CUDA device; None: a share of what is free.
        host_bytes: in the host's memory; None: a share of what is free.
        folder: for files; None: none are written.
        disk_bytes: in the folder.
        dtype: to which they are rounded, if they are held in a larger one; ``exact``: to none.
        shared: whether all API keys share them.
        max_saved: saved states in all.
        signing_key: with which states that travel are signed; None: they are not.
        max_saved_per_key, saved_bytes_per_key: saved states of one API key, and what they may take; None: no limit.
    """

    gpu_bytes: int | None = 0
    host_bytes: int | None = 0
    folder: Path | None = None
    disk_bytes: int = 0
    dtype: StateCacheDtype = "exact"
    shared: bool = False
    max_saved: int = 1 << 16
    max_saved_per_key: int | None = None
    saved_bytes_per_key: int | None = None
    signing_key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine process needs to know.

    Attributes:
        model_folder: a local checkpoint folder.
        tokenizer_folder: where the tokenizer lies; None: serve token ids only.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of weights and activations; ``auto``: float32 on the CPU, the checkpoint's on CUDA.
        state_dtype: of the recurrent states.
        max_num_seqs: sequences that may run at once; fewer where memory holds fewer states.
        max_num_batched_tokens: most tokens absorbed by one step; None: as suits the device.
        max_model_len: most tokens of prompt and answer together; None: unlimited.
        gpu_memory_utilization: share of the GPU's memory for weights, states and workspace.
        max_num_queued_reqs: choices that may wait beyond the running ones.
        max_concurrent_seqs_per_key: choices that one API key may have waiting and running; None: unlimited.
        several_keys: whether there are keys of more than one name.
        max_logprobs: most alternatives per token that a request may ask for.
        generation_config: ``auto`` reads sampling defaults from the checkpoint's ``generation_config.json``.
        load_format: ``dummy`` fills the weights at random.
        seed: of dummy weights and of requests that bring no seed.
        state_cache: for prefix reuse; without room anywhere, every prompt is absorbed from its beginning.
        swap_bytes: host memory for states of running sequences that make room for more urgent ones; None: a share of
            what is free.
    """

    model_folder: Path
    tokenizer_folder: Path | None
    device: str
    dtype: str
    state_dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int | None
    max_model_len: int | None
    gpu_memory_utilization: float
    max_num_queued_reqs: int
    max_concurrent_seqs_per_key: int | None
    several_keys: bool
    max_logprobs: int
    generation_config: GenerationConfigSource
    load_format: LoadFormat
    seed: int
    state_cache: StateCacheConfig = StateCacheConfig()
    swap_bytes: int | None = 0


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """What an API process needs to know.

    Attributes:
        served_model_names: names clients may ask for; the first one stands in the answers.
        revision: of the model's hub repository, as asked for.
        api_keys: the accepted keys; empty: no key needed.
        protect_all_routes: whether health, version and metrics want a key too.
        allowed_origins: web pages of these origins may use the API; ``*``: of all.
        tokenizer_folder: where the tokenizer lies; None: prompts and answers are token ids.
        chat_template: as given by ``--chat-template``; None: the checkpoint's own.
        max_model_len: most tokens of prompt and answer together; None: unlimited.
        max_body_bytes: larger request bodies are refused.
        sleep_mode: whether clients may send the engine to sleep.
        max_log_len: characters of each prompt and of each answer that are logged.
        created: Unix time of the server's start, shown by ``/v1/models``.
    """

    served_model_names: tuple[str, ...]
    revision: str | None
    api_keys: tuple[ApiKey, ...]
    protect_all_routes: bool
    allowed_origins: tuple[str, ...]
    tokenizer_folder: Path | None
    chat_template: str | None
    max_model_len: int | None
    max_body_bytes: int
    sleep_mode: bool
    max_log_len: int
    created: int


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """How the launcher treats its children.

    Attributes:
        shutdown_timeout: seconds that running requests may take to finish when the server stops.
        max_restarts: deaths in a row after which a child is not started again.
        watchdog_timeout: seconds after which a child hangs; 0: never.
        startup_timeout: seconds after which an engine that loads does; 0: never.
    """

    shutdown_timeout: float
    max_restarts: int
    watchdog_timeout: float
    startup_timeout: float
