"""Who may import whom: one table, held against every import statement and against fresh interpreters."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BASE = ("server.types", "server.errors", "server.keys", "server.component_settings", "server.logs", "server.jsonfile")

# Module or package -> what of ours it may import, anywhere in the file. The longest matching name counts.
# "server" itself, which holds the version, is open to all.
ALLOWED: dict[str, tuple[str, ...]] = {
    "server.types": (),
    "server.errors": (),
    "server.keys": ("server.errors",),
    "server.component_settings": ("server.keys",),
    "server.flags": ("server.component_settings",),
    "server.settings": ("server.component_settings", "server.errors", "server.flags", "server.keys"),
    "server.logs": ("server.component_settings",),
    "server.jsonfile": ("server.errors",),
    "server.ipc": BASE,
    "server.tokenizer": (*BASE, "server.tokenizer"),
    "server.grammar": ("server.tokenizer",),
    "server.metrics": BASE,
    "server.hub": BASE,
    "server.listeners": BASE,
    "server.child": BASE,
    "server.children": (*BASE, "server.child"),
    "server.kernels": ("server.kernels",),
    "server.engine": (*BASE, "server.engine", "server.grammar", "server.kernels", "server.tokenizer"),
    "server.engine.config": BASE,
    "server.engine.process": (*BASE, "server.engine", "server.child", "server.ipc"),
    "server.api": (
        *BASE,
        "server.api",
        "server.grammar",
        "server.ipc",
        "server.metrics",
        "server.tokenizer",
    ),
    "server.api.process": (*BASE, "server.api", "server.child", "server.listeners", "server.tokenizer"),
    "server.launch": (
        *BASE,
        "server.child",
        "server.engine.config",
        "server.hub",
        "server.listeners",
        "server.settings",
        "server.supervision",
    ),
    "server.supervision": (
        *BASE,
        "server.child",
        "server.children",
        "server.engine_sleep",
        "server.listeners",
        "server.metrics",
        "server.spawning",
        "server.watchdog",
    ),
    "server.watchdog": ("server.child", "server.children"),
    "server.engine_sleep": ("server.child", "server.children"),
    "server.spawning": (
        *BASE,
        "server.child",
        "server.children",
        # Inside the functions that run in the child processes.
        "server.api.process",
        "server.engine.process",
    ),
    "server.cli": (*BASE, "server.children", "server.launch", "server.settings", "clients.bench", "clients.terminal"),
    "server.__main__": ("server.cli",),
    # Over HTTP they talk to any server, so they know nothing of this one.
    "clients": ("clients",),
}
WITH_TORCH = ("server.engine", "server.kernels")
TORCH_FREE = ("server.engine.config", "server.engine.process")
HEAVY = ("torch", "triton", "numpy", "transformers")
HTTP = ("fastapi", "starlette", "uvicorn")

MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for top in ("server", "clients")
    for path in sorted((REPOSITORY / top).rglob("*.py"))
}


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of these, or lies in one of them."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def rule_of(module: str) -> str | None:
    """The entry of ALLOWED that governs a module."""
    return max((name for name in ALLOWED if within(module, (name,))), key=len, default=None)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports, at whatever depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if name in MODULES else node.module


def loaded_by(*modules: str) -> set[str]:
    """The names in sys.modules after a fresh interpreter has imported these."""
    script = f"import sys, {', '.join(modules)}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def ours(loaded: set[str]) -> set[str]:
    return {module for module in loaded if within(module, ("server",))}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"server", "clients"}))
def test_imports_follow_the_table(module: str) -> None:
    rule = rule_of(module)
    assert rule is not None, f"{module} has no entry in ALLOWED"
    for line, name in imports(MODULES[module]):
        where = f"{MODULES[module]}:{line}: {module} must not import {name}"
        if within(name, ("server", "clients")):
            assert name == "server" or within(name, ALLOWED[rule]), where
        if within(name, HEAVY):
            assert within(module, WITH_TORCH) and not within(module, TORCH_FREE), where
            assert within(name, ("torch", "triton")), where
        if within(name, HTTP):
            assert within(module, ("server.api",)), where


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_the_table_names_what_exists(name: str) -> None:
    for module in (name, *ALLOWED[name]):
        assert module in MODULES


@pytest.mark.parametrize("module", [module for module in MODULES if within(module, ("server.kernels",))])
def test_kernels_need_torch_and_triton_alone(module: str) -> None:
    roots = {name.split(".")[0] for _, name in imports(MODULES[module])}
    assert roots - sys.stdlib_module_names <= {"server", "torch", "triton"}


def test_the_package_itself_imports_nothing() -> None:
    assert list(imports(MODULES["server"])) == []


def test_types_errors_and_settings_stand_alone() -> None:
    assert ours(loaded_by("server.types")) == {"server", "server.types"}
    assert ours(loaded_by("server.errors")) == {"server", "server.errors"}
    of_settings = {"server.settings", "server.flags", "server.component_settings", "server.keys", "server.errors"}
    assert ours(loaded_by("server.settings")) == {"server", *of_settings}


def test_api_processes_import_neither_torch_nor_the_engine() -> None:
    loaded = loaded_by(*(module for module in MODULES if within(module, ("server.api",))))
    assert loaded.isdisjoint(HEAVY)
    assert not [module for module in ours(loaded) if within(module, WITH_TORCH)]


def test_the_launcher_imports_neither_torch_nor_http() -> None:
    loaded = loaded_by("server.cli", "server.launch")
    assert loaded.isdisjoint(HEAVY + HTTP)
    assert {module for module in loaded if within(module, WITH_TORCH)} == {"server.engine", "server.engine.config"}


def test_the_engine_imports_no_http() -> None:
    loaded = loaded_by("server.engine.engine", "server.engine.process")
    assert loaded.isdisjoint(HTTP)
    assert not [module for module in ours(loaded) if within(module, ("server.api", "server.launch"))]


def test_kernels_load_nothing_else_of_ours() -> None:
    loaded = ours(loaded_by("server.kernels"))
    assert loaded - {"server"} == {module for module in loaded if within(module, ("server.kernels",))}
