"""Lets sequences begin from snapshots of what others have absorbed, and takes these snapshots.

:mod:`server.engine.prefix_cache` decides, :mod:`server.engine.snapshot_store` holds the bytes; this connects them with
the sequences that the scheduler admits and the runner absorbs.
"""

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future

import torch

from server.component_settings import StateCacheConfig
from server.engine.batch import Batch
from server.engine.named_states import NamedState, StateLimits
from server.engine.pinned import PinnedPieces
from server.engine.prefix_cache import CacheFigures, PrefixCache, Ticket
from server.engine.radix import TOKEN_BYTES
from server.engine.sequence import Sequence
from server.engine.sessions import Sessions
from server.engine.snapshot import Snapshot
from server.engine.snapshot_store import Payload, SnapshotStore
from server.engine.state_file import Part
from server.engine.stats import Figures
from server.engine.tiers import Entry, Tier
from server.types import pack_tokens

logger = logging.getLogger(__name__)


def build_reuse(
    config: StateCacheConfig,
    budgets: Mapping[Tier, int],
    parked_bytes: int,
    pool: Mapping[str, Part],
    device: torch.device,
    figures: Figures,
) -> "PrefixReuse | None":
    """Prefix reuse as the settings want it; None if no tier can hold a state.

    Args:
        config: the settings.
        budgets: bytes of each tier.
        parked_bytes: most bytes of a parked state.
        pool: what a snapshot of the state pool looks like.
        device: where the state pool lies.
        figures: where the time that files take is counted.

    Raises:
        SettingsError: the folder for files cannot be used.
    """
    counts = {tier: nbytes // parked_bytes for tier, nbytes in budgets.items() if nbytes}
    for tier, count in counts.items():
        logger.info("%s: room for %d parked states of %d bytes", tier.name.lower(), count, parked_bytes)
    usable = {tier: budgets[tier] for tier, count in counts.items() if count}
    if not usable:
        return None
    pieces = None
    if device.type == "cuda" and Tier.HOST in usable:
        pieces = PinnedPieces(parked_bytes, usable[Tier.HOST])
    store = SnapshotStore(device, pool, pieces, config.folder, figures.state_read, figures.state_write)
    return PrefixReuse(store, usable, shared=config.shared)


def state_limits(config: StateCacheConfig, budgets: Mapping[Tier, int], parked_bytes: int) -> StateLimits:
    """How much may be saved: half of the disk where states are saved there, else of memory.

    Args:
        config, budgets, parked_bytes: as for :func:`build_reuse`.
    """
    room = budgets[Tier.DISK] if config.folder is not None else sum(budgets.values())
    # The other half stays for prefix reuse.
    nbytes = max(room // 2, parked_bytes)
    return StateLimits(
        nbytes=nbytes,
        transcript_nbytes=nbytes,
        state_nbytes=parked_bytes,
        count=config.max_saved,
        tenant_count=config.max_saved_per_key,
        tenant_nbytes=config.saved_bytes_per_key,
    )


class PrefixReuse:
    """Prefix reuse for the sequences of one engine.

    Args:
        store: holds the snapshots.
        budgets: most bytes in each tier; files of saved states count as part of the disk's.
        shared: whether every tenant may begin from every other's snapshots.

    Attributes:
        store: the same.
    """

    def __init__(self, store: SnapshotStore, budgets: Mapping[Tier, int], *, shared: bool) -> None:
        self.store = self._store = store
        self._shared = shared
        self._disk = budgets.get(Tier.DISK, 0)
        self._file_bytes = 0
        self._filed: dict[Payload, Entry[Payload]] = {}
        self._tier = Tier.HOST if store.device.type == "cpu" else Tier.DEVICE
        self._cache: PrefixCache[Payload] = PrefixCache(budgets, store)
        self._sessions = Sessions(self)

    @property
    def figures(self) -> CacheFigures:
        """What the cache counts."""
        return self._cache.figures

    @property
    def evictions(self) -> int:
        """Snapshots given up for want of room, since the start."""
        return self._cache.tiers.evictions

    def usage(self) -> dict[str, tuple[int, int]]:
        """By lower-case name of the tier: snapshots, and their bytes."""
        self._cache.tiers.recover()
        return {tier.name.lower(): self._cache.tiers.usage(tier) for tier in Tier if tier is not Tier.SAVED}

    def held(self) -> dict[str, tuple[int, int]]:
        """By lower-case name of the tier: snapshots of saved states, and their bytes."""
        return {tier.name.lower(): self._cache.tiers.held(tier) for tier in Tier}

    # The scheduler's side.

    def admit(self, seq: Sequence) -> bool:
        """Decide where a waiting sequence begins; False: it should wait for a snapshot that is on its way.

        Afterwards its ``num_launched`` counts the tokens that its snapshot holds.
        """
        if seq.snapshot is not None:
            return True  # it has a state to begin with
        if seq.ticket is None:
            # Who wants to know how likely the prompt is must absorb it.
            reuse = not seq.absorbs_all and (seq.params.prompt_logprobs is None or seq.leads_again)
            scope = self._scope(seq.tenant, seq.island)
            seq.ticket = Ticket(
                scope, seq.packed_prompt, seq.checkpoint_at, reuse, priority=seq.priority, grows=seq.grows
            )
        if not self._cache.admit(seq.ticket):
            return False
        entry = seq.ticket.entry
        if entry is not None:
            seq.snapshot = self._store.take(entry.payload)
            seq.num_launched = seq.ticket.start
            seq.cached_tokens = 0 if seq.leads_again else seq.ticket.start
        return True

    def withdraw(self, seq: Sequence) -> None:
        """An admitted sequence did not get a slot after all."""
        if seq.ticket is not None:
            self._cache.close(seq.ticket)
            seq.ticket = seq.snapshot = None
            seq.num_launched = seq.cached_tokens = 0

    def is_wanted(self, seq: Sequence) -> bool:
        """Whether to take a snapshot where the newest launched piece of a prompt ends."""
        return seq.ticket is not None and self._cache.advance(seq.ticket, seq.num_launched)

    # The engine's side.

    def launched(self, batch: Batch, snapshots: Seq[Snapshot | None]) -> None:
        """Take over the snapshots of a launched batch, in the order of its ``saves``; None where there is none."""
        self._sessions.expire()
        for seq in batch.leased:
            if seq.ticket is not None:
                self._cache.started(seq.ticket)
        for index, snapshot in zip(batch.saves, snapshots, strict=True):
            ticket = batch.prefills[index].seq.ticket
            if ticket is None:
                continue  # the sequence turned out to be broken
            if snapshot is None:
                self._cache.disappoint(ticket)
                continue
            complete = snapshot.logits_V is not None
            self._cache.put(ticket, snapshot, self._tier, snapshot.nbytes, complete=complete)
        for span in (*batch.prefills, *batch.replays):
            if not span.seq.prompt_remaining:
                self.leave(span.seq)

    def leave(self, seq: Sequence) -> None:
        """A sequence's prompt has been absorbed, or will not be."""
        if seq.ticket is not None:
            self._cache.close(seq.ticket)
            seq.ticket = None

    def keep_answer(self, seq: Sequence, snapshot: Snapshot) -> bool:
        """Take the state of a sequence that has ended; whether there was room for it."""
        answer = pack_tokens(seq.outputs[: snapshot.num_tokens - len(seq.prompt)])
        tokens = seq.packed_prompt + answer
        complete = snapshot.logits_V is not None
        scope = self._scope(seq.tenant, seq.island)
        return self._cache.keep(scope, tokens, snapshot, self._tier, snapshot.nbytes, complete=complete)

    def is_parked(self, seq: Sequence) -> bool:
        """Whether there is a snapshot of just a sequence's transcript, with the logits."""
        return self._cache.has(self._scope(seq.tenant, seq.island), seq.transcript)

    @property
    def is_busy(self) -> bool:
        """Whether snapshots are on their way to other tiers, which makes room."""
        return self._store.is_busy

    def note_session(self, seq: Sequence) -> None:
        """A sequence has ended, and what it leaves behind is what its session will go on from."""
        if seq.session is not None and seq.island is None:
            self._sessions.note(seq.tenant, seq.session, seq.transcript)

    @property
    def reads(self) -> "set[Future[None]]":
        """What sequences wait for that begin from a file."""
        return self._store.reads

    def close(self) -> None:
        """Give everything up."""
        self._store.close()

    # The side of saved states, and of sessions.

    def hold(self, state: NamedState) -> Entry[Payload] | None:
        """Keep the snapshot of the longest beginning of a state's tokens until it is released; None: there is none."""
        return self._cache.hold(self._scope(state.tenant, state.island), state.tokens)

    def release(self, entry: Entry[Payload]) -> None:
        """One holder less."""
        self._cache.tiers.release(entry)

    def favour(self, tenant: str, tokens: bytes) -> Entry[Payload] | None:
        """Give the snapshot of the longest beginning of these tokens up after others; None: there is none."""
        return self._cache.favour(self._scope(tenant, None), tokens)

    def unfavour(self, entry: Entry[Payload]) -> None:
        """One session less needs it."""
        self._cache.unfavour(entry)

    def adopt(self, tenant: str, island: str | None, tokens: bytes, snapshot: Snapshot) -> bool:
        """Take in a snapshot on the host that another server has taken of a beginning of these tokens.

        Returns:
            Whether there was room for it.
        """
        scope = self._scope(tenant, island)
        tokens = tokens[: snapshot.num_tokens * TOKEN_BYTES]
        complete = snapshot.logits_V is not None
        return self._cache.keep(scope, tokens, snapshot, Tier.HOST, snapshot.nbytes, complete=complete)

    def file_written(self, state: NamedState) -> Entry[Payload] | None:
        """A state has a file now. Returns the snapshot to be held for it, in place of the one that was held."""
        file, entry = state.file, state.entry
        assert file is not None
        self._count_file(file.nbytes)
        if file.payload is None:
            return entry
        if entry is not None and entry.nbytes and entry.num_tokens == file.num_tokens:
            self._cache.tiers.back(entry, file.payload, complete=file.complete)
        else:
            if entry is not None:
                self._cache.tiers.release(entry)
            entry = self._cache.find_saved(
                self._scope(state.tenant, state.island),
                state.tokens[: file.num_tokens * TOKEN_BYTES],
                file.payload,
                file.snapshot_bytes,
                complete=file.complete,
            )
        self._filed[file.payload] = entry
        return entry

    def file_removed(self, state: NamedState) -> None:
        """A state's file is about to be removed."""
        assert state.file is not None
        self._count_file(-state.file.nbytes)
        if state.file.payload is not None:
            self._cache.tiers.unback(self._filed.pop(state.file.payload), state.file.payload)

    def set_aside(self, nbytes: int) -> None:
        """So many bytes of the disk are taken by files that are not used."""
        self._count_file(nbytes)

    def _count_file(self, nbytes: int) -> None:
        self._file_bytes += nbytes
        self._cache.tiers.resize(Tier.DISK, max(0, self._disk - self._file_bytes))

    def _scope(self, tenant: str, island: str | None) -> str:
        """Who can see each other's snapshots. No tenant's name has the character that begins an island's."""
        if island is not None:
            return f"\0{island}"
        return "" if self._shared else tenant
