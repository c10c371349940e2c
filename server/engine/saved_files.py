"""Saved states as files, which outlive the engine.

Each state has a file of its own, named after its id: its snapshot, its transcript, and in the metadata whose it is and
until when. A file is there as a whole or not at all (:mod:`server.engine.state_file`), so whatever was acknowledged is
found again, after a crash of the engine, of the server or of the machine. One thread writes and removes them.

At the start their headers and transcripts are read and checked. The snapshots are read and checked when somebody
continues a state; one that turns out to be damaged is never used, but absorbed again from the transcript.
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Final

import torch

from server.engine.named_states import NamedState, StateFile
from server.engine.radix import TOKEN_BYTES
from server.engine.snapshot import Snapshot
from server.engine.snapshot_store import FileSnapshot, SnapshotStore
from server.engine.state_exchange import TRANSCRIPT, num_folded
from server.engine.state_file import (
    Header,
    StateFileError,
    UnknownLayoutError,
    read_header,
    read_part,
    sync_folder,
    write_state,
)
from server.errors import SettingsError
from server.types import STATE_ID_PREFIX

logger = logging.getLogger(__name__)

FOLDER: Final = "saved"
"""Within the folder of the states' cache."""
_SUFFIX: Final = ".safetensors"
_ASIDE: Final = ".damaged"
_TRIES: Final = 5


class SavedFiles:
    """The folder of saved states; ``Files`` of :class:`server.engine.named_states.NamedStates`.

    Args:
        folder: of the cache, which the store has locked: there the folder is made.
        store: has the snapshots.
        model: the model's fingerprint; files of others are left alone.
        vocab_size: token ids are smaller.

    Raises:
        SettingsError: the folder cannot be used.

    Attributes:
        skipped: files at the start that are no states for this server, by why: damaged, layout, model.
        skipped_bytes: of these.
    """

    def __init__(self, folder: Path, store: SnapshotStore, model: str, vocab_size: int) -> None:
        self._folder = folder / FOLDER
        self._store = store
        self._model = model
        self._vocab_size = vocab_size
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state-writer")
        self.skipped: Counter[str] = Counter({"damaged": 0, "layout": 0, "model": 0})
        self.skipped_bytes = self.skipped.copy()
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            for path in self._folder.glob("*.tmp"):
                path.unlink()  # never acknowledged
        except OSError as error:
            raise SettingsError(f"--state-cache-dir: {self._folder}: {error.strerror}") from None

    def scan(self) -> Iterator[NamedState]:
        """The states that were saved earlier, of this model, expired ones removed."""
        for path in self._folder.glob(f"*{_SUFFIX}{_ASIDE}"):
            self._skip("damaged", path)
        found = 0
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                state = self._read(path)
            except UnknownLayoutError as error:
                self._skip("layout", path)
                logger.warning("saved state %s is left alone: %s", path, error)
            except StateFileError as error:
                self._skip("damaged", path)
                logger.error("saved state %s is put aside: %s", path, error)
                with contextlib.suppress(OSError):
                    path.rename(path.with_name(f"{path.name}{_ASIDE}"))
            else:
                if state is None:
                    self._skip("model", path)
                elif state.expires <= time.time():
                    self.remove(state)
                else:
                    found += 1
                    yield state
        if self.skipped["model"]:
            logger.warning(
                "%d saved states in %s are of other models, and left alone", self.skipped["model"], self._folder
            )
        if unused := self.skipped_bytes.total():
            logger.warning("files in %s that are not used take %d bytes of --state-cache-disk", self._folder, unused)
        logger.info("%d saved states found in %s", found, self._folder)

    def write(self, state: NamedState) -> "Future[StateFile]":
        """Write a state's file; OSError if it cannot be written."""
        return self._writer.submit(self._write, state)

    def remove(self, state: NamedState) -> "Future[None]":
        """Remove it, so that it does not come back after a crash either."""
        return self._writer.submit(self._remove, state)

    def settled(self) -> "Future[None]":
        """Done when everything is written and removed that is to be by now."""
        return self._writer.submit(lambda: None)

    def close(self) -> None:
        """Return once everything is written and removed that was to be."""
        self._writer.shutdown()

    def _skip(self, why: str, path: Path) -> None:
        self.skipped[why] += 1
        with contextlib.suppress(OSError):
            self.skipped_bytes[why] += path.stat().st_size

    def _write(self, state: NamedState) -> StateFile:
        snapshot = read_snapshot(self._store, state)
        path = self._path(state)
        tensors = {} if snapshot is None else snapshot.tensors()
        start = time.perf_counter()
        written = write_state(path, {TRANSCRIPT: transcript_tensor(state), **tensors}, self._metadata(state, snapshot))
        self._store.write_seconds.observe(time.perf_counter() - start)
        return StateFile(written.nbytes) if snapshot is None else _with_snapshot(path, written.nbytes, snapshot)

    def _remove(self, state: NamedState) -> None:
        try:
            self._path(state).unlink(missing_ok=True)
            sync_folder(self._folder)
        except OSError as error:
            logger.error("saved state %s cannot be removed: %s", self._path(state), error.strerror)
            raise

    def _metadata(self, state: NamedState, snapshot: Snapshot | None) -> dict[str, str]:
        local = {"id": state.id, "name": state.name, "expires": repr(state.expires), "island": state.island}
        return {
            **{name: value for name, value in local.items() if value is not None},
            **portable_metadata(state, snapshot, self._model),
        }

    def _path(self, state: NamedState) -> Path:
        return self._folder / f"{state.id}{_SUFFIX}"

    def _read(self, path: Path) -> NamedState | None:
        """A file's state; None: it is of another model.

        Raises:
            StateFileError: it is damaged, or of another layout.
        """
        header = read_header(path)
        metadata = header.metadata
        if metadata.get("model") != self._model:
            return None
        tokens, (absorbed, folded) = read_transcript(path, header, self._vocab_size)
        try:
            state = NamedState(
                id=metadata["id"],
                name=metadata.get("name"),
                tenant=metadata["tenant"],
                tokens=tokens,
                created=float(metadata["created"]),
                expires=float(metadata["expires"]),
                turn=metadata.get("turn"),
                island=metadata.get("island"),
            )
        except (KeyError, ValueError):
            raise StateFileError("damaged: the metadata are incomplete") from None
        if path.name != f"{state.id}{_SUFFIX}" or not state.id.startswith(STATE_ID_PREFIX):
            raise StateFileError("its name is not the state's")
        nbytes = path.stat().st_size
        if not absorbed:
            state.file = StateFile(nbytes)
            return state
        payload = FileSnapshot(path, absorbed, folded, None, None)
        snapshot_bytes = sum(part.nbytes for name, part in header.parts.items() if name != TRANSCRIPT)
        state.file = StateFile(nbytes, payload, absorbed, snapshot_bytes, "logits" in header.parts)
        return state


