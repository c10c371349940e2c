"""The command line: every flag arrives, every mistake is one line and exit code 2."""

import subprocess
import sys

import pytest

import server.launch
from server import __version__, cli
from server.children import ChildError
from server.errors import CheckpointError, SettingsError
from server.settings import Settings
from tests.unit.test_settings import GIVEN


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `gale serve` would have started."""
    seen: list[Settings] = []
    monkeypatch.delenv("GALE_API_KEY", raising=False)
    monkeypatch.setattr(server.launch, "serve", lambda settings: seen.append(settings) or 0)
    return seen


def as_flags(given: dict[str, object]) -> list[str]:
    flags = []
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool):
            flags += [f"--{name.replace('_', '-')}"] if value else []
        else:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def test_every_flag_arrives(served: list[Settings]) -> None:
    assert cli.main(["serve", *as_flags(GIVEN)]) == 0
    assert served == [Settings.from_flags(GIVEN)]


def test_no_flags_are_the_defaults(served: list[Settings]) -> None:
    assert cli.main(["serve"]) == 0
    assert served == [Settings()]


def test_skip_tokenizer_init(served: list[Settings]) -> None:
    assert cli.main(["serve", "--skip-tokenizer-init"]) == 0
    assert served[0].skip_tokenizer_init


@pytest.mark.parametrize("flags", [["org/name"], ["--model", "org/name"], ["org/name", "--model", "org/name"]])
def test_model_by_position_or_flag(served: list[Settings], flags: list[str]) -> None:
    assert cli.main(["serve", *flags]) == 0
    assert served[0].model == "org/name"


def test_keys_from_flags_or_environment(served: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> list[str]:
        return [key.get_secret_value() for key in served.pop().api_key]

    cli.main(["serve", "--api-key", "a", "--api-key", "b"])
    assert keys() == ["a", "b"]
    monkeypatch.setenv("GALE_API_KEY", "from, environment")
    cli.main(["serve"])
    assert keys() == ["from, environment"]
    cli.main(["serve", "--api-key", "a"])
    assert keys() == ["a"]
    monkeypatch.setenv("GALE_API_KEY", "")
    cli.main(["serve"])
    assert keys() == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve", "--colour", "red"], "--colour"),
        (["serve", "--por", "80"], "--por"),
        (["serve", "--port"], "--port"),
        (["serve", "--port", "99999"], "--port"),
        (["serve", "--device", "gpu"], "--device"),
        (["serve", "--state-dtype", "int4"], "--state-dtype"),
        (["serve", "a", "--model", "b"], "two models"),
        (["serve", "--skip-tokenizer-init", "--tokenizer", "x"], "--tokenizer"),
        (["fly"], "fly"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_are_one_line(
    served: list[Settings], capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("gale")
    assert named in captured.err
    assert served == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("--device cuda: no GPU"), 2),
        (CheckpointError("config.json: no such file"), 1),
        (ChildError("--device cuda: no GPU", 2), 2),
        (ChildError("the engine process was killed by SIGKILL"), 1),
    ],
)
def test_failures_are_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(settings: Settings) -> int:
        raise error

    monkeypatch.setattr(server.launch, "serve", fail)
    assert cli.main(["serve"]) == code
    assert capsys.readouterr().err == f"gale serve: error: {error}\n"


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown
        assert field.description is not None
        assert field.description in shown


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "server", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gale {__version__}\n", "")


def test_command_line_and_launcher_import_no_torch_and_no_http_framework() -> None:
    heavy = {"torch", "fastapi", "uvicorn", "zmq"}
    code = f"import sys, server.cli, server.launch; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
