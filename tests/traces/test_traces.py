"""Whatever is done with states, in whatever order: every answer is the uninterrupted run's, and nothing is lost."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.traces.trace import OPERATIONS, Trace

_AT_ONCE = 5
"""Traces of one test."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" in metafunc.fixturenames:
        count = metafunc.config.getoption("--traces", default=20)
        metafunc.parametrize("first", range(0, count, _AT_ONCE))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_traces(first: int, device: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    counts: Counter[str] = Counter()
    for seed in range(first, first + _AT_ONCE):
        trace = Trace(seed, tmp_path, device)
        try:
            trace.run()
        except BaseException as error:
            error.add_note(f"in trace {seed}")
            raise
        counts += trace.counts
    for name, count in counts.items():
        record_property(name, count)
    assert counts["answers"] > _AT_ONCE * OPERATIONS / 10
