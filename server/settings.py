"""Settings: every flag of ``gale serve``, validated once.

The launcher builds one :class:`Settings` from the command line and hands each component only what it needs:
:class:`EngineConfig` to the engine process, :class:`ApiSettings` to the API processes. ``auto`` for device and dtype is
resolved in the engine process, the only one that imports torch.
"""

import re
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError, model_validator

from server.component_settings import CHUNK, ApiSettings, EngineConfig, ProcessSettings, StateCacheConfig
from server.errors import SettingsError
from server.flags import Flags
from server.keys import ApiKey, check_distinct, hash_key, read_key_file

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")
"""Scheme, host and perhaps port, as browsers write them: no path, no slash at the end (RFC 6454)."""

_LEAST_SIGNING_KEY = 16


class Settings(Flags):
    """The flags' values, which go together, and what follows from them."""

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
