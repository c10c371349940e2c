"""Where parked snapshots lie: on the device, on the host, on a disk. Moves them without holding the engine up.

Between device and host, copies take their place in the device's queues. One thread writes files and another reads them:
a snapshot on its way to the disk is served from memory until it is there, and if more of them queue up than the disk
takes, the next ones are refused. Files of saved states are only read here; see :mod:`server.engine.saved_files`.
"""

import fcntl
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from server.engine.pinned import PinnedPiece, PinnedPieces
from server.engine.snapshot import Snapshot, copy_from_device, to_device, to_host
from server.engine.state_exchange import TRANSCRIPT, adapt
from server.engine.state_file import Part, StateFileError, read_state, write_state
from server.engine.stats import Histogram
from server.engine.tiers import SnapshotLostError, Tier
from server.errors import SettingsError

logger = logging.getLogger(__name__)

_MAX_WRITES = 4
MAX_LEAVING = 4
"""Snapshots on their way from the device to the host, beyond the budget of both."""
_READ_AHEAD = 2
"""Snapshots in memory that is kept for those that are read: the first use of new memory takes as long as reading."""
_TRANSCRIPT_BYTES = 1 << 20
"""Room there for the transcript of a saved state; whatever has a longer one is read to new memory."""
_SUFFIX = ".safetensors"


@dataclass(slots=True, eq=False)
class FileSnapshot:
    """A snapshot in a file, or on its way there.

    Attributes:
        path: of the file.
        num_tokens, num_folded: as in :class:`Snapshot`.
        layout: of its tensors; None: the file is a saved state's, which is written and removed elsewhere.
        source: the snapshot until it is written, and once it has been read again; set and cleared by the threads, too.
        memory: the same, held for whoever has been told that it is ready.
        reading: the read that was asked for.
        lost: why there is no file.
    """

    path: Path
    num_tokens: int
    num_folded: int
    layout: dict[str, Part] | None
    source: Snapshot | None
    memory: Snapshot | None = None
    reading: "Future[None] | None" = None
    lost: str | None = None


Payload: TypeAlias = Snapshot | FileSnapshot


