"""Decode graphs: the same answers as without them, and padding that touches nobody.

Without a GPU, a graph is the work it would have captured, run again: the buffers, the padding and the choice of size
are then those of the real thing.
"""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from server.engine import graphs as graphs_module
from server.engine.batch import Batch
from server.engine.engine import Engine
from server.engine.graphs import DecodeGraphs, ladder
from server.engine.runner import PendingStep
from server.engine.sampler import SamplePlan
from server.kernels import STATE_DTYPES, ring_size
from server.types import FinishReason
from tests.engine.driving import FIXTURES, Answer, Driver, engine_config, random_prompt

VOCAB = 512
ON_EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
MakeDriver = Callable[..., Driver]


class Repeat:
    """Stands in for the recorder of CUDA graphs."""

    def __init__(self, stream: object) -> None:
        pass

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


@pytest.fixture
def make_driver(monkeypatch: pytest.MonkeyPatch) -> MakeDriver:
    """Builds an engine whose decode steps are graphs, or one without."""

    def make(device: str, *, graphs: bool, folder: Path = FIXTURES / "base", **changes: object) -> Driver:
        engine = Engine(engine_config(folder, device=device, **changes))
        runner = engine._runner
        if not graphs:
            runner._graphs = None
        elif device == "cpu":
            monkeypatch.setattr(graphs_module, "_Recorder", Repeat)
            rows = engine.info.max_num_seqs
            runner._graphs = DecodeGraphs(
                runner._model,
                runner._states,
                runner._sampler,
                max_rows=rows,
                stream=None,  # type: ignore[arg-type]
            )
        assert (runner._graphs is not None) == graphs
        return Driver(engine)

    return make


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8, 9, 100, 256, 1000, 1024])
def test_the_ladder_wastes_little(max_rows: int) -> None:
    sizes = ladder(max_rows)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, max_rows)
    for below, size in pairwise(sizes):
        most_padding = size - below - 1
        assert most_padding <= max(7, size // 8)
    assert len(sizes) <= 45


PARAMS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "frequency_penalty": 1.0, "repetition_penalty": 1.2},
    {"temperature": 1.3, "seed": 3, "logit_bias": {7: 3.0}},
    {"temperature": 0.9, "seed": 4, "min_tokens": 4, "stop_token_ids": tuple(range(150))},
]


def same(ours: Answer, theirs: Answer) -> bool:
    close = all(abs(a.sampled - b.sampled) < 1e-3 for a, b in zip(ours.logprobs, theirs.logprobs, strict=True))
    return close and (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)


def traffic(driver: Driver, seed: int, params: list[dict[str, object]]) -> dict[int, Answer]:
    """Requests that come and go between steps; answers in order of submission."""
    rng = random.Random(seed)
    requests = []
    for index in range(24):
        prompt = random_prompt(rng.choice([1, 3, 64, 100]), VOCAB, index)
        requests.append(driver.submit([prompt], max_tokens=rng.randint(1, 40), **rng.choice(params)))
        for _ in range(rng.randint(0, 6)):
            driver.step()
    driver.run()
    assert driver.engine.scheduler.allocator.num_used == 0
    return {index: driver.answers[request, 0] for index, request in enumerate(requests)}


@ON_EACH_DEVICE
@pytest.mark.parametrize("params", [PARAMS[:1], PARAMS[1:2], PARAMS], ids=["greedy", "plain", "mixed"])
@pytest.mark.parametrize("name", ["base", "gqa", "conv"])
def test_answers_are_those_without_graphs(
    name: str, params: list[dict[str, object]], device: str, make_driver: MakeDriver
) -> None:
    answers = [
        traffic(make_driver(device, graphs=graphs, folder=FIXTURES / name, max_num_seqs=7), 0, params)
        for graphs in (False, True)
    ]
    assert len({tuple(answer.token_ids) for answer in answers[0].values()}) > 5
    for index, answer in answers[0].items():
        assert answer.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
        assert same(answers[1][index], answer), index


