"""The engine: requests in, step outputs out. No I/O; ``server.engine.process`` wraps it.

A step schedules a batch, launches it and retires the step before: while the device computes, the host
turns the previous step's tokens into text and decides what ends. On the CPU nothing runs behind the
host's back, so a step is retired as soon as it is launched.
"""

import logging
import random
import time
from array import array
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial

from server.engine.batch import Batch
from server.engine.config import GenerationConfig, GLAConfig
from server.engine.constraints import Constraint, Constraints, Verdict
from server.engine.detokenizer import StopMatcher
from server.engine.identity import model_fingerprint, system_fingerprint
from server.engine.memory import build_runner
from server.engine.named_states import NamedState, NamedStates
from server.engine.outputs import Outbox
from server.engine.prefix_cache import CacheFigures
from server.engine.radix import TOKEN_BYTES
from server.engine.reuse import build_reuse, state_limits
from server.engine.runner import PendingStep
from server.engine.sampler import DEAD_END
from server.engine.saved_files import SavedFiles
from server.engine.saves import Saves
from server.engine.scheduler import Scheduler
from server.engine.sequence import Save, Sequence
from server.engine.state_pool import SlotAllocator
from server.engine.state_requests import Told, Waiting, context_of, obey, reserve
from server.engine.state_transfer import StateTransfer, largest_file
from server.engine.stats import Figures
from server.kernels import STATE_DTYPES
from server.settings import EngineConfig
from server.tokenizer import load_tokenizer
from server.types import (
    EngineInfo,
    EngineStats,
    Extend,
    FinishReason,
    GenerateRequest,
    PromptLogprobs,
    Refusal,
    RefusalReason,
    SavedStats,
    StateAction,
    StateCommand,
    StepOutput,
    unpack_tokens,
)

logger = logging.getLogger(__name__)

