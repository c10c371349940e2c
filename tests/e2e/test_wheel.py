"""The wheel, installed into an empty environment outside the checkout, serves the shipped model."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import server

REPOSITORY = Path(__file__).parents[2]
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input")
OFFLINE = ("--no-deps", "--no-index")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the build backend of this environment: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, *PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", folder, REPOSITORY])
    [built] = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment with the wheel and, beside it, the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    # A path in a .pth file is searched for packages, but its own .pth files, with the checkout's path, are not read.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)))
    run([folder / "bin/python", *PIP, "install", *OFFLINE, "--ignore-installed", wheel])
    return folder / "bin"


def run(command: list[str | Path], **options: object) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return str(done.stdout)


def test_the_wheel_holds_the_package_and_the_model(wheel: Path) -> None:
    assert wheel.name == f"gale_server-{server.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"server", "clients", f"gale_server-{server.__version__}.dist-info"}
    for top in ("server", "clients"):
        sources = {p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / top).rglob("*") if is_source(p)}
        assert {name for name in names if name.startswith(f"{top}/")} == sources
    assert {"server/assets/classics-11m/model.safetensors", "server/assets/classics-11m/README.md"} <= names


def is_source(path: Path) -> bool:
    return path.is_file() and not {"__pycache__", "node_modules"} & set(path.parts)


def test_both_commands_are_the_installed_package(installed: Path, tmp_path: Path) -> None:
    script = "import server; print(server.__file__)"
    found = Path(run([installed / "python", "-c", script], cwd=tmp_path).strip())
    assert found.is_relative_to(installed.parent)
    for command in ([installed / "gale"], [installed / "python", "-m", "server"]):
        assert run([*command, "--version"], cwd=tmp_path) == f"gale {server.__version__}\n"


def test_it_serves_the_shipped_model_as_the_readme_shows(installed: Path, tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    asked, answered = re.findall(r"-d '(\{.*\})'\n(\{.*\})\n", readme)[0]
    shown = json.loads(answered)
    with serving(installed, tmp_path) as base_url:
        answer = httpx.post(f"{base_url}/v1/completions", json=json.loads(asked), timeout=60)
    assert answer.status_code == 200, answer.text
    completion = answer.json()
    assert completion.keys() == shown.keys()
    for key in ("object", "model", "choices", "usage"):
        assert completion[key] == shown[key]


@contextmanager
def serving(installed: Path, folder: Path) -> Iterator[str]:
    """Run ``gale serve`` from an empty folder; yields its URL, and sees to it that it ends with exit code 0."""
    process = subprocess.Popen(
        [installed / "gale", "serve", "--port", "0", "--device", "cpu"],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GALE_"))},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    log = []
    try:
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"ready after .* (http://\S+)", line):
                yield found.group(1)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
                return
        pytest.fail(f"gale serve ended: {''.join(log)}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stderr.close()
