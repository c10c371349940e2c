"""The load generators of vLLM and SGLang: what they send, and what they must find in the answer.

Both are too heavy to install for a test. Their requests are replayed here, field by field as of vLLM's
``benchmarks/lib/endpoint_request_func.py`` and SGLang's ``benchmark/serving.py`` in 2026, and the answers are read
under the assumptions that these files make: a server that breaks one of them shows up there as failed requests, or as
wrong figures.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.clients.conftest import KEY, MODEL
from tests.e2e.running import RunningServer

HEADERS = {"authorization": f"Bearer {KEY}"}
OUTPUT_LENGTH = 9
TEXT = "The old man looked at the sea and"
IDS = [1, 300, 301, 302]


@dataclass
class Measured:
    """What a load generator takes from a stream.

    Attributes:
        text: of the first choice.
        pieces: chunks that count as a token's arrival.
        output_tokens, prompt_tokens: as the server counts them; None if it does not say.
    """

    text: str = ""
    pieces: int = 0
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    chunks: list[dict[str, Any]] = field(default_factory=list)


def post(server: RunningServer, path: str, payload: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(server.base_url + path, json=payload, headers={**HEADERS, **headers}, timeout=60)


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Both read line by line, take ``data: `` off, and parse every line but ``[DONE]`` as JSON."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done = [line for line in response.text.splitlines() if line.strip()]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def read_like_vllm(response: httpx.Response, *, chat: bool) -> Measured:
    """Chunks with choices are tokens, chunks without are usage; the text of a choice may be null."""
    measured = Measured(chunks=lines_of(response))
    for chunk in measured.chunks:
        if choices := chunk.get("choices"):
            measured.text += (choices[0]["delta"].get("content") if chat else choices[0].get("text")) or ""
            measured.pieces += 1
        elif usage := chunk.get("usage"):
            measured.output_tokens = usage.get("completion_tokens")
            measured.prompt_tokens = usage.get("prompt_tokens")
    return measured


def read_like_sglang(response: httpx.Response, *, chat: bool) -> Measured:
    """Completions: every chunk has a choice with text. Chat: chunks without choices are skipped."""
    measured = Measured(chunks=lines_of(response))
    for chunk in measured.chunks:
        usage = chunk.get("usage") or {}
        measured.output_tokens = usage.get("completion_tokens", measured.output_tokens)
        measured.prompt_tokens = usage.get("prompt_tokens") or measured.prompt_tokens
        if chat and not chunk.get("choices"):
            continue
        text = (chunk["choices"][0]["delta"].get("content") or "") if chat else chunk["choices"][0]["text"]
        measured.pieces += bool(text)
        measured.text += text
    return measured


def whole_text(server: RunningServer, **fields: Any) -> str:
    """What the stream must add up to."""
    body = {"model": MODEL, "max_tokens": OUTPUT_LENGTH, "temperature": 0, "ignore_eos": True, **fields}
    return post(server, "/v1/completions", body).json()["choices"][0]["text"]


def test_before_the_run(server: RunningServer) -> None:
    """Both wait for the list of models and take the first one's id; vLLM's looks for metrics, SGLang's for two
    routes that only its own server has, and does without."""
    models = httpx.get(f"{server.base_url}/v1/models", headers=HEADERS)
    assert models.json()["data"][0]["id"] == MODEL
    assert httpx.get(f"{server.base_url}/metrics").status_code == 200
    assert httpx.get(f"{server.base_url}/health").status_code == 200
    for path in ("/server_info", "/model_info"):
        assert httpx.get(server.base_url + path, headers=HEADERS).status_code == 404


@pytest.mark.parametrize("prompt", [TEXT, IDS], ids=["text", "token ids"])
@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("extra", [{}, {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}])
def test_vllm_bench_serve(server: RunningServer, prompt: Any, logprobs: int | None, extra: dict[str, Any]) -> None:
    """``--backend openai`` (and ``vllm``, its other name), with ``--ignore-eos`` and sampling flags."""
    payload = {
        "model": MODEL,
        "prompt": prompt,
        "repetition_penalty": 1.0,
        "max_tokens": OUTPUT_LENGTH,
        "logprobs": logprobs,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **extra,
    }
    response = post(server, "/v1/completions", payload, **{"x-request-id": "benchmark-serving-7"})
    measured = read_like_vllm(response, chat=False)
    assert response.headers["x-request-id"] == "benchmark-serving-7"
    assert measured.output_tokens == OUTPUT_LENGTH
    assert measured.prompt_tokens == (len(IDS) if prompt is IDS else 9)
    assert 1 <= measured.pieces <= OUTPUT_LENGTH
    if extra:
        assert measured.text == whole_text(server, prompt=prompt)


@pytest.mark.parametrize("content", [TEXT, [{"type": "text", "text": TEXT}]], ids=["text", "parts"])
def test_vllm_bench_serve_chat(server: RunningServer, content: Any) -> None:
    """``--backend openai-chat``."""
    payload = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": OUTPUT_LENGTH,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }
    measured = read_like_vllm(post(server, "/v1/chat/completions", payload), chat=True)
    assert measured.output_tokens == OUTPUT_LENGTH
    assert measured.prompt_tokens is not None and measured.prompt_tokens > 9
    assert measured.text
    # The chunk that names the role counts as a token there, as with vLLM's own server.
    assert 1 <= measured.pieces <= OUTPUT_LENGTH + 2


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "--disable-stream"])
@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("top_logprobs", [0, 2])
def test_sglang_benchmark_serving(server: RunningServer, streamed: bool, ignore_eos: bool, top_logprobs: int) -> None:
    """``--backend vllm`` and ``sglang-oai`` send the same; ``--return-logprob --top-logprobs-num N`` adds a field."""
    payload: dict[str, Any] = {
        "model": MODEL,
        "prompt": TEXT,
        "best_of": 1,
        "max_tokens": OUTPUT_LENGTH,
        "stream": streamed,
        "temperature": 0.0,
        "ignore_eos": ignore_eos,
    }
    if top_logprobs:
        payload["logprobs"] = top_logprobs
    response = post(server, "/v1/completions", payload)
    expected = whole_text(server, prompt=TEXT, ignore_eos=ignore_eos)
    if streamed:
        measured = read_like_sglang(response, chat=False)
        assert all(chunk["choices"] for chunk in measured.chunks), "a chunk without choices ends its run"
        assert measured.text == expected
        assert measured.pieces >= 1
    else:
        # It reads this as a stream of one line, too.
        (line,) = response.text.splitlines()
        assert json.loads(line)["choices"][0]["text"] == expected
        assert json.loads(line)["usage"]["completion_tokens"] == OUTPUT_LENGTH


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "--disable-stream"])
def test_sglang_benchmark_serving_chat(server: RunningServer, streamed: bool) -> None:
    """``--backend sglang-oai-chat`` and ``vllm-chat``; rounds of a conversation ask for usage."""
    payload: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": TEXT}],
        "max_completion_tokens": OUTPUT_LENGTH,
        "stream": streamed,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    if streamed:
        payload["stream_options"] = {"include_usage": True}
        measured = read_like_sglang(post(server, "/v1/chat/completions", payload), chat=True)
        assert (measured.output_tokens, bool(measured.prompt_tokens)) == (OUTPUT_LENGTH, True)
        assert measured.text
    else:
        answer = post(server, "/v1/chat/completions", payload).json()
        assert answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] == OUTPUT_LENGTH
