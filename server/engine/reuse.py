"""Lets sequences begin from snapshots of what others have absorbed, and takes these snapshots.

:mod:`server.engine.prefix_cache` decides, :mod:`server.engine.snapshot_store` holds the bytes; this connects them with
the sequences that the scheduler admits and the runner absorbs.
"""

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future

import torch

from server.engine.batch import Batch
from server.engine.pinned import PinnedPieces
from server.engine.prefix_cache import CacheFigures, Entry, PrefixCache, Ticket, Tier
from server.engine.sequence import Sequence
from server.engine.sessions import Sessions
from server.engine.snapshot import Snapshot
from server.engine.snapshot_store import Payload, SnapshotStore
from server.engine.stats import Figures
from server.settings import StateCacheConfig
from server.types import pack_tokens

logger = logging.getLogger(__name__)


def build_reuse(
    config: StateCacheConfig, budgets: Mapping[Tier, int], parked_bytes: int, device: torch.device, figures: Figures
) -> "PrefixReuse | None":
    """Prefix reuse as the settings want it; None if no tier can hold a state.

    Args:
        config: the settings.
        budgets: bytes of each tier.
        parked_bytes: most bytes of a parked state.
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
    store = SnapshotStore(device, pieces, config.folder, figures.state_read, figures.state_write)
    return PrefixReuse(store, usable, shared=config.shared)


class PrefixReuse:
    """Prefix reuse for the sequences of one engine.

    Args:
        store: holds the snapshots.
        budgets: most bytes in each tier.
        shared: whether every tenant may begin from every other's snapshots.
    """

    def __init__(self, store: SnapshotStore, budgets: Mapping[Tier, int], *, shared: bool) -> None:
        self._store = store
        self._shared = shared
        self._tier = Tier.HOST if store.device.type == "cpu" else Tier.DEVICE
        self._cache: PrefixCache[Payload] = PrefixCache(budgets, store)
        self._sessions = Sessions(self)

    @property
    def figures(self) -> CacheFigures:
        """What the cache counts."""
        return self._cache.figures

    def usage(self) -> dict[str, tuple[int, int]]:
        """By lower-case name of the tier: snapshots, and their bytes."""
        return {tier.name.lower(): self._cache.usage(tier) for tier in Tier}

    # The scheduler's side.

    def admit(self, seq: Sequence) -> bool:
        """Decide where a waiting sequence begins; False: it should wait for a snapshot that is on its way.

        Afterwards its ``num_launched`` counts the tokens that its snapshot holds.
        """
        if seq.snapshot is not None:
            return True  # it has a state to begin with
        if seq.ticket is None:
            # Who wants to know how likely the prompt is must absorb it.
            reuse = seq.params.prompt_logprobs is None or seq.leads_again
            seq.ticket = Ticket(self._scope(seq.tenant), seq.prompt.tobytes(), seq.checkpoint_at, reuse, seq.priority)
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

    def launched(self, batch: Batch, snapshots: Seq[Snapshot]) -> None:
        """Take over the snapshots of a launched batch, in the order of its ``saves``."""
        self._sessions.expire()
        for seq in batch.leased:
            if seq.ticket is not None:
                self._cache.started(seq.ticket)
        for index, snapshot in zip(batch.saves, snapshots, strict=True):
            ticket = batch.prefills[index].seq.ticket
            if ticket is None:
                continue  # the sequence turned out to be broken
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

    def keep_answer(self, seq: Sequence, snapshot: Snapshot) -> None:
        """Take the state of a sequence that has ended."""
        answer = pack_tokens(seq.outputs[: snapshot.num_tokens - len(seq.prompt)])
        tokens = seq.prompt.tobytes() + answer
        complete = snapshot.logits_V is not None
        self._cache.keep(self._scope(seq.tenant), tokens, snapshot, self._tier, snapshot.nbytes, complete=complete)

    def note_session(self, seq: Sequence) -> None:
        """A sequence has ended, and what it leaves behind is what its session will go on from."""
        if seq.session is not None:
            self._sessions.note(seq.tenant, seq.session, seq.transcript)

    @property
    def reads(self) -> "set[Future[None]]":
        """What sequences wait for that begin from a file."""
        return self._store.reads

    def close(self) -> None:
        """Give everything up."""
        self._store.close()

    # The side of saved states, and of sessions.

    def hold(self, tenant: str, tokens: bytes) -> Entry[Payload] | None:
        """Keep the snapshot of the longest beginning of these tokens until it is released; None: there is none."""
        return self._cache.hold(self._scope(tenant), tokens)

    def release(self, entry: Entry[Payload]) -> None:
        """One holder less."""
        self._cache.release(entry)

    def favour(self, tenant: str, tokens: bytes) -> Entry[Payload] | None:
        """Give the snapshot of the longest beginning of these tokens up after others; None: there is none."""
        return self._cache.favour(self._scope(tenant), tokens)

    def unfavour(self, entry: Entry[Payload]) -> None:
        """One session less needs it."""
        self._cache.unfavour(entry)

    def _scope(self, tenant: str) -> str:
        return "" if self._shared else tenant
