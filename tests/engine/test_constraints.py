"""Grammars, banned phrases and allowed tokens in the engine: every text obeys them, and nobody else notices."""

import json
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server import grammar
from server.engine.batch import Batch
from server.engine.constraints import Constraint, Constraints, MaskJob, Verdict, allowed_RV
from server.engine.runner import PendingStep
from server.tokenizer import Tokenizer
from server.types import FinishReason
from tests.engine.driving import EOS, Answer, Driver, random_prompt, states_of
from tests.engine.test_engine import ALL_MODES, Mode, settle

PROMPT = random_prompt(7, 400, 1)


def follow(rule: str, driver: Driver, **fields: object) -> Answer:
    return driver.complete(PROMPT, **{"temperature": 1.0, "max_tokens": 300, "grammar": rule, **fields})


# Schemas, and a validator of what these may hold.

scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4)
sizes = st.integers(0, 5)
leaves = st.one_of(
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, st.integers(-99, 99), sizes
    ),
    st.builds(lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size}, sizes, sizes),
    st.builds(lambda values: {"enum": values}, st.lists(scalars, min_size=1, max_size=4)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "née 世界"}]),
    st.just({"type": "string", "pattern": "^[a-c]{2,4}$"}),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.builds(
        lambda item, low, size: {"type": "array", "items": item, "minItems": low, "maxItems": low + size},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    objects = st.builds(
        lambda fields, optional: {
            "type": "object",
            "properties": fields,
            "required": [name for name in fields if name not in optional],
            "additionalProperties": False,
        },
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
        st.sets(st.text(max_size=4), max_size=1),
    )
    return arrays | objects | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2))


schemas = st.recursive(leaves, containers, max_leaves=5)


