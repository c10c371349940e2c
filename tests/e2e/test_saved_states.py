"""Saved states of real servers, through whatever ends them."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

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

    def __init__(self, base_url: str) -> None:
        self.acknowledged: dict[str, list[int]] = {}
        self.refused = 0
        self._base_url = base_url
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(SAVERS)
        self._done = [self._pool.submit(self._save, number) for number in range(SAVERS)]

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
    for state in random.Random(0).sample(sorted(acknowledged), 20):
        answer = server.complete(6, prompt=[5, 6], state=state, return_token_ids=True)
        expected = cold.complete([*acknowledged[state], 5, 6], max_tokens=6, temperature=0.0, ignore_eos=True)
        assert answer["choices"][0]["token_ids"] == expected.token_ids
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(acknowledged[state])


def test_killed_in_the_middle_of_a_thousand_saves(tmp_path: Path) -> None:
    cold = Driver(Engine(engine_config(FIXTURES / "base")))
    flags = (*FLAGS, "--state-cache-dir", str(tmp_path / "states"))
    with RunningServer(tmp_path / "first", *flags) as server, Savers(server.base_url) as savers:
        savers.wait_for(200)
        server.child("gale-engine").kill()
        known = dict(savers.acknowledged)
        server.wait_for_log("the engine process serves again")
        savers.wait_for(len(known) + 50)
        check(server, known, cold, None)
        savers.wait_for(500)
        for process in [psutil.Process(server.process.pid), *server.find_children()]:
            process.kill()
        acknowledged = savers.end()
    assert len(acknowledged) >= 500 and savers.refused
    with RunningServer(tmp_path / "second", *flags) as server:
        # Beyond them only those that were just being acknowledged.
        check(server, acknowledged, cold, 2 * SAVERS)
        # Another server on the same folder does not start.
        code, log = run_to_end(*flags, "--port", "0")
        assert code == 2 and "in use by another server" in log