@ON_EACH_DEVICE
@pytest.mark.parametrize("states", ["float32", "bfloat16", "int8"])
def test_answers_are_the_same_alone(
    states: str, device: str, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens wait in rings, which fold at absolute positions: the batch has no part in it."""
    monkeypatch.setattr(graphs_module, "folds_every_token", lambda rows, values: False)
    config: dict[str, object] = {"folder": FIXTURES / "gqa", "state_dtype": states, "max_num_seqs": 7}
    together = traffic(make_driver(device, graphs=True, **config), 0, PARAMS[:1])  # type: ignore[arg-type]
    without = traffic(make_driver(device, graphs=False, **config), 0, PARAMS[:1])  # type: ignore[arg-type]
    one_by_one = traffic(make_driver(device, graphs=True, **config | {"max_num_seqs": 1}), 0, PARAMS[:1])  # type: ignore[arg-type]
    assert sum(len(answer.token_ids) > ring_size(STATE_DTYPES[states]) for answer in together.values()) > 2
    for others in (without, one_by_one):
        equal = [same(others[index], answer) for index, answer in together.items()]
        # On a GPU, matrices of one row and of seven are multiplied in other orders, which may tip the rounding of a
        # small state and then a near tie; anything wrong with the rings would show in most answers.
        assert all(equal) if device == "cpu" or states == "float32" else sum(equal) >= 20


@ON_EACH_DEVICE
@pytest.mark.parametrize("rows", [1, 3, 5, 6])
@pytest.mark.parametrize("plan", ["greedy", "plain", "mixed"])
def test_padding_touches_no_live_slot(rows: int, plan: str, device: str, make_driver: MakeDriver) -> None:
    """Whatever other slots hold, states and the sampler's tables, is bit for bit the same after a step."""
    driver = make_driver(device, graphs=True, folder=FIXTURES / "conv", max_num_seqs=12)
    runner = driver.engine._runner
    sampler, states, graphs = runner._sampler, runner._states, runner._graphs
    assert graphs is not None and states.conv_LSWD is not None
    slots = random.Random(rows).sample(range(1, 13), rows)
    others = [slot for slot in range(1, 13) if slot not in slots]
    num_greedy = {"greedy": rows, "plain": 0, "mixed": rows // 2}[plan]
    with torch.inference_mode():
        states.recurrent_LSGKV.normal_()
        states.conv_LSWD.normal_()
        states.recurrent_LSGKV[:, 0] = torch.nan
        sampler.last_token_S.copy_(torch.arange(13))
        sampler.done_S.zero_()
        tables = (states.recurrent_LSGKV.transpose(0, 1), states.conv_LSWD.transpose(0, 1), sampler.last_token_S)
        tables = (*tables, sampler.done_S, sampler._counts_SV)
        before = [table.clone() for table in tables]
        penalties = plan == "mixed"
        sampled = graphs.launch(
            slots,
            range(rows),
            [0] * rows,
            SamplePlan(num_greedy, rows - num_greedy, 0, penalties, False, False, None),
            [0] * rows,
            range(rows),
        )
        tokens = sampled.tokens_R.tolist()
    assert len(tokens) == rows
    assert all(0 <= token < VOCAB for token in tokens)
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table[others], old[others])
    for table, old in zip(tables[:3], before, strict=False):
        assert not torch.equal(table[slots], old[slots])


def test_steps_with_a_prompt_run_without_a_graph(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver("cpu", graphs=True)
    graphs = driver.engine._runner._graphs
    assert graphs is not None
    launched: list[int] = []
    launch = graphs.launch
    monkeypatch.setattr(graphs, "launch", lambda slots, *rest: launched.append(len(slots)) or launch(slots, *rest))
    driver.submit([random_prompt(10, VOCAB, 0)], temperature=0.0, max_tokens=6, ignore_eos=True)
    for _ in range(3):
        driver.step()
    driver.submit([random_prompt(10, VOCAB, 1)], temperature=0.0, max_tokens=3, ignore_eos=True)
    driver.run()
    # The first prompt, two steps alone; the second prompt beside a decode; two steps of both.
    assert launched == [1, 1, 2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("steps", ["decodes", "admissions and prompts"])
@pytest.mark.parametrize("params", [PARAMS[:1], PARAMS[1:2], PARAMS], ids=["greedy", "plain", "mixed"])
def test_launching_never_waits_for_the_device(
    params: list[dict[str, object]], steps: str, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver("cuda", graphs=True)
    traffic(driver, 0, params)  # compiles and loads what is loaded at first use
    launch = driver.engine._runner.launch

    def watched(batch: Batch) -> PendingStep:
        if bool(batch.prefills) == (steps == "decodes"):
            return launch(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(driver.engine._runner, "launch", watched)
    traffic(driver, 1, params)
