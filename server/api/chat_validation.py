"""From the JSON of a chat completion to a job."""

from typing import Any, Final

from server.api.checks import invalid, parse_as
from server.api.conversation import Conversations, begins_answer
from server.api.schemas.chat import ChatCompletionRequest
from server.api.structured import Grammars
from server.api.validation import GenerationJob, RequestValidator
from server.tokenizer import Tokenizer
from server.types import EngineInfo

DEFAULT_MAX_TOKENS: Final = 4096
"""Where no --max-model-len bounds an answer, this does: a recurrent model could go on for ever."""


class ChatValidator(RequestValidator):
    """Turns the bodies of ``POST /v1/chat/completions`` into jobs.

    Args:
        names: the served model names.
        info: the engine's limits.
        tokenizer: None: every request is refused.
        grammars: made with the same tokenizer.
        conversations: makes the prompts.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        info: EngineInfo,
        tokenizer: Tokenizer | None,
        grammars: Grammars,
        conversations: Conversations,
    ) -> None:
        super().__init__(names, info, tokenizer, grammars)
        self._conversations = conversations

    def job(self, body: dict[str, Any]) -> GenerationJob:
        """See :meth:`RequestValidator.job`."""
        request = parse_as(ChatCompletionRequest, body)
        self._check_request(request, "messages", 1)
        logprobs = self._logprobs(request)
        asked = self._max_tokens(request)
        if request.echo and not request.continue_final_message:
            raise invalid("echo", "is only allowed together with 'continue_final_message'")
        prompt = self._conversations.token_ids(request, add_special_tokens=bool(request.add_special_tokens))
        prompt = self._truncated(prompt, request.truncate_prompt_tokens, asked or 1)
        self._check_prompts("messages", [prompt])
        if request.prompt_logprobs is not None:
            self._check_num_scores("prompt_logprobs", [prompt], [request.prompt_logprobs], 1)
        limit = self._info.max_model_len
        max_tokens = asked or (DEFAULT_MAX_TOKENS if limit is None else limit - len(prompt))
        return self._job(
            request,
            prompts=[prompt],
            echoed=[_text(request) if request.echo else ""],
            params=self._params(
                request, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=request.prompt_logprobs
            ),
            role="assistant" if begins_answer(request) else request.messages[-1].role,
        )

    def _logprobs(self, request: ChatCompletionRequest) -> int | None:
        """Alternatives to report per token; None: no log-probabilities."""
        if not request.logprobs:
            if request.top_logprobs:
                raise invalid("top_logprobs", "is only allowed together with 'logprobs'")
            return None
        self._check_logprobs("top_logprobs", request.top_logprobs)
        return request.top_logprobs or 0

    def _max_tokens(self, request: ChatCompletionRequest) -> int | None:
        """What the request says of it under either name."""
        newer, older = request.max_completion_tokens, request.max_tokens
        if newer is not None and older is not None and newer != older:
            raise invalid(
                "max_tokens", f"differs from 'max_completion_tokens' ({newer}), of which it is the older name"
            )
        return newer if newer is not None else older


def _text(request: ChatCompletionRequest) -> str:
    """The last message's text."""
    content = request.messages[-1].content
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