def valid(value: Any, schema: dict[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(valid(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(option) and value == option for option in schema["enum"])
    if "const" in schema:
        return bool(value == schema["const"])
    match schema["type"]:
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            low, high = schema.get("minLength", 0), schema.get("maxLength", 99)
            return (
                isinstance(value, str)
                and low <= len(value) <= high
                and bool(re.search(schema.get("pattern", ""), value))
            )
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "array":
            fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return fits and all(valid(item, schema["items"]) for item in value)
    fields = schema["properties"]
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= value.keys() <= fields.keys()
        and all(valid(item, fields[name]) for name, item in value.items())
    )


@given(schema=schemas, seed=st.integers(0, 2**32), spaces=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_text_is_valid_against_its_schema(
    driver: Driver, tokenizer: Tokenizer, schema: dict[str, Any], seed: int, spaces: bool
) -> None:
    rule = grammar.from_json_schema(schema, whitespace_pattern=" ?" if spaces else None, any_whitespace=spaces)
    answer = follow(rule, driver, seed=seed)
    if answer.finish_reason is FinishReason.STOP:
        assert valid(json.loads(answer.text), schema), answer.text
    else:
        assert answer.finish_reason is FinishReason.LENGTH
        assert len(answer.token_ids) == 300
        matcher = grammar.GrammarVocabulary(tokenizer, 512, EOS).matcher(rule)
        assert matcher.consume_tokens(answer.token_ids)


PATTERNS = [
    *("(yes|no)", "[0-9]{3}-[0-9]{4}", "a+b?", "(é|世界|🌊)+!", r"\{\}", "x{0,3}", "[^a-z]{5}", "the cat"),
    *(r"(\d+\.){3}\d+", "<[a-z]{1,3}/>", "(ab|a)(bc|c)"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_text_matches_its_pattern(pattern: str, driver: Driver) -> None:
    texts = set()
    for seed in range(4):
        answer = follow(grammar.from_regex(pattern), driver, seed=seed, max_tokens=100)
        assert answer.finish_reason is FinishReason.STOP or len(answer.token_ids) == 100
        if answer.finish_reason is FinishReason.STOP:
            assert re.fullmatch(pattern, answer.text.decode()), answer.text
            texts.add(answer.text)
    assert texts


@given(
    choices=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_text_is_one_of_the_choices(driver: Driver, choices: list[str], seed: int) -> None:
    answer = follow(grammar.from_choices(choices), driver, seed=seed)
    assert answer.text.decode() in choices
    assert answer.finish_reason is FinishReason.STOP
    assert answer.stop_reason is None


def test_digits_and_words_are_ascii(driver: Driver) -> None:
    for seed in range(5):
        assert re.fullmatch(rb"[0-9][0-9a-zA-Z_]", follow(grammar.from_regex(r"\d\w"), driver, seed=seed).text)


def test_lark_and_gbnf(driver: Driver) -> None:
    for text in ('start: "a" b+\nb: /[0-9]/', 'root ::= "a" [0-9]+'):
        rule = grammar.from_grammar(text)
        answer = follow(rule, driver, seed=1, max_tokens=9)
        assert re.fullmatch(rb"a[0-9]*", answer.text)


# Ends.


def test_the_last_token_of_a_complete_text_is_no_cut(driver: Driver) -> None:
    """Whether or not max_tokens ends there, too; but where more could follow, it was cut."""
    assert follow(grammar.from_regex("abc"), driver, seed=1, max_tokens=3).finish_reason is FinishReason.STOP
    cut = follow(grammar.from_regex("abc+"), driver, seed=1, max_tokens=3)
    assert (cut.text, cut.finish_reason) == (b"abc", FinishReason.LENGTH)


def test_a_complete_text_ends_although_more_tokens_are_wanted(driver: Driver) -> None:
    answer = follow(grammar.from_choices(["abc"]), driver, min_tokens=20)
    assert (answer.text, answer.finish_reason) == (b"abc", FinishReason.STOP)
    longer = follow(grammar.from_regex("[a-z]*"), driver, min_tokens=20, logit_bias={EOS: 100.0})
    assert len(longer.token_ids) == 21, "end of sequence was neither kept off nor allowed"
    assert longer.finish_reason is FinishReason.STOP


def test_an_empty_text(driver: Driver) -> None:
    answer = follow(grammar.from_regex(""), driver)
    assert (answer.text, answer.token_ids, answer.finish_reason) == (b"", [], FinishReason.STOP)


def test_stop_strings_and_stop_tokens_end_a_text_before_its_grammar(driver: Driver, tokenizer: Tokenizer) -> None:
    rule = grammar.from_regex("[abc]{30}x")
    stopped = follow(rule, driver, seed=3, stop=("b",))
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, "b")
    assert re.fullmatch(rb"[ac]*", stopped.text)
    token = tokenizer.token_bytes().index(b"c")
    stopped = follow(rule, driver, seed=3, stop_token_ids=(token,))
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, token)


@ALL_MODES
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_dead_end_is_an_abort(mode: Mode, temperature: float, make: Callable[..., Driver]) -> None:
    """The text so far is returned, and said to be unfinished."""
    driver = make(mode)
    table = driver.engine._requests.texts.plain
    assert table is not None
    a, b = table.index(b"a"), table.index(b"b")
    dead = {"grammar": grammar.from_regex("aa*bz"), "allowed_token_ids": (a, b), "logit_bias": {b: 100.0}}
    answer = driver.complete(PROMPT, temperature=temperature, max_tokens=50, stop=("bx",), **dead)
    assert (answer.text, answer.finish_reason, answer.error) == (b"ab", FinishReason.ABORT, None)
    nothing = driver.complete(PROMPT, temperature=temperature, max_tokens=5, allowed_token_ids=(a,), bad_words=((a,),))
    assert (nothing.text, nothing.finish_reason) == (b"", FinishReason.ABORT)
    settle(driver)
    assert driver.engine.stats().finished["abort"] == 2


def test_a_grammar_that_cannot_be_followed_any_further_is_an_abort(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraints = driver.engine._constraints
    matcher = constraints._compile(grammar.from_regex("a{1,9}"))
    assert not matcher.consume_token(5), "the matcher was meant to fail"
    monkeypatch.setattr(constraints, "_prototype", lambda rule: matcher)
    answer = follow(grammar.from_regex("a"), driver)
    assert (answer.text, answer.finish_reason) == (b"", FinishReason.ABORT)
    settle(driver)


# Beside others.

MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "grammar": grammar.from_regex("[a-z]{3,40}!")},
    {"grammar": grammar.from_json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 4}), "seed": 1},
    {"top_p": 0.9, "seed": 2},
    {"top_k": 5, "grammar": grammar.from_regex("(ab|cd)*."), "seed": 3, "logprobs": 3},
    {"grammar": grammar.from_regex("[ -~]+"), "frequency_penalty": 1.5, "repetition_penalty": 1.2, "seed": 4},
    {"seed": 5, "bad_words": ((70, 71), (80,)), "logit_bias": {70: 5.0, 71: 5.0}},
    {"seed": 6, "allowed_token_ids": tuple(range(60, 90)), "min_p": 0.01},
    {"temperature": 0.0, "grammar": grammar.from_choices(["one", "two", "three"]), "n": 3, "seed": 7},
    {"seed": 8, "min_tokens": 5, "logit_bias": {EOS: 9.0}, "logprobs": 1},
]


@ALL_MODES
def test_everybody_gets_what_they_get_alone(mode: Mode, make: Callable[..., Driver]) -> None:
    alone = []
    driver = make(mode)
    for fields in MIXED:
        request = submit(driver, fields)
        settle(driver)
        alone.append([driver.answers[request, choice] for choice in range(fields.get("n", 1))])
    for budget, seed in ((64, 0), (400, 1)):
        together = make(mode, max_num_seqs=6, max_num_batched_tokens=budget)
        order = random.Random(seed).sample(range(len(MIXED)), len(MIXED))
        ids = {}
        for index in order:
            ids[index] = submit(together, MIXED[index])
            together.step()
        settle(together)
        for index, expected in enumerate(alone):
            for choice, answer in enumerate(expected):
                ours = together.answers[ids[index], choice]
                assert (ours.token_ids, ours.text) == (answer.token_ids, answer.text), MIXED[index]
                assert (ours.finish_reason, ours.stop_reason) == (answer.finish_reason, answer.stop_reason)
                assert len(ours.logprobs) == len(answer.logprobs)


def submit(driver: Driver, fields: dict[str, Any]) -> int:
    fields = {"temperature": 1.0, "max_tokens": 30, **fields}
    return driver.submit([PROMPT], n=fields.pop("n", 1), **fields)


class SlowThreads:
    """Runs nothing until told to."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[None], Callable[[], None]]] = []

    def submit(self, work: Callable[..., None], *args: object) -> "Future[None]":
        future: Future[None] = Future()
        self.jobs.append((future, lambda: work(*args)))
        return future

    def run(self) -> None:
        jobs, self.jobs = self.jobs, []
        for future, work in jobs:
            work()
            future.set_result(None)


@ALL_MODES
def test_nobody_waits_for_somebody_elses_mask(
    mode: Mode, make: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks that take for ever, the others go on; with the masks, the constrained one goes on where it was."""
    driver = make(mode)
    fields = {"grammar": grammar.from_regex("[a-z]{5,9}"), "seed": 1}
    first = submit(driver, fields)
    settle(driver)
    expected = driver.answers[first, 0]
    threads = SlowThreads()
    monkeypatch.setattr(driver.engine._constraints, "_threads", threads)
    monkeypatch.setattr(driver.engine._constraints, "_slow_threads", threads)
    constrained = submit(driver, fields)
    for _ in range(3):
        driver.step()
        threads.run()
    driver.step()
    so_far = len(driver.answers[constrained, 0].token_ids)
    other = submit(driver, {"temperature": 0.0, "max_tokens": 20})
    for _ in range(25):
        driver.step()
    assert driver.answers[other, 0].finish_reason is FinishReason.LENGTH
    assert len(driver.answers[constrained, 0].token_ids) <= so_far + 1
    for _ in range(30):
        threads.run()
        driver.step()
        driver.step()
    settle(driver)
    assert driver.answers[constrained, 0].token_ids == expected.token_ids


def test_a_grammar_that_takes_long_holds_others_up_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are computed together until one takes long; from then on nobody waits for it."""
    constraints = Constraints(tokenizer, 512, (EOS,))
    a = tokenizer.token_bytes().index(b"a")
    slow, quick = Constraint(grammar.from_regex("a+"), ()), Constraint(grammar.from_regex("a+b"), ())
    follow_masks, blocked = constraints._follow, threading.Event()

    def follow(job: MaskJob, sampled: list[tuple[Constraint, int | None]]) -> None:
        if any(constraint is slow for constraint, _ in sampled):
            blocked.wait(0.2)
        follow_masks(job, sampled)

    monkeypatch.setattr(constraints, "_follow", follow)
    constraints.follow([(slow, None), (quick, None)])
    assert slow.job is not None and slow.job is quick.job
    slow.job.future.result(30)
    together = slow.job
    for _ in range(50):
        constraints.follow([(quick, a)])
        quick.job.future.result(30)
        if not quick.slow:
            break  # on a busy machine it may take long, too
    constraints.follow([(slow, a), (quick, a)])
    assert slow.job is not together and slow.job is not quick.job
    quick.job.future.result(30)
    assert quick.verdict is Verdict.OPEN
    blocked.set()
    slow.job.future.result(30)
    assert slow.verdict is Verdict.OPEN
    assert set(allowed_RV(slow.job.masks_RW, 512)[slow.row].nonzero()[:, 0].tolist()) >= {a, EOS}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_token_is_absorbed_while_its_mask_is_computed(
    device: str, make: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps overlap: a step is launched before the host even looks at the token that it absorbs."""
    driver = make((device, True))
    runner, constraints = driver.engine._runner, driver.engine._constraints
    launch, follow_masks = runner.launch, constraints.follow
    order: list[tuple[str, int]] = []

    def note_launch(batch: Batch) -> PendingStep:
        order.extend(("launched", span.start - len(PROMPT)) for span in batch.decodes)
        return launch(batch)

    def note_follow(sampled: list[tuple[Constraint, int | None]]) -> None:
        order.extend(("looked at", len(followed)) for _, token in sampled if token is not None)
        followed.extend(token for _, token in sampled if token is not None)
        follow_masks(sampled)

    followed: list[int] = []
    monkeypatch.setattr(runner, "launch", note_launch)
    monkeypatch.setattr(constraints, "follow", note_follow)
    answer = follow(grammar.from_regex("[a-z]{20}"), driver, seed=1)
    assert len(followed) == len(answer.token_ids) > 3
    assert order == [(what, token) for token in range(len(followed)) for what in ("launched", "looked at")]


@ALL_MODES
def test_cancelled_at_every_step_of_a_grammar(mode: Mode, make: Callable[..., Driver]) -> None:
    driver = make(mode, max_num_seqs=2)
    fields = {"grammar": grammar.from_regex("[a-z]{3,9}"), "seed": 1}
    for steps in range(12):
        neighbour, victim = submit(driver, fields), submit(driver, fields | {"seed": 2})
        for _ in range(steps):
            driver.step()
        driver.cancel(victim)
        settle(driver)
        assert re.fullmatch(rb"[a-z]{3,9}", driver.answers[neighbour, 0].text)
        assert not driver.engine.scheduler.held


@ALL_MODES
def test_the_state_absorbs_the_text_and_nothing_after_it(mode: Mode, make: Callable[..., Driver]) -> None:
    """Where a grammar ends by itself, and where its end is an end-of-sequence token."""
    for pattern in ("abcab", "[a-z]+"):
        driver = make(mode, max_num_seqs=1)
        fields = {"grammar": grammar.from_regex(pattern), "logit_bias": {EOS: 3.0}, "seed": 5, "max_tokens": 100}
        answer = driver.complete(PROMPT, **fields)
        assert answer.finish_reason is FinishReason.STOP
        absorbed = answer.token_ids if answer.token_ids[-1] != EOS else answer.token_ids[:-1]
        fresh = make(mode, max_num_seqs=1)
        fresh.complete(PROMPT + absorbed, temperature=0.0, max_tokens=1)
        ours, reference = states_of(driver.engine, 1), states_of(fresh.engine, 1)
        assert float((ours - reference).norm() / reference.norm()) < 1e-5


# Phrases and allowed tokens.


@ALL_MODES
def test_a_banned_phrase_is_not_said(mode: Mode, make: Callable[..., Driver]) -> None:
    """The answer is the greedy one up to the phrase, and goes on with the next best token."""
    driver = make(mode)
    fields = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "logprobs": 2}
    free = driver.complete(PROMPT, **fields)
    for start, length in ((4, 1), (4, 2), (10, 3), (0, 4)):
        phrase = tuple(free.token_ids[start : start + length])
        first = next(i for i in range(30) if tuple(free.token_ids[i : i + length]) == phrase) + length - 1
        answer = driver.complete(PROMPT, **fields, bad_words=(phrase, (7, 8, 9)))
        assert answer.token_ids[:first] == free.token_ids[:first]
        assert answer.token_ids[first] == free.logprobs[first].top_ids[1]
        said = [tuple(answer.token_ids[i : i + length]) for i in range(30)]
        assert phrase not in said


