"""Captured steps: the same answers as without them, and padding that touches nobody.

Without a GPU, a graph is the work it would have captured, run again: the buffers, the padding and the choice of size
are then those of the real thing.
"""

import random
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine import graphs as graphs_module
from server.engine.batch import Batch, Span
from server.engine.capture import all_shapes, capture_steps
from server.engine.engine import Engine
from server.engine.graphs import StepGraphs
from server.engine.runner import PendingStep, Runner
from server.engine.sequence import Sequence
from server.engine.state_pool import NULL_SLOT
from server.engine.step_shapes import StepShape
from server.kernels import STATE_DTYPES, ring_size
from server.types import FinishReason, SamplingParams
from tests.engine.driving import CLIENT, FIXTURES, Answer, Driver, engine_config, random_prompt

VOCAB = 512
ON_EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
MakeDriver = Callable[..., Driver]


class Repeat:
    """Stands in for the recorder of CUDA graphs."""

    def __init__(self, stream: object) -> None:
        pass

    def record(self, work: Callable[[], None], *, is_loaded: bool) -> Callable[[], None]:
        work()
        return work


@torch.inference_mode()
def run_once(graphs: StepGraphs, shape: StepShape, *, folds: int | None = None) -> float:
    """In place of a measurement: the same work, and the same time for all shapes."""
    graphs._fill(shape, folds)
    graphs._forward[shape]()
    return 1e-3


