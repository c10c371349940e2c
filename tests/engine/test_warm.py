"""Serving compiles nothing: every variant of every kernel is compiled before the first request."""

import importlib
import pkgutil
import random

import pytest

import server.kernels
from server.engine.engine import Engine
from tests.engine.driving import FIXTURES, Driver, engine_config, random_prompt


def compiled_variants() -> dict[str, int]:
    """Compiled variants of each Triton kernel in this process."""
    import triton

    variants = {}
    for info in pkgutil.iter_modules(server.kernels.__path__):
        module = importlib.import_module(f"server.kernels.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and value.__module__ == module.__name__:
                variants[f"{info.name}.{name}"] = sum(len(caches[0]) for caches in value.device_caches.values())
    return variants


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "states"),
    [("base", "float32"), ("gqa", "float32"), ("conv", "float32"), ("base", "bfloat16"), ("gqa", "int8")],
)
def test_traffic_compiles_no_kernel(name: str, states: str) -> None:
    config = engine_config(FIXTURES / name, device="cuda", dtype="bfloat16", state_dtype=states, max_num_seqs=40)
    driver = Driver(Engine(config))
    before = compiled_variants()
    assert any(before.values())
    rng = random.Random(0)
    for round_ in range(30):
        for i in range(rng.choice([1, 2, 7, 16, 17])):
            length = rng.choice([1, 2, 15, 16, 17, 63, 64, 65, 128, 300])
            driver.submit([random_prompt(length, 512, i)], max_tokens=rng.randint(1, 9), temperature=rng.choice([0, 1]))
            if rng.random() < 0.3:
                driver.step()
        for _ in range(rng.randint(0, 8)):
            driver.step()
        assert compiled_variants() == before, f"round {round_}"
    driver.run()
    assert compiled_variants() == before
