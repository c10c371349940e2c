"""Reading config.json and generation_config.json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.engine.config import FEATURE_MAPS, GenerationConfig, GLAConfig
from server.errors import CheckpointError

FIXTURES = Path(__file__).parent.parent / "fixtures"
RECIPES = FIXTURES / "recipes"


def parse(**values: object) -> GLAConfig:
    return GLAConfig.from_dict({"model_type": "gla"} | values)


def test_defaults_are_flash_linear_attentions() -> None:
    config = parse()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (32000, 2048, 24)
    assert (config.num_heads, config.num_kv_heads, config.head_k, config.head_v) == (4, 4, 256, 512)
    assert (config.intermediate_size, config.norm_eps, config.feature_map, config.clamp_min) == (5632, 1e-6, None, None)
    assert config.use_output_gate and config.fuse_norm and config.elementwise_affine
    assert not config.use_short_conv and not config.tie_word_embeddings
    assert (config.dtype, config.eos_token_ids) == ("float32", ())


def test_derived_sizes_of_the_7b_recipe() -> None:
    config = GLAConfig.from_folder(RECIPES / "gla-7B-mistral-20B")
    assert (config.num_heads, config.num_kv_heads, config.head_k, config.head_v) == (32, 8, 128, 128)
    assert (config.key_dim, config.value_dim, config.kv_key_dim, config.kv_value_dim) == (4096, 4096, 1024, 1024)
    assert (config.intermediate_size, config.norm_eps, config.feature_map) == (14336, 1e-5, "relu")
    assert not config.use_output_gate


@pytest.mark.parametrize(
    ("hidden_size", "ratio", "size"),
    [(1024, 4, 2816), (2048, 4, 5632), (2560, 4, 6912), (96, 4, 256), (128, 4, 512), (512, 1, 512), (384, 1, 256)],
)
def test_intermediate_size_is_two_thirds_rounded_up(hidden_size: int, ratio: int, size: int) -> None:
    assert parse(hidden_size=hidden_size, hidden_ratio=ratio).intermediate_size == size
    assert parse(hidden_size=hidden_size, hidden_ratio=ratio, intermediate_size=300).intermediate_size == 300


def test_old_and_new_key_names() -> None:
    assert parse(rms_norm_eps=1e-5).norm_eps == 1e-5
    assert parse(rms_norm_eps=1e-5, norm_eps=1e-4).norm_eps == 1e-4
    assert parse(torch_dtype="bfloat16").dtype == "bfloat16"
    assert parse(dtype="float16", torch_dtype="bfloat16").dtype == "float16"


def test_values_that_pass() -> None:
    parse(
        attn=None,
        attnres_block_size=None,
        use_gk=True,
        use_gv=False,
        gate_logit_normalizer=16,
        gate_low_rank_dim=16,
        share_conv_kernel=True,
        use_short_conv=False,
        hidden_act="silu",
        quantization_config=None,
        max_position_embeddings=1,
        fuse_swiglu=False,
        some_future_key={"a": [1]},
    )
    for name in FEATURE_MAPS:
        assert parse(feature_map=name).feature_map == name
    assert parse(eos_token_id=[2, 7]).eos_token_ids == (2, 7)
    assert parse(num_kv_heads=None, clamp_min=0).clamp_min == 0.0


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model_type", {"model_type": "llama"}),
        ("model_type", {"model_type": None}),
        ("attn", {"attn": {"layers": [1], "num_heads": 4}}),
        ("attnres_block_size", {"attnres_block_size": 4}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("gate_fn", {"gate_fn": "sigmoid"}),
        ("use_gk", {"use_gk": False}),
        ("use_gv", {"use_gv": True}),
        ("gate_logit_normalizer", {"gate_logit_normalizer": 8}),
        ("gate_low_rank_dim", {"gate_low_rank_dim": 32}),
        ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
        ("share_conv_kernel", {"use_short_conv": True, "share_conv_kernel": True}),
        ("feature_map", {"feature_map": "bias_gelu"}),
        ("feature_map", {"feature_map": ["relu"]}),
        ("num_heads", {"num_heads": 0}),
        ("num_heads", {"num_heads": True}),
        ("num_heads", {"num_heads": 4.0}),
        ("num_kv_heads", {"num_kv_heads": 3}),
        ("num_kv_heads", {"num_kv_heads": 8}),
        ("hidden_size", {"hidden_size": "big"}),
        ("hidden_size", {"hidden_size": -2048}),
        ("num_hidden_layers", {"num_hidden_layers": 10**9}),
        ("vocab_size", {"vocab_size": -1}),
        ("vocab_size", {"vocab_size": 1 << 60}),
        ("expand_k", {"expand_k": 0.3}),
        ("expand_k", {"hidden_size": 2044, "expand_k": 0.5}),
        ("expand_v", {"expand_v": 0}),
        ("expand_v", {"expand_v": float("nan")}),
        ("expand_v", {"hidden_size": 2048, "num_heads": 3, "expand_k": 1.5}),
        ("intermediate_size", {"intermediate_size": 0}),
        ("hidden_ratio", {"hidden_ratio": -4}),
        ("hidden_ratio", {"hidden_ratio": 1e300}),
        ("norm_eps", {"norm_eps": 0}),
        ("rms_norm_eps", {"rms_norm_eps": -1}),
        ("clamp_min", {"clamp_min": 0.5}),
        ("conv_size", {"conv_size": 0}),
        ("use_output_gate", {"use_output_gate": "yes"}),
        ("dtype", {"dtype": "int8"}),
        ("torch_dtype", {"torch_dtype": "float8_e4m3fn"}),
        ("eos_token_id", {"eos_token_id": "</s>"}),
    ],
)
def test_refused_values_are_named(key: str, values: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=rf"^some/config\.json: {key}: ") as caught:
        GLAConfig.from_dict({"model_type": "gla"} | values, source="some/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"[]", "must hold a JSON object"), (b"\xff\xfe", "not valid JSON")],
)
def test_broken_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        GLAConfig.from_folder(tmp_path)


def test_missing_things(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        GLAConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="the folder is empty"):
        GLAConfig.from_folder(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        GLAConfig.from_folder(tmp_path)


def test_generation_config(tmp_path: Path) -> None:
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig((), {})
    values = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "max_length": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps(values | {"eos_token_id": 2, "do_sample": True}))
    config = GenerationConfig.from_folder(tmp_path)
    assert config.eos_token_ids == (2,)
    assert config.sampling_defaults == {key: value for key, value in values.items() if key != "max_length"}


def test_generation_config_without_sampling_is_greedy() -> None:
    assert GenerationConfig.from_dict({"do_sample": False, "temperature": 0.7}).sampling_defaults == {
        "temperature": 0.0
    }
    assert GenerationConfig.from_dict({"temperature": None}).sampling_defaults == {}


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"eos_token_id": [None]},
    ],
)
def test_generation_config_refusals(values: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {next(iter(values))}: "):
        GenerationConfig.from_dict(values)


def test_needs_no_torch() -> None:
    code = "import server.engine.config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
