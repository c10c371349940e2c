"""``POST /tokenize``, ``POST /detokenize``, ``GET /tokenizer_info``."""

from pathlib import Path
from typing import Any

import pytest

from server.api.schemas.tokenization import TokenizerInfo
from server.tokenizer import load_tokenizer
from tests.api.scripted import BOS, VOCAB, Server, serve
from tests.engine.driving import CLASSICS

TEXT = "naïve 世界 🌊"


def test_tokens_and_back(server: Server) -> None:
    body = server.http.post("/tokenize", json={"prompt": TEXT}).json()
    tokens = [BOS, *TEXT.encode()]
    assert body == {"count": len(tokens), "max_model_len": 2000, "tokens": tokens, "token_strs": None}
    assert server.http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": TEXT}
    assert server.engine.requests == []


def test_without_special_tokens(server: Server) -> None:
    body = server.http.post("/tokenize", json={"prompt": TEXT, "add_special_tokens": False, "model": None}).json()
    assert body["tokens"] == list(TEXT.encode())
    assert server.http.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()["count"] == 0


def test_the_text_of_every_token(server: Server) -> None:
    body = server.http.post("/tokenize", json={"prompt": "aï", "return_token_strs": True}).json()
    assert body["token_strs"] == ["<s>", "a", "bytes:\\xc3", "bytes:\\xaf"]


def test_a_large_text_and_what_is_not_utf8(server: Server) -> None:
    text = "ab" * 9_000
    body = server.http.post("/tokenize", json={"prompt": text}).json()
    assert body["count"] == 18_001
    assert server.http.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": text}
    assert server.http.post("/detokenize", json={"tokens": [0xC3, 0x28]}).json() == {"prompt": "\ufffd("}


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "abc"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, "2"]}, 400, "tokens.1"),
        ("/detokenize", {"tokens": [1, VOCAB]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, 400, "tokens"),
        ("/detokenize", {"tokens": [], "model": "other"}, 404, "model"),
    ],
)
def test_refused_with_the_name_of_the_field(
    server: Server, path: str, fields: dict[str, Any], status: int, param: str
) -> None:
    response = server.http.post(path, json=fields)
    assert response.status_code == status
    assert response.json()["error"]["param"].startswith(param)


def test_without_a_tokenizer_or_a_key() -> None:
    with serve(tokenizer=None) as server:
        response = server.http.post("/tokenize", json={"prompt": "a"})
        assert response.status_code == 400
        assert "without a tokenizer" in response.json()["error"]["message"]
    with serve(keys=("first",)) as server:
        for path in ("/tokenize", "/detokenize"):
            assert server.http.post(path, json={}).status_code == 401


def test_the_documents_schemas_are_there(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    for path, schemas in (
        ("/tokenize", ["TokenizeRequest", "TokenizeChatRequest"]),
        ("/detokenize", ["DetokenizeRequest"]),
    ):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        references = [{"$ref": f"#/components/schemas/{schema}"} for schema in schemas]
        assert body.get("anyOf", [body]) == references
        assert set(schemas) <= document["components"]["schemas"].keys()


def test_the_shipped_tokenizer_gives_a_completions_prompt() -> None:
    tokenizer = load_tokenizer(CLASSICS)
    with serve(tokenizer=lambda: tokenizer) as server:
        tokens = server.http.post("/tokenize", json={"prompt": "The old man"}).json()["tokens"]
    assert tokens == tokenizer.encode("The old man")


def test_tokenizer_info_of_a_folder(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((CLASSICS / name).read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 8192}')
    tokenizer = load_tokenizer(tmp_path)
    template = "{{ messages }}"
    with serve(tokenizer=lambda: tokenizer, tokenizer_folder=tmp_path, chat_template=template) as server:
        answer = server.http.get("/tokenizer_info")
    assert answer.status_code == 200, answer.text
    TokenizerInfo.model_validate(answer.json())
    assert answer.json() == {
        "tokenizer_class": "LlamaTokenizer",
        "vocab_size": 8193,
        "max_model_len": 2000,
        "bos_token": "<s>",
        "bos_token_id": 1,
        "eos_token": "</s>",
        "eos_token_id": 2,
        "unk_token": "<unk>",
        "pad_token": None,
        "added_tokens_decoder": {
            "8192": {
                "content": "<|im_end|>",
                "special": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
                "normalized": True,
            }
        },
        "chat_template": template,
    }


def test_tokenizer_info_without_files(server: Server) -> None:
    info = server.http.get("/tokenizer_info").json()
    assert (info["tokenizer_class"], info["vocab_size"], info["bos_token"]) == ("ByteTokenizer", 259, "<s>")
    assert info["chat_template"] is None
    with serve(tokenizer=None) as other:
        answer = other.http.get("/tokenizer_info")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
