"""Exceptions in a step end the sequences that they strike, and the engine goes on."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from server import grammar
from server.component_settings import StateCacheConfig
from server.engine import requests as requests_module
from server.engine import runner as runner_module
from server.engine.constraints import Constraint
from server.engine.detokenizer import StopMatcher
from server.engine.engine import Engine
from server.engine.named_states import NamedStates
from server.engine.prefix_cache import PrefixCache
from server.engine.reuse import PrefixReuse
from server.engine.runner import PendingStep, Runner
from server.engine.sampler import Sampler
from server.engine.saved_files import SavedFiles
from server.engine.sequence import Sequence
from server.engine.sessions import Sessions
from server.engine.state_transfer import StateTransfer
from server.types import FinishReason, Refusal, RefusalReason, StateAction, StateInfo
from tests.engine.driving import CLIENT, FIXTURES, Answer, Driver, engine_config, random_prompt
from tests.engine.test_engine import ALL_MODES, VOCAB, Mode, settle

CACHE = StateCacheConfig(gpu_bytes=64 << 20, host_bytes=64 << 20)
VICTIM = 13
"""The seed of requests at which something fails."""
BUG = RuntimeError("a bug")


def make_driver(mode: Mode, **changes: object) -> Driver:
    device, overlap = mode
    config = engine_config(FIXTURES / "base", device=device, state_cache=CACHE, **changes)
    return Driver(Engine(config, overlap=overlap))


def is_victim(seq: Sequence) -> bool:
    return seq.params.seed == VICTIM


def fail_if(condition: bool) -> None:
    if condition:
        raise BUG


Patch = pytest.MonkeyPatch


def before(patch: Patch, owner: object, name: str, condition: Callable[..., bool]) -> None:
    """Let a function fail where the condition holds of its arguments."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        fail_if(condition(*args, **kwargs))
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapped)


def in_lease(patch: Patch) -> None:
    before(patch, Sampler, "lease", lambda sampler, sequences: any(map(is_victim, sequences)))


def while_biases_are_written(patch: Patch) -> None:
    """Half of the lease is done, of others too."""
    before(patch, Sampler, "_write_bias", lambda sampler, seq: is_victim(seq))


def in_a_logprobs_row(patch: Patch) -> None:
    before(patch, PendingStep, "fetch_logprobs", lambda step, row: is_victim(step.rows[row].seq))


def in_the_stop_matcher(patch: Patch) -> None:
    before(patch, StopMatcher, "feed", lambda matcher, piece: any(stop == "victim" for _, stop in matcher._stops))


OF_ONE = [in_lease, while_biases_are_written, in_a_logprobs_row, in_the_stop_matcher]

PROMPTS = [random_prompt(length, VOCAB, 1)[:length] for length in (5, 64, 90, 200)]
"""The shorter ones begin the longer ones, so that parked states are used."""


