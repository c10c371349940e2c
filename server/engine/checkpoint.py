"""Weights of a checkpoint folder, straight into a model on its device.

The files' headers are compared with the architecture before a weight is allocated. Then each tensor is copied from the
mapped file into its place, converted on the way: beside the model there is never more in memory than one tensor.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.engine.config import GLAConfig
from server.engine.model import GLAModel
from server.errors import CheckpointError
from server.jsonfile import read_json_object

_FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # safetensors' names -> bytes
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CONV_BIAS = "_conv1d.bias"
_OLD_NAMES = {"model.embed_tokens.weight": "model.embeddings.weight"}  # as in early 2024


def load_model(
    folder: Path,
    config: GLAConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    load_format: str = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> GLAModel:
    """Build a model and fill its weights.

    Args:
        folder: a Hugging Face checkpoint folder with ``*.safetensors``.
        config: the folder's :class:`GLAConfig`.
        device: where the weights go; ``meta`` only compares the files with the architecture.
        dtype: of the weights; the files' are converted.
        load_format: ``auto`` reads the files; ``dummy`` reads none and draws the weights at random.
        seed: of the random weights.
        progress: whether to draw a progress bar on stderr; None: if stderr is a terminal.

    Raises:
        CheckpointError: the weights are missing, broken, or not those of this architecture.
    """
    if load_format == "dummy":
        model = GLAModel(config, device=device, dtype=dtype)
        _fill_at_random(model, seed)
        return model
    stored = _read_headers(folder)
    expected = GLAModel(config, device="meta", dtype=dtype).checkpoint_tensors()
    plan = _match(stored, expected, folder, tied=config.tie_word_embeddings)
    model = GLAModel(config, device=device, dtype=dtype)
    if not model.norm.is_meta:
        _copy_weights(model, plan, progress=sys.stderr.isatty() if progress is None else progress)
    return model


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """A tensor in a file, by the file's header."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        size = _FLOATS.get(self.dtype, 1)
        for length in self.shape:
            size *= length
        return size


def _find_files(folder: Path) -> tuple[list[Path], Mapping[str, Path]]:
    """The checkpoint's files, and for a sharded one the file that its index names for each tensor."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    single = folder / "model.safetensors"
    if single.is_file():
        return [single], {}
    index_path = folder / "model.safetensors.index.json"
    if not index_path.is_file():
        if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
            raise CheckpointError(
                f"{folder / pickles[0]}: pickled weights are not loaded, since reading them may run foreign code; "
                "convert the checkpoint to safetensors"
            )
        raise CheckpointError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json; other formats are not loaded"
        )
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map: must be an object that names a file for each tensor")
    index: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index_path}: weight_map: {name}: not the name of a safetensors file: {file!r}")
        index[name] = folder / file
        if not index[name].is_file():
            raise CheckpointError(f"{index_path}: weight_map: {name}: {file} is missing")
    return sorted(set(index.values())), index


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A mapped safetensors file; what goes wrong with it becomes a CheckpointError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file: {error}") from error


def _read_headers(folder: Path) -> dict[str, _StoredTensor]:
    """All tensors of a checkpoint by their present name."""
    stored: dict[str, _StoredTensor] = {}
    paths, index = _find_files(folder)
    for path in paths:
        with _open(path) as file:
            for stored_name in file.keys():  # noqa: SIM118 (no mapping)
                name = _OLD_NAMES.get(stored_name, stored_name)
                if name in stored:
                    raise CheckpointError(f"{path}: {stored_name}: also stands in {stored[name].path.name}")
                header = file.get_slice(stored_name)
                stored[name] = _StoredTensor(path, stored_name, tuple(header.get_shape()), header.get_dtype())
    for stored_name, path in index.items():
        name = _OLD_NAMES.get(stored_name, stored_name)
        if name not in stored or stored[name].path != path:
            raise CheckpointError(f"{path}: {stored_name}: missing, although the index says that it stands here")
    return stored


def _match(
    stored: Mapping[str, _StoredTensor], expected: Mapping[str, Tensor], folder: Path, *, tied: bool
) -> dict[str, _StoredTensor]:
    """The tensors to copy, by name; raises unless they are exactly those of the architecture, in its shapes."""
    shapes = {name: tuple(view.shape) for name, view in expected.items()}
    if not any(name.endswith(_CONV_BIAS) for name in stored):
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(_CONV_BIAS)}
    for name in [name for name in shapes if name.endswith("mlp.up_proj.weight")]:
        gate_name = name.replace("up_proj", "gate_proj")
        rows, width = shapes[gate_name]
        if name not in stored and gate_name in stored and stored[gate_name].shape == (2 * rows, width):
            del shapes[name]
            shapes[gate_name] = (2 * rows, width)  # as in 2024: gate and up stacked

    for name in shapes:
        if name not in stored:
            raise CheckpointError(f"{folder}: {name}: this tensor is missing from the safetensors files")
    for name, tensor in stored.items():
        if name == "lm_head.weight" and tied:
            continue  # a copy of the embedding, as config.json says
        if name not in shapes:
            raise CheckpointError(f"{tensor.path}: {name}: unexpected tensor; config.json describes a model without it")
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.path}: {name}: has shape {list(tensor.shape)}; by config.json it is {list(shapes[name])}"
            )
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{tensor.path}: {name}: has dtype {tensor.dtype}; supported are {', '.join(_FLOATS)}"
            )
    return {name: stored[name] for name in shapes}


def _copy_weights(model: GLAModel, plan: Mapping[str, _StoredTensor], *, progress: bool) -> None:
    """Copy the planned tensors into the model, file by file."""
    views = model.checkpoint_tensors()
    for name, view in views.items():
        if name.endswith(_CONV_BIAS):
            view.zero_()
    total, done = sum(tensor.num_bytes for tensor in plan.values()), 0
    for path in sorted({tensor.path for tensor in plan.values()}):
        with _open(path) as file:
            for name, tensor in plan.items():
                if tensor.path != path:
                    continue
                targets = [views[name]]
                if tensor.shape != views[name].shape:  # gate and up stacked
                    targets.append(views[name.replace("gate_proj", "up_proj")])
                for target, part in zip(targets, file.get_tensor(tensor.name).chunk(len(targets)), strict=True):
                    target.copy_(part)
                done += tensor.num_bytes
                if progress:
                    _draw_progress(done, total)


def _draw_progress(done: int, total: int) -> None:
    """Draw the progress bar over itself; the last time, end the line."""
    filled = 30 * done // total
    bar = f"\rLoading weights [{'#' * filled}{'.' * (30 - filled)}] {done / 1e9:.2f} of {total / 1e9:.2f} GB"
    sys.stderr.write(bar + ("\n" if done == total else ""))
    sys.stderr.flush()


def _fill_at_random(model: GLAModel, seed: int) -> None:
    """Draw weights of a sane scale: activations stay near 1, gates are slow and fast, no logit stands out."""
    generator = torch.Generator(model.norm.device).manual_seed(seed)
    depth = 2 * model.config.num_hidden_layers
    for name, view in model.checkpoint_tensors().items():
        if name.endswith(("norm.weight", "norm_swish_gate.weight")):
            view.fill_(1.0)
        elif name.endswith("gk_proj.1.bias"):
            view.normal_(1.0, 3.0, generator=generator)
        elif name.endswith(_CONV_BIAS):
            view.zero_()
        else:
            std = view.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= depth**-0.5
            view.normal_(0.0, std, generator=generator)
