"""Saved states of real servers, through whatever ends them."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.engine.engine import Engine
from tests.e2e.running import RunningServer, run_to_end
from tests.engine.driving import FIXTURES, Driver, engine_config, random_prompt

VOCAB = 512
FLAGS = (
    "--model",
    str(FIXTURES / "base"),
    "--skip-tokenizer-init",
    "--max-num-seqs",
    "16",
    "--state-cache-host",
    "0.01",
)
SAVERS = 8


class Savers:
    """Clients that save states until they are told to stop, and remember what was acknowledged."""

    def __init__(self, base_url: str, seed: int) -> None:
        self.acknowledged: dict[str, list[int]] = {}
        self.refused = 0
        self._base_url = base_url
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(SAVERS)
        self._done = [self._pool.submit(self._save, seed * SAVERS + number) for number in range(SAVERS)]

    def _save(self, number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=self._base_url, timeout=60) as http:
            while not self._end.is_set():
                prompt = random_prompt(rng.randrange(1, 60), VOCAB, rng.randrange(1 << 30))
                body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
                body |= {"save_state": True, "return_token_ids": True}
                try:
                    response = http.post("/v1/completions", json=body)
                except httpx.TransportError:
                    self.refused += 1
                    time.sleep(0.02)
                    continue
                if response.status_code != 200:
                    assert response.status_code in (500, 503), response.text
                    self.refused += 1
                    time.sleep(0.02)
                    continue
                answer: dict[str, Any] = response.json()
                self.acknowledged[answer["state"]["id"]] = prompt + answer["choices"][0]["token_ids"]

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.acknowledged) < count:
            assert time.monotonic() < deadline, f"{len(self.acknowledged)} of {count} saved"
            for future in self._done:
                assert not future.done(), future.exception()
            time.sleep(0.005)

    def __enter__(self) -> "Savers":
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._pool.shutdown()

    def end(self) -> dict[str, list[int]]:
        """All that was acknowledged."""
        self.__exit__()
        for future in self._done:
            future.result()
        return dict(self.acknowledged)


def check(server: RunningServer, acknowledged: dict[str, list[int]], cold: Driver, beyond: int | None) -> None:
    """Every acknowledged state is there, and so many others at most, and some of them go on as they should."""
    listed = httpx.get(f"{server.base_url}/v1/states", timeout=60).json()["data"]
    there = {state["id"]: state["num_tokens"] for state in listed}
    assert {state: len(tokens) for state, tokens in acknowledged.items()}.items() <= there.items()
    if beyond is not None:
        assert len(there) <= len(acknowledged) + beyond
    for state in random.Random(0).sample(sorted(acknowledged), min(20, len(acknowledged))):
        answer = server.complete(6, prompt=[5, 6], state=state, return_token_ids=True)
        expected = cold.complete([*acknowledged[state], 5, 6], max_tokens=6, temperature=0.0, ignore_eos=True)
        assert answer["choices"][0]["token_ids"] == expected.token_ids
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(acknowledged[state])


@pytest.mark.timeout(600)
def test_killed_in_the_middle_of_saves(
    request: pytest.FixtureRequest, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Servers one after the other, on one folder: of each the engine is killed, and then all of it, at any moment."""
    total = request.config.getoption("--saves", default=300)
    lives = max(1, total // 200)
    rng = random.Random(0)
    cold = Driver(Engine(engine_config(FIXTURES / "base")))
    flags = (*FLAGS, "--state-cache-dir", str(tmp_path / "states"))
    acknowledged: dict[str, list[int]] = {}
    for life in range(lives):
        with RunningServer(tmp_path / str(life), *flags) as server:
            # Beyond those that were acknowledged only those that were just about to be.
            check(server, acknowledged, cold, 2 * SAVERS * life)
            with Savers(server.base_url, life) as savers:
                savers.wait_for(rng.randrange(1, total // lives))
                server.child("gale-engine").kill()
                known = acknowledged | savers.acknowledged
                server.wait_for_log("the engine process serves again")
                check(server, known, cold, None)
                savers.wait_for(max(total // lives, len(savers.acknowledged) + 20))
                for process in [psutil.Process(server.process.pid), *server.find_children()]:
                    process.kill()
                acknowledged |= savers.end()
        assert savers.refused
    assert len(acknowledged) >= total
    with RunningServer(tmp_path / "last", *flags) as server:
        check(server, acknowledged, cold, 2 * SAVERS * lives)
        # Another server on the same folder does not start.
        code, log = run_to_end(*flags, "--port", "0")
        assert code == 2 and "in use by another server" in log
    record_property("acknowledged", len(acknowledged))
    record_property("kills", 2 * lives)
