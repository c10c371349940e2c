"""Token ids of a text that arrives in pieces, in memory that does not grow with it."""

import codecs
import re
from collections.abc import Callable, Iterator
from typing import Final

from server.api.checks import invalid
from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer

PIECE_CHARACTERS: Final = 1 << 15
"""So much text is tokenized at a time, more or less."""
_LONGEST_PIECE: Final = 1 << 19
"""A text in which no place to cut is found for so long is cut anywhere."""
_CONTEXT: Final = 200
"""Characters on either side of a place that have to agree that the text can be cut there."""
_ATTEMPTS: Final = 32
_WORD_BEGINS: Final = re.compile(r"(?<=\S)\s")
_ANYWHERE: Final = re.compile(r"(?<=.)", re.DOTALL)

Encode = Callable[[str], list[int]]


class TextTokens:
    """Tokenizes a text from its beginning to its end.

    A text is cut where its tokens are, and only where these are the same whether the 200 characters on either side are
    tokenized together or apart. For tokenizers whose tokens depend on nothing farther away, the pieces' tokens are the
    whole text's; a text that has no such place for half a million characters is cut anywhere.

    Args:
        tokenizer: of the model.
        add_special_tokens: put BOS and EOS where the checkpoint asks for them.
        continues: whether the text comes behind other text: no space, and no special token, is put before it.

    Attributes:
        num_bytes: fed so far.
    """

    def __init__(self, tokenizer: Tokenizer, *, add_special_tokens: bool, continues: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.num_bytes = 0
        self._text = ""
        self._enough = 2 * PIECE_CHARACTERS
        self._inner: Encode = tokenizer.encode_continuation if continues else tokenizer.encode_within
        # What the next piece is tokenized by: at the beginning, the tokenizer may put a space before it.
        self._encode: Encode = (
            self._inner if continues else lambda text: tokenizer.encode(text, add_special_tokens=False)
        )
        self._before, self._after = _special(tokenizer) if add_special_tokens else ([], [])

    def feed(self, data: bytes) -> list[int]:
        """The tokens that are certain once these bytes have come, as many as there are; often none.

        Raises:
            InvalidRequestError: the bytes are not UTF-8; says where.
        """
        self._text += self._decode(data)
        ids: list[int] = []
        while len(self._text) >= self._enough:
            cut = self._cut()
            if cut is None:
                self._enough = len(self._text) + PIECE_CHARACTERS
                break
            ids += self._take(cut)
            self._enough = 2 * PIECE_CHARACTERS
        return ids

    def finish(self) -> list[int]:
        """The tokens of what is left.

        Raises:
            InvalidRequestError: the text ends within a character.
        """
        self._text += self._decode(b"", final=True)
        return self._take(len(self._text)) + self._after

    def _decode(self, data: bytes, *, final: bool = False) -> str:
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            place = self.num_bytes - pending + error.start
            raise InvalidRequestError(f"The body is not UTF-8: at byte {place}: {error.reason}.") from None
        self.num_bytes += len(data)
        return text

    def _take(self, end: int) -> list[int]:
        ids = self._before + self._encode(self._text[:end])
        self._before, self._encode, self._text = [], self._inner, self._text[end:]
        return ids

    def _cut(self) -> int | None:
        """Where to cut the text; None: not before more has come."""
        limit = len(self._text) - _CONTEXT
        for pattern in (_WORD_BEGINS, _ANYWHERE):
            for place in self._places(pattern, max(PIECE_CHARACTERS, limit - PIECE_CHARACTERS), limit):
                before, behind = self._text[place - _CONTEXT : place], self._text[place : place + _CONTEXT]
                if self._inner(before + behind) == self._inner(before) + self._inner(behind):
                    return place
        return limit if len(self._text) >= _LONGEST_PIECE else None

    def _places(self, pattern: re.Pattern[str], start: int, end: int) -> Iterator[int]:
        """Some places of a kind, the last first."""
        stretch = max(start, end - 64 * _ATTEMPTS)
        places = [match.start() for match in pattern.finditer(self._text, stretch, end)]
        yield from reversed(places[-_ATTEMPTS:])


def _special(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that are put before and behind a text."""
    plain = tokenizer.encode("x", add_special_tokens=False)
    whole = tokenizer.encode("x", add_special_tokens=True)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise invalid("add_special_tokens", "is not possible here: with them, this tokenizer makes other tokens of a text")
