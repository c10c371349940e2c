"""A tokenizer for the small checkpoints, and engines that use it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine.engine import Engine
from server.tokenizer import Tokenizer, load_tokenizer
from tests.engine.driving import Driver, engine_config
from tests.tokenizers import train_byte_level


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of some 400 tokens, fewer than the model has."""
    texts = ['{"name": "the cat", "size": 12} true false null, née 世界 ' * 9]
    backend = train_byte_level(texts, vocab_size=400, special_tokens=("<unk>", "<s>", "</s>"))
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
