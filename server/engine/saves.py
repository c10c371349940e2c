"""Sequences that have ended and whose states are being saved.

A state goes to its file by way of the tiers of parked states, and stays in one until it is written. When a burst of
saves has filled them, a sequence keeps its slot, with the state in it, until there is room again: who saves waits for
the disk, and nobody else does.
"""

import logging
from collections.abc import Callable

from server.engine.named_states import NamedStates
from server.engine.radix import TOKEN_BYTES
from server.engine.reuse import PrefixReuse
from server.engine.sequence import Sequence
from server.engine.state_requests import Told, Waiting, complaint, complete
from server.types import Refusal, RefusalReason

logger = logging.getLogger(__name__)


class Saves:
    """The end of sequences whose states are to be saved.

    Args:
        states: where they are entered.
        reuse: parks the snapshots.
        waiting: answers that wait for files.
        park: copies a sequence's state and parks it; whether there was room.
    """

    def __init__(
        self, states: NamedStates, reuse: PrefixReuse, waiting: Waiting, park: Callable[[Sequence], bool]
    ) -> None:
        self._states = states
        self._reuse = reuse
        self._waiting = waiting
        self._park = park
        self._delayed: dict[Sequence, Callable[[Told], None] | None] = {}
        self._failed: dict[Sequence, Refusal] = {}

    def __len__(self) -> int:
        """Sequences that keep their slots."""
        return len(self._delayed)

    def __contains__(self, seq: Sequence) -> bool:
        return seq.saving is not None or seq in self._delayed or seq in self._failed

    @property
    def is_writing(self) -> bool:
        """Whether files are being written, which makes room."""
        return self._states.is_writing

    @property
    def delayed(self) -> list[Sequence]:
        """Sequences that keep their slots, the longest first."""
        return list(self._delayed)

    def begin(self, seq: Sequence) -> bool:
        """Save the state of a sequence that ends. False: it has to keep its slot until :meth:`settle` returns it."""
        try:
            if self._delayed or not self._is_parked(seq):
                self._delayed[seq] = None
                return False
            self._save(seq)
        except Exception as error:
            self._failed[seq] = self._fail(seq, error)
        return True

    def give_up(self, seq: Sequence) -> None:
        """The state of a sequence that ends will not be saved."""
        self._states.give_up(seq.tenant)

    def after(self, seq: Sequence, then: Callable[[Told], None]) -> None:
        """Tell what has become of a state, once it is saved or cannot be."""
        if seq in self._delayed:
            self._delayed[seq] = then
        elif seq in self._failed:
            then(self._failed.pop(seq))
        else:
            assert seq.saving is not None
            self._waiting.after(complete(self._states, seq.saving, "save"), then)

    def settle(self) -> list[Sequence]:
        """Save what there is room for by now; the sequences that need not keep their slots any longer."""
        free = []
        for seq in self.delayed:
            try:
                if not self._is_parked(seq):
                    break
                self._save(seq)
            except Exception as error:
                self._failed[seq] = self._fail(seq, error)
            then = self._delayed.pop(seq)
            if then is not None:
                self.after(seq, then)
            free.append(seq)
        return free

    def _fail(self, seq: Sequence, error: Exception) -> Refusal:
        """The state of a sequence that ends cannot be saved, which is nobody else's concern."""
        logger.error("a state cannot be saved", exc_info=error)
        self.give_up(seq)
        return Refusal(RefusalReason.FAILED, complaint(error))

    def _is_parked(self, seq: Sequence) -> bool:
        """Whether a sequence's state is parked, or cannot be: what is saved is then the snapshot of a beginning."""
        if seq.num_absorbed * TOKEN_BYTES != len(seq.transcript):
            return True  # a string that stopped it was found after more had been absorbed
        if self._reuse.is_parked(seq):
            return True
        if seq.slot is None and not seq.swapped:
            return True  # it has waited for the state of another one
        # Asked first: if nothing is under way, there has been all the room that there will be. Other answers that wait
        # make none, and may themselves wait for this slot: a deleted state's file stays for those who go on from it.
        is_busy = self._states.is_writing or self._reuse.is_busy
        return self._park(seq) or not is_busy

    def _save(self, seq: Sequence) -> None:
        save = seq.save
        assert save is not None
        seq.saving = self._states.save(seq.tenant, save.name, save.ttl, seq.transcript, save.turn, seq.island)