def _with_snapshot(path: Path, nbytes: int, snapshot: Snapshot) -> StateFile:
    payload = FileSnapshot(path, snapshot.num_tokens, num_folded(snapshot), None, None)
    return StateFile(nbytes, payload, snapshot.num_tokens, snapshot.nbytes, snapshot.logits_V is not None)


def read_snapshot(store: SnapshotStore, state: NamedState) -> Snapshot | None:
    """The snapshot of a state, on the host; None: it has none that can be read. For other threads than the engine's."""
    for _ in range(_TRIES):
        entry = state.entry
        if entry is None or not entry.nbytes:
            return None
        payload = entry.payload
        try:
            return store.copy_to_host(payload)
        except StateFileError as error:
            if entry.payload is payload:
                logger.warning("the snapshot of %s is lost: %s", state.id, error)
                return None
            # The engine has just brought it to another tier.
    return None


def transcript_tensor(state: NamedState) -> torch.Tensor:
    """int32 [num_tokens]."""
    return torch.frombuffer(bytearray(state.tokens), dtype=torch.int32)


def portable_metadata(state: NamedState, snapshot: Snapshot | None, model: str) -> dict[str, str]:
    """What is true of a state wherever it goes.

    Args:
        snapshot: None: there is none.
        model: the model's fingerprint.
    """
    metadata = {
        "model": model,
        "tenant": state.tenant,
        "created": repr(state.created),
        "num_tokens": str(state.num_tokens),
        "transcript_sha256": sha256(state.tokens).hexdigest(),
        "num_absorbed": str(0 if snapshot is None else snapshot.num_tokens),
        "num_folded": str(0 if snapshot is None else num_folded(snapshot)),
    }
    return metadata if state.turn is None else {**metadata, "turn": state.turn}


def read_transcript(path: Path, header: Header, vocab_size: int) -> tuple[bytes, tuple[int, int]]:
    """A file's transcript, int32 bytes, and how many of its tokens its snapshot has absorbed and folded.

    Raises:
        StateFileError: they are not there, have changed, or make no sense.
    """
    metadata: Mapping[str, str] = header.metadata
    part = header.parts.get(TRANSCRIPT)
    if part is None or part.dtype != torch.int32 or len(part.shape) != 1 or not part.nbytes:
        raise StateFileError("holds no transcript")
    tokens = read_part(path, header, TRANSCRIPT)
    if metadata.get("transcript_sha256") != sha256(tokens).hexdigest():
        raise StateFileError("damaged: the transcript is not the one that was saved")
    ids = torch.frombuffer(bytearray(tokens), dtype=torch.int32)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise StateFileError(f"the transcript has tokens that are none of this model's {vocab_size}")
    try:
        length, absorbed, folded = (int(metadata[name]) for name in ("num_tokens", "num_absorbed", "num_folded"))
    except (KeyError, ValueError):
        raise StateFileError("damaged: the metadata are incomplete") from None
    if length != len(tokens) // TOKEN_BYTES or not 0 <= folded <= absorbed <= length:
        raise StateFileError("the metadata do not fit the transcript")
    if (absorbed > 0) != (len(header.parts) > 1):
        raise StateFileError("the metadata do not fit the tensors")
    return tokens, (absorbed, folded)
