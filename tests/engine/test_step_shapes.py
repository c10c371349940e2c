"""Which steps are captured, which one a batch takes, and how many prompt tokens go beside decodes."""

from itertools import pairwise

import pytest

from server.engine.capture import prompt_ladders
from server.engine.step_shapes import (
    PromptLimit,
    StepShape,
    decode_ladder,
    in_order_of_choice,
    limit_prompts,
    prompt_shapes,
    token_ladder,
    typical_lengths,
)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8, 9, 100, 256, 1000, 1024])
def test_the_ladder_of_decodes_wastes_little(max_rows: int) -> None:
    sizes = decode_ladder(max_rows)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, max_rows)
    for below, size in pairwise(sizes):
        most_padding = size - below - 1
        assert most_padding <= max(7, size // 8)
    assert len(sizes) <= 45


@pytest.mark.parametrize("decodes", [0, 1, 256])
@pytest.mark.parametrize("max_tokens", [1, 64, 100, 2048, 8192, 1 << 20])
def test_the_ladder_of_tokens_wastes_little(max_tokens: int, decodes: int) -> None:
    sizes = token_ladder(max_tokens, decodes=decodes)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_tokens
    for below, size in pairwise(sizes):
        assert size - below <= max(128, (decodes + below) // 4)
    if not decodes:
        assert len(sizes) <= 64


@pytest.mark.parametrize("shape", [(0, 64, 1), (0, 64, 8), (8, 70, 8), (0, 2048, 1), (0, 2048, 8), (0, 2048, 32)])
def test_typical_spans_fill_a_step(shape: tuple[int, int, int]) -> None:
    lengths = typical_lengths(StepShape(*shape))
    assert sum(lengths) == shape[1]
    assert len(lengths) == shape[2]
    assert min(lengths) >= 0
    assert max(lengths) >= shape[1] // 2 // 64 * 64


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, 64), (8, 128), (256, 2048), (1024, 2048), (300, 8192)])
def test_every_step_beside_decodes_has_a_graph(max_rows: int, max_tokens: int) -> None:
    """If none is too slow: whatever the decodes, for all the tokens that the budget leaves."""
    ladders = prompt_ladders(max_rows, max_tokens)
    rows = [decodes for decodes, _ in ladders]
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1]) == (0, max_rows)
    for decodes, ladder in ladders:
        assert max(64, max_tokens - decodes - 63) <= ladder[-1] <= max(64, max_tokens)
        assert decodes + ladder[-1] <= max(max_tokens, decodes + 64)


def test_a_step_takes_the_smallest_shape_that_holds_it() -> None:
    shapes = in_order_of_choice(
        [
            *(StepShape(decodes, 0, 0) for decodes in (1, 8)),
            *(shape for decodes in (0, 8) for tokens in (64, 1024) for shape in prompt_shapes(decodes, tokens)),
        ]
    )

    def choose(*size: int) -> StepShape | None:
        return next((shape for shape in shapes if shape.holds(StepShape(*size))), None)

    assert choose(1, 0, 0) == (1, 0, 0)
    assert choose(2, 0, 0) == (8, 0, 0)
    assert choose(9, 0, 0) is None
    assert choose(0, 1, 1) == (0, 64, 1)
    assert choose(0, 64, 2) == (0, 64, 8)
    assert choose(1, 64, 1) == (8, 64, 1)
    assert choose(3, 65, 8) == (8, 1024, 8)
    assert choose(0, 9, 9) == (0, 1024, 32)
    assert choose(0, 1025, 1) is None
    assert choose(0, 64, 33) is None


def seconds_of(shape: StepShape) -> float:
    """A made-up device: 1 ms, and so much for each decode, token and span."""
    return 1e-3 + shape.decodes * 1e-5 + shape.tokens * 5e-6 + shape.spans * 1e-5


def test_prompts_are_limited_by_the_time_of_the_step_with_them() -> None:
    sizes = decode_ladder(256)
    quiet = [(size, seconds_of(StepShape(size, 0, 0))) for size in sizes]
    shapes = [StepShape(decodes, tokens, 8) for decodes, ladder in prompt_ladders(256, 2048)[1:] for tokens in ladder]
    seconds = {shape: seconds_of(shape) for shape in shapes}
    limits = limit_prompts(quiet, seconds, 2048)
    assert limits[0] == PromptLimit(0, 0, 2048, 32)
    assert [limit.decodes for limit in limits[1:]] == sizes
    assert [limit.folds for limit in limits[1:]] == sizes
    tokens = {limit.decodes: limit.tokens for limit in limits}
    assert [tokens[decodes] for decodes in (1, 8, 32, 128, 256)] == [128, 128, 128, 320, 512]
    for decodes, quiet_seconds in quiet:
        # The graph taken has more decodes than some of the batches that it serves; the limit is these batches' own.
        captured = min(shape.decodes for shape in shapes if shape.decodes >= decodes)
        padding = 0.75 * (captured - decodes) * 1e-5
        step_seconds = seconds_of(StepShape(captured, tokens[decodes], 8)) - padding
        assert step_seconds <= 1.75 * quiet_seconds + 1e-9 or tokens[decodes] == 64


def test_where_many_decodes_fold_at_once_there_is_less_time_for_prompts() -> None:
    quiet = [(256, 4e-3)]  # up to 7 ms
    seconds = {StepShape(256, tokens, 8): 4e-3 + tokens * 6e-6 for tokens in (64, 128, 256, 512)}
    limits = limit_prompts(quiet, seconds, 512, ring_size=16, fold_seconds={256: 25e-6})
    assert limits[1:] == (
        *((256, 16, 256, 8), (256, 32, 256, 8), (256, 64, 256, 8)),
        *((256, 128, 0, 8), (256, 256, 0, 8)),
    )
    slow = limit_prompts(quiet, seconds, 512, ring_size=16, fold_seconds={256: 50e-6})
    assert [limit.tokens for limit in slow[1:]] == [256, 256, 64, 0, 0]
    in_place = limit_prompts(quiet, seconds, 512, ring_size=16, fold_seconds={128: 25e-6})
    assert in_place[1:] == ((256, 256, 256, 8),)


def test_where_even_the_smallest_piece_is_too_slow_prompts_still_move_on() -> None:
    quiet = [(1, 1e-3), (2, 1e-3)]
    limits = limit_prompts(quiet, {StepShape(2, 64, 8): 1.0, StepShape(2, 128, 8): 1.0}, 128)
    assert limits == ((0, 0, 128, 8), (1, 1, 64, 8), (2, 2, 64, 8))
    # With rings, but for steps with more folds than usual.
    quiet = [(32, 1e-3)]
    limits = limit_prompts(quiet, {StepShape(32, 64, 8): 2e-3}, 128, ring_size=16, fold_seconds={32: 25e-6})
    assert limits[1:] == ((32, 2, 64, 8), (32, 4, 0, 8), (32, 8, 0, 8), (32, 16, 0, 8), (32, 32, 0, 8))
