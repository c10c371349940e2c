"""The tokenizer of a SentencePiece ``tokenizer.model``."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from server.errors import CheckpointError
from server.tokenizer.base import Tokenizer, byte_of_piece, with_added_tokens
from server.tokenizer.config import AddedToken, TokenizerConfig

_SPACE = "\u2581"  # SentencePiece's visible space


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, with SentencePiece's own ids: in a text, a control piece such as ``</s>`` is text.

    Tokens that the configuration adds to the model's vocabulary are found in the text first; the stretches between
    them go to SentencePiece.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        processor = _load_sentencepiece(path)
        size = processor.vocab_size()
        added = [
            token
            for token in config.added_tokens
            if token.token_id >= size or processor.id_to_piece(token.token_id) != token.content
        ]
        ids = {token.content: token.token_id for token in added}
        bos = _named_piece(processor, config, "bos_token", processor.bos_id(), ids)
        eos = _named_piece(processor, config, "eos_token", processor.eos_id(), ids)
        table = _sentencepiece_bytes(processor, added, path)
        unwritten = {token.token_id: token.content.encode() for token in added if token.special}
        unwritten |= {token: processor.id_to_piece(token).encode() for token in range(size) if not table[token]}
        super().__init__(
            table,
            unwritten,
            bos_token_id=bos,
            eos_token_id=eos,
            special_tokens=_piece_texts(processor, bos_token=bos, eos_token=eos) | config.special_tokens(),
            dummy_space="".join(processor.encode("a", out_type=str)).startswith(_SPACE),
        )
        self._prefix = [bos] if bos is not None and config.flag("add_bos_token", True) else []
        self._suffix = [eos] if eos is not None and config.flag("add_eos_token", False) else []
        self._processor = self._inner_processor = processor
        if not config.flag("legacy", True):
            # A stretch behind an added token does not begin the text, so it gets no space put before it. Protobuf
            # merges a repeated field: these bytes set normalizer_spec.add_dummy_prefix to false.
            proto = processor.serialized_model_proto() + b"\x1a\x02\x18\x00"
            self._inner_processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._added = _TokenFinder(added)
        self._special = _TokenFinder([*added, *_control_pieces(processor, ids)])

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = False) -> list[int]:
        """See :meth:`Tokenizer.encode`."""
        ids: list[int] = []
        end = 0
        for start, token_id, next_start in (self._special if parse_special_tokens else self._added).find(text):
            ids += self._encode_stretch(text[end:start], begins=end == 0)
            ids.append(token_id)
            end = next_start
        ids += self._encode_stretch(text[end:], begins=end == 0)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _encode_stretch(self, text: str, *, begins: bool) -> list[int]:
        return list((self._processor if begins else self._inner_processor).encode(text))


class _TokenFinder:
    """Finds whole tokens in a text; of those that begin at one place, the longest."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._tokens = sorted(tokens, key=lambda token: -len(token.content))
        self._pattern = re.compile("|".join(token.pattern for token in self._tokens)) if tokens else None

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Where each begins, its id, and where it ends, from left to right."""
        if self._pattern is not None:
            for match in self._pattern.finditer(text):
                yield match.start(), self._tokens[(match.lastindex or 0) - 1].token_id, match.end()


def _control_pieces(processor: Any, added: Mapping[str, int]) -> Iterator[AddedToken]:
    """A model's own special tokens, but for those whose text the configuration gives to another id."""
    for token_id in range(processor.vocab_size()):
        if processor.is_control(token_id) or processor.is_unknown(token_id):
            piece = processor.id_to_piece(token_id)
            if piece and piece not in added:
                yield AddedToken(token_id, piece, special=True)


def _piece_texts(processor: Any, **ids: int | None) -> dict[str, str]:
    """The texts of named tokens that are pieces of the model."""
    size = processor.vocab_size()
    return {name: processor.id_to_piece(i) for name, i in ids.items() if i is not None and i < size}


def _load_sentencepiece(path: Path) -> Any:
    try:
        # By its contents: the library's own reading of a file name that is not ASCII depends on the locale.
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model: {error}") from error


def _named_piece(
    processor: Any, config: TokenizerConfig, key: str, default: int, added: Mapping[str, int]
) -> int | None:
    """Id of the token the configuration names; the model's own if it says nothing; None if there is none."""
    if key not in config.values:
        return default if default >= 0 else None
    content = config.token(key)
    if content is None:
        return None
    if content in added:
        return added[content]
    token_id = int(processor.piece_to_id(content))
    if processor.id_to_piece(token_id) != content:
        raise CheckpointError(f"{config.path}: {key}: {content!r} is not in the vocabulary")
    return token_id


def _sentencepiece_bytes(processor: Any, added: Sequence[AddedToken], path: Path) -> list[bytes]:
    """The bytes of every piece and added token, by id."""
    table: list[bytes] = []
    for token_id in range(processor.vocab_size()):
        piece = processor.id_to_piece(token_id)
        if processor.is_control(token_id) or processor.is_unused(token_id):
            table.append(b"")
        elif processor.is_unknown(token_id):
            table.append(processor.decode([token_id]).encode())
        elif processor.is_byte(token_id):
            table.append(byte_of_piece(piece) or b"")
        else:
            table.append(piece.replace(_SPACE, " ").encode())
    return with_added_tokens(table, added, path)
