"""A few hundred requests made from the OpenAPI document, valid and invalid; ``make test-clients`` makes thousands."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.api.scripted import ScriptedEngine, Server, serve

CASES = {"POST": 60, "GET": 10, "DELETE": 10}
"""For each operation, and twice: bodies that fit the document, and bodies that do not."""


@pytest.fixture(scope="module")
def quick_server() -> Iterator[Server]:
    """A server whose answers are short, whatever is asked for."""
    with serve(ScriptedEngine(stop_after=5), max_body_bytes=1_000_000) as running:
        yield running


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_case_breaks_what_the_document_promises(quick_server: Server, mode: str) -> None:
    # Imported here: only this test needs it, and machines with a GPU may lack it.
    import schemathesis
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{quick_server.http.base_url}/openapi.json")
    checked = 0

    def check(operation: Any) -> None:
        @seed(0)
        @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
        @settings(
            max_examples=CASES[operation.method.upper()],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def run(case: Any) -> None:
            nonlocal checked
            checked += 1
            # A body that fits the document may still be refused: it cannot say what the vocabulary holds.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        run()

    for result in schema.get_all_operations():
        operation = result.ok()
        # Without a body, nothing but a path is left that could be wrong.
        if mode == "positive" or operation.body:
            check(operation)
    assert checked > 100
