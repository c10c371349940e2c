"""Sampling on the device, every row with its own parameters.

All that a sequence's sampling needs lies in tables indexed by slot, written when the slot is leased,
so a step uploads only which slots it samples. Nothing here waits for the device on CUDA.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.constraints import allowed_RV
from server.engine.sequence import Sequence
from server.engine.state_pool import NULL_SLOT
from server.kernels import pick_greedy

BROKEN = -1
"""In place of a token: the logits are not finite."""
DEAD_END = -2
"""In place of a token: what the request allows leaves none."""

_IN_PROMPT = 1
_IS_STOP = 2
_BLOCK = 128
_ATTEMPT_SHIFT = 40
"""Random numbers of a position's further attempts come from positions that no sequence reaches."""


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """What a step's sampling has to do, known on the host, so that nothing unneeded is launched.

    Rows come in the order greedy, plain (temperature only), filtered (top_k, top_p or min_p), held.
    """

    num_greedy: int
    num_plain: int
    num_filtered: int
    penalties: bool
    bias: bool
    min_tokens: bool
    num_logprobs: int | None
    """Alternatives to report, the most any row wants; None: no row wants log-probabilities."""
    num_held: int = 0
    """Rows not to sample yet: their logits are kept until the masks of their constraints are known."""

    @property
    def num_sampled(self) -> int:
        """Rows to sample."""
        return self.num_greedy + self.num_plain + self.num_filtered


@dataclass(frozen=True, slots=True)
class Sampled:
    """A step's samples, on the device.

    Attributes:
        tokens_R: int64 [R], of the rows that are not held; BROKEN or DEAD_END where nothing can be chosen.
        logprobs_R: float32 [R] or None, of the sampled tokens.
        top_ids_RK, top_logprobs_RK: int64 and float32 [R, K] or None.
    """

    tokens_R: Tensor
    logprobs_R: Tensor | None
    top_ids_RK: Tensor | None
    top_logprobs_RK: Tensor | None


def is_greedy(seq: Sequence) -> bool:
    """Whether the sequence always takes the most likely token."""
    return seq.params.temperature < 1e-5 or seq.params.top_k == 1


def is_filtered(seq: Sequence) -> bool:
    """Whether the sequence's sampling leaves tokens out, so that it needs them in order."""
    params = seq.params
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def has_bias(seq: Sequence) -> bool:
    """Whether something is added to the sequence's logits, or taken out of them, at every position alike."""
    params = seq.params
    return bool(params.logit_bias or params.bad_words) or params.allowed_token_ids is not None


def has_penalties(seq: Sequence) -> bool:
    """Whether the sequence's logits depend on the tokens so far."""
    params = seq.params
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