@contextmanager
def patched(fault: Callable[[Patch], None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        yield


def parameters(kind: int) -> dict[str, object]:
    """All of them greedy, so that the answers do not depend on the seed, which names the victims."""
    common: dict[str, object] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 3 + 5 * (kind % 3)}
    special: list[dict[str, object]] = [{}, {"logit_bias": {7: 3.0}}, {"logprobs": 2}, {"frequency_penalty": 1.0}]
    return common | special[kind % 4]


@cache
def alone(mode: Mode) -> dict[tuple[int, int], Answer]:
    """The answer to every prompt with every kind of parameters."""
    driver = make_driver(mode)
    return {
        (index, kind): driver.complete(prompt, tenant=f"{kind}", **parameters(kind))
        for index, prompt in enumerate(PROMPTS)
        for kind in range(12)
    }


def random_trace(
    driver: Driver, seed: int, *, victims: dict[str, object] | None
) -> dict[tuple[int, int], tuple[int, int]]:
    """Drive requests to their ends.

    Args:
        victims: parameters of those, a third of all, that something happens to; None: there are none.

    Returns:
        By request and choice, which prompt and kind it was; victims have kinds below zero.
    """
    rng = random.Random(seed)
    asked = {}
    for _ in range(18):
        index, kind, n = rng.randrange(len(PROMPTS)), rng.randrange(12), rng.randint(1, 3)
        fields = parameters(kind)
        if victims is not None and rng.random() < 0.33:
            fields |= {"seed": VICTIM, **victims}
            kind = -1
        request = driver.submit([PROMPTS[index]], n=n, **fields)
        asked |= {(request, choice): (index, kind) for choice in range(n)}
        for _ in range(rng.randrange(4)):
            driver.step()
    settle(driver)
    return asked


@ALL_MODES
@pytest.mark.parametrize("fault", OF_ONE)
def test_a_fault_of_one_ends_one(fault: Callable[[Patch], None], mode: Mode) -> None:
    expected = alone(mode)
    victims = {"logit_bias": {9: 2.0}, "logprobs": 1, "stop": ("victim",)}
    driver = make_driver(mode, max_num_seqs=4)
    with patched(fault):
        asked = random_trace(driver, 0, victims=victims)
    struck = 0
    for choice, (index, kind) in asked.items():
        answer = driver.answers[choice]
        if kind < 0:
            assert answer.finish_reason is FinishReason.ERROR
            assert answer.error == "the engine failed at this request (RuntimeError)"
            struck += 1
        else:
            assert answer.token_ids == expected[index, kind].token_ids
            assert answer.finish_reason is FinishReason.LENGTH
    assert struck
    # What it left parked is right, too.
    for choice, (index, kind) in random_trace(driver, 0, victims=None).items():
        assert driver.answers[choice].token_ids == expected[index, kind].token_ids


def now_and_then(patch: Patch, owner: object, name: str, seed: int) -> None:
    rng = random.Random(seed)
    before(patch, owner, name, lambda *_, **__: rng.random() < 0.25)


@ALL_MODES
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param(Runner, "_advance_rings", id="upload"),
        pytest.param(Runner, "_save", id="half-way"),
        pytest.param(Runner, "_fork", id="fork"),
    ],
)
def test_whoever_is_not_struck_gets_the_right_answer(owner: object, name: str, mode: Mode) -> None:
    """Also where states had been updated and tokens were yet to be sampled."""
    expected = alone(mode)
    errors = answers = 0
    for seed in range(2):
        driver = make_driver(mode, max_num_seqs=4)
        with pytest.MonkeyPatch.context() as patch:
            now_and_then(patch, owner, name, seed)
            asked = random_trace(driver, seed, victims=None)
        for choice, (index, kind) in asked.items():
            answer, right = driver.answers[choice], expected[index, kind]
            if answer.finish_reason is FinishReason.ERROR:
                errors += 1
                assert answer.token_ids == right.token_ids[: len(answer.token_ids)]
            else:
                answers += 1
                assert answer.token_ids == right.token_ids
        for choice, (index, kind) in random_trace(driver, seed, victims=None).items():
            assert driver.answers[choice].token_ids == expected[index, kind].token_ids
    assert errors and answers


@ALL_MODES
@pytest.mark.parametrize("seed", range(3))
def test_a_state_that_cannot_be_restored_costs_time_only(seed: int, mode: Mode) -> None:
    expected = alone(mode)
    driver = make_driver(mode, max_num_seqs=4)
    struck = 0
    rng = random.Random(seed)

    def strike(*_: object, **__: object) -> bool:
        nonlocal struck
        failing = rng.random() < 0.5
        struck += failing
        return failing

    with patched(lambda patch: before(patch, runner_module, "restore_snapshot", strike)):
        asked = random_trace(driver, seed, victims=None)
    assert struck
    for choice, (index, kind) in (asked | random_trace(driver, seed, victims=None)).items():
        answer = driver.answers[choice]
        assert answer.finish_reason is FinishReason.LENGTH
        assert answer.token_ids == expected[index, kind].token_ids


