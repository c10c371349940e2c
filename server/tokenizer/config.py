"""The configuration files beside a tokenizer. Torch-free."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import CheckpointError
from server.jsonfile import read_json_object

_MAX_TOKEN_ID = 1 << 24


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token outside the trained vocabulary, found in text before anything else."""

    token_id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True

    @property
    def pattern(self) -> str:
        """Regular expression, one group, that also takes the white space the token swallows."""
        pattern = re.escape(self.content)
        if self.single_word:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        return "(" + (r"\s*" if self.lstrip else "") + pattern + (r"\s*" if self.rstrip else "") + ")"


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What ``tokenizer_config.json`` and ``added_tokens.json`` say, where they exist.

    Attributes:
        path: of ``tokenizer_config.json``.
        values: its contents.
        added_tokens: by id.
    """

    path: Path
    values: Mapping[str, Any]
    added_tokens: tuple[AddedToken, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> "TokenizerConfig":
        """Read both files.

        Raises:
            CheckpointError: one of them is broken.
        """
        path = folder / "tokenizer_config.json"
        values = read_json_object(path) if path.is_file() else {}
        added: dict[int, AddedToken] = {}
        added_path = folder / "added_tokens.json"
        for content, token_id in (read_json_object(added_path) if added_path.is_file() else {}).items():
            _add_token(added, added_path, content, token_id, {})
        decoder = values.get("added_tokens_decoder", {})
        if not isinstance(decoder, dict):
            raise CheckpointError(f"{path}: added_tokens_decoder: must be an object")
        for key, entry in decoder.items():
            options = entry if isinstance(entry, dict) else {"content": entry}
            _add_token(added, path, options.get("content"), int(key) if key.isdecimal() else key, options)
        return cls(path, values, tuple(added[token_id] for token_id in sorted(added)))

    def flag(self, key: str, default: bool) -> bool:
        """A setting that is true or false; the default if it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key}: must be true or false, is {value!r}")
        return value

    def special_tokens(self) -> dict[str, str]:
        """The texts of all named tokens, by name (``bos_token``, ``pad_token``, ...)."""
        named = {key: self.token(key) for key, value in self.values.items() if _names_token(key, value)}
        return {key: content for key, content in named.items() if content is not None}

    def token(self, key: str) -> str | None:
        """The text of a named token such as ``bos_token``; None if there is none."""
        value = self.values.get(key)
        content: Any = value.get("content") if isinstance(value, dict) else value
        if content is None or isinstance(content, str):
            return content
        raise CheckpointError(f"{self.path}: {key}: must be a token's text, is {value!r}")


def _names_token(key: str, value: object) -> bool:
    """Whether a setting is a token, and not one such as ``add_bos_token``."""
    return key.endswith("_token") and isinstance(value, str | dict)


def _add_token(
    added: dict[int, AddedToken], path: Path, content: object, token_id: object, options: Mapping[str, object]
) -> None:
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"{path}: added token {token_id!r}: must have a text, is {content!r}")
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < _MAX_TOKEN_ID:
        raise CheckpointError(f"{path}: added token {content!r}: must have an id below 2^24, is {token_id!r}")
    flags = ("special", "lstrip", "rstrip", "single_word")
    added[token_id] = AddedToken(
        token_id,
        content,
        **{flag: options.get(flag) is True for flag in flags},
        normalized=options.get("normalized") is not False,
    )
