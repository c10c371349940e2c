"""Text to token ids and back: ``tokenizer.json`` or a SentencePiece ``tokenizer.model``. Torch-free.

Both kinds give a table of the bytes each token adds to running text, from which generated text is put together and
searched for stop strings. It exists only where a token means the same bytes wherever it stands: for byte-level BPE, and
for SentencePiece-like vocabularies. Other kinds are refused.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from server.errors import CheckpointError
from server.tokenizer_config import AddedToken, TokenizerConfig

_SPACE = "\u2581"  # SentencePiece's visible space
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_ANCHORS = ("\n", "x")
"""Texts to stand before another. Few tokenizers join the first with what follows, or both of them with the same."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are in [0, vocab_size); the model's vocabulary may be larger.
        bos_token_id: id of the token that begins a text, if there is one.
        eos_token_id: id of the token that ends a text, if there is one.
        special_tokens: texts of the named tokens, by name (``bos_token``, ``eos_token``, ``pad_token``, ...).
    """

    def __init__(
        self,
        token_bytes: list[bytes],
        unwritten: Mapping[int, bytes],
        *,
        bos_token_id: int | None,
        eos_token_id: int | None,
        special_tokens: Mapping[str, str],
        dummy_space: bool,
    ) -> None:
        self.vocab_size = len(token_bytes)
        self._unwritten = unwritten
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.special_tokens = special_tokens
        self._token_bytes = token_bytes
        self._dummy_space = dummy_space

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = False) -> list[int]:
        """The text's token ids.

        Args:
            text: any text.
            add_special_tokens: put BOS and EOS where the checkpoint asks for them.
            parse_special_tokens: the text of a special token is that token, as a chat template means it. A
                ``tokenizer.json`` always reads it so.
        """

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole sequence of ids, without special tokens. Bytes that are not UTF-8 become U+FFFD.

        The space that the tokenizer itself puts before every text is taken off. Ids outside [0, vocab_size), which a
        model may have, are no text.
        """
        known = (self._token_bytes[token] for token in token_ids if 0 <= token < self.vocab_size)
        text = b"".join(known).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._dummy_space else text

    def token_bytes(self, *, special: bool = False) -> list[bytes]:
        """The bytes each id adds to running text, by id; nothing for special tokens and unused ids.

        Args:
            special: whether special tokens are written, too, such as ``</s>``.
        """
        table = list(self._token_bytes)
        if special:
            for token, data in self._unwritten.items():
                table[token] = data
        return table

    def encode_continuation(self, text: str, *, parse_special_tokens: bool = False) -> list[int]:
        """Token ids whose bytes are exactly the text's, as it would be tokenized behind other text.

        No space that the tokenizer puts before a text is among them, and no special token but those of the text.
        Where the tokenizer itself would change the text, the longest tokens that fit are taken; characters that no
        token has are left out.

        Args:
            text: any text.
            parse_special_tokens: the text of a special token is that token.
        """
        wanted = text.encode("utf-8", errors="replace")
        written = self._written if parse_special_tokens else self._token_bytes
        for anchor_text, anchor in self._anchors.items():
            ids = self.encode(anchor_text + text, add_special_tokens=False, parse_special_tokens=parse_special_tokens)
            behind = ids[len(anchor) :]
            if ids[: len(anchor)] == anchor and b"".join(written[token] for token in behind) == wanted:
                return behind
        return self._longest_tokens(wanted, self._ids_by_text if parse_special_tokens else self._ids_by_bytes)

    def encode_within(self, text: str) -> list[int]:
        """The token ids of a text that stands within another one, as :meth:`encode` of the whole would give them."""
        for anchor_text, anchor in self._anchors.items():
            ids = self.encode(anchor_text + text, add_special_tokens=False)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return self.encode_continuation(text)

    @cached_property
    def _anchors(self) -> dict[str, list[int]]:
        return {text: self.encode(text, add_special_tokens=False) for text in _ANCHORS}

    @cached_property
    def _written(self) -> list[bytes]:
        return self.token_bytes(special=True)

    @cached_property
    def _ids_by_bytes(self) -> dict[bytes, int]:
        return _by_bytes(self._token_bytes)

    @cached_property
    def _ids_by_text(self) -> dict[bytes, int]:
        return _by_bytes(self._written)

    @staticmethod
    def _longest_tokens(text: bytes, ids_by_bytes: Mapping[bytes, int]) -> list[int]:
        ids: list[int] = []
        longest = max(map(len, ids_by_bytes), default=0)
        position = 0
        while position < len(text):
            for length in range(longest, 0, -1):
                token = ids_by_bytes.get(text[position : position + length])
                if token is not None:
                    ids.append(token)
                    position += length
                    break
            else:
                position += 1
        return ids


def _by_bytes(token_bytes: Sequence[bytes]) -> dict[bytes, int]:
    """The first id of each text that a token adds."""
    return {data: token for token, data in reversed(list(enumerate(token_bytes))) if data}


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
            table.append(_byte_piece(piece) or b"")
        else:
            table.append(piece.replace(_SPACE, " ").encode())
    return _with_added(table, added, path)


def _with_added(table: list[bytes], added: Sequence[AddedToken], path: Path) -> list[bytes]:
    """The table with added tokens put in; special ones are no text."""
    size = max([len(table), *(token.token_id + 1 for token in added)])
    if size > len(table) + len(added) + (1 << 16):
        raise CheckpointError(f"{path}: an added token has id {size - 1}, far beyond the vocabulary of {len(table)}")
    table += [b""] * (size - len(table))
    for token in added:
        table[token.token_id] = b"" if token.special else token.content.encode()
    return table


def _byte_piece(piece: str) -> bytes | None:
    """The byte of a piece such as ``<0x0A>``; None if it is no byte piece."""
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(match[1]) if match else None


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
    return _with_added(table, added, path)


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
        return (_byte_piece(token) if self.byte_fallback else None) or token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: printable Latin-1 stands for itself, the other bytes for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
