"""From a request's JSON to a job that the engine cannot refuse, save for a full queue: what all routes share."""

from abc import ABC, abstractmethod
from typing import Any, Final

from server.api.checks import check_vocabulary, invalid, served_name
from server.api.job import GenerationJob
from server.api.schemas.fields import MAX_PROMPT_LOGPROBS
from server.api.schemas.generation import GenerationFields, StreamOptions
from server.api.structured import Grammars
from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer
from server.types import EngineInfo, SamplingParams

_SAMPLING_FIELDS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
"""Fields whose default a checkpoint may set."""


class RequestValidator(ABC):
    """Turns request bodies into jobs. Safe to call from several threads.

    Args:
        names: the served model names.
        info: the engine's limits.
        tokenizer: None: only token ids are served.
        grammars: made with the same tokenizer.
    """

    def __init__(
        self, names: tuple[str, ...], info: EngineInfo, tokenizer: Tokenizer | None, grammars: Grammars
    ) -> None:
        self._names = names
        self._info = info
        self._tokenizer = tokenizer
        self._grammars = grammars

    @abstractmethod
    def job(self, body: dict[str, Any]) -> GenerationJob:
        """Check everything that can be known before the engine sees the request, and tokenize.

        Raises:
            InvalidRequestError: ``param`` names the field at fault.
            NotFoundError: no model of that name is served.
        """

    def _job(
        self,
        request: GenerationFields,
        *,
        prompts: list[list[int]],
        echoed: list[str],
        params: SamplingParams,
        role: str = "assistant",
    ) -> GenerationJob:
        """The job of a checked request; what the routes share is read from it here."""
        options = request.stream_options or StreamOptions()
        shortest = min(map(len, prompts))
        checkpoint_at = request.checkpoint_at or ()
        if any(position > shortest for position in checkpoint_at):
            raise invalid("checkpoint_at", f"must hold positions within the prompt, which has {shortest} tokens")
        return GenerationJob(
            model=served_name(request.model, self._names),
            prompts=prompts,
            echoed=echoed,
            n=request.n or 1,
            candidates=request.n or 1,
            priority=request.priority or 0,
            state=request.state,
            save_state=request.save_state not in (None, False),
            state_name=request.save_state if isinstance(request.save_state, str) else None,
            state_ttl=request.state_ttl,
            checkpoint_at=checkpoint_at,
            params=params,
            stream=bool(request.stream),
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
            prompt_token_ids=bool(request.return_token_ids),
            # Without a tokenizer the ids are the answer.
            token_ids=bool(request.return_token_ids) or self._tokenizer is None,
            tokens_as_ids=bool(request.return_tokens_as_token_ids),
            request_id=request.request_id,
            role=role,
            logprobs=params.logprobs,
            prompt_logprobs=request.prompt_logprobs,
        )

    def _check_request(
        self, request: GenerationFields, param: str, num_prompts: int, *, candidates: int | None = None
    ) -> None:
        """Refuse what cannot be answered whatever the prompts are.

        Args:
            request: the body.
            param: the field that holds the prompts.
            num_prompts: how many there are.
            candidates: answers to generate to each, if not ``n``.
        """
        served_name(request.model, self._names)
        if request.stream_options is not None and not request.stream:
            raise invalid("stream_options", "is only allowed together with 'stream'")
        self._check_logprobs("prompt_logprobs", request.prompt_logprobs)
        if request.prompt_logprobs is not None and request.stream:
            raise invalid("prompt_logprobs", "is not available in a stream")
        num_choices = num_prompts * (candidates or request.n or 1)
        self._check_states(request, num_choices, candidates)
        most = self._info.max_request_choices
        if num_choices > most:
            at_fault = param if num_prompts > most else "n" if num_prompts * (request.n or 1) > most else "best_of"
            raise invalid(at_fault, f"asks for {num_choices} choices; at most {most} are taken at once")

    @staticmethod
    def _check_states(request: GenerationFields, num_choices: int, candidates: int | None) -> None:
        """Refuse what cannot be done with saved states, whatever the prompts are."""
        if request.state is not None:
            for name in ("prompt_logprobs", "truncate_prompt_tokens"):
                if getattr(request, name) is not None:
                    raise invalid(name, "is not possible together with 'state'")
            if request.add_special_tokens:
                raise invalid("add_special_tokens", "is not possible together with 'state': they are for beginnings")
        if request.save_state in (None, False):
            if request.state_ttl is not None:
                raise invalid("state_ttl", "is only allowed together with 'save_state'")
        elif candidates is not None and candidates > (request.n or 1):
            raise invalid("save_state", "is not possible with 'best_of' above 'n'")
        elif isinstance(request.save_state, str) and num_choices > 1:
            raise invalid("save_state", f"names one state, and there are {num_choices} choices; true saves all of them")

    def _params(
        self,
        request: GenerationFields,
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """How the request samples, with the checkpoint's defaults.

        Args:
            request: the body.
            max_tokens: most tokens per choice.
            logprobs: alternatives to report per token, within the server's limit; None: no log-probabilities.
            prompt_logprobs: the same for the prompts' tokens.
        """
        info = self._info
        sampling: dict[str, Any] = {}
        for name in _SAMPLING_FIELDS:
            value = getattr(request, name)
            if value is None:
                value = info.default_sampling.get(name)
            if value is not None:
                sampling[name] = value
        if not 0 < sampling.get("top_k", 0) < info.vocab_size:
            sampling["top_k"] = 0  # 0, -1 and the whole vocabulary are the same
        min_tokens = request.min_tokens or 0
        if min_tokens > max_tokens:
            raise invalid("min_tokens", f"must not exceed the most tokens of an answer, here {max_tokens}")
        stop = request.stop or ()
        if stop and self._tokenizer is None:
            raise invalid("stop", "is not possible: this server runs without a tokenizer; use 'stop_token_ids'")
        stop_token_ids = request.stop_token_ids or ()
        check_vocabulary("stop_token_ids", stop_token_ids, info.vocab_size)
        logit_bias = request.logit_bias or {}
        check_vocabulary("logit_bias", logit_bias, info.vocab_size)
        check_vocabulary("allowed_token_ids", request.allowed_token_ids or (), info.vocab_size)
        rule = self._grammars.of(request)
        if rule is not None and request.ignore_eos:
            raise invalid("ignore_eos", "is not possible here: what the text must look like decides where it ends")
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            logit_bias=logit_bias,
            allowed_token_ids=request.allowed_token_ids,
            bad_words=self._phrases(request.bad_words or ()),
            grammar=rule,
            seed=request.seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            include_stop_str_in_output=bool(request.include_stop_str_in_output),
            skip_special_tokens=request.skip_special_tokens is not False,
            ignore_eos=bool(request.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **sampling,
        )

    def _phrases(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """The token ids of banned words, as they stand at the beginning of a word and inside one."""
        if words and self._tokenizer is None:
            raise invalid("bad_words", "is not possible: this server runs without a tokenizer")
        phrases: dict[tuple[int, ...], None] = {}
        for word in words:
            assert self._tokenizer is not None
            bare = word.lstrip(" ") or word
            for text in (bare, f" {bare}"):
                phrases[tuple(self._tokenizer.encode_continuation(text))] = None
        phrases.pop((), None)  # of characters that no token has
        return tuple(phrases)

    def _check_num_scores(self, param: str, prompts: list[list[int]], alternatives: list[int], copies: int) -> None:
        """Refuse answers with more log-probabilities of prompts than can be written at once.

        Args:
            param: the field to name.
            prompts: token ids.
            alternatives: per token, for each way in which a choice carries log-probabilities of its prompt.
            copies: how often an answer carries those of each prompt.
        """
        number = sum(map(len, prompts)) * sum(1 + wanted for wanted in alternatives) * copies
        if number > MAX_PROMPT_LOGPROBS:
            raise invalid(
                param,
                f"asks for {number} log-probabilities of prompts; an answer may have at most {MAX_PROMPT_LOGPROBS}",
            )

    def _check_logprobs(self, param: str, number: int | None) -> None:
        if number is not None and number > self._info.max_logprobs:
            raise invalid(param, f"must be at most {self._info.max_logprobs} (--max-logprobs)")

    def _truncated(self, token_ids: list[int], length: int | None, answer: int) -> list[int]:
        """The end of a prompt, as ``truncate_prompt_tokens`` asks for it; ``answer``: most tokens of the answer."""
        if length == 0:
            raise invalid("truncate_prompt_tokens", "must be at least 1, or -1 for as many as fit")
        if length == -1:
            limit = self._info.max_model_len
            length = None if limit is None else max(limit - answer, 1)
        return token_ids if length is None else token_ids[-length:]

    def _check_prompts(
        self, param: str, prompts: list[list[int]], *, min_answer: int = 1, may_be_empty: bool = False
    ) -> None:
        """Refuse prompts that are empty, hold no token ids, or leave no room for an answer of so many tokens."""
        limit = self._info.max_model_len
        for token_ids in prompts:
            if not token_ids and not may_be_empty:
                raise invalid(param, "holds a text without a single token")
            check_vocabulary(param, token_ids, self._info.vocab_size)
            if limit is not None and len(token_ids) + min_answer > limit:
                raise InvalidRequestError(
                    f"Invalid '{param}': has {len(token_ids)} tokens; prompt and answer together may have "
                    f"{limit} (--max-model-len)" + (", and the answer needs at least one." if min_answer else "."),
                    param=param,
                    code="context_length_exceeded",
                )
