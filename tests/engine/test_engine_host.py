"""The benches of the engine still drive it as it is, and read a trace as it is meant."""

from server.types import FinishReason
from tests.bench.engine import gaps_at
from tests.bench.engine_host import stub_engine
from tests.engine.driving import Driver


def test_the_stub_engine_answers() -> None:
    driver = Driver(stub_engine(4))
    requests = [driver.submit([[5] * 16], max_tokens=3, temperature=0.0, ignore_eos=True) for _ in range(6)]
    driver.run()
    for request in requests:
        answer = driver.answers[request, 0]
        assert (len(answer.token_ids), answer.finish_reason) == (3, FinishReason.LENGTH)


def test_gaps_between_steps_are_found_in_a_trace() -> None:
    # Two kernels of a step overlap, and the longer one began first; nothing follows the last step.
    kernels = [(0.0, 10.0), (4.0, 6.0), (13.0, 20.0), (20.0, 25.0), (24.0, 30.0)]
    assert gaps_at(kernels, [10.0, 20.5, 30.0]) == [3.0, 0.0]
    assert gaps_at(kernels, [-1.0]) == []
