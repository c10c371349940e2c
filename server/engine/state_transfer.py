"""Saved states on their way to other servers and from there, as files that the API processes pass on.

Whoever uploads a state says "after these tokens, a model remembers this", and nobody can see whether that is true short
of absorbing the tokens. So what is not signed with this server's key lives on an island: it is continued by its id or
name only, and neither it nor anything that comes of it is ever found by another prompt that begins alike, not even by
one of the same API key.
"""

import logging
import math
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import torch

from server.engine.named_states import NamedState, NamedStates
from server.engine.reuse import PrefixReuse
from server.engine.saved_files import portable_metadata, read_snapshot, read_transcript, transcript_tensor
from server.engine.snapshot import Snapshot, shrink
from server.engine.state_exchange import LONGEST_RING, TRANSCRIPT, RoundingError, adapt
from server.engine.state_file import (
    MAX_HEADER_BYTES,
    Part,
    SignatureError,
    StateFileError,
    UnknownLayoutError,
    check_finite,
    read_header,
    read_state,
    write_state,
)
from server.engine.state_requests import Answer, Later, complete, reserve, unknown
from server.types import ROLES, Refusal, RefusalReason, StateCommand

logger = logging.getLogger(__name__)

_THREADS: Final = 2


class ForeignModelError(StateFileError):
    """A file is a state of another model."""


_CODES: Final[dict[type[StateFileError], str]] = {
    ForeignModelError: "state_of_another_model",
    UnknownLayoutError: "state_layout_unknown",
    SignatureError: "state_signature_invalid",
    RoundingError: "state_needs_conversion",
}
"""What clients are told, beside the message; of all others: state_invalid."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What a file holds that can be used here."""

    tokens: bytes
    snapshot: Snapshot
    turn: str | None