@dataclass(slots=True)
class SnapshotStore:
    """Holds what :class:`server.engine.tiers.Tiers` decides on; its ``Store``.

    Args:
        device: where snapshots of the tier DEVICE lie.
        pool: what a snapshot of the state pool looks like.
        pieces: pinned memory for snapshots of the tier HOST that come from a CUDA device; None: there are none.
        folder: for files; None: there is no disk tier. Files of an earlier run are removed.
        read_seconds, write_seconds: time that files take is entered there.

    Raises:
        SettingsError: the folder cannot be used, or another server uses it.
    """

    device: torch.device
    pool: Mapping[str, Part]
    pieces: PinnedPieces | None
    folder: Path | None
    read_seconds: Histogram
    write_seconds: Histogram
    _writer: ThreadPoolExecutor = field(init=False)
    _reader: ThreadPoolExecutor = field(init=False)
    _writes: set["Future[None]"] = field(default_factory=set)
    _reads: set["Future[None]"] = field(default_factory=set)
    _leaving: "deque[torch.cuda.Event]" = field(default_factory=deque)
    _unwritten: "deque[FileSnapshot]" = field(default_factory=deque)
    _number: int = 0
    _lock: int | None = None
    _stream: torch.cuda.Stream | None = field(init=False)
    _read_memory: PinnedPieces | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshot-writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="snapshot-reader")
        self._stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self.folder.glob(f"*{_SUFFIX}*"):
                path.unlink()
        except BlockingIOError:
            raise SettingsError(f"--state-cache-dir: {self.folder} is in use by another server") from None
        except OSError as error:
            raise SettingsError(f"--state-cache-dir: {self.folder}: {error.strerror}") from None
        piece_bytes = sum(part.nbytes for part in self.pool.values()) + _TRANSCRIPT_BYTES
        self._read_memory = PinnedPieces(piece_bytes, _READ_AHEAD * piece_bytes, pin=self.device.type == "cuda")

    # The cache's side; see Store.

    def move(self, payload: Payload, tier: Tier) -> Payload | None:
        """Bring a snapshot to another tier; None: there is enough under way already, or no memory for it.

        Raises:
            torch.AcceleratorError: the device is ill.
        """
        try:
            moved = self._moved(payload, tier)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            # Whoever asks can do without: nothing that is answered depends on where a snapshot lies.
            logger.warning("a snapshot stays where it is: %s", str(error) or type(error).__name__)
            return None
        if moved is not None and isinstance(payload, FileSnapshot):
            self.drop(payload)
        return moved

    def _moved(self, payload: Payload, tier: Tier) -> Payload | None:
        if tier is Tier.DISK:
            assert isinstance(payload, Snapshot)
            return self._write(payload)
        snapshot = payload.memory if isinstance(payload, FileSnapshot) else payload
        assert snapshot is not None, "moved before it was ready"
        return self._to_host(snapshot) if tier is Tier.HOST else to_device(snapshot, self.device)

    def drop(self, payload: Payload) -> None:
        """Give a snapshot up; memory is freed with the last reference."""
        if isinstance(payload, FileSnapshot):
            payload.source = payload.memory = payload.reading = None
            if payload.layout is not None:
                self._writer.submit(payload.path.unlink, missing_ok=True)

    def ready(self, payload: Payload) -> bool:
        """Whether a snapshot is in memory; if it is not, it is being read.

        Raises:
            SnapshotLostError: it could not be written or read.
        """
        if isinstance(payload, Snapshot):
            return True
        payload.memory = payload.source
        if payload.memory is not None:
            return True
        if payload.lost is not None:
            raise SnapshotLostError(payload.lost)
        if payload.reading is None:
            payload.reading = self._submit(self._reader, self._reads, self._read_file, payload)
        return False

    def unread(self, payload: Payload) -> None:
        """Nobody waits for a snapshot's file any longer: it is not read, or what was read is given up."""
        reading = payload.reading if isinstance(payload, FileSnapshot) else None
        if reading is None:
            return

        def forget(_: "Future[None]") -> None:
            assert isinstance(payload, FileSnapshot)
            payload.source = payload.reading = None

        reading.cancel()
        reading.add_done_callback(forget)

    def take_unwritten(self) -> list[Payload]:
        """Snapshots whose files could not be written, since this was last asked; they are in memory still."""
        unwritten: list[Payload] = []
        while self._unwritten:
            payload = self._unwritten.popleft()
            payload.memory = payload.source
            unwritten.append(payload)
        return unwritten

    # The side of other threads.

    def copy_to_host(self, payload: Payload) -> Snapshot:
        """A snapshot as the host can read it; waits for the device or for a file. May be called by any thread.

        Raises:
            StateFileError: its file cannot be read.
        """
        if isinstance(payload, FileSnapshot):
            snapshot = payload.source
            return self._read(payload) if snapshot is None else self.copy_to_host(snapshot)
        payload.wait()
        if payload.parts["recurrent"].device.type == "cpu":
            return payload
        return copy_from_device(payload, self._stream)

    # The engine's side.

    def take(self, payload: Payload) -> Snapshot:
        """The snapshot of a payload that is ready."""
        if isinstance(payload, Snapshot):
            return payload
        snapshot = payload.memory
        assert snapshot is not None, "taken before it was ready"
        payload.memory = None
        if payload.reading is not None:
            # Read for this one use: its place is on the disk.
            payload.source = payload.reading = None
        return snapshot

    @property
    def reads(self) -> "set[Future[None]]":
        """Files being read."""
        return set(self._reads)

    @property
    def is_busy(self) -> bool:
        """Whether snapshots are on their way to the host or to files."""
        self._forget_left()
        return bool(self._writes or self._leaving)

    def close(self) -> None:
        """Remove the files; nothing can be moved any more."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)
        if self._lock is not None and self.folder is not None:
            for path in self.folder.glob(f"*{_SUFFIX}*"):
                path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _to_host(self, snapshot: Snapshot) -> Snapshot | None:
        if snapshot.parts["recurrent"].device.type == "cpu":
            return snapshot
        self._forget_left()
        # What a copy that has not left yet frees on the device cannot be used again: this bounds how much that is.
        piece = None if self.pieces is None or len(self._leaving) >= MAX_LEAVING else self.pieces.take()
        if piece is None:
            return None
        copy = to_host(snapshot, piece)
        assert copy.copied is not None
        self._leaving.append(copy.copied)
        return copy

    def _forget_left(self) -> None:
        while self._leaving and self._leaving[0].query():
            self._leaving.popleft()

    def _write(self, snapshot: Snapshot) -> FileSnapshot | None:
        if len(self._writes) >= _MAX_WRITES or self.folder is None:
            return None
        self._number += 1
        layout = {name: Part(tensor.dtype, tuple(tensor.shape)) for name, tensor in snapshot.tensors().items()}
        path = self.folder / f"{self._number}{_SUFFIX}"
        host = self._to_host(snapshot)
        if host is None:
            return None
        file = FileSnapshot(path, snapshot.num_tokens, snapshot.num_folded, layout, host)
        self._submit(self._writer, self._writes, self._write_file, file)
        return file

    @staticmethod
    def _submit(
        thread: ThreadPoolExecutor,
        futures: set["Future[None]"],
        work: Callable[[FileSnapshot], None],
        file: FileSnapshot,
    ) -> "Future[None]":
        future = thread.submit(work, file)
        futures.add(future)
        future.add_done_callback(futures.discard)
        return future

    def _write_file(self, file: FileSnapshot) -> None:
        snapshot = file.source
        if snapshot is None:
            return  # dropped before its turn
        start = time.perf_counter()
        try:
            snapshot.wait()
            write_state(file.path, snapshot.tensors(), {})
        except Exception as error:  # the memory may be full, too
            logger.warning("a snapshot was not written: %s: %s", file.path, _reason(error))
            self._unwritten.append(file)
        else:
            self.write_seconds.observe(time.perf_counter() - start)
            file.source = None

    def _read_file(self, file: FileSnapshot) -> None:
        piece = None if self._read_memory is None else self._read_memory.take()
        try:
            if piece is not None and self.device.type == "cuda":
                # What lay there before may still be on its way to the device.
                torch.cuda.synchronize(self.device)
            file.source = self._read(file, piece)
        except Exception as error:  # whatever it is, somebody waits for the file or for this
            file.lost = f"{file.path}: {_reason(error)}"

    def _read(self, file: FileSnapshot, piece: PinnedPiece | None = None) -> Snapshot:
        start = time.perf_counter()
        tensors, _ = read_state(file.path, file.layout, memory=None if piece is None else piece.memory)
        self.read_seconds.observe(time.perf_counter() - start)
        tensors.pop(TRANSCRIPT, None)
        logits_V = tensors.pop("logits", None)
        snapshot = Snapshot(tensors, logits_V, file.num_tokens, file.num_folded, None, piece)
        return snapshot if file.layout is not None else adapt(snapshot, self.pool, exact=True)


def _reason(error: Exception) -> str:
    """What went wrong with a file, in a line."""
    if isinstance(error, StateFileError):
        return str(error)
    return error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
