"""A tokenizer for the small checkpoints, and engines that use it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from server.engine.engine import Engine
from server.tokenizer import Tokenizer, load_tokenizer
from tests.engine.driving import Driver, engine_config


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of some 400 tokens, fewer than the model has."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(['{"name": "the cat", "size": 12} true false null, née 世界 ' * 9], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def make(tokenizer_folder: Path) -> Callable[..., Driver]:
    def build(mode: tuple[str, bool] = ("cpu", False), **changes: object) -> Driver:
        device, overlap = mode
        config = engine_config(device=device, tokenizer_folder=tokenizer_folder, **changes)
        return Driver(Engine(config, overlap=overlap))

    return build


@pytest.fixture(scope="session")
def driver(make: Callable[..., Driver]) -> Driver:
    return make()
