"""API keys from flags and files: names, digests, and mistakes that are named without showing a key."""

from pathlib import Path

import pytest

from server.errors import SettingsError
from server.keys import ApiKey, hash_key, read_key_file
from server.settings import Settings

FILE = f"""\
# the first two are one user's
alice first-key
  alice \t second key with spaces
bob\tsha256:{hash_key("bob's").upper()}

carol sha256
dave clé
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(FILE)
    return path


def test_every_form_of_line(file: Path) -> None:
    assert read_key_file(file) == (
        ApiKey("alice", hash_key("first-key")),
        ApiKey("alice", hash_key("second key with spaces")),
        ApiKey("bob", hash_key("bob's")),
        ApiKey("carol", hash_key("sha256")),
        ApiKey("dave", hash_key("clé")),
    )


def test_a_key_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"erin \xff\xfe\n")
    assert read_key_file(path)[0].digest == hash_key(b"\xff\xfe".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("alice", "line 1: needs a name and a key"),
        ("alice a\n\ntopsecret", "line 3: needs a name"),
        ("al/ice topsecret", "line 1: a name is"),
        ("-alice topsecret", "line 1: a name is"),
        (f"{'a' * 65} topsecret", "line 1: a name is"),
        ("alice sha256:topsecret", "line 1: sha256: must be followed"),
        ("alice topsecret\nbob topsecret", "alice and bob"),
        ("# nothing\n\n", "has no keys"),
        ("key-1 topsecret", "key-1 is the name of a key given with --api-key"),
        ("alice flag-key", "key-1 and alice"),
    ],
)
def test_mistakes_are_named_and_no_key_is_shown(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        Settings.from_flags({"api_key": ["flag-key"], "api_key_file": path})
    assert named in str(caught.value)
    assert "topsecret" not in str(caught.value)
    assert "flag-key" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--api-key-file: cannot read .*: No such file"):
        Settings.from_flags({"api_key_file": tmp_path / "none"})
    with pytest.raises(SettingsError, match=r"--api-key-file: cannot read .*: Is a directory"):
        Settings.from_flags({"api_key_file": tmp_path})


def test_settings_join_flags_and_file(file: Path) -> None:
    settings = Settings.from_flags({"api_key": ["x", "y"], "api_key_file": str(file)})
    assert [key.name for key in settings.keys] == ["key-1", "key-2", "alice", "alice", "bob", "carol", "dave"]
    assert settings.api_settings(Path("model"), None).api_keys == settings.keys
    shown = repr(settings) + str(settings) + settings.model_dump_json() + repr(settings.keys)
    assert "first-key" not in shown and "second key" not in shown


@pytest.mark.parametrize(
    ("text", "several"), [("alice a", False), ("alice a\nalice b", False), ("alice a\nbob b", True)]
)
def test_keys_of_one_name_are_one_user(tmp_path: Path, text: str, several: bool) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    assert Settings.from_flags({"api_key_file": path}).engine_config(Path("model"), None).several_keys is several