@dataclass(slots=True)
class StateTransfer:
    """Writes the files of downloads and reads those of uploads.

    Args:
        states: where uploads are saved.
        reuse: has the snapshots.
        model: the model's fingerprint.
        vocab_size: token ids are smaller.
        pool: what a snapshot of the state pool looks like.
        parked_dtype: to which parked states are rounded; None: they are not.
        key: to sign with, and with which uploads must be signed; None: neither.
        max_model_len: most tokens of a transcript; None: any number.
    """

    states: NamedStates
    reuse: PrefixReuse
    model: str
    vocab_size: int
    pool: Mapping[str, Part]
    parked_dtype: torch.dtype | None
    key: bytes | None
    max_model_len: int | None
    _threads: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="state-transfer")

    def download(self, command: StateCommand) -> Answer:
        """Write a state's file where the command says."""
        state = self.states.find(command.tenant, command.state)
        if state is None:
            return unknown(command.state)
        if state.num_absorbed < state.num_tokens:
            self.states.renew(state)
        if state.num_absorbed < state.num_tokens:
            return Refusal(
                RefusalReason.NOT_ABSORBED,
                f"the snapshot of {state.id} holds {state.num_absorbed} of {state.num_tokens} tokens, and there is no "
                "room for a better one",
            )
        info, begun = state.info, time.monotonic()
        future = self._threads.submit(self._write, state, Path(command.path))

        def finish() -> Answer:
            try:
                digest = future.result()
            except OSError as error:
                return Refusal(RefusalReason.NOT_WRITTEN, f"the state's file could not be written: {error.strerror}")
            except StateFileError as error:
                if self.states.find(command.tenant, state.id) is None:
                    return unknown(command.state)  # it has just been deleted
                return Refusal(RefusalReason.FAILED, f"the state's snapshot is lost: {error}")
            except Exception:
                logger.exception("a download cannot be written")
                return Refusal(RefusalReason.FAILED, "the state's file could not be made")
            self.states.counts["download"] += 1
            self.states.seconds["download"].observe(time.monotonic() - begun)
            return [msgspec.structs.replace(info, digest=digest)]

        return Later(future, finish)

    def upload(self, command: StateCommand) -> Answer:
        """Save what is in the file that the command names, if it can be trusted and used."""
        if (refusal := reserve(self.states, command.tenant, 1)) is not None:
            return refusal
        begun = time.monotonic()
        future = self._threads.submit(self._read, Path(command.path), exact=not command.convert)

        def finish() -> Answer:
            try:
                uploaded = future.result()
            except StateFileError as error:
                self.states.give_up(command.tenant)
                code = _CODES.get(type(error), "state_invalid")
                return Refusal(RefusalReason.BAD_FILE, f"the file is no state for this server: {error}", code)
            except Exception:
                # Whoever can make a file that nobody has thought of must not be able to end the engine with it.
                logger.exception("an upload cannot be read")
                self.states.give_up(command.tenant)
                return Refusal(RefusalReason.FAILED, "the file cannot be read")
            return self._save(command, uploaded, begun)

        return Later(future, finish)

    def _save(self, command: StateCommand, uploaded: Uploaded, begun: float) -> Answer:
        island = None if self.key is not None else secrets.token_hex(12)
        tokens = uploaded.tokens
        try:
            adopted = self.reuse.adopt(command.tenant, island, tokens, uploaded.snapshot)
            written = None if adopted else self.states.written()
            if written is not None:
                # Once the states that fill the tiers have their files, there is room.
                return Later(written, lambda: self._save(command, uploaded, begun))
            saving = self.states.save(command.tenant, command.name, command.ttl, tokens, uploaded.turn, island)
        except Exception:
            self.states.give_up(command.tenant)
            raise
        return complete(self.states, saving, "upload", begun)

    def close(self) -> None:
        """Return once nothing is under way."""
        self._threads.shutdown(cancel_futures=True)

    def _write(self, state: NamedState, path: Path) -> str:
        snapshot = read_snapshot(self.reuse.store, state)
        if snapshot is None or snapshot.num_tokens < state.num_tokens:
            raise StateFileError("it has just been given up")
        metadata = portable_metadata(state, snapshot, self.model)
        if state.name is not None:
            metadata["name"] = state.name
        tensors = {TRANSCRIPT: transcript_tensor(state), **snapshot.tensors()}
        return write_state(path, tensors, metadata, key=self.key).digest

    def _read(self, path: Path, *, exact: bool) -> Uploaded:
        header = read_header(path)
        model = header.metadata.get("model")
        if model != self.model:
            raise ForeignModelError(f"it belongs to the model {model!r}, and this server has {self.model!r}")
        tokens, (absorbed, folded) = read_transcript(path, header, self.vocab_size)
        if self.max_model_len is not None and len(tokens) // 4 > self.max_model_len:
            raise StateFileError(f"its transcript is longer than {self.max_model_len} tokens (--max-model-len)")
        if not absorbed:
            raise StateFileError("it holds a transcript only")
        if (turn := header.metadata.get("turn")) not in (None, *ROLES):
            raise StateFileError(f"its turn {turn!r} is the role of no message")
        tensors, _ = read_state(path, None, key=self.key)
        del tensors[TRANSCRIPT]
        logits_V = tensors.pop("logits", None)
        snapshot = adapt(Snapshot(tensors, logits_V, absorbed, folded, None), self.pool, exact=exact)
        if self.parked_dtype is not None:
            snapshot = shrink(snapshot, self.parked_dtype)
        # Folding and rounding can make infinities of numbers that are none.
        check_finite(snapshot.tensors())
        return Uploaded(tokens, snapshot, turn)


def largest_file(pool: Mapping[str, Part]) -> int:
    """Most bytes of a state's file without its transcript, of a server with whatever flags."""
    layers, *_, heads, head_k, head_v = pool["recurrent"].shape
    rings = layers * heads * LONGEST_RING * (2 * head_k + head_v)
    recurrent = layers * heads * head_k * (head_v + 1)  # with scales
    others = sum(math.prod(part.shape) for name, part in pool.items() if name in ("conv", "logits"))
    return MAX_HEADER_BYTES + 4 * (recurrent + rings + others)