@ALL_MODES
def test_only_allowed_tokens_are_sampled(mode: Mode, make: Callable[..., Driver]) -> None:
    driver = make(mode)
    allowed = (3, 50, 51, 52, 300)
    for fields in (
        {"temperature": 0.0},
        {"seed": 1},
        {"seed": 2, "top_p": 0.7},
        {"seed": 3, "logit_bias": {3: -100.0}},
    ):
        answer = driver.complete(PROMPT, allowed_token_ids=allowed, max_tokens=40, **fields)
        assert set(answer.token_ids) <= set(allowed)
        assert len(answer.token_ids) == 40
        free = driver.complete(PROMPT, max_tokens=40, ignore_eos=True, **fields)
        assert not set(free.token_ids) <= set(allowed), "the slot keeps its last tenant's bans"


# Masks by themselves.


def masks(constraints: Constraints, constraint: Constraint, *tokens: int) -> set[int]:
    """What is allowed after some tokens."""
    for token in (None, *tokens):
        constraints.follow([(constraint, token)])
        assert constraint.job is not None
        constraint.job.future.result(30)
    allowed = allowed_RV(constraint.job.masks_RW, 512)[constraint.row]  # type: ignore[union-attr]
    return set(allowed.nonzero()[:, 0].tolist())


def test_all_ends_of_sequence_count_alike(tokenizer: Tokenizer) -> None:
    table = tokenizer.token_bytes()
    a, b = table.index(b"a"), table.index(b"b")
    constraints = Constraints(tokenizer, 512, (EOS, b, 450))
    constraint = Constraint(grammar.from_regex("a(a|b)*"), ())
    assert a in masks(constraints, constraint)
    assert masks(constraints, constraint) & {EOS, b, 450} == set(), "a second one is no text either"
    after = masks(constraints, Constraint(grammar.from_regex("a(a|b)*"), ()), a)
    assert {EOS, b, 450, a} <= after


