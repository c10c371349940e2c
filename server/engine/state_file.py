"""Parked states as files: safetensors with metadata, written whole or not at all, and checked before they are used.

The tensors are a snapshot's parts. The metadata say what they are a state of, and hold a digest of everything: SHA-256
of the metadata and the table of tensors, and of every tensor's bytes in pieces, which are hashed side by side, so that
checking a state takes less time than reading it; and a checksum of the metadata and the table alone, for those who read
no more. A file may be signed: the signature is the digest's HMAC-SHA256. Nothing in a file is ever executed or
unpickled.
"""

import contextlib
import ctypes
import hmac
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import torch
from torch import Tensor

from server.kernels import SPLIT, is_split_finite

LAYOUT: Final = "gale-state-1"
"""Changes with the meaning of the parts or of the metadata."""
SPLIT_LAYOUT: Final = "gale-state-2"
"""The same with recurrent states that are split, of which servers before them do not know."""

_DTYPES: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
MAX_HEADER_BYTES: Final = 1 << 20
_MAX_STRING = 1024
"""Characters of a name, or of what the metadata say, which may stand in errors and go on to clients."""
_PIECE_BYTES = 4 << 20
_ALIGNMENT = 64
_hashers = ThreadPoolExecutor(4, thread_name_prefix="state-hash")


class StateFileError(Exception):
    """A file is not a state that can be used; str() says why, in one line."""


class UnknownLayoutError(StateFileError):
    """A file is a state of another layout, which another version may be able to read."""


class SignatureError(StateFileError):
    """A file is not signed, or with another key."""


class Part(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.dtype.itemsize * math.prod(self.shape)


class Written(NamedTuple):
    """A file that was written: its size in bytes, and the digest that it holds."""

    nbytes: int
    digest: str


class Header(NamedTuple):
    """What a file says that it holds.

    Attributes:
        parts: by name, in the order of the file, without gaps.
        metadata: all of them.
        start: where the tensors begin, in bytes.
    """

    parts: dict[str, Part]
    metadata: dict[str, str]
    start: int


def write_state(
    path: Path, parts: Mapping[str, Tensor], metadata: Mapping[str, str], *, key: bytes | None = None
) -> Written:
    """Write a file that is there as a whole, also after a crash, once this returns; before that, not at all.

    Args:
        path: replaced if it exists.
        parts: contiguous tensors on the host.
        metadata: whatever the reader needs to know; ``layout``, ``checksum``, ``digest`` and, with a key, ``signature``
            are added.
        key: to sign the file with.

    Raises:
        OSError: the disk is full, or the folder is not writable; no file is left behind.
    """
    # The larger types first: so each begins at a multiple of its size.
    parts = dict(sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize))
    buffers = {name: _buffer(part) for name, part in parts.items()}
    table: dict[str, Any] = {}
    offset = 0
    for name, part in parts.items():
        end = offset + part.nbytes
        table[name] = {"dtype": _NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [offset, end]}
        offset = end
    is_split = any(part.dtype == SPLIT for part in parts.values())
    metadata = {**_unsealed(metadata), "layout": SPLIT_LAYOUT if is_split else LAYOUT}
    metadata["checksum"] = _checksum(table, metadata)
    digest = metadata["digest"] = _digest(table, metadata, buffers)
    if key is not None:
        metadata["signature"] = _sign(digest, key)
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
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return Written(8 + len(header) + offset, digest)


def read_header(path: Path) -> Header:
    """Read what a file says that it holds, and check that it has the size for it.

    Raises:
        StateFileError: it is no whole state file, or what it says of itself has changed.
    """
    with _opened(path) as file:
        table, metadata, start = _read_table(file)
        parts = _parse_table(table, os.fstat(file.fileno()).st_size - start)
    if metadata.get("checksum") != _checksum(table, _unsealed(metadata)):
        raise StateFileError("damaged: the checksum does not fit the header")
    return Header(parts, metadata, start)


def read_part(path: Path, header: Header, name: str) -> bytes:
    """The bytes of one tensor, unchecked.

    Raises:
        StateFileError: there is no such tensor, or it cannot be read.
    """
    if name not in header.parts:
        raise StateFileError(f"holds no {name}")
    names = list(header.parts)
    before = sum(header.parts[other].nbytes for other in names[: names.index(name)])
    with _opened(path) as file:
        file.seek(header.start + before)
        content = file.read(header.parts[name].nbytes)
    if len(content) != header.parts[name].nbytes:
        raise StateFileError("the file changed while it was read")
    return content


