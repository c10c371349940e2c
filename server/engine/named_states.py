"""States that clients have saved: which transcript each stands for, whose it is, and until when. Torch-free.

A saved state is a transcript and a hold on the parked snapshot of as much of it as has been absorbed. Whoever continues
it sends the transcript's tokens before new ones, so that whatever became of the snapshot, the answer is the same; the
hold is what makes it quick.

Where there is a folder, a state is saved once its file is there: until then nobody can find it, and it takes over
nobody's name. Files are written elsewhere, in the meantime the engine goes on.

Nobody can find a deleted state, but its snapshot and its file last as long as somebody waits to go on from it.
"""

import heapq
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Protocol

from server.engine.ledger import Ledger
from server.engine.radix import TOKEN_BYTES
from server.engine.stats import Histogram, seconds_histogram
from server.engine.tiers import Entry
from server.types import STATE_ID_PREFIX, SavedStats, StateInfo

OPERATIONS: Final = ("save", "restore", "fork", "delete", "expire", "upload", "download")
TIMED_OPERATIONS: Final = ("save", "fork", "upload", "download")
DEFAULT_TTL: Final = 86400.0
"""Seconds for which a state is kept if nobody says for how long."""


class NoRoomError(Exception):
    """As many states are kept as may be; str() says so in a sentence."""


class TenantFullError(Exception):
    """The tenant keeps as many states as it may; str() says so in a sentence."""


class NotWrittenError(Exception):
    """A state could not be saved, for its file could not be written; str() says why in a sentence."""


@dataclass(frozen=True, slots=True, eq=False)
class StateFile:
    """The file of a saved state.

    Attributes:
        nbytes: its size.
        payload: what the prefix cache knows of the snapshot in it; None: there is none, the transcript is all.
        num_tokens: which that snapshot has absorbed.
        snapshot_bytes: what that takes in memory.
        complete: whether the last position's logits are in it.
    """

    nbytes: int
    payload: Any = None
    num_tokens: int = 0
    snapshot_bytes: int = 0
    complete: bool = False


@dataclass(slots=True, eq=False)
class NamedState:
    """A saved state.

    Attributes:
        id: unique in this server.
        name: unique among the tenant's; None: it has none.
        tenant: whose it is.
        tokens: the transcript, int32 bytes, at least one.
        created, expires: Unix time.
        turn: the role of the chat message within which the transcript ends; None: of none.
        island: where its snapshots lie apart from the tenant's others, because somebody else has computed them; None:
            nowhere.
        entry: the snapshot, of as many of the tokens as had been absorbed; None: none was left.
        file: None: it is kept in memory only.
        awaiting: choices that have been accepted to go on from it, and have not begun.
        removed: done when its file is gone, of a state that was deleted while there were any.
    """

    id: str
    name: str | None
    tenant: str
    tokens: bytes
    created: float
    expires: float
    turn: str | None = None
    island: str | None = None
    entry: Entry[Any] | None = None
    file: StateFile | None = None
    awaiting: int = 0
    removed: "Future[None] | None" = None

    @property
    def num_tokens(self) -> int:
        """Of the transcript."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def num_absorbed(self) -> int:
        """Tokens of the transcript that the snapshot holds."""
        return 0 if self.entry is None or not self.entry.nbytes else self.entry.num_tokens

    @property
    def info(self) -> StateInfo:
        """What clients are told of it."""
        return StateInfo(
            id=self.id,
            name=self.name,
            num_tokens=self.num_tokens,
            nbytes=0 if self.entry is None else self.entry.nbytes,
            created=self.created,
            expires=self.expires,
            turn=self.turn,
        )


class Parking(Protocol):
    """What holds the snapshots; see :class:`server.engine.reuse.PrefixReuse`."""

    def hold(self, state: NamedState) -> Entry[Any] | None:
        """The snapshot of the longest beginning of a state's tokens, from now on kept; None: there is none."""

    def release(self, entry: Entry[Any]) -> None:
        """One holder less."""

    def file_written(self, state: NamedState) -> Entry[Any] | None:
        """A state has a file now. Returns the snapshot to be held for it, in place of the one that was held."""

    def file_removed(self, state: NamedState) -> None:
        """A state's file is about to be removed."""

    def set_aside(self, nbytes: int) -> None:
        """So many bytes of the disk are taken by files that are not used."""


class Files(Protocol):
    """What writes the files; see :class:`server.engine.saved_files.SavedFiles`."""

    @property
    def skipped(self) -> Mapping[str, int]:
        """Files that are not used, by why."""

    @property
    def skipped_bytes(self) -> Counter[str]:
        """Bytes of these."""

    def scan(self) -> Iterator[NamedState]:
        """The states whose files there are; only at the beginning."""

    def write(self, state: NamedState) -> "Future[StateFile]":
        """Write a state's file; OSError if it cannot be written."""

    def remove(self, state: NamedState) -> "Future[None]":
        """Remove it."""

    def settled(self) -> "Future[None]":
        """Done when what has been asked for by now is done."""