@ALL_MODES
def test_who_cannot_begin_from_a_state_absorbs_all_of_it(mode: Mode) -> None:
    """A saved state's transcript, the choices of a prompt, a prompt that comes in pieces, each told of once."""
    expected = alone(mode)
    driver = make_driver(mode, max_num_seqs=1)
    prompt = PROMPTS[3]
    driver.submit([prompt[:150]], max_tokens=0, save=True, name="text")
    driver.run()
    with patched(lambda patch: before(patch, runner_module, "restore_snapshot", lambda *_, **__: True)):
        before_all = driver.engine.stats().prompt_tokens
        request = driver.submit([prompt[150:]], state="text", **parameters(0))
        driver.run()
        assert driver.answers[request, 0].token_ids == expected[3, 0].token_ids
        assert driver.answers[request, 0].cached_tokens == 0
        # The step that could not be used, too.
        assert driver.engine.stats().prompt_tokens - before_all == 50 + 200
        choices = driver.submit([prompt], 3, prompt_logprobs=1, **parameters(0))
        pieces = driver.submit([prompt[:160]], more=True, **parameters(1))
        for _ in range(9):
            driver.step()
        driver.extend(pieces, prompt[160:], last=True)
        settle(driver)
    for choice in range(3):
        assert driver.answers[choices, choice].token_ids == expected[3, 0].token_ids
    assert len(driver.prompts[choices, 0].logprobs) == 199
    assert not any((choices, choice) in driver.prompts for choice in (1, 2))
    assert driver.answers[pieces, 0].token_ids == expected[3, 1].token_ids


def test_who_begins_again_keeps_the_order() -> None:
    driver = make_driver(("cpu", False), max_num_seqs=2, max_num_batched_tokens=64)
    driver.complete(PROMPTS[3], max_tokens=1)
    with patched(lambda patch: before(patch, runner_module, "restore_snapshot", lambda *_, **__: True)):
        for token in (5, 6):
            driver.submit([[*PROMPTS[3], token]], **parameters(0))
        driver.step()
    assert [seq.prompt[-1] for seq in driver.engine.scheduler.waiting] == [5, 6]
    settle(driver)


@ALL_MODES
def test_an_answer_does_not_depend_on_what_can_be_kept_of_it(mode: Mode) -> None:
    """Where there is no memory for a copy of its state, it ends as it would have, and is saved as far as it goes."""
    expected = alone(mode)
    driver = make_driver(mode, max_num_seqs=4)
    with patched(lambda patch: before(patch, runner_module, "take_snapshot", lambda *_, **__: True)):
        asked = {}
        for index, prompt in enumerate(PROMPTS):
            for kind in range(4):
                save = {"save": True} if kind else {}
                asked[driver.submit([prompt], **save, **parameters(kind))] = index, kind
        text = driver.submit([PROMPTS[3][:100]], max_tokens=0, save=True, more=True)
        driver.step()
        driver.extend(text, PROMPTS[3][100:], last=True)
        settle(driver)
    for request, (index, kind) in asked.items():
        answer, right = driver.answers[request, 0], expected[index, kind]
        assert (answer.token_ids, answer.finish_reason) == (right.token_ids, FinishReason.LENGTH)
        if kind:
            assert answer.state is not None and answer.state.nbytes == 0
    read = driver.answers[text, 0].state
    assert read is not None and read.num_tokens == 200
    more = driver.submit([[]], state=read.id, **parameters(0))
    settle(driver)
    assert driver.answers[more, 0].token_ids == expected[3, 0].token_ids


