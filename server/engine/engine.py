"""The engine: requests in, step outputs out. No I/O; ``server.engine.process`` wraps it.

A step schedules a batch, launches it and retires the step before: while the device computes, the host
turns the previous step's tokens into text and decides what ends. On the CPU nothing runs behind the
host's back, so a step is retired as soon as it is launched.
"""

import logging
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from server.component_settings import EngineConfig
from server.engine.answers import Answers
from server.engine.batch import Batch
from server.engine.config import GenerationConfig, GLAConfig
from server.engine.constraints import Constraint, Constraints, Verdict
from server.engine.identity import system_fingerprint
from server.engine.memory import build_runner
from server.engine.outputs import Outbox
from server.engine.prefix_cache import CacheFigures
from server.engine.requests import Requests, TokenTexts
from server.engine.runner import PendingStep
from server.engine.scheduler import Scheduler
from server.engine.state_keeping import build_keeping
from server.engine.state_pool import SlotAllocator
from server.engine.state_requests import Answer, Told, complaint, context_of, guarded, obey, reserve
from server.engine.state_transfer import largest_file
from server.engine.stats import Figures
from server.tokenizer import load_tokenizer
from server.types import (
    EngineInfo,
    EngineStats,
    Extend,
    FinishReason,
    GenerateRequest,
    Refusal,
    RefusalReason,
    StateAction,
    StateCommand,
    StepOutput,
    unpack_tokens,
)

logger = logging.getLogger(__name__)

_BUSY_WAIT_SECONDS = 0.0005
"""How often to see whether the device is still busy."""
_IDLE_WAIT_SECONDS = 0.005
"""How often to see whether somebody wants something."""
_MAX_FAILED_STEPS = 8
"""So many in a row are the engine's fault, not the requests'."""


