"""Settings: defaults, limits, and what each component gets."""

import dataclasses
from pathlib import Path

import pytest

from server.component_settings import ApiSettings, EngineConfig, ProcessSettings
from server.errors import SettingsError
from server.keys import ApiKey, hash_key
from server.settings import Settings

# One value per flag, each different from its default, and where it must arrive.
GIVEN = {
    "model": "org/model",
    "tokenizer": "org/tokenizer",
    "revision": "v2",
    "served_model_name": ("first", "second"),
    "load_format": "dummy",
    "generation_config": "none",
    "skip_tokenizer_init": False,
    "host": "0.0.0.0",
    "port": 1234,
    "api_key": ("secret",),
    "api_key_file": Path(__file__).parent / "keys.txt",
    "protect_all_routes": True,
    "allowed_origins": ("https://a.example", "http://localhost:3000"),
    "max_logprobs": 3,
    "max_body_bytes": 1000,
    "api_server_count": 4,
    "device": "cuda",
    "dtype": "bfloat16",
    "state_dtype": "float32",
    "max_num_seqs": 17,
    "max_num_batched_tokens": 640,
    "chat_template": "{{ messages }}",
    "max_model_len": 5000,
    "gpu_memory_utilization": 0.5,
    "max_num_queued_reqs": 6,
    "max_concurrent_seqs_per_key": 5,
    "swap_space": 0.25,
    "state_cache_gpu": 0.5,
    "state_cache_host": 1.0,
    "state_cache_dir": "states",
    "state_cache_disk": 2.0,
    "state_cache_dtype": "int8",
    "state_cache_shared": True,
    "max_saved_states": 500,
    "max_saved_states_per_key": 50,
    "max_saved_gib_per_key": 0.25,
    "state_signing_key": None,
    "state_signing_key_file": Path(__file__).parent / "keys.txt",
    "seed": 99,
    "shutdown_timeout": 3.5,
    "max_restarts": 2,
    "watchdog_timeout": 7.5,
    "startup_timeout": 70.0,
    "enable_sleep_mode": True,
    "log_level": "error",
    "log_format": "json",
    "max_log_len": 80,
}


def test_given_values_cover_every_setting() -> None:
    assert set(GIVEN) == set(Settings.model_fields)


def test_engine_gets_its_part() -> None:
    config = Settings.from_flags(GIVEN).engine_config(Path("model"), Path("tokenizer"))
    assert dataclasses.asdict(config) == {
        "model_folder": Path("model"),
        "tokenizer_folder": Path("tokenizer"),
        "several_keys": True,
        "swap_bytes": 1 << 28,
        "state_cache": {
            "gpu_bytes": 1 << 29,
            "host_bytes": 1 << 30,
            "folder": Path("states"),
            "disk_bytes": 2 << 30,
            "dtype": "int8",
            "shared": True,
            "max_saved": 500,
            "max_saved_per_key": 50,
            "saved_bytes_per_key": 1 << 28,
            "signing_key": (Path(__file__).parent / "keys.txt").read_bytes().strip(),
        },
        **{name: GIVEN[name] for name in GIVEN if name in {field.name for field in dataclasses.fields(EngineConfig)}},
    }


def test_api_gets_its_part() -> None:
    api = Settings.from_flags(GIVEN).api_settings(Path("model"), None)
    assert api == ApiSettings(
        served_model_names=("first", "second"),
        revision="v2",
        api_keys=(ApiKey("key-1", hash_key("secret")), ApiKey("alice", hash_key("second"))),
        protect_all_routes=True,
        allowed_origins=("https://a.example", "http://localhost:3000"),
        tokenizer_folder=None,
        chat_template=GIVEN["chat_template"],
        max_model_len=5000,
        max_body_bytes=1000,
        sleep_mode=True,
        max_log_len=80,
        created=api.created,
    )


def test_the_launcher_gets_its_part() -> None:
    assert Settings.from_flags(GIVEN).process_settings() == ProcessSettings(3.5, 2, 7.5, 70.0)


