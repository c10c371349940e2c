"""What every tokenizer can do, whatever file it comes from, and the table of bytes that it is built upon."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from server.errors import CheckpointError
from server.tokenizer.config import AddedToken

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


def with_added_tokens(table: list[bytes], added: Sequence[AddedToken], path: Path) -> list[bytes]:
    """A table of the bytes of tokens, by id, with added tokens put in; special ones are no text.

    Raises:
        CheckpointError: an id is far beyond the vocabulary; ``path`` is the tokenizer's file.
    """
    size = max([len(table), *(token.token_id + 1 for token in added)])
    if size > len(table) + len(added) + (1 << 16):
        raise CheckpointError(f"{path}: an added token has id {size - 1}, far beyond the vocabulary of {len(table)}")
    table += [b""] * (size - len(table))
    for token in added:
        table[token.token_id] = b"" if token.special else token.content.encode()
    return table


def byte_of_piece(piece: str) -> bytes | None:
    """The byte of a piece such as ``<0x0A>``; None if it is no byte piece."""
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(match[1]) if match else None
