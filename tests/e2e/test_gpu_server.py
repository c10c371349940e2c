"""The whole server on a GPU, with a checkpoint of the 1.3B shape (random weights) and 64 clients at once."""

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.running import RunningServer

pytestmark = pytest.mark.gpu

RECIPE = Path(__file__).parent.parent / "fixtures" / "recipes" / "gla-1.3B-100B"
MODEL = "big"
VOCAB = 32000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    flags = ["--model", str(RECIPE), "--load-format", "dummy", "--skip-tokenizer-init", "--device", "cuda"]
    folder = tmp_path_factory.mktemp("gpu")
    flags += ["--enable-sleep-mode", "--state-cache-dir", str(folder / "states"), "--state-cache-disk", "1"]
    with RunningServer(folder, *flags, "--served-model-name", MODEL) as running:
        print(running.log)
        yield running


async def one_stream(client: openai.AsyncOpenAI, length: int, max_tokens: int, seed: int, leave: bool) -> list[int]:
    rng = random.Random(seed)
    stream = await client.completions.create(
        model=MODEL,
        prompt=[rng.randrange(VOCAB) for _ in range(length)],
        max_tokens=max_tokens,
        temperature=rng.choice([0.0, 0.9]),
        top_p=rng.choice([1.0, 0.9]),
        seed=seed,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    token_ids: list[int] = []
    async for chunk in stream:
        if chunk.choices:
            token_ids += chunk.choices[0].model_extra["token_ids"]
            if leave and len(token_ids) > 5:
                await stream.close()
                return token_ids
        else:
            assert chunk.usage is not None
            assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (length, max_tokens)
    assert len(token_ids) == max_tokens
    return token_ids


def test_64_concurrent_streams(server: RunningServer) -> None:
    """Mixed lengths, one in eight clients leaves; every other stream is whole and no slot stays used."""

    async def run() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=120) as client:
            return await asyncio.gather(
                *(one_stream(client, 1 + 97 * i % 3000, 20 + 3 * i, i, leave=i % 8 == 7) for i in range(64))
            )

    start = time.monotonic()
    answers = asyncio.run(run())
    tokens = sum(map(len, answers))
    print(f"{tokens} tokens in {time.monotonic() - start:.2f} s")
    assert all(0 <= token < VOCAB for answer in answers for token in answer)
    time.sleep(1)
    metrics = httpx.get(f"{server.base_url}/metrics").text
    assert "gale_slots_used 0.0" in metrics
    assert "gale_requests_running 0.0" in metrics


def test_a_seed_repeats_its_answer(server: RunningServer) -> None:
    async def twice() -> tuple[list[int], list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=120) as client:
            return (
                await one_stream(client, 500, 50, 3, leave=False),
                await one_stream(client, 500, 50, 3, leave=False),
            )

    first, second = asyncio.run(twice())
    assert first == second


def test_engine_figures_stand_in_the_log(server: RunningServer) -> None:
    # 24 layers of 4 heads of 256 x 512 in float32 are 48 MiB; rings of 16 keys and values in bfloat16 and of 16
    # cumulative gates in float32 are 3.75 more.
    assert "51.75 MiB, constant at any length" in server.log


def test_sleeping_frees_the_gpu(server: RunningServer) -> None:
    """Weights, 256 states and room for parked ones are some 20 GB. Tests beside this one may take them at once."""
    import torch

    def answer() -> list[int]:
        return server.complete(20, prompt=[5, 6, 7], return_token_ids=True)["choices"][0]["token_ids"]

    before, freed = answer(), 0
    for _ in range(3):
        awake = torch.cuda.mem_get_info()[0]
        assert httpx.post(f"{server.base_url}/sleep", timeout=120).json() == {"is_sleeping": True}
        freed = max(freed, torch.cuda.mem_get_info()[0] - awake)
        assert "gale-engine" not in {child.name() for child in server.find_children()}
        assert httpx.post(f"{server.base_url}/wake_up", timeout=120).json() == {"is_sleeping": False}
        assert answer() == before
        if freed > 10e9:
            return
    pytest.fail(f"{freed} bytes were freed")
