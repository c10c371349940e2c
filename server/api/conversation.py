"""From messages to token ids."""

from server.api.chat_template import OWN_VARIABLES, ChatTemplate
from server.api.checks import invalid
from server.api.schemas.conversation import ConversationFields
from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer


class Conversations:
    """Makes prompts of conversations. Safe to call from several threads.

    Args:
        tokenizer: None: the server has none, and every conversation is refused.
        template: None: the model has no chat template, and every conversation is refused.
    """

    def __init__(self, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template

    @property
    def source(self) -> str | None:
        """The template's Jinja."""
        return None if self._template is None else self._template.source

    def token_ids(self, request: ConversationFields, *, add_special_tokens: bool) -> list[int]:
        """The prompt of a conversation. Special tokens that the template writes are those tokens.

        Args:
            request: messages and how to render them.
            add_special_tokens: let the tokenizer add its own to those of the template.

        Raises:
            InvalidRequestError: there is no template, or it cannot render these messages; ``param`` names the field.
        """
        if self._tokenizer is None:
            raise invalid("messages", "cannot be rendered: this server runs without a tokenizer")
        if self._template is None:
            raise InvalidRequestError(
                "Invalid 'messages': this model has no chat template; start the server with --chat-template FILE to "
                "give it one, or send a text to /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        if request.continue_final_message and request.add_generation_prompt:
            raise invalid("continue_final_message", "excludes 'add_generation_prompt'")
        if request.documents and not self._template.reads_documents:
            raise invalid("documents", "are not read by this model's chat template")
        variables = request.chat_template_kwargs or {}
        self._check_variables(variables)
        text = self._template.render(
            [message.model_dump(exclude_none=True) for message in request.messages],
            add_generation_prompt=begins_answer(request),
            continue_final_message=bool(request.continue_final_message),
            documents=request.documents or None,
            variables=variables,
        )
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, parse_special_tokens=True)

    def _check_variables(self, variables: dict[str, object]) -> None:
        assert self._template is not None
        for name in variables:
            if name in OWN_VARIABLES:
                raise invalid("chat_template_kwargs", f"must not set {name!r}, which has a field of its own")
            if name not in self._template.variables:
                known = ", ".join(sorted(self._template.variables)) or "none"
                raise invalid(
                    "chat_template_kwargs",
                    f"sets {name[:60]!r}, which the chat template does not read; it reads: {known}",
                )


def begins_answer(request: ConversationFields) -> bool:
    """Whether the prompt ends with what begins an answer, rather than within or behind the last message."""
    if request.add_generation_prompt is None:
        return not request.continue_final_message
    return request.add_generation_prompt
