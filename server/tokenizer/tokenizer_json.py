"""The tokenizer of a ``tokenizer.json``, as the Hugging Face library ``tokenizers`` writes it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from server.errors import CheckpointError
from server.tokenizer.base import Tokenizer, byte_of_piece, with_added_tokens
from server.tokenizer.config import AddedToken, TokenizerConfig


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``; it also says where BOS and EOS go, and that special tokens in a text are tokens."""

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        try:
            source = path.read_text(encoding="utf-8")
            backend = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path}: not a valid tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        decoder = _TokenDecoder.parse(json.loads(source).get("decoder"), path)
        _complete_added_tokens(backend, config)
        table = _json_bytes(backend, decoder, config, path)
        texts = {token: backend.id_to_token(token) for token, data in enumerate(table) if not data}
        super().__init__(
            table,
            {token: text.encode() for token, text in texts.items() if text is not None},
            bos_token_id=_named_token(backend, config, "bos_token"),
            eos_token_id=_named_token(backend, config, "eos_token"),
            special_tokens=config.special_tokens(),
            dummy_space=decoder.dummy_space,
        )
        self._backend = backend

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = False) -> list[int]:
        """See :meth:`Tokenizer.encode`."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)


def _complete_added_tokens(backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Add the tokens that only the configuration knows; each must get the id it has there."""
    for token in config.added_tokens:
        if backend.token_to_id(token.content) is None:
            new = tokenizers.AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special,
            )
            backend.add_tokens([new])
        token_id = backend.token_to_id(token.content)
        if token_id != token.token_id:
            raise CheckpointError(
                f"{config.path}: added token {token.content!r} has id {token.token_id}, tokenizer.json gives {token_id}"
            )


def _named_token(backend: tokenizers.Tokenizer, config: TokenizerConfig, key: str) -> int | None:
    content = config.token(key)
    if content is None:
        return None
    token_id: int | None = backend.token_to_id(content)
    if token_id is None:
        raise CheckpointError(f"{config.path}: {key}: {content!r} is not in the vocabulary")
    return token_id


def _json_bytes(
    backend: tokenizers.Tokenizer, decoder: "_TokenDecoder", config: TokenizerConfig, path: Path
) -> list[bytes]:
    """The bytes of every token, by id."""
    named = {config.token(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    added = [
        AddedToken(token_id, token.content, special=token.special or token.content in named)
        for token_id, token in backend.get_added_tokens_decoder().items()
    ]
    vocabulary = backend.get_vocab(with_added_tokens=False)
    size = max(vocabulary.values(), default=-1) + 1
    if size > len(vocabulary) + (1 << 16):
        raise CheckpointError(f"{path}: model.vocab: an id of {size - 1} in a vocabulary of {len(vocabulary)}")
    table = [b""] * size
    for token, token_id in vocabulary.items():
        table[token_id] = decoder.token_bytes(token)
    return with_added_tokens(table, added, path)


@dataclass(frozen=True, slots=True)
class _TokenDecoder:
    """The part of a tokenizer.json's ``decoder`` that acts on single tokens.

    Attributes:
        byte_level: a token's characters stand for bytes.
        replacements: strings to replace in a token, in order.
        byte_fallback: ``<0x0A>`` stands for a byte.
        dummy_space: the decoder takes a space off the front of the whole text.
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    dummy_space: bool = False

    @classmethod
    def parse(cls, decoder: Any, path: Path) -> "_TokenDecoder":
        """Read the ``decoder`` object of a tokenizer.json.

        Raises:
            CheckpointError: its tokens have no bytes of their own.
        """
        if decoder is None:
            raise CheckpointError(f"{path}: decoder: null is not supported; byte-level and SentencePiece-like ones are")
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        byte_level = byte_fallback = dummy_space = fused = False
        replacements: list[tuple[str, str]] = []
        for step in steps:
            match step:
                case {"type": "ByteLevel"} if not fused:
                    byte_level = True
                case {"type": "Metaspace", "replacement": str(symbol)} if not fused:
                    replacements.append((symbol, " "))
                    # add_prefix_space is the older form of prepend_scheme
                    never = step.get("prepend_scheme") == "never" or step.get("add_prefix_space") is False
                    dummy_space = not never
                case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if not fused:
                    replacements.append((pattern, content))
                case {"type": "ByteFallback"} if not fused:
                    byte_fallback = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if fused:
                    dummy_space = True
                case _:
                    raise CheckpointError(
                        f"{path}: decoder: {json.dumps(step)} is not supported; "
                        "byte-level and SentencePiece-like decoders are"
                    )
        return cls(byte_level, tuple(replacements), byte_fallback, dummy_space)

    def token_bytes(self, token: str) -> bytes:
        """The bytes a token of the trained vocabulary adds to running text."""
        if self.byte_level:
            try:
                return bytes(_BYTE_LEVEL[char] for char in token)
            except KeyError:
                return token.encode()
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        return (byte_of_piece(token) if self.byte_fallback else None) or token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: printable Latin-1 stands for itself, the other bytes for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
