"""Writes a checkpoint of a recipe's shape to disk: random weights of a sane scale, and a tokenizer for all its ids.

    python -m tests.bench.checkpoint FOLDER [--recipe tests/fixtures/recipes/gla-1.3B-100B]

Every id is a word of its own, so that a server's streams carry text whatever random weights sample.
"""

import argparse
import json
import shutil
from pathlib import Path

import safetensors.torch
import torch

from server.engine.checkpoint import load_model
from server.engine.config import GLAConfig

RECIPE = Path(__file__).parents[1] / "fixtures" / "recipes" / "gla-1.3B-100B"


def write_checkpoint(recipe: Path, folder: Path) -> None:
    """``config.json``, ``model.safetensors`` in the recipe's dtype, ``tokenizer.json``."""
    config = GLAConfig.from_folder(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(recipe, config, device=device, dtype=getattr(torch, config.dtype), load_format="dummy")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(recipe / "config.json", folder)
    tensors = {name: view.cpu().contiguous() for name, view in model.checkpoint_tensors().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    words = {f"\u2581word{i}": i for i in range(config.vocab_size)}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "\u2581word0"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    args = parser.parse_args()
    write_checkpoint(args.recipe, args.folder)


if __name__ == "__main__":
    main()