def test_defaults() -> None:
    settings = Settings.from_flags({})
    assert (settings.host, settings.port, settings.device, settings.dtype) == ("127.0.0.1", 8000, "auto", "auto")
    assert settings.max_model_len is None
    assert settings.max_num_batched_tokens is None  # the engine knows the device
    assert settings.max_body_bytes == 64 * 1024 * 1024
    assert settings.api_settings(Path("shipped"), None).api_keys == ()


def test_key_stands_nowhere_in_clear_text() -> None:
    settings = Settings.from_flags({"api_key": ["topsecret"]})
    api = settings.api_settings(Path("model"), None)
    assert "topsecret" not in repr(settings) + str(settings) + repr(api) + settings.model_dump_json()
    digest = "53336a676c64c1396553b2b7c92f38126768827c93b64d9142069c10eda7a721"
    assert api.api_keys == (ApiKey("key-1", digest),)


def test_names_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert Settings.from_flags({}).model_names(Path("assets/shipped")) == ("shipped",)
    assert Settings.from_flags({"model": "org/name"}).model_names(Path("cache/xyz")) == ("org/name",)
    given = f"{folder}/"
    assert Settings.from_flags({"model": given}).model_names(folder) == ("my-model", given)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": 65536}, "--port"),
        ({"port": -1}, "--port"),
        ({"port": "eight"}, "--port"),
        ({"host": ""}, "--host"),
        ({"device": "gpu"}, "--device"),
        ({"dtype": "float64"}, "--dtype"),
        ({"state_dtype": "float16"}, "--state-dtype"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"max_num_batched_tokens": 63}, "--max-num-batched-tokens"),
        ({"max_model_len": 0}, "--max-model-len"),
        ({"gpu_memory_utilization": 0}, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": 1.1}, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": "nan"}, "--gpu-memory-utilization"),
        ({"max_num_queued_reqs": -1}, "--max-num-queued-reqs"),
        ({"api_key": ["k"], "max_concurrent_seqs_per_key": 0}, "--max-concurrent-seqs-per-key"),
        ({"max_concurrent_seqs_per_key": 3}, "--max-concurrent-seqs-per-key needs --api-key"),
        ({"protect_all_routes": True}, "--protect-all-routes needs --api-key"),
        ({"allowed_origins": ["https://a.example/"]}, "--allowed-origins"),
        ({"allowed_origins": ["a.example"]}, "--allowed-origins"),
        ({"allowed_origins": ["https://*.example/x"]}, "--allowed-origins"),
        ({"allowed_origins": [""]}, "--allowed-origins"),
        ({"max_logprobs": -1}, "--max-logprobs"),
        ({"max_num_seqs": 200, "max_num_batched_tokens": 263}, "--max-num-batched-tokens must be at least"),
        ({"max_body_bytes": 0}, "--max-body-bytes"),
        ({"seed": -1}, "--seed"),
        ({"seed": 1 << 63}, "--seed"),
        ({"api_server_count": 0}, "--api-server-count"),
        ({"shutdown_timeout": -1}, "--shutdown-timeout"),
        ({"shutdown_timeout": "inf"}, "--shutdown-timeout"),
        ({"log_level": "loud"}, "--log-level"),
        ({"log_format": "xml"}, "--log-format"),
        ({"load_format": "pickle"}, "--load-format"),
        ({"generation_config": "all"}, "--generation-config"),
        ({"served_model_name": [""]}, "--served-model-name"),
        ({"api_key": [""]}, "--api-key"),
        ({"skip_tokenizer_init": True, "tokenizer": "x"}, "--skip-tokenizer-init"),
        ({"skip_tokenizer_init": True, "chat_template": "x"}, "--skip-tokenizer-init and --chat-template"),
        ({"revision": "main"}, "--revision"),
        ({"revision": "main", "model": "."}, "--revision"),
        ({"colour": "red"}, "--colour"),
    ],
)
def test_impossible_values_name_their_flag(flags: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_flags(flags)
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)


def test_wrong_key_is_not_repeated_in_the_error() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_flags({"api_key": [{"topsecret": 1}]})
    assert "topsecret" not in str(caught.value)


def test_sleep_mode_needs_a_place_for_saved_states() -> None:
    with pytest.raises(SettingsError, match="--enable-sleep-mode needs --state-cache-dir"):
        Settings.from_flags({"enable_sleep_mode": True})
