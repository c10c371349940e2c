"""For what happens in its own time."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], *, seconds: float = 90.0) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)