class Engine:
    """Continuous batching over one device.

    Args:
        config: what to load and how much of the machine to use.
        overlap: whether a step is launched before the previous one is retired; None: on CUDA.

    Raises:
        CheckpointError: the model or tokenizer cannot be loaded.
        SettingsError: the device is missing, or too small for one sequence.

    Attributes:
        info: what the API processes need to know.
    """

    def __init__(self, config: EngineConfig, *, overlap: bool | None = None) -> None:
        model_config = GLAConfig.from_folder(config.model_folder)
        generation = GenerationConfig.from_folder(config.model_folder)
        tokenizer = None if config.tokenizer_folder is None else load_tokenizer(config.tokenizer_folder)
        eos = set(generation.eos_token_ids) | set(model_config.eos_token_ids)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            eos.add(tokenizer.eos_token_id)
        texts = TokenTexts.of(tokenizer, model_config.vocab_size)
        built = build_runner(config, model_config)
        self._runner = built.runner
        self._overlap = built.device.type == "cuda" if overlap is None else overlap
        self._figures = Figures()
        self._keeping = keeping = build_keeping(config, model_config.vocab_size, built, self._figures)
        self._reuse, self._states = keeping.reuse, keeping.states
        self.scheduler = Scheduler(
            SlotAllocator(built.num_slots),
            max_num_batched_tokens=built.max_num_batched_tokens,
            prompt_limits=built.prompt_limits,
            ring_size=built.ring_size,
            max_num_queued_reqs=config.max_num_queued_reqs,
            max_seqs_per_tenant=config.max_concurrent_seqs_per_key,
            several_tenants=config.several_keys,
            reuse=self._reuse,
            swap=built.runner.swap,
        )
        self.info = EngineInfo(
            vocab_size=model_config.vocab_size,
            eos_token_ids=tuple(sorted(token for token in eos if 0 <= token < model_config.vocab_size)),
            max_model_len=config.max_model_len,
            max_num_seqs=built.num_slots,
            max_num_queued_reqs=config.max_num_queued_reqs,
            max_request_choices=self.scheduler.max_request_choices,
            max_logprobs=config.max_logprobs,
            default_sampling=generation.sampling_defaults if config.generation_config == "auto" else {},
            num_parameters=built.num_parameters,
            state_bytes=built.state_bytes,
            state_file_bytes=largest_file(built.runner.pool_layout),
            dtype=built.dtype,
            state_dtype=config.state_dtype,
            device=built.device_name,
            fingerprint=system_fingerprint(
                config.model_folder, config.load_format, config.seed, built.dtype, config.state_dtype, built.device.type
            ),
        )
        self._constraints = Constraints(tokenizer, model_config.vocab_size, self.info.eos_token_ids)
        ends = frozenset(self.info.eos_token_ids)
        self._requests = Requests(texts, ends, config.max_model_len, config.seed)
        self._outbox = Outbox()
        self._answers = Answers(self._runner, self.scheduler, keeping, self._outbox, self._figures, ends)
        self._pending: PendingStep | None = None
        self._failed_steps = 0

    def submit(self, client: bytes, request: GenerateRequest) -> None:
        """Queue all choices of a request, or refuse it; the next outputs say which.

        Args:
            client: the API process, to which the outputs will be addressed.
            request: validated by the API process.
        """
        reserved = False
        try:
            refusal = self.scheduler.refusal(request.tenant, request.num_choices)
            state = None
            if refusal is None and request.state is not None:
                found = context_of(self._states, request, request.state, self.info.max_model_len)
                state, refusal = (None, found) if isinstance(found, Refusal) else (found, None)
            if refusal is None and request.save_state:
                refusal = reserve(self._states, request.tenant, request.num_choices)
                reserved = refusal is None
            if refusal is not None:
                self._outbox.reject(client, request.request_id, refusal)
                return
            sequences = self._requests.sequences(client, request, state)
            if constraints := [seq.constraint for seq in sequences if seq.constraint is not None]:
                self._constraints.follow([(constraint, None) for constraint in constraints])
        except Exception as error:
            logger.exception("a request cannot be queued")
            if reserved and self._states is not None:
                for _ in range(request.num_choices):
                    self._states.give_up(request.tenant)
            self._outbox.reject(client, request.request_id, Refusal(RefusalReason.FAILED, complaint(error)))
            return
        self._answers.open[client, request.request_id] = sequences
        self.scheduler.add(sequences)
        self._figures.accepted += len(sequences)
        if state is not None and self._states is not None:
            self._states.expect(state, len(sequences))
            self._states.counts["restore"] += 1
        self._outbox.accept(client, request.request_id, 0 if state is None else state.num_tokens)

    def command(self, client: bytes, command: StateCommand) -> None:
        """Do something about saved states; the next outputs tell what came of it."""

        def tell(told: Told) -> None:
            if isinstance(told, Refusal):
                self._outbox.reject(client, command.request_id, told)
            else:
                self._outbox.tell_states(client, command.request_id, told)

        transfer = self._keeping.transfer

        def work() -> Answer:
            if transfer is not None and command.action is StateAction.DOWNLOAD:
                return transfer.download(command)
            if transfer is not None and command.action is StateAction.UPLOAD:
                return transfer.upload(command)
            return obey(self._states, command)

        self._answers.waiting.after(guarded(work), tell)

    def extend(self, client: bytes, message: Extend) -> None:
        """Take more of a prompt."""
        for seq in self._answers.open.get((client, message.request_id), ()):
            self.scheduler.extend(seq, unpack_tokens(message.tokens), last=message.last)

    def cancel(self, client: bytes, request_ids: Iterable[int]) -> None:
        """End the named requests' choices now. Unknown ids are ignored: they may have just ended."""
        for request_id in request_ids:
            for seq in self._answers.open.get((client, request_id), ())[:]:
                self._answers.finish(seq, FinishReason.CANCELLED)
                self._outbox.end(seq)

    def forget_client(self, client: bytes) -> None:
        """Cancel all requests of an API process that is gone, and produce nothing more for it."""
        self.cancel(client, [request_id for owner, request_id in self._answers.open if owner == client])
        self._outbox.drop(client)

    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return self.scheduler.has_work or self._pending is not None or self._answers.has_work

    def step(self) -> None:
        """Launch the next batch and retire a completed one.

        A sequence whose computation raises ends with an error, and so do all of a batch where it cannot be told whose
        fault it was, for their states may have been half updated. The engine goes on, unless the device is ill.

        Raises:
            Exception: the engine cannot go on.
        """
        self._answers.settle()
        resumed = self._resume()
        if resumed is not None and not self._overlap:
            self._retire(resumed)
        parts = self._figures.step_parts
        begun = time.monotonic()
        batch = self.scheduler.schedule(begun)
        launched = failure = None
        if batch is not None:
            scheduled = time.monotonic()
            try:
                launched = self._runner.launch(batch)
            except Exception as error:
                failure = error
            parts["schedule"].observe(scheduled - begun)
            parts["launch"].observe(time.monotonic() - scheduled)
            self._figures.tokens_per_step.observe(batch.num_tokens)
            for seq in batch.leased:
                self._answers.let_context_go(seq)
                if seq.admitted != begun:
                    continue  # it has run before
                self._figures.queue_time.observe(seq.admitted - seq.arrived)
            if launched is not None:
                self._failed_steps = 0
                self._answers.break_off(launched.broken)
                if self._reuse is not None:
                    self._reuse.launched(batch, launched.snapshots)
        idle = resumed is None and batch is None and self._pending is None
        if self._overlap:
            launched, self._pending = self._pending, launched
        if launched is not None:
            self._retire(launched)
        if resumed is not None and self._overlap:
            self._retire(resumed)
        if batch is not None and failure is not None:
            self._abandon(batch, failure)
        if idle:
            reads = set() if self._reuse is None else self._reuse.reads
            awaited = self._missing_masks() | reads | self._answers.waiting.futures
            if awaited:
                wait(awaited, timeout=_IDLE_WAIT_SECONDS, return_when=FIRST_COMPLETED)
            else:
                time.sleep(_IDLE_WAIT_SECONDS)  # those who wait do so for slots of prompts that have yet to come

    def close(self) -> None:
        """Remove what the engine keeps on disk for itself; it can no longer be stepped."""
        self._keeping.close()

    def _resume(self) -> PendingStep | None:
        """Sample the held rows whose masks are known, or will be before the device has nothing to do."""
        while self._pending is not None and not self._pending.done and (missing := self._missing_masks()):
            wait(missing, timeout=_BUSY_WAIT_SECONDS)
        ready = []
        for seq in list(self.scheduler.held):
            assert seq.constraint is not None
            if not seq.constraint.ready:
                continue
            if seq.constraint.verdict is Verdict.OPEN:
                ready.append(seq)
            else:
                complete = seq.constraint.verdict is Verdict.COMPLETE
                self._answers.end(seq, FinishReason.STOP if complete else FinishReason.ABORT)
        if not ready:
            return None
        batch = self.scheduler.resume(ready)
        try:
            return self._runner.resume(batch)
        except Exception as error:
            self._abandon(batch, error)
            return None

    def _missing_masks(self) -> "set[Future[None]]":
        """What the held rows wait for."""
        constraints = [seq.constraint for seq in self.scheduler.held]
        return {one.job.future for one in constraints if one is not None and one.job is not None and not one.ready}

    def take_outputs(self) -> dict[bytes, StepOutput]:
        """Everything to be sent, by API process."""
        return self._outbox.take()

    def stats(self) -> EngineStats:
        """The figures as they stand."""
        figures, copies = self._figures, self._runner.copies
        copies.collect()
        cached = CacheFigures() if self._reuse is None else self._reuse.figures
        parked = {} if self._reuse is None else self._reuse.usage()
        swap = self._runner.swap
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            slots_used=self.scheduler.allocator.num_used,
            slots_total=self.scheduler.allocator.num_slots,
            accepted=figures.accepted,
            prompt_tokens=figures.prompt_tokens,
            generated_tokens=figures.generated_tokens,
            finished=dict(figures.finished),
            time_to_first_token=figures.time_to_first_token.snapshot(),
            time_per_output_token=figures.time_per_output_token.snapshot(),
            end_to_end=figures.end_to_end.snapshot(),
            queue_time=figures.queue_time.snapshot(),
            tokens_per_step=figures.tokens_per_step.snapshot(),
            step_parts={part: histogram.snapshot() for part, histogram in figures.step_parts.items()},
            prefix_hits=cached.hits,
            prefix_misses=cached.misses,
            prefix_tokens_saved=cached.tokens_saved,
            states_evicted=0 if self._reuse is None else self._reuse.evictions,
            swapped=len(self.scheduler.swapped),
            swaps_out=0 if swap is None else swap.num_out,
            swaps_in=0 if swap is None else swap.num_in,
            swapped_bytes=0 if swap is None else swap.num_bytes,
            states_parked={tier: count for tier, (count, _) in parked.items()},
            states_parked_bytes={tier: nbytes for tier, (_, nbytes) in parked.items()},
            state_restore=copies.restores.snapshot(),
            state_save=copies.saves.snapshot(),
            state_read=figures.state_read.snapshot(),
            state_write=figures.state_write.snapshot(),
            saved=self._keeping.stats(),
        )

    def _retire(self, step: PendingStep) -> None:
        begun = time.monotonic()
        tokens = step.fetch()
        if (seconds := step.device_seconds()) is not None:
            self._figures.step_parts["device"].observe(seconds)
        now = time.monotonic()
        self._answers.report_prompts(step)
        followed: list[tuple[Constraint, int | None]] = []
        generated = 0
        for row, (span, token) in enumerate(zip(step.rows, tokens, strict=True)):
            seq = span.seq
            # A sequence that ended meanwhile was still part of the step launched ahead.
            if seq.finish_reason:
                continue
            if span.discards:
                if seq.last_reason:
                    self._answers.end(seq, seq.last_reason)
                continue
            generated += token >= 0
            try:
                self._answers.advance(seq, token, step, row, now)
            except Exception as error:
                self._answers.break_off({seq: error})
            if seq.constraint is not None and not seq.finish_reason and not seq.last_reason:
                followed.append((seq.constraint, token))
        self._figures.generated_tokens += generated
        for span in step.batch.prefills + step.batch.replays:
            self._figures.prompt_tokens += span.length
            if span.seq.streams and not span.seq.finished:
                self._outbox.progress(span.seq, span.start + span.length)
            is_whole = not span.seq.grows and span.start + span.length == len(span.seq.prompt)
            if span.seq.max_tokens == 0 and is_whole:
                # Only the prompt was to be absorbed.
                self._answers.end_group(span.seq, FinishReason.LENGTH)
        self.scheduler.retire(step.batch)
        if followed:
            self._constraints.follow(followed)
        self._figures.step_parts["retire"].observe(time.monotonic() - begun)

    def _abandon(self, batch: Batch, error: Exception) -> None:
        """Give up a batch that could not be launched, or only in part."""
        self._failed_steps += 1
        if self._failed_steps == _MAX_FAILED_STEPS:
            raise error
        waiting = [seq for fork in batch.forks for seq in fork.waiting]
        waiting += [seq for seq, _ in batch.swaps if seq.snapshot is None]
        self._answers.break_off(dict.fromkeys([*(span.seq for span in batch.spans), *waiting], error))
        self.scheduler.retire(batch)