@ALL_MODES
def test_who_waits_for_a_copy_that_fails_ends_alone(mode: Mode) -> None:
    expected = alone(mode)
    driver = make_driver(mode, max_num_seqs=1)
    with patched(lambda patch: before(patch, runner_module, "take_snapshot", lambda *_, **__: True)):
        request = driver.submit([PROMPTS[3]], n=2, **parameters(0))
        settle(driver)
    assert driver.answers[request, 0].token_ids == expected[3, 0].token_ids
    assert driver.answers[request, 1].finish_reason is FinishReason.ERROR
    assert driver.complete(PROMPTS[3], **parameters(0)).token_ids == expected[3, 0].token_ids


@ALL_MODES
def test_prompt_logprobs_that_fail(mode: Mode) -> None:
    driver = make_driver(mode)
    with patched(lambda patch: before(patch, runner_module, "pack_scores", lambda *_: True)):
        victim = driver.submit([PROMPTS[3]], n=2, prompt_logprobs=1, max_tokens=4)
        other = driver.submit([PROMPTS[2]], max_tokens=4, ignore_eos=True)
        settle(driver)
    assert [driver.answers[victim, choice].finish_reason for choice in (0, 1)] == [FinishReason.ERROR] * 2
    assert driver.answers[other, 0].finish_reason is FinishReason.LENGTH


def test_a_request_that_cannot_be_queued() -> None:
    driver = make_driver(("cpu", False))
    with patched(lambda patch: before(patch, requests_module, "StopMatcher", lambda *_, **__: True)):
        refused = driver.submit([PROMPTS[0]], stop=("a",), max_tokens=4)
    assert driver.rejected[refused].reason is RefusalReason.FAILED
    assert driver.complete(PROMPTS[0], max_tokens=4, ignore_eos=True).finish_reason is FinishReason.LENGTH
    settle(driver)


@ALL_MODES
def test_a_grammar_that_fails_ends_its_own_text(mode: Mode, make: Callable[..., Driver]) -> None:
    driver = make(mode)
    bad, good = grammar.from_regex("bad"), grammar.from_regex("good")
    with patched(lambda patch: before(patch, driver.engine._constraints, "_prototype", lambda rule: rule == bad)):
        # In one step, so that their masks are computed together.
        victim = driver.submit([PROMPTS[0]], grammar=bad)
        other = driver.submit([PROMPTS[0]], grammar=good)
        settle(driver)
    assert driver.answers[victim, 0].finish_reason is FinishReason.ABORT
    assert driver.answers[other, 0].text == b"good"
    with patched(lambda patch: before(patch, Constraint, "ends_with", lambda *_: True)):
        answer = driver.complete(PROMPTS[0], grammar=good, max_tokens=1)
    assert answer.finish_reason is FinishReason.ERROR
    settle(driver)


@ALL_MODES
def test_sampling_of_held_rows_that_fails(mode: Mode, make: Callable[..., Driver]) -> None:
    driver = make(mode)
    rule = grammar.from_regex("[a-z]{20}")
    expected = driver.complete(PROMPTS[1], temperature=0.0, max_tokens=12, ignore_eos=True)
    free = driver.submit([PROMPTS[1]], temperature=0.0, max_tokens=12, ignore_eos=True)
    held = driver.submit([PROMPTS[0]], n=2, grammar=rule)
    for _ in range(5):
        driver.step()
    with patched(lambda patch: before(patch, Sampler, "resume", lambda *_: True)):
        settle(driver)
    assert [driver.answers[held, choice].finish_reason for choice in (0, 1)] == [FinishReason.ERROR] * 2
    assert driver.answers[free, 0].token_ids == expected.token_ids
    assert len(driver.complete(PROMPTS[0], grammar=rule).text) == 20
    settle(driver)


def test_an_engine_that_only_fails_gives_up() -> None:
    driver = make_driver(("cpu", False), max_num_seqs=1)
    with patched(lambda patch: before(patch, Runner, "_launch", lambda *_: True)):
        for _ in range(20):
            driver.submit([PROMPTS[0]], max_tokens=4)
        with pytest.raises(RuntimeError, match="a bug"):
            driver.run()
    assert 0 < driver.engine.stats().finished["error"] < 20


