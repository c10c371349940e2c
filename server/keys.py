"""API keys: their names, the form in which they are kept, and the file that lists them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from server.errors import SettingsError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One accepted key, without the key.

    Attributes:
        name: whose it is. Keys of one name are one tenant: they share its limits and its turns.
        digest: SHA-256 of the key, lower-case hex.
    """

    name: str
    digest: str


def hash_key(key: str) -> str:
    """The form in which API keys are kept and compared: SHA-256, lower-case hex."""
    return sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_key_file(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a file: a line for each, ``NAME KEY`` or ``NAME sha256:HEX``; ``#`` begins a comment line.

    Raises:
        SettingsError: the file cannot be read or has no keys, or a line is wrong. Names the line, and never quotes it.
    """
    try:
        text = path.read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise SettingsError(f"--api-key-file: cannot read {path}: {error.strerror}") from None
    keys = tuple(_parse(path, text))
    if not keys:
        raise SettingsError(f"--api-key-file: {path} has no keys")
    return keys


def _parse(path: Path, text: str) -> Iterator[ApiKey]:
    for number, line in enumerate(text.split("\n"), 1):
        parts = line.strip().split(None, 1)
        if not parts or parts[0].startswith("#"):
            continue
        where = f"--api-key-file: {path} line {number}"
        if len(parts) < 2:
            raise SettingsError(f"{where}: needs a name and a key, with a space between them")
        name, key = parts
        if not _NAME.fullmatch(name):
            raise SettingsError(f"{where}: a name is up to 64 letters, digits, '.', '_' and '-'")
        if key.startswith(_DIGEST_PREFIX):
            digest = key.removeprefix(_DIGEST_PREFIX)
            if not _DIGEST.fullmatch(digest):
                raise SettingsError(f"{where}: {_DIGEST_PREFIX} must be followed by 64 hexadecimal digits")
            yield ApiKey(name, digest.lower())
        else:
            yield ApiKey(name, hash_key(key))


def check_distinct(keys: tuple[ApiKey, ...]) -> None:
    """No key may stand for two tenants.

    Raises:
        SettingsError: names both.
    """
    names: dict[str, str] = {}
    for key in keys:
        other = names.setdefault(key.digest, key.name)
        if other != key.name:
            raise SettingsError(f"one API key is given for two names: {other} and {key.name}")
