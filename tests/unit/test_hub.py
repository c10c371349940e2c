"""From --model to a folder. Nothing here reaches for the network."""

import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from server.errors import CheckpointError
from server.hub import resolve_model


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").mkdir()
    assert resolve_model("org/model") == Path("org/model")
    with pytest.raises(CheckpointError, match="a folder has no revision 'main'"):
        resolve_model("org/model", "main")


def test_missing_folders_are_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").touch()
    for model in (str(tmp_path / "nowhere"), "./nowhere", "../nowhere", "a/b/c", "models/nowhere", "~/no/where", ""):
        with pytest.raises(CheckpointError, match=r"no such folder$"):
            resolve_model(model)
    with pytest.raises(CheckpointError, match="file: not a folder"):
        resolve_model("file")


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("fla-hub/gla-340M-15B", "v1") == tmp_path
    [(repo_id, options)] = calls
    assert (repo_id, options["revision"]) == ("fla-hub/gla-340M-15B", "v1")

    def wanted(name: str) -> bool:
        allowed = any(fnmatch.fnmatch(name, pattern) for pattern in options["allow_patterns"])
        return allowed and not any(fnmatch.fnmatch(name, pattern) for pattern in options["ignore_patterns"])

    for name in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
    ):
        assert wanted(name)
    for name in ("pytorch_model.bin", "model.pt", "original/model.safetensors", "README.md", "modeling_gla.py"):
        assert not wanted(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached; download it where there is a network"),
        (errors.OfflineModeIsEnabled("x"), "the hub cannot be reached; download it where there is a network"),
        (ConnectionError("x"), "the hub cannot be reached; download it where there is a network"),
        (OSError("No space left\non device"), "cannot be downloaded: No space left on device"),
        (ValueError("odd"), "cannot be downloaded: odd"),
    ],
)
def test_failures_say_what_to_do(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_failure(error, message, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "no such folder here and no such repository on the hub"),
        (errors.GatedRepoError, "access to it must be granted on the hub first"),
        (errors.RevisionNotFoundError, "the repository has no revision 'v9'"),
    ],
)
def test_the_hubs_answers(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = kind.__new__(kind)  # the constructors' arguments differ between versions
    Exception.__init__(error, "x")
    check_failure(error, message, monkeypatch)


def check_failure(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError) as caught:
        resolve_model("some/model", "v9")
    assert str(caught.value).startswith("some/model: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)
