"""A GLA language model written a second time: float64, one token after the other, straight from a checkpoint's tensors.

It shares nothing with the server but the checkpoint's format, so that one can be held against the other. Also here:
random checkpoints of any variant.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SMALL: dict[str, Any] = {
    "model_type": "gla",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "intermediate_size": 80,
    "norm_eps": 1e-5,
}
"""A small configuration for the variants to start from."""


def tensor_shapes(config: Mapping[str, Any], *, stacked: bool = False, conv_bias: bool = False) -> dict[str, list[int]]:
    """Names and shapes of a checkpoint's tensors, as flash-linear-attention names them."""
    width = config["hidden_size"]
    groups = config["num_heads"] // (config.get("num_kv_heads") or config["num_heads"])
    keys, values = int(width * config["expand_k"]), int(width * config["expand_v"])
    inner = config["intermediate_size"]
    gated = config.get("use_output_gate", True)
    shapes = {"model.embeddings.weight": [config["vocab_size"], width], "model.norm.weight": [width]}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [config["vocab_size"], width]
    for i in range(config["num_hidden_layers"]):
        layer = {
            "attn_norm.weight": [width],
            "attn.q_proj.weight": [keys, width],
            "attn.k_proj.weight": [keys // groups, width],
            "attn.v_proj.weight": [values // groups, width],
            "attn.gk_proj.0.weight": [16, width],
            "attn.gk_proj.1.weight": [keys // groups, 16],
            "attn.gk_proj.1.bias": [keys // groups],
            "attn.o_proj.weight": [width, values],
            "mlp_norm.weight": [width],
            "mlp.gate_proj.weight": [inner * (2 if stacked else 1), width],
            "mlp.down_proj.weight": [width, inner],
        }
        if not stacked:
            layer["mlp.up_proj.weight"] = [inner, width]
        if gated:
            layer["attn.g_proj.weight"] = [values, width]
        if config.get("elementwise_affine", True):
            name = "g_norm_swish_gate" if gated and config.get("fuse_norm", True) else "g_norm"
            layer[f"attn.{name}.weight"] = [values // config["num_heads"]]
        if config.get("use_short_conv"):
            for name, channels in (("q", keys), ("k", keys // groups), ("v", values // groups)):
                layer[f"attn.{name}_conv1d.weight"] = [channels, 1, config.get("conv_size", 4)]
                if conv_bias:
                    layer[f"attn.{name}_conv1d.bias"] = [channels]
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint folder of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def random_tensors(config: Mapping[str, Any], *, seed: int = 0, **layout: bool) -> dict[str, Tensor]:
    """Random float32 tensors for a configuration: strong and weak gates, norm weights away from 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config, **layout).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = 1 + 0.3 * noise
        elif name.endswith("gk_proj.1.bias"):
            tensors[name] = 1 + 3 * noise
        elif "conv1d" in name:
            tensors[name] = 0.5 * noise
        else:
            tensors[name] = noise * math.prod(shape[1:]) ** -0.5
    return tensors


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _feature_map(name: str | None, x: Tensor) -> Tensor:
    match name:
        case None:
            return x
        case "relu":
            return x.clamp(min=0)
        case "sqrelu":
            return x.clamp(min=0) ** 2
        case "sigmoid":
            return 1 / (1 + torch.exp(-x))
        case "logsigmoid":
            return -torch.log1p(torch.exp(-x))
        case "silu" | "swish":
            return _silu(x)
        case "gelu":
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise AssertionError(name)


def _conv(x_TC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    size = weight.shape[-1]
    out = torch.zeros_like(x_TC)
    for t in range(x_TC.shape[0]):
        for tap in range(size):
            source = t - (size - 1) + tap
            if source >= 0:
                out[t] += weight[:, 0, tap] * x_TC[source]
    return _silu(out if bias is None else out + bias)


def _attention(x_TD: Tensor, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    heads = config["num_heads"]
    kv_heads = config.get("num_kv_heads") or heads
    parts = {}
    for name in "qkv":
        parts[name] = x_TD @ weights[f"{name}_proj.weight"].T
        if config.get("use_short_conv"):
            bias = weights.get(f"{name}_conv1d.bias")
            parts[name] = _conv(parts[name], weights[f"{name}_conv1d.weight"], bias)
    logits = x_TD @ weights["gk_proj.0.weight"].T @ weights["gk_proj.1.weight"].T + weights["gk_proj.1.bias"]
    decay = -torch.log1p(torch.exp(-logits)) / 16
    if config.get("clamp_min") is not None:
        decay = decay.clamp(min=config["clamp_min"])
    q = _feature_map(config.get("feature_map"), parts["q"]).unflatten(1, (heads, -1))
    k = _feature_map(config.get("feature_map"), parts["k"]).unflatten(1, (kv_heads, -1))
    v = parts["v"].unflatten(1, (kv_heads, -1))
    decay = decay.unflatten(1, (kv_heads, -1))

    outputs = []
    state = torch.zeros(kv_heads, k.shape[2], v.shape[2], dtype=torch.float64)
    for t in range(x_TD.shape[0]):
        state = torch.exp(decay[t])[:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
        read = [q[t, h] @ state[h // (heads // kv_heads)] for h in range(heads)]
        outputs.append(torch.stack(read) * k.shape[2] ** -0.5)
    norm = weights.get("g_norm_swish_gate.weight", weights.get("g_norm.weight"))
    out = _rms_norm(torch.stack(outputs), norm, config["norm_eps"]).flatten(1)
    if config.get("use_output_gate", True):
        out = out * _silu(x_TD @ weights["g_proj.weight"].T)
    return out @ weights["o_proj.weight"].T


def oracle_logits(config: Mapping[str, Any], tensors: Mapping[str, Tensor], token_ids: list[int]) -> Tensor:
    """Logits of every position: float64 [T, vocab_size]."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    embedding = weights["model.embeddings.weight"]
    x = embedding[torch.tensor(token_ids)]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        attn = {name.removeprefix("attn."): w for name, w in layer.items() if name.startswith("attn.")}
        x = x + _attention(_rms_norm(x, layer["attn_norm.weight"], config["norm_eps"]), config, attn)
        h = _rms_norm(x, layer["mlp_norm.weight"], config["norm_eps"])
        gate, up = h @ layer["mlp.gate_proj.weight"].T, h
        if "mlp.up_proj.weight" in layer:
            up = h @ layer["mlp.up_proj.weight"].T
        else:
            gate, up = gate.chunk(2, dim=1)
        x = x + (_silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    x = _rms_norm(x, weights["model.norm.weight"], config["norm_eps"])
    return x @ weights.get("lm_head.weight", embedding).T
