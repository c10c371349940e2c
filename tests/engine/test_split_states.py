"""An engine that holds float32 states as two halves, as on CUDA, does what any other does; here on the CPU, whose
reference forms them whole before it reads them, so that answers are the same to the token."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.component_settings import StateCacheConfig
from server.engine import state_pool
from server.engine.state_file import read_header
from server.kernels import SPLIT
from server.types import Refusal
from tests.engine.driving import Driver, random_prompt
from tests.engine.test_saved_files import GREEDY, VOCAB, MiB, absorbed, listed, run
from tests.engine.test_saved_files import make_driver as make
from tests.engine.test_state_transfer import saved, upload
from tests.traces.trace import Trace, _cold, parked_bytes


class Splitting:
    """Whether float32 pools are to be split, and how often that was asked."""

    def __init__(self) -> None:
        self.on = True
        self.count = 0


@pytest.fixture
def splitting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Splitting]:
    chosen, usual = Splitting(), state_pool.held_dtype
    # What traces keep of engines from one test to the next is of whole states.
    caches = (_cold, parked_bytes)
    for cache in caches:
        cache.cache_clear()

    def held_dtype(state_dtype: torch.dtype, dtype: torch.dtype, *, on_cuda: bool) -> torch.dtype:
        if chosen.on and state_dtype == torch.float32:
            chosen.count += 1
            return SPLIT
        return usual(state_dtype, dtype, on_cuda=on_cuda)

    monkeypatch.setattr(state_pool, "held_dtype", held_dtype)
    yield chosen
    for cache in caches:
        cache.cache_clear()


def make_driver(splitting: Splitting, *, split: bool, folder: Path | None = None, **changes: object) -> Driver:
    splitting.on = split
    driver = make(Path() if "cache" in changes else folder, **changes)  # type: ignore[arg-type]
    recurrent = driver.engine._runner._step.states.parts["recurrent"]
    assert (recurrent.dtype == SPLIT) == split
    return driver


def test_held_as() -> None:
    held_dtype = state_pool.held_dtype
    assert held_dtype(torch.float32, torch.bfloat16, on_cuda=True) == SPLIT
    for dtype in (torch.float32, torch.float16):
        assert held_dtype(torch.float32, dtype, on_cuda=True) == torch.float32
    assert held_dtype(torch.float32, torch.bfloat16, on_cuda=False) == torch.float32
    assert held_dtype(torch.uint8, torch.bfloat16, on_cuda=True) == torch.uint8


@pytest.mark.parametrize("name", ["base", "conv", "gqa"])
def test_answers_are_the_same(name: str, splitting: Splitting) -> None:
    cache = StateCacheConfig(host_bytes=64 * MiB)
    halves, whole = (make_driver(splitting, split=split, name=name, cache=cache) for split in (True, False))
    for length in (3, 70, 200):
        prompt = random_prompt(length, VOCAB, length)
        answers = [driver.complete(prompt, max_tokens=40, **GREEDY) for driver in (halves, whole)]
        assert answers[0].token_ids == answers[1].token_ids
        again = halves.complete(prompt, max_tokens=40, **GREEDY)
        assert again.token_ids == answers[0].token_ids
        assert again.cached_tokens == length


@pytest.mark.parametrize("first", [True, False])
def test_saved_states_go_on_either_way(first: bool, splitting: Splitting, tmp_path: Path) -> None:
    """A folder of a server that holds them the other way: as after an update, or on another device."""
    folder = tmp_path / "states"
    driver = make_driver(splitting, split=first, folder=folder)
    prompt = random_prompt(77, VOCAB, 1)
    answer = run(driver, prompt, save=True, name="talk", max_tokens=21)
    more = run(driver, [5, 6], state="talk", max_tokens=15)
    driver.engine.close()
    other = make_driver(splitting, split=not first, folder=folder)
    assert listed(other) == [answer.state]
    assert run(other, [5, 6], state="talk", max_tokens=15).token_ids == more.token_ids
    assert absorbed(other) == 2
    other.engine.close()


@pytest.mark.parametrize("first", [True, False])
def test_states_travel_either_way(first: bool, splitting: Splitting, tmp_path: Path) -> None:
    cache = StateCacheConfig(host_bytes=64 * MiB)
    ours, theirs = (make_driver(splitting, split=split, cache=cache) for split in (first, not first))
    transcript = saved(ours, tmp_path / "a")
    assert (read_header(tmp_path / "a").parts["recurrent"].dtype == SPLIT) == first
    told = upload(theirs, tmp_path / "a", name="moved")
    assert isinstance(told, list), told
    answer = run(theirs, [5, 6, 7], state="moved", max_tokens=12)
    assert answer.cached_tokens == len(transcript)
    assert answer.token_ids == run(ours, [5, 6, 7], state=listed(ours)[0].id, max_tokens=12).token_ids


@pytest.mark.parametrize("smaller", ["bfloat16", "int8"])
def test_smaller_types_are_rounded_on_request_only(smaller: str, splitting: Splitting, tmp_path: Path) -> None:
    cache = StateCacheConfig(host_bytes=64 * MiB)
    halves = make_driver(splitting, split=True, cache=cache)
    transcript = saved(halves, tmp_path / "a")
    theirs = make(Path(), state_dtype=smaller, cache=cache)
    told = upload(theirs, tmp_path / "a")
    assert isinstance(told, Refusal) and told.code == "state_needs_conversion"
    assert isinstance(upload(theirs, tmp_path / "a", name="a", convert=True), list)
    assert run(theirs, [5], state="a", max_tokens=1).cached_tokens == len(transcript)
    saved(theirs, tmp_path / "b", seed=2)
    assert isinstance(upload(halves, tmp_path / "b", name="b"), list), "what is larger holds it exactly"
    assert run(halves, [5], state="b", max_tokens=1).cached_tokens == 69


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_parked_in_fewer_bits(dtype: str, splitting: Splitting) -> None:
    cache = StateCacheConfig(host_bytes=64 * MiB, dtype=dtype)
    halves, whole = (make_driver(splitting, split=split, cache=cache) for split in (True, False))
    prompt = random_prompt(90, VOCAB, 3)
    answers = []
    for driver in (halves, whole):
        driver.complete(prompt, max_tokens=4, **GREEDY)
        again = driver.complete([*prompt, 7], max_tokens=12, **GREEDY)
        assert again.cached_tokens == 90
        answers.append(again.token_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("seed", [2, 7, 11])
def test_traces(seed: int, splitting: Splitting, tmp_path: Path) -> None:
    """Save, fork, restore, evict, swap, cancel, restart, crash, move: in a random order."""
    trace = Trace(seed, tmp_path, "cpu")
    trace.run()
    assert trace.counts["answers"]
    assert splitting.count > 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["base", "conv", "gqa"])
def test_a_bfloat16_model_on_cuda(name: str, tmp_path: Path) -> None:
    """Saved, restarted and restored: as without an interruption, and not a token absorbed twice. A CPU, which holds
    states whole, takes them."""
    changes = {"mode": ("cuda", True), "dtype": "bfloat16"}
    steady = make(tmp_path / "steady", name, **changes)  # type: ignore[arg-type]
    folder = tmp_path / "states"
    transcript = random_prompt(100, VOCAB, 1)
    for turn in range(4):
        driver = make(folder, name, **changes)  # type: ignore[arg-type]
        assert driver.engine._runner._step.states.parts["recurrent"].dtype == SPLIT
        new = transcript if turn == 0 else random_prompt(3 * turn, VOCAB, turn)
        options = {"state": "talk" if turn else None, "save": True, "name": "talk", "max_tokens": 25}
        before = absorbed(driver)
        answer = run(driver, new, **options)
        assert absorbed(driver) - before == len(new)
        assert answer.token_ids == run(steady, new, **options).token_ids
        transcript = [*transcript, *(new if turn else []), *answer.token_ids]
        driver.engine.close()
    cache = StateCacheConfig(gpu_bytes=64 * MiB, host_bytes=64 * MiB)
    ours = make(Path(), name, cache=cache, **changes)  # type: ignore[arg-type]
    told = saved(ours, tmp_path / "a")
    theirs = make(Path(), name, cache=StateCacheConfig(host_bytes=64 * MiB))
    assert isinstance(upload(theirs, tmp_path / "a", name="moved"), list)
    assert run(theirs, [5], state="moved", max_tokens=2).cached_tokens == len(told)
