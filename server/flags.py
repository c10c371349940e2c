"""Every flag of ``gale serve``: its type, bounds and default, and what the command line says of it."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.config import JsonDict

from server.component_settings import CHUNK, GenerationConfigSource, LoadFormat, LogFormat, LogLevel, StateCacheDtype

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
StateDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]

_MAX_GIB = float(1 << 20)


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


class Flags(BaseModel):
    """Each field is the flag of that name with dashes. :class:`server.settings.Settings` says which go together."""

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
