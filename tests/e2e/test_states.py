"""Saved states of the shipped model, over a real socket."""

from typing import Any

import httpx

BOOK = "The old man looked at the sea. " * 40


def complete(base_url: str, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 12, **fields}
    response = httpx.post(f"{base_url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_book_is_read_once_and_asked_many_times(base_url: str) -> None:
    read = httpx.post(f"{base_url}/v1/states/prefill", json={"prompt": BOOK, "name": "book", "ttl": 600}, timeout=60)
    assert read.status_code == 201, read.text
    state = read.json()
    assert state["num_tokens"] == complete(base_url, BOOK)["usage"]["prompt_tokens"]
    assert state["bytes"] > 0
    for question in (" And then", " But she", ""):
        answer = complete(base_url, question, state="book", return_token_ids=True)
        (choice,) = answer["choices"]
        # The same text at once: no space and no beginning of sequence may come between the two.
        whole = complete(base_url, BOOK + question, return_token_ids=True)
        assert answer["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
        assert choice["text"] == whole["choices"][0]["text"]
    assert complete(base_url, " And then", state="book")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    grown = complete(base_url, " Then he said", state="book", save_state=True)["state"]
    assert grown["num_tokens"] > state["num_tokens"] + 12
    for name in ("book", grown["id"]):
        assert httpx.delete(f"{base_url}/v1/states/{name}").status_code == 200
        assert httpx.get(f"{base_url}/v1/states/{name}").status_code == 404