@pytest.mark.gpu
def test_an_error_of_the_device_is_not_survived() -> None:
    driver = make_driver(("cuda", True))
    driver.submit([PROMPTS[0]], max_tokens=4)

    def complain(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.AcceleratorError):
        patch.setattr(Runner, "_launch", complain)
        driver.run()
    driver.engine.forget_client(CLIENT)


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}])
def test_rows_of_no_numbers_come_to_an_end(sampling: dict[str, object]) -> None:
    """A slot whose restoring failed may hold anything."""
    driver = make_driver(("cpu", False))
    driver.engine._runner._step.model.norm.fill_(torch.nan)
    assert driver.complete(PROMPTS[0], max_tokens=3, **sampling).finish_reason is FinishReason.ERROR


@pytest.mark.parametrize("mode", [("cpu", False), ("cpu", True)], ids=["in-step", "overlapped"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((NamedStates, name) for name in ("find", "of", "fork", "delete", "reserve", "save")),
        *((StateTransfer, name) for name in ("download", "upload")),
        *((PrefixReuse, name) for name in ("hold", "adopt", "file_written", "keep_answer")),
        (PrefixCache, "keep"),
        (SavedFiles, "write"),
        (Sessions, "note"),
    ],
)
def test_a_fault_of_saved_states_ends_nothing_else(owner: type, name: str, mode: Mode, tmp_path: Path) -> None:
    """The command gets a refusal, the answer that was to be saved an error; the engine and everybody else go on."""
    cache = StateCacheConfig(host_bytes=64 << 20, folder=tmp_path / "states", disk_bytes=64 << 20)
    driver = Driver(Engine(engine_config(FIXTURES / "base", state_cache=cache), overlap=mode[1]))
    kept: dict[str, object] = {"save": True, "max_tokens": 4, "ignore_eos": True}
    driver.submit([PROMPTS[0]], **kept, name="old")
    driver.run()
    assert isinstance(driver.command(StateAction.DOWNLOAD, "old", path=tmp_path / "file"), list)
    commands = [
        (StateAction.LIST, ""),
        (StateAction.DESCRIBE, "old"),
        (StateAction.FORK, "old"),
        (StateAction.DOWNLOAD, "old"),
        (StateAction.UPLOAD, ""),
        (StateAction.DELETE, "old"),
    ]
    struck = 0

    def strike(*_: object, **__: object) -> bool:
        nonlocal struck
        struck += 1
        return True

    with patched(lambda patch: before(patch, owner, name, strike)):
        beside = driver.submit([PROMPTS[2]], **parameters(0))
        asked = [
            driver.submit([PROMPTS[0]], **kept),
            driver.submit([[9]], state="old", max_tokens=4),
            driver.submit([PROMPTS[1]], session="talk", max_tokens=4, ignore_eos=True),
        ]
        for action, state in commands:
            path = tmp_path / ("file" if action is StateAction.UPLOAD else "other")
            told = driver.command(action, state, path=path)
            assert isinstance(told, list) or told.reason in (RefusalReason.FAILED, RefusalReason.UNKNOWN_STATE)
        settle(driver)
    assert struck
    assert driver.answers[beside, 0].token_ids == alone(("cpu", False))[2, 0].token_ids
    for request in asked:
        assert request in driver.rejected or driver.answers[request, 0].finish_reason is not FinishReason.RUNNING
    # And everything works again, with as much room as before.
    assert driver.engine._states is not None and not driver.engine._states._reserved.total()
    again = driver.submit([PROMPTS[3]], **kept, name="new")
    driver.run()
    assert isinstance(driver.answers[again, 0].state, StateInfo)
    assert not isinstance(driver.command(StateAction.FORK, "new"), Refusal)
    assert not isinstance(driver.command(StateAction.DELETE, "new"), Refusal)
