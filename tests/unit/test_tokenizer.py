"""Tokenizers: SentencePiece's own ids, transformers' ids, and bytes that add up to the text."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from server.errors import CheckpointError
from server.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizers import train_byte_level

CLASSICS = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"
TORTURE = [
    "",
    " ",
    "a",
    "The old man looked at the sea.",
    "  two  spaces, and a tail   ",
    "\n\n\ttabs\t\tand\r\nnewlines\n",
    "12345 3.14159 1,000,000",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "Ünïcödé, naïve café",
    "e\u0301 o\u0308 (combining)",
    "\ufb01 \u2126 \u00bd \u3000 (normalization bait)",
    "日本語のテキスト、한국어, 中文",
    "مرحبا שלום",
    "😀👩‍👩‍👧‍👦🇩🇪👍🏽",
    "\0 nul \0\0",
    "\ufeffbyte order mark\u200b\u202e",
    "<s>", "</s>", "<unk>", "a <s> b</s>c <unk>",
    "<0x0A> <0xFF>",
    "\u2581 already \u2581\u2581here",
    "x" * 5000,
    "ab " * 2000,
    "~`!@#$%^&*()_+-={}[]|\\:;\"'<>?,./",
]  # fmt: skip
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "def f(x):\n    return x + 1  # 12345\n" * 20,
    "Ünïcödé, naïve café, 日本語のテキスト 😀 " * 20,
    " ".join(TORTURE[3:9]) * 3,
]


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    table = tokenizer.token_bytes()
    return b"".join(table[token] for token in ids)


@cache
def classics() -> Tokenizer:
    return load_tokenizer(CLASSICS)


@cache
def sentencepiece_itself() -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(CLASSICS / "tokenizer.model"))


def test_shipped_tokenizer() -> None:
    tokenizer = classics()
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (8192, 1, 2)
    assert tokenizer.encode("The old man") == [1, 366, 712, 435]
    assert tokenizer.encode("The old man", add_special_tokens=False) == [366, 712, 435]
    assert tokenizer.encode("") == [1]
    assert tokenizer.decode([1, 366, 712, 435, 2]) == "The old man"
    table = tokenizer.token_bytes()
    assert len(table) == 8192
    assert table[:3] == [" \u2047 ".encode(), b"", b""]
    assert table[3 : 3 + 256] == [bytes([byte]) for byte in range(256)]
    assert table[366] == b" The"


@pytest.mark.parametrize("text", TORTURE)
def test_sentencepiece_ids_and_bytes(text: str) -> None:
    tokenizer = classics()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == sentencepiece_itself().encode(text)
    assert not {0, 1, 2} & set(ids)
    visible = text.replace("\u2581", " ")  # SentencePiece's own sign for a space cannot be told from one
    assert joined(tokenizer, ids).decode() == (" " + visible if text else "")
    assert tokenizer.decode(ids) == visible


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_sentencepiece_bytes_reproduce_any_text(text: str) -> None:
    ids = classics().encode(text, add_special_tokens=False)
    assert ids == sentencepiece_itself().encode(text)
    assert joined(classics(), ids).decode().replace("\u2581", " ") == (" " + text if text else "").replace(
        "\u2581", " "
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 8191), max_size=20))
def test_sentencepiece_decodes_any_ids(ids: list[int]) -> None:
    """Bytes that are not UTF-8 aside, where the two libraries count replacement characters differently."""
    decoded = classics().decode(ids)
    if "\ufffd" not in decoded:
        assert decoded.removeprefix(" ") == sentencepiece_itself().decode(ids).removeprefix(" ")


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_a_continuation_has_exactly_the_bytes_of_its_text(text: str) -> None:
    """Also where the tokenizer itself would put a space before it, or take one sign for another."""
    assert joined(classics(), classics().encode_continuation(text)) == text.encode()


def test_a_continuation_is_tokenized_as_behind_other_text() -> None:
    tokenizer = classics()
    assert tokenizer.encode_continuation(" The old man") == [366, 712, 435]
    assert tokenizer.encode_continuation("</s>") == tokenizer.encode("x</s>", add_special_tokens=False)[1:]
    assert tokenizer.encode_continuation("") == []


def test_a_continuation_may_hold_special_tokens(json_folder: Path) -> None:
    tokenizer = load_tokenizer(json_folder)
    special = tokenizer.token_bytes(special=True).index(b"</s>")
    for text in ("</s>", "</s>the", "the</s>the"):
        ids = tokenizer.encode_continuation(text, parse_special_tokens=True)
        assert ids.count(special) == 1, text
        assert joined(tokenizer, ids) == text.replace("</s>", "").encode()
    assert classics().encode_continuation("</s>\n", parse_special_tokens=True)[0] == 2


def test_a_json_continuation_has_exactly_the_bytes_of_its_text(json_folder: Path) -> None:
    tokenizer = load_tokenizer(json_folder)
    unigram = "unigram" in json_folder.name  # without byte pieces it has no tokens for some of it
    for text in CORPUS[:1] if unigram else TORTURE:
        assert joined(tokenizer, tokenizer.encode_continuation(text)) == text.encode()


def test_special_tokens_are_written_where_asked_for(json_folder: Path) -> None:
    tokenizer = load_tokenizer(json_folder)
    hidden, shown = tokenizer.token_bytes(), tokenizer.token_bytes(special=True)
    changed = {token: shown[token] for token in range(tokenizer.vocab_size) if shown[token] != hidden[token]}
    assert changed.items() >= {1: b"<s>", 2: b"</s>"}.items()
    assert all(hidden[token] == b"" for token in changed)


def test_sentencepiece_special_tokens_are_written_where_asked_for(tmp_path: Path) -> None:
    folder = sentencepiece_folder(
        tmp_path,
        {"added_tokens_decoder": {"8192": {"content": "<|x|>", "special": True}, "8193": {"content": "<|y|>"}}},
    )
    tokenizer = load_tokenizer(folder)
    table = tokenizer.token_bytes(special=True)
    assert (table[1], table[2], table[8192], table[8193]) == (b"<s>", b"</s>", b"<|x|>", b"<|y|>")
    assert tokenizer.token_bytes()[8192:] == [b"", b"<|y|>"]


def test_ids_beyond_the_vocabulary_are_no_text() -> None:
    assert classics().decode([366, 99999, -1, 712]) == "The old"


def sentencepiece_folder(folder: Path, config: object, added: object = None) -> Path:
    (folder / "tokenizer.model").write_bytes((CLASSICS / "tokenizer.model").read_bytes())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


@pytest.mark.parametrize(
    ("config", "ids", "bos", "eos"),
    [
        (None, [1, 366], 1, 2),
        ({}, [1, 366], 1, 2),
        ({"add_bos_token": False}, [366], 1, 2),
        ({"add_eos_token": True}, [1, 366, 2], 1, 2),
        ({"bos_token": None}, [366], None, 2),
        ({"bos_token": {"content": "</s>"}, "eos_token": "<s>"}, [2, 366], 2, 1),
    ],
)
def test_bos_and_eos(config: object, ids: list[int], bos: int | None, eos: int | None, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, config))
    assert tokenizer.encode("The") == ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (bos, eos)


def test_sentencepiece_added_tokens(tmp_path: Path) -> None:
    config = {
        "legacy": False,
        "eos_token": "<|end|>",
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            "8193": {"content": "<|end|>", "special": True},
            "8194": {"content": "<tag>", "lstrip": True, "rstrip": True},
        },
    }
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, config, {"<|start|>": 8192}))
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (8195, 8193)
    assert tokenizer.token_bytes()[8192:] == [b"<|start|>", b"", b"<tag>"]
    plain = classics().encode("The", add_special_tokens=False)
    assert tokenizer.encode("The<|end|>", add_special_tokens=False) == [*plain, 8193]
    ids = tokenizer.encode("<|start|>The old  <tag> man<s>", add_special_tokens=False)
    assert ids[0] == 8192 and ids.count(8194) == 1 and 1 not in ids
    assert joined(tokenizer, ids) == b"<|start|>The old<tag>man<s>"


def test_legacy_puts_a_space_behind_added_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, {"legacy": True}, {"<|start|>": 8192}))
    assert tokenizer.encode("<|start|>The", add_special_tokens=False) == [8192, 366]


def test_special_tokens_in_a_text_are_parsed_on_request() -> None:
    tokenizer = classics()
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    text = "<s>[INST] Hello [/INST]Good day</s>\n<unk>"
    plain = tokenizer.encode(text)
    assert plain.count(1) == 1, "the BOS put in front"
    assert 2 not in plain
    parsed = tokenizer.encode(text, add_special_tokens=False, parse_special_tokens=True)
    assert [token for token in parsed if token < 3] == [1, 2, 0]
    assert (parsed[0], parsed[-1]) == (1, 0)
    assert joined(tokenizer, parsed[1:-1]) == b"[INST] Hello [/INST]Good day\n", "no space behind a special token"
    assert tokenizer.encode("no such", parse_special_tokens=True) == tokenizer.encode("no such")


def test_special_tokens_of_a_model_without_configuration(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, {})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    # As old checkpoints were trained: a space before every stretch.
    a = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a</s>a", add_special_tokens=False, parse_special_tokens=True) == [*a, 2, *a]


def byte_level() -> Backend:
    backend = train_byte_level(CORPUS, vocab_size=500, special_tokens=("<unk>", "<s>", "</s>"))
    backend.add_tokens([AddedToken("<tag>"), AddedToken("    ", normalized=False)])
    return backend


def byte_fallback(*, metaspace: bool) -> Backend:
    """In the manner of Llama's: with a normalizer as in 2023, or with Metaspace as since."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *byte_pieces],
        max_token_length=12,
        show_progress=False,
    )
    backend.train_from_iterator([line for text in CORPUS for line in text.split(".")], trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # byte pieces are no added tokens
    backend = Backend.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def metaspace_unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
KINDS: dict[str, tuple[Any, dict[str, object]]] = {
    "byte_level": (byte_level, NAMED | FAST),
    "byte_level_without_config": (byte_level, {}),
    "byte_level_asking_for_bos": (byte_level, NAMED | FAST | {"add_bos_token": True, "add_eos_token": True}),
    "llama_with_normalizer": (lambda: byte_fallback(metaspace=False), NAMED | FAST),
    "llama_with_metaspace": (lambda: byte_fallback(metaspace=True), NAMED | FAST),
    "llama_by_class": (lambda: byte_fallback(metaspace=True), NAMED | {"tokenizer_class": "LlamaTokenizer"}),
    "unigram": (metaspace_unigram, NAMED | FAST),
}


@pytest.fixture(scope="module", params=KINDS)
def json_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build, config = KINDS[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    build().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_same_ids_as_transformers(json_folder: Path) -> None:
    tokenizer, reference = load_tokenizer(json_folder), AutoTokenizer.from_pretrained(json_folder)
    for text in TORTURE:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special), text
    assert tokenizer.vocab_size == len(reference)
    if "bos_token" in json.loads((json_folder / "tokenizer_config.json").read_text()):
        assert tokenizer.bos_token_id == reference.bos_token_id == 1
        assert tokenizer.eos_token_id == reference.eos_token_id == 2
    else:
        assert tokenizer.bos_token_id is None


def test_same_text_as_transformers(json_folder: Path) -> None:
    tokenizer, reference = load_tokenizer(json_folder), AutoTokenizer.from_pretrained(json_folder)
    for text in TORTURE:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


def test_json_bytes_reproduce_the_text(json_folder: Path) -> None:
    tokenizer = load_tokenizer(json_folder)
    unigram = "unigram" in json_folder.name  # without byte pieces it loses what it does not know
    for text in CORPUS[:1] if unigram else TORTURE:
        text = text.replace("<s>", "").replace("</s>", "").replace("<unk>", "")  # tokens here, hence no text
        expected = text.replace("\u2581", " ") if "llama" in json_folder.name else text
        assert joined(tokenizer, tokenizer.encode(text)).decode() in (expected, " " + expected)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_byte_level_reproduces_any_text(text: str, byte_level_tokenizer: Tokenizer) -> None:
    assert joined(byte_level_tokenizer, byte_level_tokenizer.encode(text)).decode() == text


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte_level")
    byte_level().save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a longer text than four")) == "a longer text than four"


def test_added_tokens_of_the_configuration(tmp_path: Path) -> None:
    backend = byte_level()
    backend.save(str(tmp_path / "tokenizer.json"))
    size = backend.get_vocab_size()
    config = NAMED | {"added_tokens_decoder": {str(size): {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("a<|im_end|>")[-1] == size
    assert tokenizer.token_bytes()[size] == b""
    assert tokenizer.token_bytes()[tokenizer.encode("<tag>")[0]] == b"<tag>"

    config["added_tokens_decoder"] = {str(size + 5): {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: added token '<\|im_end\|>' has id {size + 5}"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_goes_first(tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path, {})
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size < 8192


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (None, "null"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]), "ByteLevel"),
        (decoders.Sequence([decoders.Strip("_", 1, 1)]), "Strip"),
    ],
)
def test_other_decoders_are_refused(decoder: Any, named: str, tmp_path: Path) -> None:
    backend = byte_level()
    state = json.loads(backend.to_str()) | {"decoder": None}
    if decoder is not None:
        backend.decoder = decoder
        state = json.loads(backend.to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: decoder: .*{named}.* not supported"):
        load_tokenizer(tmp_path)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a valid tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "must hold a JSON object"),
        ({"bos_token": "<nope>"}, "bos_token: '<nope>' is not in the vocabulary"),
        ({"eos_token": 2}, "eos_token: must be a token's text, is 2"),
        ({"add_bos_token": "yes"}, "add_bos_token: must be true or false, is 'yes'"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder: must be an object"),
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "added token '<a>': must have an id"),
        ({"added_tokens_decoder": {"9999999999": {"content": "<a>"}}}, "added token '<a>': must have an id"),
        ({"added_tokens_decoder": {"8200": {}}}, "added token 8200: must have a text"),
        ({"added_tokens_decoder": {"9000000": {"content": "<a>"}}}, "far beyond the vocabulary"),
    ],
)
def test_configuration_refusals(config: object, message: str, tmp_path: Path) -> None:
    if config == []:
        (tmp_path / "tokenizer.model").write_bytes((CLASSICS / "tokenizer.model").read_bytes())
        (tmp_path / "tokenizer_config.json").write_text("[]")
    else:
        sentencepiece_folder(tmp_path, config)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_needs_no_torch() -> None:
    code = "import server.tokenizer, server.hub, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