def test_a_model_without_end_of_sequence_ends_where_nothing_can_follow(tokenizer: Tokenizer) -> None:
    a = tokenizer.token_bytes().index(b"a")
    constraints = Constraints(tokenizer, 512, ())
    open_ended = Constraint(grammar.from_regex("a+"), ())
    assert EOS not in masks(constraints, open_ended, a)
    assert open_ended.verdict is Verdict.OPEN
    closed = Constraint(grammar.from_regex("aa?"), ())
    masks(constraints, closed, a)
    assert closed.verdict is Verdict.OPEN
    complete = Constraint(grammar.from_regex("aa"), ())
    masks(constraints, complete, a, a)
    assert complete.verdict is Verdict.COMPLETE


def test_phrases_are_banned_where_they_would_be_complete() -> None:
    constraints = Constraints(None, 512, (EOS,))
    phrases = [(5, 6), (7, 5, 6, 31), (6, 6, 32), (5, 63)]
    everything = set(range(512))

    def banned(*tokens: int) -> set[int]:
        return everything - masks(constraints, Constraint(None, phrases), *tokens)

    assert banned() == set()
    assert banned(5) == {6, 63}
    assert banned(7, 5, 6) == {31}
    assert banned(6, 6) == {32}
    assert banned(9, 9, 9, 9, 9, 7, 5) == {6, 63}
    assert banned(5, 9) == set()