@pytest.mark.parametrize("max_rows", [1, 8, 9, 257, 260, 300, 1024])
def test_the_buffers_hold_every_shape(max_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the largest number of decodes has a ladder of prompt tokens that ends before another's."""
    monkeypatch.setattr(graphs_module, "_Recorder", Repeat)
    driver = Driver(Engine(engine_config(FIXTURES / "base")))
    shapes = all_shapes(max_rows, 8192)
    graphs = StepGraphs(driver.engine._runner._step, shapes, stream=None)  # type: ignore[arg-type]
    for shape in shapes:
        columns = graphs._columns(shape)
        assert columns.token_ids_P is None or len(columns.token_ids_P) == shape.tokens
        assert len(graphs.rows(shape.rows)[0]) == shape.rows


@pytest.fixture
def make_driver(monkeypatch: pytest.MonkeyPatch) -> MakeDriver:
    """Builds an engine whose steps are graphs, or one without."""

    def make(device: str, *, graphs: bool, folder: Path = FIXTURES / "base", **changes: object) -> Driver:
        config = engine_config(folder, device=device, **changes)
        engine = Engine(config)
        runner = engine._runner
        if not graphs:
            runner._graphs = None
        elif device == "cpu":
            monkeypatch.setattr(graphs_module, "_Recorder", Repeat)
            monkeypatch.setattr(StepGraphs, "measure", run_once)
            runner._graphs, _ = capture_steps(
                runner._step,
                max_rows=engine.info.max_num_seqs,
                max_tokens=engine.scheduler.token_budget,
                stream=None,  # type: ignore[arg-type]
            )
        assert (runner._graphs is not None) == graphs
        return Driver(engine)

    return make


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


def traffic(driver: Driver, seed: int, params: list[dict[str, object]]) -> dict[tuple[int, int], Answer]:
    """Requests that come and go between steps, some with several choices; answers in order of submission."""
    rng = random.Random(seed)
    requests = []
    for index in range(24):
        prompt = random_prompt(rng.choice([1, 3, 64, 100]), VOCAB, index)
        n = 3 if index % 6 == 2 else 1
        requests.append(driver.submit([prompt], n, max_tokens=rng.randint(1, 40), **rng.choice(params)))
        for _ in range(rng.randint(0, 6)):
            driver.step()
    driver.run()
    assert driver.engine.scheduler.allocator.num_used == 0
    return {
        (requests.index(request), choice): driver.answers[request, choice]
        for request, choice in sorted(driver.answers)
        if request in requests
    }


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


def make_batch(
    decodes: list[int], prompts: list[tuple[int, int, int, int]], params: list[dict[str, object]], ring: int
) -> Batch:
    """A step of sequences that are in the middle of their lives.

    Args:
        decodes: their slots.
        prompts: slot, start, length, and length of the whole prompt.
        params: sampling parameters, in turn.
        ring: tokens that a ring takes.
    """
    rng = random.Random(0)

    def sequence(slot: int, prompt_length: int) -> Sequence:
        return Sequence(
            client=CLIENT,
            request_id=slot,
            choice=0,
            prompt=array("i", random_prompt(prompt_length, VOCAB, slot)),
            params=SamplingParams(**params[slot % len(params)]),  # type: ignore[arg-type]
            seed=slot,
            stop_ids=frozenset(),
            max_tokens=None,
            matcher=None,
            arrived=0.0,
            slot=slot,
        )

    spans = []
    for slot in decodes:
        seq, position = sequence(slot, 5), rng.randrange(1, 60)
        start = 4 + position
        seq.num_folded = start // ring * ring if ring else start
        spans.append(Span(seq, slot, start, 1, True, position))
    prefills = [
        Span(sequence(slot, total), slot, start, length, start + length == total, 0)
        for slot, start, length, total in prompts
    ]
    return Batch(tuple(spans), tuple(prefills), ())


def tables_of(runner: Runner) -> list[Tensor]:
    """All that a step may change, slots first."""
    step, sampler = runner._step, runner._step.sampler
    tables = [sampler.last_token_S, sampler.done_S, sampler._counts_SV]
    for layer in step.states.layers:
        tables.append(layer.values_SGKV)
        if layer.scales_SGK is not None:
            tables.append(layer.scales_SGK)
        if layer.ring is not None:
            tables += [layer.ring.keys_SGCK, layer.ring.values_SGCV, layer.ring.decays_SGCK]
    if step.states.conv_LSWD is not None:
        tables += step.states.conv_LSWD.unbind()
    return tables


@torch.inference_mode()
def fill_at_random(runner: Runner) -> None:
    """States and rings as some sequences may have left them; the null slot's are no numbers."""
    generator = torch.Generator(runner._step.device).manual_seed(0)
    for table in tables_of(runner)[3:]:
        if table.dtype == torch.uint8:
            table.random_(1, 256, generator=generator)
            continue
        # Of nothing but negative numbers, a ring's are decays.
        table.normal_(generator=generator).abs_().neg_()
        table[NULL_SLOT] = torch.nan
    sampler = runner._step.sampler
    sampler.last_token_S.copy_(torch.arange(len(sampler.last_token_S)) + 7)
    sampler.done_S.zero_()


PROMPTS: dict[str, list[tuple[int, int, int, int]]] = {
    "none": [],
    "one, begun": [(7, 64, 30, 94)],
    "one, not ended": [(7, 0, 64, 200)],
    "three": [(7, 0, 3, 3), (2, 64, 64, 130), (11, 0, 20, 20)],
}
"""Slot, start, length and length of the whole prompt."""


@ON_EACH_DEVICE
@pytest.mark.parametrize("params", [PARAMS[:1], PARAMS[1:2], PARAMS], ids=["greedy", "plain", "mixed"])
@pytest.mark.parametrize(("prompts", "rows"), [(name, rows) for name in PROMPTS for rows in (0, 1, 3, 6)][1:])
def test_padding_touches_no_live_slot(
    prompts: str, params: list[dict[str, object]], rows: int, device: str, make_driver: MakeDriver
) -> None:
    """Whatever other slots hold, states and the sampler's tables, is bit for bit the same after a step."""
    driver = make_driver(device, graphs=True, folder=FIXTURES / "conv", max_num_seqs=12, max_num_batched_tokens=256)
    runner = driver.engine._runner
    used = {slot for slot, *_ in PROMPTS[prompts]}
    slots = random.Random(rows).sample([slot for slot in range(1, 13) if slot not in used], rows)
    fill_at_random(runner)
    before = [table.clone() for table in tables_of(runner)]
    batch = make_batch(slots, PROMPTS[prompts], params, runner._step.states.ring_size)
    assert runner._graphs is not None and runner._graphs.find(batch.shape) is not None
    step = runner.launch(batch)
    tokens = step.fetch()
    assert len(tokens) == len(step.rows) == sum(span.samples for span in batch.spans)
    assert all(0 <= token < VOCAB for token in tokens)
    others = [slot for slot in range(1, 13) if slot not in slots and slot not in used]
    after = tables_of(runner)
    for table, old in zip(after, before, strict=True):
        assert torch.equal(table[others], old[others])
    sampling = [span.slot for span in step.rows]
    assert after[0][sampling].tolist() == tokens
    for slot in used:
        assert not torch.equal(after[3][slot], before[3][slot])


@ON_EACH_DEVICE
@pytest.mark.parametrize("states", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["gqa", "conv"])
@pytest.mark.parametrize("exact", [True, False], ids=["full", "padded"])
def test_a_captured_step_is_the_launched_one(
    exact: bool, name: str, states: str, device: str, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, log-probabilities, states, rings and tables: bit for bit where nothing is padded, so that the same
    kernels run; but for the order of sums otherwise."""
    monkeypatch.setattr(graphs_module, "folds_every_token", lambda rows, values: False)
    config: dict[str, object] = {"state_dtype": states, "max_num_seqs": 12, "max_num_batched_tokens": 256}
    driver = make_driver(device, graphs=True, folder=FIXTURES / name, **config)
    runner = driver.engine._runner
    graphs = runner._graphs
    assert graphs is not None
    decodes = [1, 2, 3, 4, 5, 6, 8, 9] if exact else [3, 9, 1]
    prompts = [(12, 64, 64, 128)] if exact else [(12, 64, 30, 94), (7, 0, 9, 9)]
    results = []
    for captured in (graphs, None):
        runner._graphs = captured
        fill_at_random(runner)
        batch = make_batch(decodes, prompts, [{"temperature": 0.0, "logprobs": 5}], runner._step.states.ring_size)
        if captured is not None:
            shape = captured.find(batch.shape)
            assert shape is not None and (shape == batch.shape) == exact
        step = runner.launch(batch)
        tokens = step.fetch()
        logprobs = [step.fetch_logprobs(row) for row in range(len(tokens))]
        live = [table[1:].clone() for table in tables_of(runner)]
        results.append((tokens, logprobs, live))
    (tokens, logprobs, tables), (launched_tokens, launched_logprobs, launched_tables) = results
    assert tokens == launched_tokens
    if exact:
        assert logprobs == launched_logprobs
    for row, launched_row in zip(logprobs, launched_logprobs, strict=True):
        assert row is not None and launched_row is not None
        assert row.top_ids == launched_row.top_ids
        assert row.top == pytest.approx(launched_row.top, abs=1e-4)
    for table, launched in zip(tables, launched_tables, strict=True):
        if exact:
            assert torch.equal(table, launched)
        elif table.dtype == torch.uint8:
            assert int((table.int() - launched.int()).abs().max()) <= 1
        else:
            assert torch.allclose(
                table.float(), launched.float(), rtol=1e-2 if table.dtype == torch.bfloat16 else 1e-4, atol=1e-4
            )


def note_shapes(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[StepShape]:
    """The shapes of the captured steps that the driver's engine launches from now on."""
    graphs = driver.engine._runner._graphs
    assert graphs is not None
    launched: list[StepShape] = []
    absorb = graphs.absorb
    monkeypatch.setattr(graphs, "absorb", lambda shape, *rest: launched.append(shape) or absorb(shape, *rest))
    return launched


def test_steps_take_the_smallest_graph_that_holds_them(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver("cpu", graphs=True, max_num_seqs=12)
    launched = note_shapes(driver, monkeypatch)
    driver.submit([random_prompt(10, VOCAB, 0)], temperature=0.0, max_tokens=6, ignore_eos=True)
    for _ in range(3):
        driver.step()
    prompts = [random_prompt(10, VOCAB, seed) for seed in (1, 2)]
    driver.submit(prompts, temperature=0.0, max_tokens=3, ignore_eos=True)
    driver.run()
    # The first prompt, two steps alone; two prompts beside a decode; two steps of all three.
    assert launched == [(0, 16, 1), (1, 0, 0), (1, 0, 0), (1, 64, 8), (4, 0, 0), (4, 0, 0)]


@ON_EACH_DEVICE
def test_shared_and_scored_prompts_are_those_without_graphs(device: str, make_driver: MakeDriver) -> None:
    """States forked behind a captured step, snapshots restored before one, logits replayed and prompts scored."""
    results = []
    for graphs in (False, True):
        driver = make_driver(device, graphs=graphs, folder=FIXTURES / "conv", max_num_seqs=4)
        prompts = [random_prompt(length, VOCAB, length) for length in (70, 5)]
        driver.submit([random_prompt(3, VOCAB, 1)], max_tokens=30, temperature=0.0, ignore_eos=True)
        driver.step()
        driver.submit(prompts, n=3, max_tokens=6, temperature=1.0, seed=1, ignore_eos=True)
        driver.submit([prompts[0]], n=2, max_tokens=4, temperature=0.0, ignore_eos=True, prompt_logprobs=2)
        driver.run()
        results.append({key: (answer.token_ids, answer.finish_reason) for key, answer in driver.answers.items()})
    assert results[0] == results[1]
    assert len(results[0]) == 9


def test_steps_that_no_graph_holds_are_launched(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver("cpu", graphs=True, max_num_seqs=12)
    plain = make_driver("cpu", graphs=False, max_num_seqs=12)
    launched = note_shapes(driver, monkeypatch)
    prompts = [random_prompt(5, VOCAB, seed) for seed in range(9)]
    answers = []
    for each in (driver, plain):
        each.submit(prompts, temperature=0.0, max_tokens=3, ignore_eos=True)
        each.run()
        answers.append([each.answers[0, choice].token_ids for choice in range(9)])
    assert answers[0] == answers[1]
    assert launched == [(12, 0, 0), (12, 0, 0)]  # nine prompts at once are more than a graph takes


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
