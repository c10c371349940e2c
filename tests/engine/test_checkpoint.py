"""Loading weights: every layout, every refusal, and no more memory than needed."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.engine import checkpoint
from server.engine.checkpoint import load_model
from server.engine.config import GLAConfig
from server.engine.model import GLAModel
from server.errors import CheckpointError
from tests.engine.oracle import SMALL, random_tensors, write_checkpoint

FIXTURES = Path(__file__).parent.parent / "fixtures"
RECIPES = FIXTURES / "recipes"
Q_PROJ = "model.layers.0.attn.q_proj.weight"


def load(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: object) -> GLAModel:
    return load_model(folder, GLAConfig.from_folder(folder), device=device, dtype=dtype, **options)  # type: ignore[arg-type]


def write_sparse(path: Path, shapes: Mapping[str, list[int]], dtype: str, itemsize: int) -> None:
    """A valid safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gla-340M-15B", 341_707_776),
        ("gla-1.3B-100B", 1_365_514_240),
        ("gla-2.7B-100B", 2_703_583_744),
        ("gla-7B-mistral-20B", 7_244_390_400),
    ],
)
def test_published_recipes_load_on_the_meta_device(name: str, parameters: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((RECIPES / name / "config.json").read_bytes())
    shapes = json.loads((RECIPES / name / "tensors.json").read_text())
    write_sparse(tmp_path / "model.safetensors", shapes, "BF16", 2)
    model = load(tmp_path, dtype=torch.bfloat16, device="meta")
    views = model.checkpoint_tensors().values()
    assert sum(view.numel() for view in views) == parameters
    assert all(view.is_meta for view in views)


def test_every_weight_arrives() -> None:
    """Reading each view back gives the file's tensors, also from shards and converted."""
    files = sorted((FIXTURES / "gqa").glob("*.safetensors"))
    stored = {name: tensor for path in files if "expected" not in path.name for name, tensor in load_file(path).items()}
    views = load(FIXTURES / "gqa").checkpoint_tensors()
    assert views.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(views[name], tensor, rtol=0, atol=0)


def test_weights_are_converted() -> None:
    model = load(FIXTURES / "base", dtype=torch.bfloat16)
    stored = load_file(FIXTURES / "base" / "model.safetensors")
    views = model.checkpoint_tensors()
    assert torch.equal(views[Q_PROJ], stored[Q_PROJ].bfloat16())
    assert views["model.layers.0.attn.gk_proj.1.weight"].dtype == torch.float32
    model = load(FIXTURES / "wide_bf16")
    stored = load_file(FIXTURES / "wide_bf16" / "model.safetensors")
    assert torch.equal(model.checkpoint_tensors()[Q_PROJ], stored[Q_PROJ].float())


def test_tied_checkpoint_may_hold_the_output_projection_too(tmp_path: Path) -> None:
    config = SMALL | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"].clone()
    model = load(write_checkpoint(tmp_path, config, tensors))
    assert model.lm_head.weight is model.embeddings


def test_first_name_of_the_embedding(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    tensors["model.embed_tokens.weight"] = tensors.pop("model.embeddings.weight")
    model = load(write_checkpoint(tmp_path, SMALL, tensors))
    assert torch.equal(model.embeddings, tensors["model.embed_tokens.weight"])


def test_dummy_weights_need_only_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"use_short_conv": True}))
    one, same, other = (load(tmp_path, load_format="dummy", seed=seed).checkpoint_tensors() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embeddings.weight"], other["model.embeddings.weight"])
    for name, weight in one.items():
        assert weight.isfinite().all() and weight.abs().max() < 20, name
    assert one["model.norm.weight"].eq(1).all()


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    load(FIXTURES / "gqa", progress=True)
    drawn = capsys.readouterr().err
    assert drawn.startswith("\rLoading weights [") and drawn.endswith("0.00 of 0.00 GB\n")
    assert drawn.count("\n") == 1
    load(FIXTURES / "gqa", progress=False)
    load(FIXTURES / "gqa")  # stderr is no terminal here
    assert capsys.readouterr().err == ""


def test_no_second_copy_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL | {"vocab_size": 60_000, "hidden_size": 256, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {name: list(tensor.shape) for name, tensor in random_tensors(config).items()}
    write_sparse(tmp_path / "model.safetensors", shapes, "F32", 4)
    size = sum(4 * torch.Size(shape).numel() for shape in shapes.values())

    def private_bytes() -> int:
        status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
        return 1024 * int(status.split()[0])

    seen: list[int] = []
    monkeypatch.setattr(checkpoint, "_draw_progress", lambda done, total: seen.append(private_bytes()))
    before = private_bytes()
    load(tmp_path, progress=True)
    assert len(seen) == len(shapes)
    assert max(seen) - before < 1.2 * size


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(Q_PROJ), f": {Q_PROJ}: this tensor is missing"),
        (without("lm_head.weight"), r": lm_head\.weight: this tensor is missing"),
        (without("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight: this tensor is missing"),
        (with_tensor("model.extra", torch.zeros(1)), r"model\.safetensors: model\.extra: unexpected tensor"),
        (
            with_tensor("model.layers.2.attn_norm.weight", torch.zeros(64)),
            r"layers\.2\.attn_norm\.weight: unexpected tensor",
        ),
        (with_tensor(Q_PROJ, torch.zeros(64, 32)), rf"safetensors: {Q_PROJ}: has shape \[64, 32\].* \[32, 64\]"),
        (with_tensor(Q_PROJ, torch.zeros(32, 64, dtype=torch.int8)), f"{Q_PROJ}: has dtype I8"),
        (
            with_tensor("model.layers.0.attn.q_conv1d.bias", torch.zeros(32)),
            r"q_conv1d\.bias: unexpected tensor",
        ),
    ],
)
def test_wrong_tensors(change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    change(tensors)
    write_checkpoint(tmp_path, SMALL, tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_some_conv_biases_are_not_enough(tmp_path: Path) -> None:
    config = SMALL | {"use_short_conv": True}
    tensors = random_tensors(config, conv_bias=True)
    del tensors["model.layers.1.attn.v_conv1d.bias"]
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.v_conv1d\.bias: this tensor is missing"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 1000, -4])
def test_truncated_file(kept: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, SMALL, random_tensors(SMALL)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated, or not a safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    torch.save(random_tensors(SMALL), tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: pickled weights are not loaded"):
        load(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load(tmp_path)


def write_shards(folder: Path) -> dict[str, str]:
    """A checkpoint in two shards; returns its weight map."""
    tensors = random_tensors(SMALL)
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file)
    (folder / "config.json").write_text(json.dumps(SMALL))
    weight_map = {name: file for file, half in halves.items() for name in half}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    load(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map: .*: model-2\.safetensors is missing"):
        load(tmp_path)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    other = "model-1.safetensors" if weight_map[Q_PROJ] == "model-2.safetensors" else "model-2.safetensors"
    write_index(tmp_path, weight_map | {Q_PROJ: other})
    with pytest.raises(CheckpointError, match=rf"{other}: {Q_PROJ}: missing, although the index says"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "model-1.bin", 7])
def test_index_names_no_file_of_the_folder(file: object, tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    write_index(tmp_path, weight_map | {Q_PROJ: file})
    with pytest.raises(CheckpointError, match=rf"index\.json: weight_map: {Q_PROJ}: not the name of"):
        load(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, ["model-1.safetensors"]])
def test_index_without_a_map(weight_map: object, tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map: must be an object"):
        load(tmp_path)


def test_the_same_tensor_twice(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    second = load_file(tmp_path / "model-2.safetensors")
    first_name = next(name for name, file in weight_map.items() if file == "model-1.safetensors")
    second[first_name] = load_file(tmp_path / "model-1.safetensors")[first_name]
    save_file(second, tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: .*: also stands in model-1\.safetensors"):
        load(tmp_path)