_SEED_BITS = 63
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
        tokenizer = None
        self._token_bytes: list[bytes] | None = None
        self._token_bytes_with_special: list[bytes] | None = None
        eos = set(generation.eos_token_ids) | set(model_config.eos_token_ids)
        if config.tokenizer_folder is not None:
            tokenizer = load_tokenizer(config.tokenizer_folder)
            # A model's vocabulary may be padded beyond the tokenizer's: such a token has no text.
            missing = model_config.vocab_size - tokenizer.vocab_size
            self._token_bytes = tokenizer.token_bytes() + [b""] * missing
            self._token_bytes_with_special = tokenizer.token_bytes(special=True) + [b""] * missing
            if tokenizer.eos_token_id is not None:
                eos.add(tokenizer.eos_token_id)
        built = build_runner(config, model_config)
        self._runner = built.runner
        self._overlap = built.device.type == "cuda" if overlap is None else overlap
        self._figures = Figures()
        self._reuse = None
        if any(built.cache_bytes.values()):
            self._reuse = build_reuse(
                config.state_cache,
                built.cache_bytes,
                built.runner.parked_bytes,
                built.runner.pool_layout,
                built.device,
                self._figures,
            )
        self._files: SavedFiles | None = None
        self._states: NamedStates | None = None
        self._transfer: StateTransfer | None = None
        self._waiting = Waiting()
        self._saves: Saves | None = None
        if self._reuse is not None:
            model = model_fingerprint(config.model_folder, config.load_format, config.seed)
            if config.state_cache.folder is not None:
                self._files = SavedFiles(config.state_cache.folder, self._reuse.store, model, model_config.vocab_size)
            limits = state_limits(config.state_cache, built.cache_bytes, built.runner.parked_bytes)
            self._states = NamedStates(self._reuse, limits, self._files)
            self._saves = Saves(self._states, self._reuse, self._waiting, self._keep_answer)
            self._transfer = StateTransfer(
                self._states,
                self._reuse,
                model,
                model_config.vocab_size,
                built.runner.pool_layout,
                STATE_DTYPES.get(config.state_cache.dtype),
                config.state_cache.signing_key,
                config.max_model_len,
            )
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
        self._eos = frozenset(self.info.eos_token_ids)
        self._constraints = Constraints(tokenizer, model_config.vocab_size, self.info.eos_token_ids)
        self._seeds = random.Random(config.seed)
        self._requests: dict[tuple[bytes, int], list[Sequence]] = {}
        self._outbox = Outbox()
        self._pending: PendingStep | None = None
        self._failed_steps = 0

    def submit(self, client: bytes, request: GenerateRequest) -> None:
        """Queue all choices of a request, or refuse it; the next outputs say which.

        Args:
            client: the API process, to which the outputs will be addressed.
            request: validated by the API process.
        """
        refusal = self.scheduler.refusal(request.tenant, request.num_choices)
        state = None
        if refusal is None and request.state is not None:
            found = context_of(self._states, request, request.state, self.info.max_model_len)
            state, refusal = (None, found) if isinstance(found, Refusal) else (found, None)
        if refusal is None and request.save_state:
            refusal = reserve(self._states, request.tenant, request.num_choices)
        if refusal is not None:
            self._outbox.reject(client, request.request_id, refusal)
            return
        try:
            sequences = self._sequences(client, request, state)
        except Exception as error:
            logger.exception("a request cannot be queued")
            if request.save_state and self._states is not None:
                for _ in range(request.num_choices):
                    self._states.give_up(request.tenant)
            self._outbox.reject(client, request.request_id, Refusal(RefusalReason.FAILED, _complaint(error)))
            return
        self._requests[client, request.request_id] = sequences
        self.scheduler.add(sequences)
        self._figures.accepted += len(sequences)
        if state is not None and self._states is not None:
            self._states.counts["restore"] += 1
        self._outbox.accept(client, request.request_id, 0 if state is None else state.num_tokens)

    def command(self, client: bytes, command: StateCommand) -> None:
        """Do something about saved states; the next outputs tell what came of it."""

        def tell(told: Told) -> None:
            if isinstance(told, Refusal):
                self._outbox.reject(client, command.request_id, told)
            else:
                self._outbox.tell_states(client, command.request_id, told)

        transfer = self._transfer
        if transfer is not None and command.action is StateAction.DOWNLOAD:
            answer = transfer.download(command)
        elif transfer is not None and command.action is StateAction.UPLOAD:
            answer = transfer.upload(command)
        else:
            answer = obey(self._states, command)
        self._waiting.after(answer, tell)

    def _sequences(self, client: bytes, request: GenerateRequest, state: NamedState | None) -> list[Sequence]:
        context = b"" if state is None else state.tokens
        # One array per prompt, however many choices share it: nothing writes to it.
        prompts = [unpack_tokens(context + prompt) for prompt in request.prompts]
        sequences = [
            self._sequence(client, request, choice, prompts[choice // request.n])
            for choice in range(request.num_choices)
        ]
        if state is not None:
            for seq in sequences:
                seq.island = state.island
        for index in range(0, len(sequences), request.n):
            leader, *followers = sequences[index : index + request.n]
            leader.followers = followers
            for seq in followers:
                seq.leader = leader
        if constraints := [seq.constraint for seq in sequences if seq.constraint is not None]:
            self._constraints.follow([(constraint, None) for constraint in constraints])
        return sequences

    def _sequence(self, client: bytes, request: GenerateRequest, choice: int, prompt: "array[int]") -> Sequence:
        params = request.params
        max_tokens = params.max_tokens
        context = len(prompt) - len(request.prompts[choice // request.n]) // TOKEN_BYTES
        if self.info.max_model_len is not None:
            room = self.info.max_model_len - len(prompt)
            max_tokens = room if max_tokens is None else min(max_tokens, room)
        if params.seed is None:
            seed = self._seeds.getrandbits(_SEED_BITS)
        else:
            seed = random.Random(f"{params.seed}/{choice % request.n}").getrandbits(_SEED_BITS)
        phrases = [phrase for phrase in params.bad_words if len(phrase) > 1]
        return Sequence(
            client=client,
            request_id=request.request_id,
            choice=choice,
            prompt=prompt,
            params=params,
            seed=seed,
            table=self._token_bytes if params.skip_special_tokens else self._token_bytes_with_special,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos),
            max_tokens=max_tokens,
            matcher=StopMatcher(params.stop, include=params.include_stop_str_in_output) if params.stop else None,
            constraint=Constraint(params.grammar, phrases) if params.grammar is not None or phrases else None,
            arrived=request.arrived,
            priority=request.priority,
            checkpoint_at=tuple(context + position for position in request.checkpoint_at),
            tenant=request.tenant,
            session=request.session,
            streams=request.more,
            grows=request.more,
            save=Save(request.state_name, request.state_ttl, request.state_turn) if request.save_state else None,
        )

    def extend(self, client: bytes, message: Extend) -> None:
        """Take more of a prompt."""
        for seq in self._requests.get((client, message.request_id), ()):
            self.scheduler.extend(seq, unpack_tokens(message.tokens), last=message.last)

    def cancel(self, client: bytes, request_ids: Iterable[int]) -> None:
        """End the named requests' choices now. Unknown ids are ignored: they may have just ended."""
        for request_id in request_ids:
            for seq in self._requests.get((client, request_id), ())[:]:
                self._finish(seq, FinishReason.CANCELLED)
                self._outbox.end(seq)

    def forget_client(self, client: bytes) -> None:
        """Cancel all requests of an API process that is gone, and produce nothing more for it."""
        self.cancel(client, [request_id for owner, request_id in self._requests if owner == client])
        self._outbox.drop(client)

    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return self.scheduler.has_work or self._pending is not None or bool(self._waiting or self._saves)

    def step(self) -> None:
        """Launch the next batch and retire a completed one.

        A sequence whose computation raises ends with an error, and so do all of a batch where it cannot be told whose
        fault it was, for their states may have been half updated. The engine goes on, unless the device is ill.

        Raises:
            Exception: the engine cannot go on.
        """
        self._settle()
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
                if seq.admitted != begun:
                    continue  # it has run before
                self._figures.queue_time.observe(seq.admitted - seq.arrived)
            if launched is not None:
                self._failed_steps = 0
                self._break(launched.broken)
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
            awaited = self._missing_masks() | reads | self._waiting.futures
            if awaited:
                wait(awaited, timeout=_IDLE_WAIT_SECONDS, return_when=FIRST_COMPLETED)
            else:
                time.sleep(_IDLE_WAIT_SECONDS)  # those who wait do so for slots of prompts that have yet to come

    def _settle(self) -> None:
        """Pass on what need not wait for files any longer, and save what there is room for by now."""
        settled = self._waiting.settle()
        if self._saves and (settled or not self._waiting):
            for seq in self._saves.settle():
                self.scheduler.let_go(seq)

    def close(self) -> None:
        """Remove what the engine keeps on disk for itself; it can no longer be stepped."""
        if self._transfer is not None:
            self._transfer.close()
        if self._files is not None:
            self._files.close()
        if self._reuse is not None:
            self._reuse.close()

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
                self._end(seq, FinishReason.STOP if complete else FinishReason.ABORT)
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
            states_evicted=cached.evictions,
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
            saved=self._saved_stats(),
        )

    def _saved_stats(self) -> SavedStats:
        if self._states is None or self._reuse is None:
            return SavedStats()
        return self._states.stats(self._reuse.held(), {} if self._files is None else self._files.skipped)

    def _retire(self, step: PendingStep) -> None:
        begun = time.monotonic()
        tokens = step.fetch()
        if (seconds := step.device_seconds()) is not None:
            self._figures.step_parts["device"].observe(seconds)
        now = time.monotonic()
        self._report_prompts(step)
        followed: list[tuple[Constraint, int | None]] = []
        generated = 0
        for row, (span, token) in enumerate(zip(step.rows, tokens, strict=True)):
            seq = span.seq
            # A sequence that ended meanwhile was still part of the step launched ahead.
            if seq.finish_reason:
                continue
            if span.discards:
                if seq.last_reason:
                    self._end(seq, seq.last_reason)
                continue
            generated += token >= 0
            try:
                self._advance(seq, token, step, row, now)
            except Exception as error:
                self._break({seq: error})
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
                self._end_group(span.seq, FinishReason.LENGTH)
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
        self._break(dict.fromkeys([*(span.seq for span in batch.spans), *waiting], error))
        self.scheduler.retire(batch)

    def _break(self, broken: Mapping[Sequence, Exception]) -> None:
        """End sequences that exceptions have struck, and those that wait for the end of their prompts.

        Raises:
            Exception: the device is ill.
        """
        for error in set(broken.values()):
            self._runner.check_device(error)
            count = sum(cause is error for cause in broken.values())
            logger.error("%d choices end with an error", count, exc_info=error)
        for seq, error in broken.items():
            self._end_group(seq, FinishReason.ERROR, error=_complaint(error))

    def _report_prompts(self, step: PendingStep) -> None:
        try:
            for span, logprobs in step.fetch_prompt_logprobs():
                self._report_prompt(span.seq, logprobs)
        except Exception as error:
            sequences = (span.seq for span in step.batch.prefills)
            self._break({seq: error for seq in sequences if seq.params.prompt_logprobs is not None})

    def _report_prompt(self, seq: Sequence, logprobs: PromptLogprobs | None) -> None:
        if seq.finished:
            return
        if logprobs is None:
            error = "the prompt has no log-probabilities: the model's logits are not finite"
            self._end_group(seq, FinishReason.ERROR, error=error)
        else:
            self._outbox.prompt_logprobs(seq, logprobs)

    def _end_group(self, leader: Sequence, reason: FinishReason, *, error: str | None = None) -> None:
        """End a sequence without a token, and those that wait for the end of its prompt."""
        for seq in (leader, *leader.followers):
            if not seq.finished:
                self._finish(seq, reason)
                self._report(seq, partial(self._outbox.end, seq, error=error))

    def _advance(self, seq: Sequence, token: int, step: PendingStep, row: int, now: float) -> None:
        """Append a sampled token to its sequence and decide whether the sequence ends with it."""
        if token < 0:
            if token == DEAD_END:
                self._end(seq, FinishReason.ABORT)
            else:
                self._finish(seq, FinishReason.ERROR)
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
            self._finish(seq, reason, now)
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

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence without another token."""
        self._finish(seq, reason)
        text = b"" if seq.matcher is None else seq.matcher.flush()
        self._report(seq, lambda: self._outbox.end(seq, text))

    def _report(self, seq: Sequence, report: Callable[[], None]) -> None:
        """Tell what has become of a sequence, once its state is saved if it is to be."""
        if self._saves is None or seq not in self._saves:
            report()
            return

        def acknowledge(told: Told) -> None:
            if isinstance(told, Refusal):
                seq.finish_reason = FinishReason.ERROR
                self._outbox.end(seq, unsaved=told.message)
            else:
                (seq.saved,) = told
                report()

        self._saves.after(seq, acknowledge)

    def _keep_answer(self, seq: Sequence) -> bool:
        """Park the state at an answer's end, which does not depend on it; whether there was room."""
        assert self._reuse is not None
        try:
            snapshot = self._runner.snapshot(seq)
        except Exception as error:
            self._runner.check_device(error)
            logger.warning("the state of an answer is not kept", exc_info=error)
            return False
        return self._reuse.keep_answer(seq, snapshot)

    def _finish(self, seq: Sequence, reason: FinishReason, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        if self._reuse is not None:
            self._reuse.leave(seq)
            is_answered = reason in (FinishReason.STOP, FinishReason.LENGTH)
            # With fewer tokens, the state is the one at the prompt's end, which has left it unless its end was unknown.
            if is_answered and (seq.num_absorbed > len(seq.prompt) or seq.streams):
                self._keep_answer(seq)
            if is_answered:
                self._reuse.note_session(seq)
        keeps = False
        if seq.save is not None and self._saves is not None:
            if reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT):
                keeps = not self._saves.begin(seq)
            else:
                self._saves.give_up(seq)
        self.scheduler.finish(seq, reason, keeps=keeps)
        self._figures.finished[reason.name.lower()] += 1
        self._figures.end_to_end.observe(now - seq.arrived)
        if len(seq.outputs) > 1:
            self._figures.time_per_output_token.observe((now - seq.first_token) / (len(seq.outputs) - 1))
        choices = self._requests[seq.client, seq.request_id]
        choices.remove(seq)
        if not choices:
            del self._requests[seq.client, seq.request_id]


def _num_tokens_of(num_bytes: int, outputs: list[int], table: list[bytes]) -> int:
    """How many of the last tokens hold any of the last bytes."""
    count = 0
    while num_bytes > 0:
        count += 1
        num_bytes -= len(table[outputs[-count]])
    return count


def _complaint(error: Exception) -> str:
    return f"the engine failed at this request ({type(error).__name__})"