@dataclass(frozen=True, slots=True)
class StateLimits:
    """How much may be saved.

    Attributes:
        nbytes: in all, of files where there are any, else of snapshots in memory.
        count: states in all.
        tenant_nbytes, tenant_count: the same of each tenant; None: no such limit.
        state_nbytes: what a state about to be saved may take.
        transcript_nbytes: of transcripts in memory, beyond which no further state is saved; None: no such limit.
    """

    nbytes: int
    state_nbytes: int
    count: int = 1 << 16
    tenant_nbytes: int | None = None
    tenant_count: int | None = None
    transcript_nbytes: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Saving:
    """A state on its way.

    Attributes:
        state: nobody can find it yet.
        written: done when its file is; None where there are no files.
    """

    state: NamedState
    written: "Future[StateFile] | None"


class NamedStates:
    """Every saved state of one engine.

    Args:
        parking: holds the snapshots.
        limits: how much may be saved. States whose files are found are kept beyond them.
        files: None: states are kept in memory only.
        clock: Unix time in seconds.

    Attributes:
        counts: of what was done with states, by name of the operation.
        failed: states whose files could not be written.
        seconds: how long operations with files took, by name.
    """

    def __init__(
        self,
        parking: Parking,
        limits: StateLimits,
        files: Files | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._parking = parking
        self._limits = limits
        self._files = files
        self._clock = clock
        self._states: dict[str, NamedState] = {}
        self._by_name: dict[tuple[str, str], NamedState] = {}
        self._expiries: list[tuple[float, str]] = []
        self._reserved: Counter[str] = Counter()
        self._num_writing = 0
        self._used = Ledger()
        self.counts: Counter[str] = Counter(dict.fromkeys(OPERATIONS, 0))
        self.failed = 0
        self.seconds: dict[str, Histogram] = {name: seconds_histogram() for name in TIMED_OPERATIONS}
        self._unused = 0
        if files is not None:
            for state in sorted(files.scan(), key=lambda state: state.created):
                self._enter(state)
            self._expire()
            self._unused = files.skipped_bytes.total()
            parking.set_aside(self._unused)

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        """What they take: their files, or else their snapshots in memory."""
        return self._used.nbytes[None]

    def stats(self, held: Mapping[str, tuple[int, int]]) -> SavedStats:
        """The figures as they stand.

        Args:
            held: snapshots of saved states, and their bytes, by tier.
        """
        return SavedStats(
            states=len(self._states),
            nbytes=self.nbytes,
            transcript_bytes=self._used.transcript_bytes,
            snapshots={tier: count for tier, (count, _) in held.items()},
            snapshots_bytes={tier: nbytes for tier, (_, nbytes) in held.items()},
            operations=dict(self.counts),
            failed=self.failed,
            skipped={} if self._files is None else dict(self._files.skipped),
            skipped_bytes={} if self._files is None else dict(self._files.skipped_bytes),
            seconds={name: histogram.snapshot() for name, histogram in self.seconds.items()},
        )

    def reserve(self, tenant: str, count: int, nbytes: int | None = None) -> None:
        """Set room aside for states about to be saved; each is followed by ``save`` or ``give_up``.

        Args:
            nbytes: what each will take; None: what a state may take.

        Raises:
            NoRoomError: there is not enough.
            TenantFullError: the tenant has no more.
        """
        self._expire()
        limits = self._limits
        nbytes = limits.state_nbytes if nbytes is None else nbytes
        for owner, reserved, most_states, most_bytes, error in (
            (tenant, self._reserved[tenant], limits.tenant_count, limits.tenant_nbytes, TenantFullError),
            (None, self._reserved.total(), limits.count, limits.nbytes, NoRoomError),
        ):
            whose = "are kept or about to be" if owner is None else "of this API key are kept or about to be"
            states = self._used.count[owner] + reserved
            if most_states is not None and states + count > most_states:
                raise error(
                    f"no room for {count} more saved states: {states} {whose}, of at most {most_states}; delete some"
                )
            used = self._used.nbytes[owner] + reserved * limits.state_nbytes
            unused = self._unused if owner is None else 0
            if most_bytes is not None and used + unused + count * nbytes > most_bytes:
                others = f", besides {unused} bytes of files that this server does not use" if unused else ""
                raise error(
                    f"no room for {count} more saved states of up to {nbytes} bytes: {used} bytes {whose}{others}, of "
                    f"at most {most_bytes}; delete some"
                )
        transcripts = self._used.transcript_bytes
        if limits.transcript_nbytes is not None and transcripts >= limits.transcript_nbytes:
            raise NoRoomError(
                f"no room for {count} more saved states: the transcripts of those that are kept take {transcripts} "
                f"bytes of memory, of at most {limits.transcript_nbytes}; delete some"
            )
        self._reserved[tenant] += count

    def give_up(self, tenant: str) -> None:
        """One state that room was reserved for will not be saved."""
        self._reserved[tenant] -= 1

    def save(
        self,
        tenant: str,
        name: str | None,
        ttl: float | None,
        tokens: bytes,
        turn: str | None = None,
        island: str | None = None,
    ) -> Saving:
        """Begin to save the state after these tokens, for which room is reserved; ``complete`` has to follow."""
        now = self._clock()
        expires = now + (DEFAULT_TTL if ttl is None else ttl)
        state = NamedState(STATE_ID_PREFIX + secrets.token_hex(12), name, tenant, tokens, now, expires, turn, island)
        state.entry = self._parking.hold(state)
        if self._files is None:
            return Saving(state, None)
        try:
            saving = Saving(state, self._files.write(state))
        except Exception:
            if state.entry is not None:
                self._parking.release(state.entry)
            raise
        self._num_writing += 1
        return saving

    def complete(self, saving: Saving) -> NamedState:
        """Enter a state whose file has been written. It takes over the name from an earlier one, which is deleted.

        Raises:
            NotWrittenError: the file has not been written; nothing has changed.
        """
        state = saving.state
        self._reserved[state.tenant] -= 1
        if saving.written is not None:
            self._num_writing -= 1
            try:
                state.file = saving.written.result()
            except Exception as error:
                if state.entry is not None:
                    self._parking.release(state.entry)
                self.failed += 1
                why = error.strerror if isinstance(error, OSError) else type(error).__name__
                raise NotWrittenError(f"the state could not be saved: {why}") from error
        self._enter(state)
        return state

    @property
    def is_writing(self) -> bool:
        """Whether states are being saved whose files are not there yet."""
        return self._num_writing > 0

    def written(self) -> "Future[None] | None":
        """Done when every state that is being saved has its file; None: none is."""
        return self._files.settled() if self._files is not None and self.is_writing else None

    def find(self, tenant: str, reference: str) -> NamedState | None:
        """A tenant's state by its id or name; None: there is none, or it has expired."""
        self._expire()
        state = self._states.get(reference)
        if state is None or state.tenant != tenant:
            state = self._by_name.get((tenant, reference))
        return state

    def of(self, tenant: str) -> Iterator[NamedState]:
        """A tenant's states, the oldest first."""
        self._expire()
        return (state for state in self._states.values() if state.tenant == tenant)

    def fork(self, state: NamedState, name: str | None, ttl: float | None) -> Saving:
        """Begin to save another state of the same transcript; in memory, they share the snapshot.

        Raises:
            NoRoomError, TenantFullError: there is no room for it.
        """
        self.reserve(state.tenant, 1, 0 if state.file is None else state.file.nbytes)
        try:
            return self.save(state.tenant, name, ttl, state.tokens, state.turn, state.island)
        except Exception:
            self.give_up(state.tenant)
            raise

    def renew(self, state: NamedState) -> None:
        """Hold the longest snapshot that there is of a state by now."""
        entry = self._parking.hold(state)
        if state.entry is not None:
            self._parking.release(state.entry)
        state.entry = entry

    def expect(self, state: NamedState, count: int) -> None:
        """So many choices will go on from a state; each is followed by ``begun``."""
        state.awaiting += count

    def begun(self, state: NamedState) -> None:
        """One of them has its snapshot now, or does not need it any more."""
        state.awaiting -= 1
        if state.awaiting or self._states.get(state.id) is state:
            return
        waiting, removed = state.removed, self._remove(state)
        if waiting is not None and removed is not None:
            removed.add_done_callback(lambda done: _pass_on(done, waiting))

    def delete(self, state: NamedState) -> "Future[None] | None":
        """Forget a state; its snapshot lives on as long as any other, once nobody waits for it.

        Returns:
            Done when its file is gone; None: it has none.
        """
        del self._states[state.id]
        if state.name is not None and self._by_name.get((state.tenant, state.name)) is state:
            del self._by_name[state.tenant, state.name]
        if not state.awaiting:
            return self._remove(state)
        state.removed = None if state.file is None else Future()
        return state.removed

    def _remove(self, state: NamedState) -> "Future[None] | None":
        """Give up what a deleted state holds; done when its file is gone."""
        self._used.remove(state)
        if state.file is not None:
            self._parking.file_removed(state)
        if state.entry is not None:
            self._parking.release(state.entry)
        return None if self._files is None or state.file is None else self._files.remove(state)

    def _enter(self, state: NamedState) -> None:
        if state.file is not None:
            state.entry = self._parking.file_written(state)
        if state.name is not None:
            if (older := self._by_name.get((state.tenant, state.name))) is not None:
                self.delete(older)
            self._by_name[state.tenant, state.name] = state
        self._states[state.id] = state
        self._used.add(state)
        heapq.heappush(self._expiries, (state.expires, state.id))

    def _expire(self) -> None:
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            state = self._states.get(heapq.heappop(self._expiries)[1])
            if state is not None:
                self.delete(state)
                self.counts["expire"] += 1


def _pass_on(done: "Future[None]", waiting: "Future[None]") -> None:
    """Let one end like another."""
    error = done.exception()
    if error is None:
        waiting.set_result(None)
    else:
        waiting.set_exception(error)
