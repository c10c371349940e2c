"""What becomes of sequences: the texts of their tokens, why they end, what is kept of them and told of them."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial

from server.engine.outputs import Outbox
from server.engine.runner import PendingStep, Runner
from server.engine.sampler import DEAD_END
from server.engine.saves import Saves
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.snapshot import RestoreError
from server.engine.state_keeping import StateKeeping
from server.engine.state_requests import Told, Waiting, complaint
from server.engine.stats import Figures
from server.types import FinishReason, PromptLogprobs, Refusal

logger = logging.getLogger(__name__)


class Answers:
    """Takes sequences from their first token to their end.

    Args:
        runner: has computed them.
        scheduler: gives their slots back.
        keeping: what keeps their states.
        outbox: for what is to be told.
        figures: where it is counted.
        eos: token ids that end an answer unless its request ignores them.

    Attributes:
        open: the sequences that have not ended, by API process and request.
        waiting: what is to be told once a file is written or removed.
        saves: sequences that have ended and are being saved; None: no states are kept.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        keeping: StateKeeping,
        outbox: Outbox,
        figures: Figures,
        eos: frozenset[int],
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._reuse = keeping.reuse
        self._states = keeping.states
        self._outbox = outbox
        self._figures = figures
        self._eos = eos
        self.open: dict[tuple[bytes, int], list[Sequence]] = {}
        self.waiting = Waiting()
        self.saves: Saves | None = None
        if keeping.states is not None and keeping.reuse is not None:
            self.saves = Saves(keeping.states, keeping.reuse, self.waiting, self._keep_answer)

    @property
    def has_work(self) -> bool:
        """Whether an answer waits, or a state to be saved."""
        return bool(self.waiting or self.saves)

    def settle(self) -> None:
        """Pass on what need not wait any longer, and save what there is room for by now."""
        settled = self.waiting.settle()
        if self.saves and (settled or not self.saves.is_writing):
            for seq in self.saves.settle():
                self._scheduler.let_go(seq)

    def advance(self, seq: Sequence, token: int, step: PendingStep, row: int, now: float) -> None:
        """Append a sampled token to its sequence and decide whether the sequence ends with it."""
        if token < 0:
            if token == DEAD_END:
                self.end(seq, FinishReason.ABORT)
            else:
                self.finish(seq, FinishReason.ERROR)
                self._outbox.end(seq, error="no token can be chosen here: the model's logits are not finite")
            return
        outputs = seq.outputs
        outputs.append(token)
        if len(outputs) == 1:
            seq.first_token = now
            self._figures.time_to_first_token.observe(now - seq.arrived)
        elif (
            seq.matcher is None
            and len(outputs) != seq.max_tokens
            and token not in seq.stop_ids
            and seq.params.logprobs is None
        ):
            # Nearly every token: there is nothing to find out about it, and nothing to tell beside it.
            self._outbox.plain_token(seq, token, b"" if seq.table is None else seq.table[token])
            return
        text, reason, stop_reason = self._judge(seq, token)
        logprobs = None if seq.params.logprobs is None else step.fetch_logprobs(row)
        # Last: what raises before it leaves a sequence that can still end with an error.
        if reason is not FinishReason.RUNNING:
            self.finish(seq, reason, now)
        self._report(seq, lambda: self._outbox.token(seq, token, text, logprobs=logprobs, stop_reason=stop_reason))

    def _judge(self, seq: Sequence, token: int) -> tuple[bytes, FinishReason, int | str | None]:
        """The new token's text, whether it ends the sequence, and which stop string or id did."""
        matcher, params, table = seq.matcher, seq.params, seq.table
        text = b"" if table is None else table[token]
        if token in seq.stop_ids:
            held = b"" if matcher is None else matcher.flush()
            text = held + text if params.include_stop_str_in_output else held
            return text, FinishReason.STOP, None if token in self._eos and not params.ignore_eos else token
        if matcher is not None and len(seq.outputs) > seq.params.min_tokens:
            text, found = matcher.feed(text)
            if found is not None:
                assert table is not None
                seq.num_dropped = _num_tokens_of(matcher.num_dropped, seq.outputs, table)
                return text, FinishReason.STOP, found
        if len(seq.outputs) == seq.max_tokens:
            complete = seq.constraint is not None and seq.constraint.ends_with(token)
            reason = FinishReason.STOP if complete else FinishReason.LENGTH
            if seq.save is not None:
                # Not before its last token has been absorbed.
                seq.last_reason, reason = reason, FinishReason.RUNNING
            return text if matcher is None else text + matcher.flush(), reason, None
        return text, FinishReason.RUNNING, None

    def end(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence without another token."""
        self.finish(seq, reason)
        text = b"" if seq.matcher is None else seq.matcher.flush()
        self._report(seq, lambda: self._outbox.end(seq, text))

    def end_group(self, leader: Sequence, reason: FinishReason, *, error: str | None = None) -> None:
        """End a sequence without a token, and those that wait for the end of its prompt."""
        for seq in (leader, *leader.followers):
            if not seq.finished:
                self.finish(seq, reason)
                self._report(seq, partial(self._outbox.end, seq, error=error))

    def break_off(self, broken: Mapping[Sequence, Exception]) -> None:
        """End sequences that exceptions have struck, and those that wait for the end of their prompts.

        Those whose parked states could not be restored begin again instead, without them.

        Raises:
            Exception: the device is ill.
        """
        unrestored = [seq for seq, error in broken.items() if isinstance(error, RestoreError)]
        # Each comes before its equals: the first of them last.
        for seq in reversed(unrestored):
            logger.warning("a prompt of %d tokens is absorbed whole: %s", len(seq.prompt), broken[seq])
            self._begin_again(seq)
        broken = {seq: error for seq, error in broken.items() if not isinstance(error, RestoreError)}
        for error in set(broken.values()):
            self._runner.check_device(error)
            count = sum(cause is error for cause in broken.values())
            logger.error("%d choices end with an error", count, exc_info=error)
        for seq, error in broken.items():
            self.end_group(seq, FinishReason.ERROR, error=complaint(error))

    def _begin_again(self, seq: Sequence) -> None:
        again = self._scheduler.begin_again(seq)
        if self._reuse is not None:
            self._reuse.leave(seq)
        choices = self.open[seq.client, seq.request_id]
        choices[choices.index(seq)] = again

    def report_prompts(self, step: PendingStep) -> None:
        """Tell the log-probabilities of prompts that a step has found."""
        try:
            for span, logprobs in step.fetch_prompt_logprobs():
                self._report_prompt(span.seq, logprobs)
        except Exception as error:
            sequences = (span.seq for span in step.batch.prefills)
            self.break_off({seq: error for seq in sequences if seq.params.prompt_logprobs is not None})

    def _report_prompt(self, seq: Sequence, logprobs: PromptLogprobs | None) -> None:
        if seq.finished:
            return
        if logprobs is None:
            error = "the prompt has no log-probabilities: the model's logits are not finite"
            self.end_group(seq, FinishReason.ERROR, error=error)
        else:
            self._outbox.prompt_logprobs(seq, logprobs)

    def _report(self, seq: Sequence, report: Callable[[], None]) -> None:
        """Tell what has become of a sequence, once its state is saved if it is to be."""
        if self.saves is None or seq not in self.saves:
            report()
            return

        def acknowledge(told: Told) -> None:
            if isinstance(told, Refusal):
                seq.finish_reason = FinishReason.ERROR
                self._outbox.end(seq, unsaved=told.message)
            else:
                (seq.saved,) = told
                report()

        self.saves.after(seq, acknowledge)

    def let_context_go(self, seq: Sequence) -> None:
        """A sequence has begun, or never will: it does not need the saved state any more that it goes on from."""
        if seq.context is not None and self._states is not None:
            self._states.begun(seq.context)
            seq.context = None

    def _keep_answer(self, seq: Sequence) -> bool:
        """Park the state at an answer's end, which does not depend on it; whether there was room."""
        assert self._reuse is not None
        try:
            return self._reuse.keep_answer(seq, self._runner.snapshot(seq))
        except Exception as error:
            self._runner.check_device(error)
            logger.warning("the state of an answer is not kept", exc_info=error)
            return False

    def _note_session(self, seq: Sequence) -> None:
        """Tell a sequence's session of its end, which does not depend on it."""
        assert self._reuse is not None
        try:
            self._reuse.note_session(seq)
        except Exception as error:
            logger.warning("a session does not know of its newest answer", exc_info=error)

    def finish(self, seq: Sequence, reason: FinishReason, now: float | None = None) -> None:
        """Take a sequence out of everything, and begin to save its state if it is to be; nothing is told of it yet.

        Args:
            seq: has not ended.
            reason: why it does.
            now: ``time.monotonic()``, if it is known.
        """
        now = time.monotonic() if now is None else now
        self.let_context_go(seq)
        if self._reuse is not None:
            self._reuse.leave(seq)
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                # With fewer tokens, it is the state at the prompt's end, which has left it unless its end was unknown.
                if seq.num_absorbed > len(seq.prompt) or seq.streams:
                    self._keep_answer(seq)
                self._note_session(seq)
        keeps = False
        if seq.save is not None and self.saves is not None:
            if reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT):
                keeps = not self.saves.begin(seq)
            else:
                self.saves.give_up(seq)
        self._scheduler.finish(seq, reason, keeps=keeps)
        self._figures.finished[reason.name.lower()] += 1
        self._figures.end_to_end.observe(now - seq.arrived)
        if len(seq.outputs) > 1:
            self._figures.time_per_output_token.observe((now - seq.first_token) / (len(seq.outputs) - 1))
        choices = self.open[seq.client, seq.request_id]
        choices.remove(seq)
        if not choices:
            del self.open[seq.client, seq.request_id]


def _num_tokens_of(num_bytes: int, outputs: list[int], table: list[bytes]) -> int:
    """How many of the last tokens hold any of the last bytes."""
    count = 0
    while num_bytes > 0:
        count += 1
        num_bytes -= len(table[outputs[-count]])
    return count
