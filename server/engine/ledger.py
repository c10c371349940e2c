"""What saved states take, of each tenant and in all. Torch-free."""

from collections import Counter
from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.engine.named_states import NamedState


class Ledger:
    """How many states there are and what they take, of each tenant and in all (None).

    What several states share counts once for each tenant, and once in all.

    Attributes:
        count, nbytes: states, and bytes of their files or else of their snapshots, by tenant.
        transcript_bytes: of all transcripts.
    """

    def __init__(self) -> None:
        self.count: Counter[str | None] = Counter()
        self.nbytes: Counter[str | None] = Counter()
        self.transcript_bytes = 0
        self._transcripts: Counter[int] = Counter()
        self._charges: dict[str, list[Hashable]] = {}
        self._sharers: Counter[tuple[str | None, Hashable]] = Counter()
        # What each was counted with: a shared snapshot may have been replaced by a larger one meanwhile.
        self._counted: dict[tuple[str | None, Hashable], int] = {}

    def add(self, state: "NamedState") -> None:
        """Enter a state with what it takes now."""
        if state.file is not None:
            charges: list[tuple[Hashable, int]] = [(state.id, state.file.nbytes)]
        else:
            charges = [] if state.entry is None else [(state.entry, state.entry.nbytes)]
        # Forks have one transcript.
        self._transcripts[id(state.tokens)] += 1
        if self._transcripts[id(state.tokens)] == 1:
            self.transcript_bytes += len(state.tokens)
        self._charges[state.id] = [what for what, _ in charges]
        for owner in (None, state.tenant):
            self.count[owner] += 1
            for what, nbytes in charges:
                self._sharers[owner, what] += 1
                if self._sharers[owner, what] == 1:
                    self._counted[owner, what] = nbytes
                    self.nbytes[owner] += nbytes

    def remove(self, state: "NamedState") -> None:
        """Take a state out, with what it was counted with when it was entered."""
        self._transcripts[id(state.tokens)] -= 1
        if not self._transcripts[id(state.tokens)]:
            del self._transcripts[id(state.tokens)]
            self.transcript_bytes -= len(state.tokens)
        charges = self._charges.pop(state.id)
        for owner in (None, state.tenant):
            self.count[owner] -= 1
            for what in charges:
                self._sharers[owner, what] -= 1
                if not self._sharers[owner, what]:
                    del self._sharers[owner, what]
                    self.nbytes[owner] -= self._counted.pop((owner, what))
