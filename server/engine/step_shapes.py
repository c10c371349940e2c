"""Sizes of steps: which are captured as graphs, which one a batch takes, and how many prompt tokens a step may take.

A graph repeats a step of fixed size, so batches are padded to the next size up. There are three: the sequences that
decode, the prompt tokens, and the spans that these belong to.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from server.component_settings import CHUNK

MAX_ROWS = 1024
"""Larger batches run without a graph: their kernels take longer than launching them does."""
_PROMPT_ROWS = (0, 1, 8, 32, 64, 128, 256, 512, MAX_ROWS)
"""Decodes beside prompts: fewer sizes than for decodes alone, since each comes with many numbers of tokens."""
_FEW_TOKENS = 16
_SPANS = 8
_MANY_SPANS = 32
"""Spans of a step, besides one. Those that are not there cost programs that find nothing to do."""
_MANY_SPANS_TOKENS = 1024
_PADDING_SAVED = 0.75
"""What padding saves of the time that decodes in its place would add to a step: it moves no state. Measured on an H200,
with 144 decodes in a step for 256: 1.29 of 1.72 milliseconds."""
_PROMPT_SHARE = 1.75
"""A step with prompts may take so many times as long as without them: at most twice, the deviations of one step in a
hundred included (measured on an H200: with 1.85, that one takes 2.07 times as long)."""


class StepShape(NamedTuple):
    """The size of a step, or of the steps that a graph can run."""

    decodes: int
    tokens: int
    """Prompt tokens."""
    spans: int
    """Pieces of prompts."""

    @property
    def rows(self) -> int:
        """Rows whose logits are wanted, at most: the last one of every span."""
        return self.decodes + self.spans

    def holds(self, other: "StepShape") -> bool:
        """Whether a step of the other size can be padded to this one. Steps with and without prompts differ."""
        return (
            self.decodes >= other.decodes
            and self.tokens >= other.tokens
            and self.spans >= other.spans
            and (self.spans > 0) == (other.spans > 0)
        )


class PromptLimit(NamedTuple):
    """How many prompt tokens a step absorbs at most, of how many prompts, with at most so many decodes and folds."""

    decodes: int
    folds: int
    """Decodes that fold their rings in this step: sequences that came together do so together, once in a while."""
    tokens: int
    """0: none, where the folds alone leave no time for them; the step behind it takes some again."""
    prompts: int


def decode_ladder(max_rows: int) -> list[int]:
    """Batch sizes to capture for decodes alone, ascending, the last one ``max_rows``.

    Powers of two to 8, then steps of 8, above 64 of an eighth of the power of two below: at most one row in eight
    is padding, or seven rows.
    """
    sizes = [1]
    while sizes[-1] < max_rows:
        size = sizes[-1]
        step = size if size < 8 else max(8, (1 << (size.bit_length() - 1)) // 8)
        sizes.append(min(size + step, max_rows))
    return sizes


def token_ladder(max_tokens: int, *, decodes: int = 0) -> list[int]:
    """Numbers of prompt tokens to capture beside so many decodes, ascending, the last one ``max_tokens``.

    Steps of the prompts' grid while these are few, then of a quarter of the power of two below all rows, as products
    take whole tiles of rows. Beside decodes at most two pieces of the grid, for the sake of fine limits; alone, the few
    tokens that go on behind a known prefix have a size of their own, since somebody waits for nothing else.
    """
    sizes = [min(CHUNK, max_tokens)]
    while sizes[-1] < max_tokens:
        step = max(CHUNK, (1 << ((decodes + sizes[-1]).bit_length() - 1)) // 4)
        step = min(step, 2 * CHUNK) if decodes else max(step, min(sizes[-1], 2 * CHUNK))
        sizes.append(min(sizes[-1] + step, max_tokens))
    return sizes if decodes or sizes[0] <= _FEW_TOKENS else [_FEW_TOKENS, *sizes]


def prompt_rows(max_rows: int) -> list[int]:
    """Numbers of decodes to capture beside prompts, ascending, from 0 to ``max_rows``."""
    return [rows for rows in _PROMPT_ROWS if rows < max_rows] + [max_rows]


def prompt_shapes(decodes: int, tokens: int) -> list[StepShape]:
    """What to capture of a step with so many decodes and prompt tokens: few spans first."""
    many = tokens >= _MANY_SPANS_TOKENS and not decodes
    return [StepShape(decodes, tokens, spans) for spans in ((1, _SPANS, _MANY_SPANS) if many else (1, _SPANS))]


def typical_lengths(shape: StepShape) -> list[int]:
    """Lengths of a full step's spans, as many long prompts at once would share it: each gets half of what is left."""
    lengths: list[int] = []
    left = shape.tokens
    for remaining in range(shape.spans, 1, -1):
        length = left // 2 // CHUNK * CHUNK or -(-left // remaining)
        lengths.append(length)
        left -= length
    return [*lengths, left]


def in_order_of_choice(shapes: Iterable[StepShape]) -> list[StepShape]:
    """Shapes so that a step's best one is the first that holds it: with the fewest rows, then the fewest spans."""
    return sorted(shapes, key=lambda shape: (shape.decodes + shape.tokens, shape.spans))


def allowed_seconds(quiet_seconds: float) -> float:
    """What a step may take with prompts if it takes so long without."""
    return _PROMPT_SHARE * quiet_seconds


def limit_prompts(
    quiet: Sequence[tuple[int, float]],
    seconds: Mapping[StepShape, float],
    max_tokens: int,
    *,
    ring_size: int = 0,
    fold_seconds: Mapping[int, float] | None = None,
) -> tuple[PromptLimit, ...]:
    """How many prompt tokens a step should take, by the numbers of its decodes and their folds.

    Args:
        quiet: sizes of steps without prompts, ascending, and the seconds that they take.
        seconds: what full steps with decodes and prompts take, for the largest number of spans: by ascending numbers
            of tokens, up to the last one that :func:`allowed_seconds` admits; the smallest in any case.
        max_tokens: of a step.
        ring_size: once in so many tokens a decode folds; the times are those of steps with the usual number of folds.
        fold_seconds: what one more takes, by captured numbers of decodes; without the others, folds take no time.

    Returns:
        Limits in ascending order, the first without decodes.
    """
    captured = sorted({shape.decodes for shape in seconds})
    full = dict(quiet)
    limits = [PromptLimit(0, 0, max_tokens, prompt_shapes(0, max_tokens)[-1].spans)]
    for decodes, quiet_seconds in quiet:
        rows = captured[bisect_left(captured, decodes)]
        times = {shape.tokens: seconds[shape] for shape in sorted(seconds) if shape.decodes == rows}
        saved = _PADDING_SAVED * (full[rows] - quiet_seconds)
        each = 0.0 if fold_seconds is None else fold_seconds.get(rows, 0.0)
        usual = decodes // ring_size if each else decodes
        for folds in sorted({usual, *(max(usual, decodes // parts) for parts in (8, 4, 2, 1))}):
            room = allowed_seconds(quiet_seconds) + saved - (folds - usual) * each
            tokens = _most_tokens(times, room)
            if folds == usual:
                tokens = max(tokens, min(times))  # prompts move on, however long it takes
            limits.append(PromptLimit(decodes, folds, min(tokens, max_tokens), _SPANS))
    return tuple(limits)


def _most_tokens(times: Mapping[int, float], room: float) -> int:
    """The last of ascending numbers of tokens up to which none takes longer than this; 0: not even the first."""
    return max(takewhile(lambda tokens: times[tokens] <= room, times), default=0)
