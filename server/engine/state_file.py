"""Parked states as files: safetensors with metadata, written whole or not at all, and checked before they are used.

The tensors are a snapshot's parts. The metadata say what they are a state of, and hold a digest of everything: SHA-256
of the metadata and the table of tensors, and of every tensor's bytes in pieces, which are hashed side by side, so that
checking a state takes less time than reading it. Nothing in a file is ever executed or unpickled.
"""

import ctypes
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

LAYOUT: Final = "gale-state-1"
"""Changes with the meaning of the parts or of the metadata."""

_DTYPES: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 1 << 20
_PIECE_BYTES = 4 << 20
_ALIGNMENT = 64
_hashers = ThreadPoolExecutor(4, thread_name_prefix="state-hash")


class StateFileError(Exception):
    """A file is not a state that can be used; str() says why, in one line."""


class Part(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def write_state(path: Path, parts: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a file that is there as a whole, also after a crash, once this returns; before that, not at all.

    Args:
        path: replaced if it exists.
        parts: contiguous tensors on the host.
        metadata: whatever the reader needs to know; ``layout`` and ``digest`` are added.

    Returns:
        The file's size in bytes.

    Raises:
        OSError: the disk is full, or the folder is not writable; no file is left behind.
    """
    buffers = {name: _buffer(part) for name, part in parts.items()}
    table: dict[str, Any] = {}
    offset = 0
    for name, part in parts.items():
        end = offset + part.nbytes
        table[name] = {"dtype": _NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [offset, end]}
        offset = end
    metadata = {**metadata, "layout": LAYOUT}
    metadata["digest"] = _digest(table, metadata, buffers)
    header = json.dumps({"__metadata__": metadata, **table}).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for buffer in buffers.values():
                file.write(buffer)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return 8 + len(header) + offset


def read_state(path: Path, layout: Mapping[str, Part]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file and check that it is whole, unchanged, of this layout and finite.

    Args:
        layout: the tensors that must be in it, and no others.

    Returns:
        The parts, on the host, and the metadata.

    Raises:
        StateFileError: it is not.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise StateFileError("not a state: the header is cut off or too long")
            header = file.read(length)
            data = torch.empty(size - 8 - length, dtype=torch.uint8)
            if file.readinto(_buffer(data)) != data.nbytes:
                raise StateFileError("the file changed while it was read")
    except OSError as error:
        raise StateFileError(f"cannot be read: {error.strerror}") from error
    table, metadata = _parse_header(header)
    parts = _cut(data, table, layout)
    buffers = {name: _buffer(parts[name]) for name in table}
    if metadata.pop("digest", None) != _digest(table, metadata, buffers):
        raise StateFileError("damaged: the digest does not fit the contents")
    for name, part in parts.items():
        # The extremes are finite if everything is (NaN counts as both), and finding them takes a tenth of the time.
        if part.dtype.is_floating_point and not all(extreme.isfinite() for extreme in torch.aminmax(part)):
            raise StateFileError(f"{name} holds values that are not finite")
    return parts, metadata


def _parse_header(header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The table of tensors and the metadata, which are strings."""
    try:
        table = json.loads(header)
    except ValueError:
        raise StateFileError("not a state: the header is no JSON") from None
    if not isinstance(table, dict):
        raise StateFileError("not a state: the header is no JSON object")
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StateFileError("not a state: the metadata are missing")
    if metadata.get("layout") != LAYOUT:
        raise StateFileError(f"of layout {metadata.get('layout')!r}; this server reads {LAYOUT!r}")
    return table, metadata


def _cut(data: Tensor, table: Mapping[str, Any], layout: Mapping[str, Part]) -> dict[str, Tensor]:
    """The tensors of a file's data, in the layout's order."""
    if table.keys() != layout.keys():
        raise StateFileError(f"holds {sorted(table)} in place of {sorted(layout)}: a state of another kind of model")
    parts = {}
    for name, (dtype, shape) in layout.items():
        entry = table[name]
        found = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        if found != (_NAMES[dtype], list(shape)):
            raise StateFileError(
                f"{name} is {found[0]} {found[1]} in place of {_NAMES[dtype]} {list(shape)}: a state of another model"
            )
        offsets = entry.get("data_offsets")
        start = offsets[0] if isinstance(offsets, list) and offsets else None
        nbytes = dtype.itemsize * math.prod(shape)
        if type(start) is not int or not 0 <= start <= data.nbytes - nbytes or start % dtype.itemsize:
            raise StateFileError(f"cut off: {name} is not in it")
        parts[name] = data[start : start + nbytes].view(dtype).view(shape)
    if data.nbytes != sum(part.nbytes for part in parts.values()):
        raise StateFileError("longer than its tensors")
    return parts


def _digest(table: Mapping[str, Any], metadata: Mapping[str, str], buffers: Mapping[str, Any]) -> str:
    pieces = [
        memoryview(buffer)[start : start + _PIECE_BYTES]
        for buffer in buffers.values()
        for start in range(0, len(buffer), _PIECE_BYTES)
    ]
    whole = sha256(json.dumps([table, metadata], sort_keys=True).encode())
    for digest in _hashers.map(lambda piece: sha256(piece).digest(), pieces):
        whole.update(digest)
    return whole.hexdigest()


def _buffer(tensor: Tensor) -> "ctypes.Array[ctypes.c_char]":
    """The tensor's memory, without a copy; only as long as the tensor lives."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