class Sampler:
    """Turns logits into tokens, and remembers by slot what the next step needs of them.

    Args:
        num_slots: rows of every table, the null slot included.
        vocab_size: V.

    Attributes:
        last_token_S: int64 [slots], the newest sampled token: the next decode's input.
        done_S: bool [slots], set with a stop token: such a slot's rows in a step launched ahead are
            pointed at the null slot, so the state never absorbs a token past the stop.
    """

    def __init__(self, num_slots: int, vocab_size: int, *, device: torch.device) -> None:
        self._device = device
        self.vocab_size = vocab_size
        self.last_token_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.done_S = torch.zeros(num_slots, dtype=torch.bool, device=device)
        # temperature, top_p, min_p, presence, frequency, repetition
        self._floats_SP = torch.ones((num_slots, 6), dtype=torch.float32, device=device)
        # seed, top_k, min_tokens
        self._ints_SP = torch.zeros((num_slots, 3), dtype=torch.int64, device=device)
        self._flags_SV = torch.zeros((num_slots, vocab_size), dtype=torch.uint8, device=device)
        self._counts_SV = torch.zeros((num_slots, vocab_size), dtype=torch.int32, device=device)
        self._bias_SV = torch.zeros((num_slots, vocab_size), dtype=torch.float32, device=device)
        self._held_SV = torch.zeros((num_slots, vocab_size), dtype=torch.float32, device=device)

    @staticmethod
    def bytes_per_slot(vocab_size: int) -> int:
        """Memory of one slot's rows in all tables."""
        return vocab_size * (1 + 4 + 4 + 4) + 8 + 1 + 6 * 4 + 3 * 8

    def lease(self, sequences: SequenceOf[Sequence]) -> None:
        """Write the tables' rows of newly leased sequences; what the last tenant left is overwritten."""
        slots = [seq.slot for seq in sequences]
        slots_L = self._upload(slots)
        params = [seq.params for seq in sequences]
        # Assigning a Python number to tensor[indices] would copy it to the device and wait for the copy.
        self.done_S.index_fill_(0, slots_L, False)
        self._floats_SP[slots_L] = self._upload(
            [
                (p.temperature, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty, p.repetition_penalty)
                for p in params
            ],
            torch.float32,
        )
        self._ints_SP[slots_L] = self._upload(
            [(seq.seed, seq.params.top_k, seq.params.min_tokens) for seq in sequences]
        )
        self._flags_SV.index_fill_(0, slots_L, 0)
        # A row without a bias may share a step with one that has: what the last tenant left would count.
        self._bias_SV.index_fill_(0, slots_L, 0.0)
        stops = [(seq.slot, token) for seq in sequences for token in seq.stop_ids]
        if stops:
            rows, tokens = self._upload(stops).unbind(1)
            self._flags_SV[rows, tokens] = torch.full_like(rows, _IS_STOP, dtype=torch.uint8)
        if begun := [seq for seq in sequences if seq.outputs]:
            # They have run in other slots.
            slots_B = self._upload([seq.slot for seq in begun])
            self.last_token_S[slots_B] = self._upload([seq.outputs[-1] for seq in begun])
        for seq in sequences:
            if has_penalties(seq):
                self._counts_SV[seq.slot] = 0
                if seq.outputs:
                    outputs = self._upload(seq.outputs)
                    self._counts_SV[seq.slot].index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))
                if seq.params.repetition_penalty != 1.0:
                    self._mark_prompt(seq)
            if has_bias(seq):
                self._write_bias(seq)

    def _write_bias(self, seq: Sequence) -> None:
        row, params = self._bias_SV[seq.slot], seq.params
        if params.allowed_token_ids is not None:
            row.fill_(-torch.inf)
            row.index_fill_(0, self._upload(list(params.allowed_token_ids)), 0.0)
        if params.logit_bias:
            tokens = self._upload(list(params.logit_bias))
            row[tokens] += self._upload(list(params.logit_bias.values()), torch.float32)
        if banned := [phrase[0] for phrase in params.bad_words if len(phrase) == 1]:
            row.index_fill_(0, self._upload(banned), -torch.inf)

    def _mark_prompt(self, seq: Sequence) -> None:
        prompt = self._to_device(torch.frombuffer(bytearray(seq.prompt), dtype=torch.int32)).long()
        row = self._flags_SV[seq.slot]
        row[prompt] = row[prompt] | _IN_PROMPT

    def _upload(self, values: object, dtype: torch.dtype = torch.int64) -> Tensor:
        return self._to_device(torch.tensor(values, dtype=dtype))

    def _to_device(self, host: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return host.pin_memory().to(self._device, non_blocking=True)
        return host

    def resume(self, slots: SequenceOf[int], positions: SequenceOf[int], plan: SamplePlan, masks_RW: Tensor) -> Sampled:
        """Sample rows that an earlier call has held, as :meth:`sample` does.

        Args:
            masks_RW: int32 [R, W], on the host: one bit per token, set where the token is allowed.
        """
        slots_R = self._upload(slots)
        masks_RW = self._to_device(masks_RW)
        return self.sample(self._held_SV[slots_R], slots_R, self._upload(positions), plan, masks_RW)

    def sample(
        self,
        logits_RV: Tensor,
        slots_R: Tensor,
        positions_R: Tensor,
        plan: SamplePlan,
        masks_RW: Tensor | None = None,
    ) -> Sampled:
        """Sample one token per row that is not held, and note it by slot; note the logits of the others.

        Args:
            logits_RV: float32 [R, V]; overwritten.
            slots_R: int64 [R]; the null slot for rows that must not count.
            positions_R: int64 [R], how many tokens the sequence sampled before.
            plan: the rows' order and needs.
            masks_RW: int32 [R, W], one bit per token, set where it is allowed; None: all are.
        """
        if plan.num_held:
            sampled = plan.num_sampled
            self._held_SV[slots_R[sampled:]] = logits_RV[sampled:]
            logits_RV, slots_R, positions_R = logits_RV[:sampled], slots_R[:sampled], positions_R[:sampled]
            if sampled == 0:
                return Sampled(slots_R, None, None, None)
        simple = not (plan.penalties or plan.bias or plan.min_tokens) and plan.num_logprobs is None
        if plan.num_greedy == len(slots_R) and simple and masks_RW is None:
            tokens_R = pick_greedy(
                logits_RV, slots_R, self._flags_SV, self.last_token_S, self.done_S, stop_flag=_IS_STOP
            )
            return Sampled(tokens_R, None, None, None)
        reference_RV = torch.log_softmax(logits_RV, -1) if plan.num_logprobs is not None else None
        logits_RV = self._adjust(logits_RV, slots_R, positions_R, plan)
        if masks_RW is not None:
            logits_RV = logits_RV.masked_fill(~allowed_RV(masks_RW, self.vocab_size), -torch.inf)
        largest_R1 = logits_RV.amax(-1, keepdim=True)
        tokens_R = self._choose(logits_RV, largest_R1, slots_R, positions_R, plan)
        if plan.penalties:
            self._counts_SV.view(-1).index_add_(
                0, slots_R * self.vocab_size + tokens_R, torch.ones_like(tokens_R, dtype=torch.int32)
            )
        self.last_token_S[slots_R] = tokens_R
        finite_R = largest_R1[:, 0].isfinite()
        self.done_S[slots_R] = ((self._flags_SV[slots_R, tokens_R] & _IS_STOP) != 0) | ~finite_R
        chosen = top_ids = top = None
        if reference_RV is not None and plan.num_logprobs is not None:
            chosen = reference_RV.gather(1, tokens_R[:, None])[:, 0]
            if plan.num_logprobs:
                top, top_ids = reference_RV.topk(plan.num_logprobs, -1)
        tokens_R = torch.where(finite_R, tokens_R, BROKEN)
        if plan.bias or plan.min_tokens or masks_RW is not None:
            tokens_R = torch.where(largest_R1[:, 0] == -torch.inf, DEAD_END, tokens_R)
        return Sampled(tokens_R, chosen, top_ids, top)

    def _adjust(self, logits_RV: Tensor, slots_R: Tensor, positions_R: Tensor, plan: SamplePlan) -> Tensor:
        """Apply bias, penalties and the minimum length, in this order."""
        if plan.bias:
            logits_RV = logits_RV + self._bias_SV[slots_R]
        if plan.penalties:
            presence, frequency, repetition = self._floats_SP[slots_R, 3:, None].unbind(1)
            counts_RV = self._counts_SV[slots_R]
            generated_RV = counts_RV > 0
            seen_RV = generated_RV | ((self._flags_SV[slots_R] & _IN_PROMPT) != 0)
            penalised_RV = torch.where(logits_RV > 0, logits_RV / repetition, logits_RV * repetition)
            logits_RV = torch.where(seen_RV, penalised_RV, logits_RV)
            logits_RV = logits_RV - frequency * counts_RV - presence * generated_RV
        if plan.min_tokens:
            early_R = positions_R < self._ints_SP[slots_R, 2]
            banned_RV = ((self._flags_SV[slots_R] & _IS_STOP) != 0) & early_R[:, None]
            logits_RV = logits_RV.masked_fill(banned_RV, -torch.inf)
        return logits_RV

    def _choose(
        self, logits_RV: Tensor, largest_R1: Tensor, slots_R: Tensor, positions_R: Tensor, plan: SamplePlan
    ) -> Tensor:
        parts = []
        g, p = plan.num_greedy, plan.num_plain
        if g:
            parts.append(_argmax(logits_RV[:g]))
        if p + plan.num_filtered:
            slots_R, positions_R = slots_R[g:], positions_R[g:]
            floats_RP, ints_RP = self._floats_SP[slots_R], self._ints_SP[slots_R]
            # The maximum is taken out first: a tiny temperature must not turn large logits into infinities.
            probs_RV = torch.softmax((logits_RV[g:] - largest_R1[g:]).div_(floats_RP[:, :1]), -1)
            if p:
                parts.append(_pick(probs_RV[:p], uniform(ints_RP[:p, 0], positions_R[:p])))
            if plan.num_filtered:
                filters = (probs_RV[p:], ints_RP[p:, 1], floats_RP[p:, 1], floats_RP[p:, 2])
                pick = _pick_sorted if probs_RV.is_cuda else _pick_by_rejection
                parts.append(pick(*filters, ints_RP[p:, 0], positions_R[p:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _argmax(logits_RV: Tensor) -> Tensor:
    """The first of the largest logits of each row.

    On the CPU in two steps, first a block of the vocabulary and then a token of it: with several rows, PyTorch finds
    maxima there ten times as fast as it finds where they are.
    """
    rows, vocab_size = logits_RV.shape
    if logits_RV.is_cuda or rows == 1 or vocab_size % _BLOCK:
        return logits_RV.argmax(-1)
    logits_RNB = logits_RV.view(rows, -1, _BLOCK)
    block_R1 = logits_RNB.amax(-1).argmax(-1, keepdim=True)
    token_R1 = logits_RNB.gather(1, block_R1[:, :, None].expand(-1, -1, _BLOCK)).argmax(-1)
    return (block_R1 * _BLOCK + token_R1)[:, 0]


def uniform(seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """The random number of each (seed, position): float64 [R] in [0, 1), in steps of 2^-40.

    SplitMix64's finaliser (Steele, Lea, Flood 2014) over a counter, in wrapping int64 arithmetic: a row's
    number depends on nothing but its own seed and position.
    """
    x = seeds_R + (positions_R + 1) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 24) & 0xFFFFFFFFFF).double() * 2.0**-40


def _pick(weights_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Inverse transform sampling from unnormalised weights; never a token of weight zero.

    In two steps, first a block of the vocabulary and then a token of it: a cumulative sum over the whole
    vocabulary is slow on the CPU.
    """
    rows, vocab_size = weights_RV.shape
    if padding := -vocab_size % _BLOCK:
        weights_RV = torch.nn.functional.pad(weights_RV, (0, padding))
    weights_RNB = weights_RV.reshape(rows, -1, _BLOCK)
    blocks_RN = weights_RNB.sum(-1).cumsum(-1, dtype=torch.float64)
    threshold_R1 = uniform_R[:, None] * blocks_RN[:, -1:]
    block_R1 = torch.searchsorted(blocks_RN, threshold_R1, right=True).clamp_(max=blocks_RN.shape[1] - 1)
    chosen_R1B = weights_RNB.gather(1, block_R1[:, :, None].expand(-1, -1, _BLOCK))
    tokens_RB = chosen_R1B[:, 0].cumsum(-1, dtype=torch.float64)
    # What of the threshold is left for the block. Added up in another order, the block may come out a
    # rounding smaller than above; the threshold must stay under its sum for the last token to have weight.
    before_R1 = torch.where(block_R1 > 0, blocks_RN.gather(1, (block_R1 - 1).clamp_(min=0)), 0.0)
    threshold_R1 = torch.minimum(threshold_R1 - before_R1, tokens_RB[:, -1:] * (1 - 2.0**-40))
    token_R1 = torch.searchsorted(tokens_RB, threshold_R1, right=True)
    return (block_R1 * _BLOCK + token_R1)[:, 0].clamp_(max=vocab_size - 1)


def _pick_by_rejection(
    probs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, seeds_R: Tensor, positions_R: Tensor
) -> Tensor:
    """Sample among the tokens that min_p, top_k and then top_p leave, without sorting.

    A token is drawn from all, and is rejected if the tokens likelier than it show that it is left out; then
    it and all that are less likely are out of the next draw. Whatever is left in is accepted with a chance
    in proportion to its probability, so the outcome has the filtered distribution exactly (the idea is
    FlashInfer's, https://flashinfer.ai/2025/03/10/sampling.html). One draw nearly always does. It takes a
    look at the outcome of each, so it is for the CPU.
    """
    tokens_R = torch.empty_like(top_k_R)
    top_k_R = torch.where(top_k_R == 0, probs_RV.shape[-1], top_k_R)
    least_R = min_p_R * probs_RV.amax(-1)
    nucleus_R = _nucleus(probs_RV, top_k_R, top_p_R, least_R)
    pivot_R = torch.zeros_like(least_R)
    rows = torch.arange(len(tokens_R))
    attempt = 0
    while len(rows):
        uniform_R = uniform(seeds_R, positions_R + (attempt << _ATTEMPT_SHIFT))
        drawn_R = _pick(torch.where(probs_RV > pivot_R[:, None], probs_RV, 0.0) if attempt else probs_RV, uniform_R)
        tokens_R[rows] = drawn_R
        prob_R = probs_RV.gather(1, drawn_R[:, None])[:, 0]
        # As numbers: comparisons that yield truth values, and choices by them, are several times as slow on the CPU.
        likelier_RV = torch.gt(probs_RV, prob_R[:, None], out=torch.empty_like(probs_RV))
        left_R = (prob_R >= least_R) & (likelier_RV.sum(-1) < top_k_R)
        left_R &= likelier_RV.mul_(probs_RV).sum(-1) < nucleus_R
        # Not even a token of the draw: the probabilities are no numbers, and no other draw would be better.
        left_R |= ~(prob_R > pivot_R)
        if bool(left_R.all()):
            break
        again = ~left_R
        rows, pivot_R = rows[again], prob_R[again]
        columns = (probs_RV, top_k_R, least_R, nucleus_R, seeds_R, positions_R)
        probs_RV, top_k_R, least_R, nucleus_R, seeds_R, positions_R = (column[again] for column in columns)
        attempt += 1
    return tokens_R


def _nucleus(probs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, least_R: Tensor) -> Tensor:
    """The probability that likelier tokens may have before top_p leaves a token out: float64 [R].

    It is top_p's share of what a least probability and top_k leave; infinite where top_p leaves nothing out.
    """
    nucleus_R = torch.where(top_p_R < 1, top_p_R.double(), torch.inf)
    limited_R = (top_k_R < probs_RV.shape[-1]) | (least_R > 0)
    if True in limited_R.tolist():
        (rows,) = (limited_R & (top_p_R < 1)).nonzero(as_tuple=True)
        sorted_XV = probs_RV[rows].sort(descending=True).values
        kept_XV = sorted_XV >= least_R[rows, None]
        kept_XV &= torch.arange(sorted_XV.shape[-1]) < top_k_R[rows, None]
        nucleus_R[rows] *= torch.where(kept_XV, sorted_XV, 0.0).sum(-1, dtype=torch.float64)
    return nucleus_R


def _pick_sorted(
    probs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, seeds_R: Tensor, positions_R: Tensor
) -> Tensor:
    """Sample among the tokens that min_p, top_k and then top_p leave, by sorting all: on CUDA, without waiting."""
    vocab_size = probs_RV.shape[-1]
    top_k_R1 = torch.where(top_k_R == 0, vocab_size, top_k_R)[:, None]
    sorted_RV, ids_RV = probs_RV.sort(descending=True)
    ranks_V = torch.arange(vocab_size, device=probs_RV.device)
    kept_RV = (ranks_V < top_k_R1) & (sorted_RV >= min_p_R[:, None] * sorted_RV[:, :1])
    cumulative_RV = torch.where(kept_RV, sorted_RV, 0.0).cumsum(-1, dtype=torch.float64)
    nucleus_R1 = top_p_R[:, None].double() * cumulative_RV[:, -1:]
    # The first token always stays, however small top_p is.
    in_nucleus_RV = (cumulative_RV - sorted_RV < nucleus_R1) | (ranks_V == 0)
    weights_RV = torch.where(kept_RV & in_nucleus_RV, sorted_RV, 0.0)
    return ids_RV.gather(1, _pick(weights_RV, uniform(seeds_R, positions_R))[:, None])[:, 0]


def redirect_done(slots_N: Tensor, done_S: Tensor) -> Tensor:
    """Slots of rows to compute: the null slot for those whose sequence has met its stop token."""
    return torch.where(done_S[slots_N], NULL_SLOT, slots_N)
