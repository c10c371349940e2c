"""Settings: every flag of ``gale serve``, validated once.

The launcher builds one :class:`Settings` from the command line and hands each component only what
it needs: :class:`EngineConfig` to the engine process, :class:`ApiSettings` to the API processes.
``auto`` for device and dtype is resolved in the engine process, the only one that imports torch.
"""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic.config import JsonDict

from server.errors import SettingsError
from server.keys import ApiKey, check_distinct, hash_key, read_key_file

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
StateDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]
StateCacheDtype: TypeAlias = Literal["exact", "bfloat16", "int8"]
GenerationConfigSource: TypeAlias = Literal["auto", "none"]
LoadFormat: TypeAlias = Literal["auto", "dummy"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["text", "json"]

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")
"""Scheme, host and perhaps port, as browsers write them: no path, no slash at the end (RFC 6454)."""

_MAX_GIB = float(1 << 20)
_LEAST_SIGNING_KEY = 16

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


def _flag(
    group: str, description: str, *, env: str | None = None, metavar: str | None = None, several: bool = False
) -> Any:
    """What the command line shows of a setting; ``several``: one flag takes more than one value."""
    extra: JsonDict = {"group": group, "env": env, "metavar": metavar, "several": several}
    return Field(description=description, json_schema_extra=extra)


_MODEL = "model"
_HTTP = "HTTP server"
_ENGINE = "engine"
_PROCESS = "process"


class Settings(BaseModel):
    """The flags of ``gale serve``; each field is the flag of the same name with dashes."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    model: Annotated[
        str | None,
        _flag(_MODEL, "Checkpoint folder, or model id on the Hugging Face hub. Default: the model shipped with Gale."),
    ] = None
    tokenizer: Annotated[str | None, _flag(_MODEL, "Folder or hub id of the tokenizer. Default: the model's own.")] = (
        None
    )
    revision: Annotated[str | None, _flag(_MODEL, "Branch, tag or commit of the model's hub repository.")] = None
    served_model_name: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        _flag(
            _MODEL,
            "One or more names that clients may use for the model; answers carry the first. "
            "Default: the hub id, or the folder's name and the folder as given.",
            metavar="NAME",
            several=True,
        ),
    ] = ()
    load_format: Annotated[
        LoadFormat, _flag(_MODEL, "'dummy' fills the weights at random, for benchmarks; it reads config.json only.")
    ] = "auto"
    generation_config: Annotated[
        GenerationConfigSource,
        _flag(_MODEL, "'auto' takes sampling defaults from the checkpoint's generation_config.json, 'none' does not."),
    ] = "auto"
    skip_tokenizer_init: Annotated[
        bool, _flag(_MODEL, "Serve without a tokenizer: prompts and answers are token ids.")
    ] = False
    chat_template: Annotated[
        str | None,
        _flag(
            _MODEL,
            "Jinja template that makes a prompt of chat messages: a file, the name of one of the checkpoint's, or the "
            "text itself. Default: the checkpoint's own, if it has one.",
        ),
    ] = None

    host: Annotated[str, Field(min_length=1), _flag(_HTTP, "Address or host name to listen on.", env="GALE_HOST")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, le=65535), _flag(_HTTP, "Port to listen on; 0 picks a free one.")] = 8000
    api_key: Annotated[
        tuple[SecretStr, ...],
        _flag(
            _HTTP,
            "Key that clients must send as 'Authorization: Bearer KEY'; repeatable. Default: no key needed.",
            env="GALE_API_KEY",
            metavar="KEY",
        ),
    ] = ()
    api_key_file: Annotated[
        Path | None,
        _flag(
            _HTTP,
            "File of further keys, one a line: 'NAME KEY' or 'NAME sha256:HEX'. Keys of one name are one user.",
            metavar="FILE",
        ),
    ] = None
    protect_all_routes: Annotated[bool, _flag(_HTTP, "/health, /version and /metrics want a key too.")] = False
    allowed_origins: Annotated[
        tuple[str, ...],
        _flag(
            _HTTP,
            "Origins whose web pages may use the API (CORS), as https://chat.example.com; '*': all. Default: none.",
            metavar="ORIGIN",
            several=True,
        ),
    ] = ()
    max_logprobs: Annotated[
        int, Field(ge=0), _flag(_HTTP, "Most log-probabilities per token that a request may ask for.")
    ] = 20
    max_body_bytes: Annotated[int, Field(ge=1), _flag(_HTTP, "Larger request bodies are refused with 413.")] = (
        64 * 1024 * 1024
    )
    api_server_count: Annotated[int, Field(ge=1, le=256), _flag(_HTTP, "API processes that share the port.")] = 1

    device: Annotated[Device, _flag(_ENGINE, "'auto' takes CUDA where there is a GPU.")] = "auto"
    dtype: Annotated[
        Dtype, _flag(_ENGINE, "Type of the weights; 'auto' is float32 on the CPU and the checkpoint's on CUDA.")
    ] = "auto"
    state_dtype: Annotated[
        StateDtype,
        _flag(_ENGINE, "Type of the recurrent states; smaller ones serve large batches faster, with a small error."),
    ] = "float32"
    max_num_seqs: Annotated[
        int, Field(ge=1, le=65535), _flag(_ENGINE, "Sequences that run at once; fewer if memory holds fewer states.")
    ] = 256
    max_num_batched_tokens: Annotated[
        int | None,
        Field(ge=CHUNK, le=1 << 20),
        _flag(
            _ENGINE,
            "Most tokens in one step: decodes first, then pieces of prompts. At least --max-num-seqs + 64. "
            "Default: 8192 on CUDA, 2048 on the CPU, or that least if it is more.",
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        Field(ge=1),
        _flag(_ENGINE, "Most tokens of prompt and answer together. Default: unlimited."),
    ] = None
    gpu_memory_utilization: Annotated[
        float, Field(gt=0, le=1), _flag(_ENGINE, "Share of the GPU's memory to use, in (0, 1].", metavar="SHARE")
    ] = 0.9
    max_num_queued_reqs: Annotated[
        int, Field(ge=0), _flag(_ENGINE, "Sequences that may wait for a slot; beyond it requests are refused with 503.")
    ] = 4096
    max_concurrent_seqs_per_key: Annotated[
        int | None,
        Field(ge=1),
        _flag(
            _ENGINE,
            "Sequences that one API key may have waiting and running; beyond it requests are refused with 429. "
            "Default: unlimited.",
        ),
    ] = None
    swap_space: Annotated[
        float | None,
        Field(ge=0, le=_MAX_GIB),
        _flag(
            _ENGINE,
            "GiB of the host's memory for states of running sequences that make room for more urgent ones of the same "
            "API key; 0: none does. Default: an eighth of what is free, at most 1.",
            metavar="GIB",
        ),
    ] = None
    state_cache_gpu: Annotated[
        float | None,
        Field(ge=0, le=_MAX_GIB),
        _flag(
            _ENGINE,
            "GiB of the GPU's memory for states that later prompts can begin from; 0: none. "
            "Default: an eighth of what is left for states, at most 4.",
            metavar="GIB",
        ),
    ] = None
    state_cache_host: Annotated[
        float | None,
        Field(ge=0, le=_MAX_GIB),
        _flag(
            _ENGINE,
            "The same in the host's memory, for what the GPU has no room for. "
            "Default: an eighth of what is free, at most 4.",
            metavar="GIB",
        ),
    ] = None
    state_cache_dir: Annotated[
        str | None,
        _flag(
            _ENGINE,
            "Folder for states that memory has no room for, and for saved ones, which are there after a restart. "
            "Its own. Default: the ones are given up, the others end with the server.",
        ),
    ] = None
    state_cache_disk: Annotated[
        float,
        Field(ge=0, le=_MAX_GIB),
        _flag(_ENGINE, "GiB that --state-cache-dir may take; half of it is for saved states.", metavar="GIB"),
    ] = 16.0
    state_cache_dtype: Annotated[
        StateCacheDtype,
        _flag(
            _ENGINE,
            "Type to which these states are rounded: 'bfloat16' takes half of the memory, 'int8' with a scale per head "
            "and key channel a quarter, both at a small error.",
        ),
    ] = "exact"
    state_cache_shared: Annotated[
        bool,
        _flag(
            _ENGINE,
            "Let prompts begin from states of other API keys, who can then tell from the time of an answer what others "
            "have asked.",
        ),
    ] = False
    max_saved_states: Annotated[
        int,
        Field(ge=1, le=1 << 24),
        _flag(_ENGINE, "States that may be saved; beyond it requests are refused with 507."),
    ] = 65536
    max_saved_states_per_key: Annotated[
        int | None,
        Field(ge=1),
        _flag(
            _ENGINE,
            "States that may be saved with one API key; beyond it requests are refused with 403. Default: unlimited.",
        ),
    ] = None
    max_saved_gib_per_key: Annotated[
        float | None,
        Field(gt=0, le=_MAX_GIB),
        _flag(_ENGINE, "GiB that these may take. Default: unlimited.", metavar="GIB"),
    ] = None
    state_signing_key: Annotated[
        SecretStr | None,
        _flag(
            _ENGINE,
            "Key of at least 16 characters, with which downloaded states are signed, and uploaded ones must be. "
            "Default: neither.",
            env="GALE_STATE_SIGNING_KEY",
            metavar="KEY",
        ),
    ] = None
    state_signing_key_file: Annotated[
        Path | None, _flag(_ENGINE, "File that holds this key alone.", metavar="FILE")
    ] = None
    seed: Annotated[
        int, Field(ge=0, lt=1 << 63), _flag(_ENGINE, "Seed of requests that bring none, and of dummy weights.")
    ] = 0

    shutdown_timeout: Annotated[
        float,
        Field(ge=0, le=86_400),
        _flag(
            _PROCESS,
            "After the first SIGTERM or Ctrl-C: seconds that running requests may take to finish.",
            metavar="SECONDS",
        ),
    ] = 25.0
    max_restarts: Annotated[
        int,
        Field(ge=0),
        _flag(
            _PROCESS,
            "How often in a row a process that died is started again before the server gives up; 0: never.",
        ),
    ] = 5
    watchdog_timeout: Annotated[
        float,
        Field(ge=0, le=86_400),
        _flag(
            _PROCESS,
            "Seconds that a step of the engine, or one turn of an API process, may take before the process counts as "
            "hung and is replaced; 0: any time.",
            metavar="SECONDS",
        ),
    ] = 300.0
    startup_timeout: Annotated[
        float,
        Field(ge=0, le=86_400),
        _flag(
            _PROCESS,
            "Seconds that the engine may take to load the model before it counts as hung; 0: any time.",
            metavar="SECONDS",
        ),
    ] = 1800.0
    enable_sleep_mode: Annotated[
        bool,
        _flag(
            _PROCESS,
            "Let clients end the engine and start it again, with POST /sleep and POST /wake_up, to free the device. "
            "Needs --state-cache-dir, where saved states outlast it.",
        ),
    ] = False
    log_level: Annotated[LogLevel, _flag(_PROCESS, "Least severe messages to log.")] = "info"
    log_format: Annotated[LogFormat, _flag(_PROCESS, "Log lines as text or as JSON objects, on stderr.")] = "text"
    max_log_len: Annotated[
        int,
        Field(ge=0, le=1 << 20),
        _flag(_PROCESS, "Characters of each prompt and of each answer in a request's line of the log; 0: no text."),
    ] = 0

    @model_validator(mode="after")
    def _combinations(self) -> "Settings":
        if self.skip_tokenizer_init and self.tokenizer is not None:
            raise ValueError("--skip-tokenizer-init and --tokenizer exclude each other")
        if self.skip_tokenizer_init and self.chat_template is not None:
            raise ValueError("--skip-tokenizer-init and --chat-template exclude each other")
        if not all(key.get_secret_value() for key in self.api_key):
            raise ValueError("--api-key: a key must not be empty")
        if not self.keys:
            for needs_keys in (
                "protect_all_routes",
                "max_concurrent_seqs_per_key",
                "max_saved_states_per_key",
                "max_saved_gib_per_key",
            ):
                if getattr(self, needs_keys):
                    raise ValueError(f"--{needs_keys.replace('_', '-')} needs --api-key or --api-key-file")
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"--allowed-origins: {origin!r} is not an origin, such as https://chat.example.com:8443"
                )
        least = self.max_num_seqs + CHUNK
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < least:
            # A step takes one token of every decoding sequence and at least one piece of a prompt.
            raise ValueError(
                f"--max-num-batched-tokens must be at least --max-num-seqs + {CHUNK}, "
                f"that is {least}, is {self.max_num_batched_tokens}"
            )
        if self.enable_sleep_mode and self.state_cache_dir is None:
            raise ValueError("--enable-sleep-mode needs --state-cache-dir, so that saved states are not lost")
        if self.revision is not None and (self.model is None or _is_folder(self.model)):
            raise ValueError("--revision needs a hub id as --model; a local folder has no revisions")
        return self

    @cached_property
    def keys(self) -> tuple[ApiKey, ...]:
        """All accepted keys; those given as flags are called key-1, key-2 ...

        Raises:
            SettingsError: the key file is wrong, or a key is given under two names.
        """
        given = tuple(
            ApiKey(f"key-{number}", hash_key(key.get_secret_value())) for number, key in enumerate(self.api_key, 1)
        )
        listed = () if self.api_key_file is None else read_key_file(self.api_key_file)
        check_distinct(given + listed)
        taken = {key.name for key in given} & {key.name for key in listed}
        if taken:
            raise SettingsError(f"--api-key-file: {min(taken)} is the name of a key given with --api-key")
        return given + listed

    @cached_property
    def signing_key(self) -> bytes | None:
        """With which states that travel are signed; None: they are not.

        Raises:
            SettingsError: the file cannot be read, or the key is too short.
        """
        flag, key = "--state-signing-key", self.state_signing_key
        content = None if key is None else key.get_secret_value().encode("utf-8", "surrogateescape")
        if self.state_signing_key_file is not None:
            if key is not None:
                raise SettingsError("--state-signing-key and --state-signing-key-file exclude each other")
            flag = "--state-signing-key-file"
            try:
                content = self.state_signing_key_file.read_bytes().strip()
            except OSError as error:
                raise SettingsError(f"{flag}: cannot read {self.state_signing_key_file}: {error.strerror}") from None
        if content is not None and len(content) < _LEAST_SIGNING_KEY:
            raise SettingsError(f"{flag}: a key must have at least {_LEAST_SIGNING_KEY} characters")
        return content

    @classmethod
    def from_flags(cls, flags: Mapping[str, object]) -> "Settings":
        """Validate what the command line and the environment gave.

        Args:
            flags: values by field name; fields left out take their defaults.

        Raises:
            SettingsError: one line, naming the flag at fault.
        """
        try:
            return cls.model_validate(dict(flags))
        except ValidationError as error:
            raise SettingsError("; ".join(_explain(error))) from None

    def model_names(self, model_folder: Path) -> tuple[str, ...]:
        """The names clients may use for the model that was resolved to ``model_folder``."""
        if self.served_model_name:
            return tuple(dict.fromkeys(self.served_model_name))
        if self.model is None:
            return (model_folder.name,)
        if _is_folder(self.model):
            return tuple(dict.fromkeys((model_folder.resolve().name, self.model)))
        return (self.model,)

    def engine_config(self, model_folder: Path, tokenizer_folder: Path | None) -> EngineConfig:
        """The engine's part, with the folders that the hub ids were resolved to."""
        return EngineConfig(
            model_folder=model_folder,
            tokenizer_folder=tokenizer_folder,
            device=self.device,
            dtype=self.dtype,
            state_dtype=self.state_dtype,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_num_queued_reqs=self.max_num_queued_reqs,
            max_concurrent_seqs_per_key=self.max_concurrent_seqs_per_key,
            several_keys=len({key.name for key in self.keys}) > 1,
            max_logprobs=self.max_logprobs,
            generation_config=self.generation_config,
            load_format=self.load_format,
            seed=self.seed,
            state_cache=self._state_cache(),
            swap_bytes=_to_bytes(self.swap_space),
        )

    def _state_cache(self) -> StateCacheConfig:
        return StateCacheConfig(
            gpu_bytes=_to_bytes(self.state_cache_gpu),
            host_bytes=_to_bytes(self.state_cache_host),
            folder=None if self.state_cache_dir is None else Path(self.state_cache_dir).expanduser(),
            disk_bytes=_to_bytes(self.state_cache_disk) or 0,
            dtype=self.state_cache_dtype,
            shared=self.state_cache_shared,
            signing_key=self.signing_key,
            max_saved=self.max_saved_states,
            max_saved_per_key=self.max_saved_states_per_key,
            saved_bytes_per_key=_to_bytes(self.max_saved_gib_per_key),
        )

    def process_settings(self) -> ProcessSettings:
        """The launcher's part."""
        return ProcessSettings(
            shutdown_timeout=self.shutdown_timeout,
            max_restarts=self.max_restarts,
            watchdog_timeout=self.watchdog_timeout,
            startup_timeout=self.startup_timeout,
        )

    def api_settings(self, model_folder: Path, tokenizer_folder: Path | None) -> ApiSettings:
        """The API processes' part; keys leave the launcher as hashes only."""
        return ApiSettings(
            served_model_names=self.model_names(model_folder),
            revision=self.revision,
            api_keys=self.keys,
            protect_all_routes=self.protect_all_routes,
            allowed_origins=self.allowed_origins,
            tokenizer_folder=tokenizer_folder,
            chat_template=self.chat_template,
            max_model_len=self.max_model_len,
            max_body_bytes=self.max_body_bytes,
            sleep_mode=self.enable_sleep_mode,
            max_log_len=self.max_log_len,
            created=int(time.time()),
        )


def _to_bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * (1 << 30))


def _is_folder(model: str) -> bool:
    return Path(model).expanduser().is_dir()


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        message = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:
            yield message
        else:
            flag = str(fault["loc"][0]).replace("_", "-")
            yield f"--{flag}: {message[:1].lower()}{message[1:]}"
