"""The bench of the engine's own work still drives the engine as it is."""

from server.types import FinishReason
from tests.bench.engine_host import stub_engine
from tests.engine.driving import Driver


def test_the_stub_engine_answers() -> None:
    driver = Driver(stub_engine(4))
    requests = [driver.submit([[5] * 16], max_tokens=3, temperature=0.0, ignore_eos=True) for _ in range(6)]
    driver.run()
    for request in requests:
        answer = driver.answers[request, 0]
        assert (len(answer.token_ids), answer.finish_reason) == (3, FinishReason.LENGTH)
