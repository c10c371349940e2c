"""Which model this is, as far as its answers depend on it."""

from hashlib import sha256
from pathlib import Path
from typing import Final

from server import __version__

_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096


def model_fingerprint(folder: Path, *facts: object) -> str:
    """A name for a checkpoint alone, by which saved states tell which model they belong to; else as
    :func:`system_fingerprint`."""
    return _digest(folder, "model", *facts)[:32]


def system_fingerprint(folder: Path, *facts: object) -> str:
    """A short name for a checkpoint, this version of Gale and how it computes; the same after every restart.

    Reading all weights would take as long as loading them, so of each file count its name, its size and samples from
    all over it: versions of a model that differ in a few numbers only may share a name.

    Args:
        folder: the checkpoint.
        facts: what else answers depend on, such as data types.

    Returns:
        ``fp_`` and 12 hexadecimal digits.
    """
    return f"fp_{_digest(folder, __version__, *facts)[:12]}"


def _digest(folder: Path, *facts: object) -> str:
    digest = sha256(repr(tuple(map(str, facts))).encode())
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
