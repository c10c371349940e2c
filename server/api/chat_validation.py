"""From the JSON of a chat completion to a job."""

from dataclasses import replace
from typing import Any, Final

from server.api.checks import invalid, parse_as
from server.api.conversation import Conversations, begins_answer
from server.api.job import GenerationJob
from server.api.schemas.chat import ChatCompletionRequest
from server.api.structured import Grammars
from server.api.validation import RequestValidator
from server.tokenizer import Tokenizer
from server.types import EngineInfo, StateInfo

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
        continued: the saved state that a request with ``state`` means.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        info: EngineInfo,
        tokenizer: Tokenizer | None,
        grammars: Grammars,
        conversations: Conversations,
        continued: StateInfo | None = None,
    ) -> None:
        super().__init__(names, info, tokenizer, grammars)
        self._conversations = conversations
        self._continued = continued

    def job(self, body: dict[str, Any]) -> GenerationJob:
        """See :meth:`RequestValidator.job`."""
        request = parse_as(ChatCompletionRequest, body)
        self._check_request(request, "messages", 1)
        logprobs = self._logprobs(request)
        asked = self._max_tokens(request)
        if request.echo and not (request.continue_final_message and request.messages):
            raise invalid("echo", "is only allowed together with 'continue_final_message'")
        prompt = self._prompt(request)
        least = 1 if asked is None else min(asked, 1)
        prompt = self._truncated(prompt, request.truncate_prompt_tokens, 1 if asked is None else asked)
        self._check_prompts("messages", [prompt], min_answer=least, may_be_empty=request.state is not None)
        if request.prompt_logprobs is not None:
            self._check_num_scores("prompt_logprobs", [prompt], [request.prompt_logprobs], 1)
        limit = self._info.max_model_len
        most = DEFAULT_MAX_TOKENS if limit is None else limit - len(prompt)
        max_tokens = most if asked is None else asked
        role = self._role(request)
        job = self._job(
            request,
            prompts=[prompt],
            echoed=[_text(request) if request.echo else ""],
            params=self._params(
                request, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=request.prompt_logprobs
            ),
            role=role,
        )
        # By its id: a name may be taken over before the engine sees the request.
        state = None if self._continued is None else self._continued.id
        return replace(job, state=state, state_turn=role)

    def _prompt(self, request: ChatCompletionRequest) -> list[int]:
        """The token ids of the messages, or of what comes behind the state."""
        if self._continued is not None:
            return self._conversations.continuation_ids(request, self._continued.turn)
        if not request.messages:
            raise invalid("messages", "must not be empty, save behind a 'state'")
        return self._conversations.token_ids(request, add_special_tokens=bool(request.add_special_tokens))

    def _role(self, request: ChatCompletionRequest) -> str:
        """Who speaks in the answer."""
        if not request.messages:
            turn = None if self._continued is None else self._continued.turn
            return turn or "assistant"
        return "assistant" if begins_answer(request) else request.messages[-1].role

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
        asked = newer if newer is not None else older
        if asked == 0 and request.prompt_logprobs is None and not request.save_state:
            raise invalid(
                "max_tokens" if newer is None else "max_completion_tokens",
                "may be 0 only with 'prompt_logprobs' or 'save_state': nothing would be answered",
            )
        return asked


def _text(request: ChatCompletionRequest) -> str:
    """The last message's text."""
    content = request.messages[-1].content
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