def read_state(
    path: Path, layout: Mapping[str, Part] | None, *, key: bytes | None = None, memory: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file and check that it is whole, unchanged, of this layout and finite.

    Args:
        layout: the tensors that must be in it, and no others; None: any.
        key: it must be signed with; None: it need not be signed.
        memory: where to read to, if that is large enough: uint8 [any], on the host. None: new memory.

    Returns:
        The parts, on the host, views of one piece of memory, and the metadata.

    Raises:
        StateFileError: it is not.
    """
    with _opened(path) as file:
        table, metadata, start = _read_table(file)
        size = os.fstat(file.fileno()).st_size - start
        found = _parse_table(table, size)
        if layout is not None:
            _compare(found, layout)
        if memory is None or memory.nbytes < size:
            memory = torch.empty(size, dtype=torch.uint8)
        data = memory[:size]
        if file.readinto(_buffer(data)) != size:  # type: ignore[attr-defined]
            raise StateFileError("the file changed while it was read")
    parts = {}
    for name, part in found.items():
        offset = table[name]["data_offsets"][0]
        parts[name] = data[offset : offset + part.nbytes].view(part.dtype).view(part.shape)
    digest, signature = metadata.get("digest", ""), metadata.get("signature", "")
    unsigned = {name: value for name, value in metadata.items() if name not in ("digest", "signature")}
    if digest != _digest(table, unsigned, {name: _buffer(part) for name, part in parts.items()}):
        raise StateFileError("damaged: the digest does not fit the contents")
    if key is not None and not hmac.compare_digest(signature.encode(), _sign(digest, key).encode()):
        raise SignatureError("signed with another key, or changed" if signature else "not signed")
    check_finite(parts)
    if layout is not None:
        parts = {name: parts[name] for name in layout}
    return parts, metadata


def check_finite(parts: Mapping[str, Tensor]) -> None:
    """Raise StateFileError if one of these tensors holds infinities or NaN.

    A split state is one of two halves per layer; integers of other shapes are not looked at.
    """
    for name, tensor in parts.items():
        if not tensor.numel():
            continue  # whatever its shape says
        finite = True
        if tensor.dtype == SPLIT and tensor.dim() > 1 and tensor.shape[1] == 2:
            finite = all(map(is_split_finite, tensor))  # a layer at a time, which the caches hold
        elif tensor.dtype.is_floating_point:
            # The extremes are finite if all are (NaN counts as both), and finding them takes a tenth of the time.
            finite = all(extreme.isfinite() for extreme in torch.aminmax(tensor))
        if not finite:
            raise StateFileError(f"{name} holds values that are not finite")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise StateFileError(f"cannot be read: {error.strerror}") from error


def _read_table(file: BinaryIO) -> tuple[dict[str, Any], dict[str, str], int]:
    """The table of tensors, the metadata, which are strings, and where the tensors begin."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size - 8):
        raise StateFileError("not a state: the header is cut off or too long")
    try:
        table = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise StateFileError("not a state: the header is no JSON") from None
    if not isinstance(table, dict):
        raise StateFileError("not a state: the header is no JSON object")
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StateFileError("not a state: the metadata are missing")
    for text in (*table, *metadata, *metadata.values()):
        if len(text) > _MAX_STRING:
            raise StateFileError("not a state: a name, or what the metadata say, is too long")
        try:
            text.encode()
        except UnicodeEncodeError:
            # Half a surrogate pair, which no message to a client can hold.
            raise StateFileError("not a state: a name, or what the metadata say, is no text") from None
    if metadata.get("layout") not in (LAYOUT, SPLIT_LAYOUT):
        raise UnknownLayoutError(
            f"of layout {metadata.get('layout')!r}; this server reads {LAYOUT!r} and {SPLIT_LAYOUT!r}"
        )
    return table, metadata, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        ValueError: a key is given twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is given twice")
    return value


def _parse_table(table: Mapping[str, Any], nbytes: int) -> dict[str, Part]:
    """The tensors in the order of the file, of which they must fill so many bytes without gaps."""
    parts: dict[str, Part] = {}
    places: list[tuple[int, str]] = []
    for name, entry in table.items():
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _DTYPES or not _is_sizes(shape) or not _is_sizes(offsets):
            raise StateFileError(f"not a state: the entry of {name!r} is wrong")
        assert shape is not None and offsets is not None
        if len(offsets) != 2:
            raise StateFileError(f"not a state: the entry of {name!r} is wrong")
        parts[name] = Part(_DTYPES[dtype], tuple(shape))
        if offsets[1] - offsets[0] != parts[name].nbytes or offsets[0] % parts[name].dtype.itemsize:
            raise StateFileError(f"not a state: the place of {name!r} does not fit its shape")
        places.append((offsets[0], name))
    end = 0
    for start, name in sorted(places):
        if start != end:
            raise StateFileError(f"not a state: {name!r} does not begin where the tensor before it ends")
        end += parts[name].nbytes
    if end > nbytes:
        raise StateFileError("cut off: it is shorter than its tensors")
    if end < nbytes:
        raise StateFileError("longer than its tensors")
    return {name: parts[name] for _, name in sorted(places)}


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(one) is int and 0 <= one < 1 << 40 for one in value)


def _compare(found: Mapping[str, Part], layout: Mapping[str, Part]) -> None:
    if found.keys() != layout.keys():
        raise StateFileError(f"holds {sorted(found)} in place of {sorted(layout)}: a state of another kind of model")
    for name, part in layout.items():
        if found[name] != part:
            raise StateFileError(
                f"{name} is {describe(found[name])} in place of {describe(part)}: a state of another model"
            )


def describe(part: Part) -> str:
    """Type and shape as the format writes them."""
    return f"{_NAMES[part.dtype]} {list(part.shape)}"


def _unsealed(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in metadata.items() if name not in ("checksum", "digest", "signature")}


def _checksum(table: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    return sha256(json.dumps([table, metadata], sort_keys=True).encode()).hexdigest()


def _sign(digest: str, key: bytes) -> str:
    return hmac.digest(key, f"{LAYOUT} {digest}".encode(), "sha256").hex()


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


def sync_folder(folder: Path) -> None:
    """Return once the names of a folder's files would survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
