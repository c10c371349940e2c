"""What a checkpoint's ``config.json`` and ``generation_config.json`` say, checked. Torch-free.

Keys, defaults and derived sizes are those of flash-linear-attention's ``gla`` model type.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from server.errors import CheckpointError
from server.jsonfile import read_json_object

DTYPES: Final = ("float32", "bfloat16", "float16")
FEATURE_MAPS: Final = ("relu", "sigmoid", "logsigmoid", "silu", "swish", "sqrelu", "gelu")
"""flash-linear-attention's activations by name, without ``bias_gelu``, which takes a bias that ``gla`` has not."""

_MAX_SIZE = 1 << 24
_MAX_LAYERS = 4096
_ACTIVATIONS = ("swish", "silu")  # two names of one function

# Keys that would change the result if they were passed over, with the only values (besides null) that do not.
_SUPPORTED_VALUES: Final[Mapping[str, tuple[object, ...]]] = {
    "hidden_act": _ACTIVATIONS,
    "gate_fn": _ACTIVATIONS,
    "use_gk": (True,),
    "use_gv": (False,),
    "gate_logit_normalizer": (16,),
    "gate_low_rank_dim": (16,),
    "quantization_config": (),
}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes typed values out of a JSON object; errors name the file and the key. Null counts as absent."""

    source: Path | str
    values: Mapping[str, Any]

    def fail(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key}: {problem}")

    def integer(self, key: str, default: int, *, low: int = 1, high: int = _MAX_SIZE) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"must be an integer from {low} to {high}, is {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(key, f"must be a finite number, is {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, is {value!r}")
        return value

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.get(key, default)
        if value not in choices:
            raise self.fail(key, f"must be one of {', '.join(choices)}, is {value!r}")
        return str(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise self.fail(key, f"must be a token id or a list of token ids, is {value!r}")
        return tuple(ids)

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


@dataclass(frozen=True, slots=True)
class GLAConfig:
    """The architecture of a ``gla`` checkpoint.

    Attributes:
        vocab_size: rows of the embedding; token ids are in [0, vocab_size).
        hidden_size: width of the residual stream.
        num_hidden_layers: layers.
        num_heads: query heads.
        num_kv_heads: heads that have keys, values, gates and a state; divides ``num_heads``.
        head_k: channels of a head's queries and keys.
        head_v: channels of a head's values.
        intermediate_size: width of the gated MLP.
        norm_eps: added to the mean square in every RMSNorm.
        feature_map: name of the function applied to queries and keys, or None.
        use_output_gate: whether the heads' outputs are multiplied by swish of a projection.
        use_short_conv: whether queries, keys and values pass through a causal depthwise convolution.
        conv_size: taps of that convolution.
        clamp_min: lower bound of the log decay, <= 0, or None.
        fuse_norm: as the checkpoint was trained; decides only what the heads' norm is called.
        elementwise_affine: whether the heads' norm has a weight.
        tie_word_embeddings: whether the output projection is the embedding.
        dtype: of the checkpoint's weights, one of :data:`DTYPES`.
        eos_token_ids: ids that end a text; perhaps outside the vocabulary, perhaps none.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    num_kv_heads: int
    head_k: int
    head_v: int
    intermediate_size: int
    norm_eps: float
    feature_map: str | None
    use_output_gate: bool
    use_short_conv: bool
    conv_size: int
    clamp_min: float | None
    fuse_norm: bool
    elementwise_affine: bool
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def key_dim(self) -> int:
        """Channels of all queries."""
        return self.num_heads * self.head_k

    @property
    def value_dim(self) -> int:
        """Channels of all heads' outputs."""
        return self.num_heads * self.head_v

    @property
    def kv_key_dim(self) -> int:
        """Channels of all keys, and of all gates."""
        return self.num_kv_heads * self.head_k

    @property
    def kv_value_dim(self) -> int:
        """Channels of all values."""
        return self.num_kv_heads * self.head_v

    @classmethod
    def from_folder(cls, folder: Path) -> "GLAConfig":
        """Read ``config.json`` of a checkpoint folder.

        Raises:
            CheckpointError: no folder, no such file, or a value that is wrong or not supported.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        if not any(folder.iterdir()):
            raise CheckpointError(f"{folder}: the folder is empty; a checkpoint has config.json and *.safetensors")
        path = folder / "config.json"
        return cls.from_dict(read_json_object(path), source=path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: Path | str = "config.json") -> "GLAConfig":
        """Check the contents of a ``config.json``; ``source`` names it in errors.

        Raises:
            CheckpointError: a value is wrong or not supported.
        """
        read = _Reader(source, values)
        _refuse_unsupported(read)
        hidden_size = read.integer("hidden_size", 2048)
        num_heads = read.integer("num_heads", 4)
        num_kv_heads = read.integer("num_kv_heads", num_heads)
        if num_heads % num_kv_heads:
            raise read.fail("num_kv_heads", f"must divide num_heads = {num_heads}, is {num_kv_heads}")
        feature_map = values.get("feature_map")
        if feature_map is not None:
            feature_map = read.choice("feature_map", "", FEATURE_MAPS)
        clamp_min = None if values.get("clamp_min") is None else read.number("clamp_min", 0.0)
        if clamp_min is not None and clamp_min > 0:
            raise read.fail("clamp_min", f"must not be positive, is {clamp_min}")
        # Checkpoints of early 2024 call it rms_norm_eps.
        norm_eps_key = "rms_norm_eps" if "norm_eps" not in values and "rms_norm_eps" in values else "norm_eps"
        norm_eps = read.number(norm_eps_key, 1e-6)
        if norm_eps <= 0:
            raise read.fail(norm_eps_key, f"must be positive, is {norm_eps}")
        return cls(
            vocab_size=read.integer("vocab_size", 32000),
            hidden_size=hidden_size,
            num_hidden_layers=read.integer("num_hidden_layers", 24, high=_MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_k=_head_size(read, "expand_k", 0.5, hidden_size, num_heads),
            head_v=_head_size(read, "expand_v", 1.0, hidden_size, num_heads),
            intermediate_size=_intermediate_size(read, hidden_size),
            norm_eps=norm_eps,
            feature_map=feature_map,
            use_output_gate=read.boolean("use_output_gate", True),
            use_short_conv=read.boolean("use_short_conv", False),
            conv_size=read.integer("conv_size", 4, high=64),
            clamp_min=clamp_min,
            fuse_norm=read.boolean("fuse_norm", True),
            elementwise_affine=read.boolean("elementwise_affine", True),
            tie_word_embeddings=read.boolean("tie_word_embeddings", False),
            dtype=_dtype(read),
            eos_token_ids=read.token_ids("eos_token_id"),
        )


def _refuse_unsupported(read: _Reader) -> None:
    """Raise for another model type, and for keys that would change the result and are not supported."""
    model_type = read.values.get("model_type")
    if model_type != "gla":
        raise read.fail("model_type", f"must be 'gla', is {model_type!r}: not a Gated Linear Attention checkpoint")
    for key, value in read.values.items():
        if key.startswith("attnres") and value is not None and value is not False:
            raise read.fail(key, "attention residuals are not supported")
        if key in _SUPPORTED_VALUES and value is not None and value not in _SUPPORTED_VALUES[key]:
            supported = " or ".join(json.dumps(choice) for choice in (*_SUPPORTED_VALUES[key], None))
            raise read.fail(key, f"only {supported} is supported, is {value!r}")
    if read.values.get("attn") is not None:
        raise read.fail("attn", "models that mix softmax attention layers in are not supported")
    if read.boolean("use_short_conv", False) and read.boolean("share_conv_kernel", False):
        raise read.fail("share_conv_kernel", "one short convolution shared by q, k and v is not supported")


def _head_size(read: _Reader, key: str, default: float, hidden_size: int, num_heads: int) -> int:
    """Channels per head, where the heads together have ``hidden_size`` times the factor named ``key``."""
    factor = read.number(key, default)
    channels = round(hidden_size * factor)
    if channels <= 0 or channels > _MAX_SIZE or abs(hidden_size * factor - channels) > 1e-6 * channels:
        raise read.fail(key, f"{factor} times hidden_size = {hidden_size} must be a positive integer")
    if channels % num_heads:
        raise read.fail(key, f"{factor} times hidden_size = {hidden_size} is not divisible by num_heads = {num_heads}")
    return channels // num_heads


def _intermediate_size(read: _Reader, hidden_size: int) -> int:
    """The given size, or 2/3 of hidden_size * hidden_ratio rounded up to a multiple of 256."""
    if read.values.get("intermediate_size") is not None:
        return read.integer("intermediate_size", 0)
    ratio = read.number("hidden_ratio", 4)
    size = 256 * math.ceil(int(hidden_size * ratio * 2 / 3) / 256)
    if not 0 < size <= _MAX_SIZE:
        raise read.fail("hidden_ratio", f"must be a positive ratio of sane size, is {ratio}")
    return size


def _dtype(read: _Reader) -> str:
    """The weights' type by name; ``dtype`` since transformers 5, ``torch_dtype`` before."""
    key = "dtype" if read.values.get("dtype") is not None else "torch_dtype"
    return read.choice(key, "float32", DTYPES)


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What ``generation_config.json`` says of sampling.

    Attributes:
        eos_token_ids: ids that end a text, in addition to ``config.json``'s.
        sampling_defaults: fields of :class:`server.types.SamplingParams` to use where a request is silent.
    """

    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, float | int]

    @classmethod
    def from_folder(cls, folder: Path) -> "GenerationConfig":
        """Read the file of a checkpoint folder; without one there are no defaults.

        Raises:
            CheckpointError: the file holds no JSON object, or a value out of range.
        """
        path = folder / "generation_config.json"
        return cls.from_dict(read_json_object(path), source=path) if path.is_file() else cls((), {})

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, source: Path | str = "generation_config.json"
    ) -> "GenerationConfig":
        """Check the contents of a ``generation_config.json``; ``source`` names it in errors.

        Raises:
            CheckpointError: a value is out of range.
        """
        read = _Reader(source, values)
        defaults: dict[str, float | int] = {}
        for key, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
        ):
            if values.get(key) is not None:
                number = read.number(key, 0.0)
                positive = key in ("top_p", "repetition_penalty")
                if not low <= number <= high or (positive and number == 0):
                    raise read.fail(key, f"out of range: {number}")
                defaults[key] = number
        if values.get("top_k") is not None:
            defaults["top_k"] = read.integer("top_k", 0, low=0, high=(1 << 31) - 1)
        if values.get("do_sample") is False:
            defaults["temperature"] = 0.0
        return cls(read.token_ids("eos_token_id"), defaults)
