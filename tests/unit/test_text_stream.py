"""Texts that are tokenized as they come have the tokens of the whole."""

import random
from pathlib import Path

import pytest

from server.api import text_stream
from server.api.text_stream import TextTokens
from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer, load_tokenizer
from tests.unit.test_tokenizer import CORPUS, TORTURE, classics, json_folder  # noqa: F401

TEXTS = {
    "documents": (Path(__file__).parents[2] / "README.md").read_text()[:15_000],
    "torture": "\n".join(TORTURE) * 6 + "\ufb01ne  double   spaces \t\n\n\n\u2026 ",
    "corpus": "".join(CORPUS) * 8,
    "no spaces": "\u4e16\u754c\u3001\u6d77\u306f\u5e83\u3044\u306a\u3002" * 300 + "x" * 900,
}


def in_pieces(tokens: TextTokens, data: bytes, seed: int) -> list[int]:
    rng = random.Random(seed)
    ids: list[int] = []
    start = 0
    while start < len(data):
        length = rng.choice([1, 2, 3, 500, 5000])
        ids += tokens.feed(data[start : start + length])
        start += length
    return ids + tokens.finish()


def check(tokenizer: Tokenizer, text: str, seed: int) -> None:
    data = text.encode()
    for special in (False, True):
        streamed = in_pieces(TextTokens(tokenizer, add_special_tokens=special, continues=False), data, seed)
        assert streamed == tokenizer.encode(text, add_special_tokens=special)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_stream, "PIECE_CHARACTERS", 700)


@pytest.mark.parametrize("name", TEXTS)
def test_the_shipped_tokenizer(name: str) -> None:
    text = TEXTS[name]
    check(classics(), text, 1)
    streamed = in_pieces(TextTokens(classics(), add_special_tokens=False, continues=True), text.encode(), 2)
    assert b"".join(classics().token_bytes()[token] for token in streamed) == text.encode()


@pytest.mark.parametrize("name", ["torture", "no spaces"])
def test_json_tokenizers(json_folder: Path, name: str) -> None:  # noqa: F811
    check(load_tokenizer(json_folder), TEXTS[name], 3)


def test_a_text_without_a_place_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_stream, "_LONGEST_PIECE", 3000)
    monkeypatch.setattr(TextTokens, "_places", lambda *_: iter(()))
    tokens = TextTokens(classics(), add_special_tokens=False, continues=True)
    text = "word " * 4000
    ids = in_pieces(tokens, text.encode(), 4)
    assert classics().decode(ids).strip() == text.strip()
    assert len(tokens._text) == 0


def test_what_is_no_utf_8() -> None:
    for data, place in ((b"abc\xff", 3), ("äö".encode() + b"\xe2\x82" + b"a", 4), (b"a" * 5000 + b"\x80", 5000)):
        tokens = TextTokens(classics(), add_special_tokens=True, continues=False)
        with pytest.raises(InvalidRequestError, match=f"at byte {place}:"):
            in_pieces(tokens, data, 5)
    tokens = TextTokens(classics(), add_special_tokens=True, continues=False)
    tokens.feed("abc€".encode()[:-1])
    with pytest.raises(InvalidRequestError, match="at byte 3:"):
        tokens.finish()
