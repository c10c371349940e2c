"""Text to token ids and back: ``tokenizer.json`` or a SentencePiece ``tokenizer.model``. Torch-free.

Both kinds give a table of the bytes each token adds to running text, from which generated text is put together and
searched for stop strings. It exists only where a token means the same bytes wherever it stands: for byte-level BPE, and
for SentencePiece-like vocabularies. Other kinds are refused.
"""

from pathlib import Path

from server.errors import CheckpointError
from server.tokenizer.base import Tokenizer
from server.tokenizer.config import TokenizerConfig
from server.tokenizer.sentencepiece_model import SentencePieceTokenizer
from server.tokenizer.tokenizer_json import JsonTokenizer

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder: ``tokenizer.json`` if there is one, else ``tokenizer.model``.

    Raises:
        CheckpointError: there is neither, or the file is broken or of a kind that is not supported.
    """
    config = TokenizerConfig.from_folder(folder)
    if (path := folder / "tokenizer.json").is_file():
        return JsonTokenizer(path, config)
    if (path := folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path, config)
    raise CheckpointError(
        f"{folder}: no tokenizer.json and no tokenizer.model; use --tokenizer or --skip-tokenizer-init"
    )
