"""From the JSON of a completion to a job."""

from dataclasses import replace
from typing import Any, Final

from server.api.checks import invalid, parse_as
from server.api.job import GenerationJob
from server.api.schemas.completion import CompletionRequest
from server.api.validation import RequestValidator

DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's default for completions."""


class CompletionValidator(RequestValidator):
    """Turns the bodies of ``POST /v1/completions`` into jobs."""

    def job(self, body: dict[str, Any]) -> GenerationJob:
        """See :meth:`RequestValidator.job`."""
        request = parse_as(CompletionRequest, body)
        n = request.n or 1
        candidates = request.best_of or n
        self._check_request(request, "prompt", len(request.prompt), candidates=candidates)
        max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        self._check_combinations(request, n, candidates, max_tokens)
        self._check_logprobs("logprobs", request.logprobs)
        echoed_logprobs = request.logprobs if request.echo else None
        wanted = [number for number in (echoed_logprobs, request.prompt_logprobs) if number is not None]
        params = self._params(
            request,
            max_tokens=max_tokens,
            # Candidates are compared by their log-probabilities.
            logprobs=0 if request.logprobs is None and candidates > n else request.logprobs,
            prompt_logprobs=max(wanted, default=None),
        )
        items: list[str | list[int]] = [*request.prompt]
        if request.state is None and not all(items):
            raise invalid("prompt", "must not hold an empty string or an empty list")
        whole = [self._token_ids(item, request) for item in items]
        prompts = [self._truncated(token_ids, request.truncate_prompt_tokens, max_tokens) for token_ids in whole]
        self._check_prompts("prompt", prompts, min_answer=min(max_tokens, 1), may_be_empty=request.state is not None)
        self._check_num_scores("prompt_logprobs" if echoed_logprobs is None else "logprobs", prompts, wanted, n)
        echoed = [""] * len(prompts)
        if request.echo:
            echoed = [self._shown(*each) for each in zip(items, whole, prompts, strict=True)]
        return replace(
            self._job(request, prompts=prompts, echoed=echoed, params=params),
            candidates=candidates,
            logprobs=request.logprobs,
            echoes_logprobs=echoed_logprobs is not None,
        )

    def _check_combinations(self, request: CompletionRequest, n: int, candidates: int, max_tokens: int) -> None:
        if candidates < n:
            raise invalid("best_of", f"must be at least 'n' ({n})")
        if candidates > n and request.stream:
            raise invalid("best_of", "must equal 'n' in a stream: which candidates are best shows only at the end")
        if not max_tokens and not request.echo and request.prompt_logprobs is None and not request.save_state:
            raise invalid(
                "max_tokens", "may be 0 only with 'echo', 'prompt_logprobs' or 'save_state': nothing would be answered"
            )
        if request.state is not None and request.echo and request.logprobs is not None:
            raise invalid("logprobs", "is not possible together with 'echo' and 'state'")
        if self._tokenizer is None and request.echo:
            raise invalid("echo", "is not possible: this server runs without a tokenizer")

    def _token_ids(self, item: str | list[int], request: CompletionRequest) -> list[int]:
        if isinstance(item, list):
            return item
        if self._tokenizer is None:
            raise invalid("prompt", "must be token ids: this server runs without a tokenizer")
        if request.state is not None:
            return self._tokenizer.encode_continuation(item)
        return self._tokenizer.encode(item, add_special_tokens=request.add_special_tokens is not False)

    def _shown(self, item: str | list[int], whole: list[int], kept: list[int]) -> str:
        """The prompt's text: as it was given, or what the ids that were kept of it mean."""
        assert self._tokenizer is not None
        return item if isinstance(item, str) and len(kept) == len(whole) else self._tokenizer.decode(kept)
