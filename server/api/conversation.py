"""From messages to token ids."""

import contextlib
import uuid
from typing import Any, Final

from server.api.chat_template import OWN_VARIABLES, ChatTemplate
from server.api.checks import invalid
from server.api.schemas.conversation import ConversationFields
from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer

_BEFORE: Final = {"assistant": ("user",), "tool": ("user", "assistant")}
"""Which roles come before a message of a role, for templates that want them in order."""
_SYSTEM_ROLES: Final = frozenset({"system", "developer"})
_ANY_TEXT: Final = "Hello."


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
        tokenizer, template = self._parts()
        text = _render(template, request, [])
        return tokenizer.encode(text, add_special_tokens=add_special_tokens, parse_special_tokens=True)

    def continuation_ids(self, request: ConversationFields, turn: str | None) -> list[int]:
        """What a conversation adds to a text that has been read already.

        Where that text ends within a message, the template writes what ends this message, and then the new ones; it
        is shown a conversation that ends like the text, and what it makes of this is cut off again. So nothing that
        belongs to the beginning comes twice, and a template that wants roles in some order finds them. Behind any
        other text stands a conversation of its own, without the token that begins a text.

        Args:
            request: new messages, if any, and how to render them.
            turn: the role of the message within which the text ends; None: it is not known to end within any.

        Raises:
            InvalidRequestError: as for :meth:`token_ids`.
        """
        tokenizer, template = self._parts()
        if not request.messages:
            for name in ("add_generation_prompt", "continue_final_message", "documents", "chat_template_kwargs"):
                if getattr(request, name):
                    raise invalid(name, "needs 'messages': without any, the text of the state goes on")
            return []
        if turn is None:
            text = _render(template, request, []).removeprefix(tokenizer.special_tokens.get("bos_token", ""))
        else:
            if request.documents:
                raise invalid("documents", "stand at the beginning of a conversation, and 'state' has begun this one")
            text = _render_behind(template, request, turn)
        return tokenizer.encode_continuation(text, parse_special_tokens=True)

    def _parts(self) -> tuple[Tokenizer, ChatTemplate]:
        if self._tokenizer is None:
            raise invalid("messages", "cannot be rendered: this server runs without a tokenizer")
        if self._template is None:
            raise InvalidRequestError(
                "Invalid 'messages': this model has no chat template; start the server with --chat-template FILE to "
                "give it one, or send a text to /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        return self._tokenizer, self._template


def _render(template: ChatTemplate, request: ConversationFields, history: list[dict[str, Any]]) -> str:
    """The text of a request's messages behind others."""
    if request.continue_final_message and request.add_generation_prompt:
        raise invalid("continue_final_message", "excludes 'add_generation_prompt'")
    if request.documents and not template.reads_documents:
        raise invalid("documents", "are not read by this model's chat template")
    variables = request.chat_template_kwargs or {}
    _check_variables(template, variables)
    return template.render(
        history + [message.model_dump(exclude_none=True) for message in request.messages],
        add_generation_prompt=begins_answer(request),
        continue_final_message=bool(request.continue_final_message),
        documents=request.documents or None,
        variables=variables,
    )


def _render_behind(template: ChatTemplate, request: ConversationFields, turn: str) -> str:
    """The text from where an unfinished message of this role ends."""
    mark = uuid.uuid4().hex
    before = [{"role": role, "content": _ANY_TEXT} for role in _BEFORE.get(turn, ())]
    unfinished = {"role": turn, "content": mark}
    try:
        text = _render(template, request, [*before, unfinished])
    except InvalidRequestError:
        if turn in _SYSTEM_ROLES:
            raise
        # Some templates want a system message first. If that is not the matter, the first complaint is the better one.
        with contextlib.suppress(InvalidRequestError):
            system = {"role": "system", "content": _ANY_TEXT}
            return _behind(mark, _render(template, request, [system, *before, unfinished]), turn)
        raise
    return _behind(mark, text, turn)


def _behind(mark: str, text: str, turn: str) -> str:
    _, found, rest = text.rpartition(mark)
    if not found:
        raise invalid("messages", f"cannot come behind 'state': the chat template does not show {turn} messages")
    return rest


def _check_variables(template: ChatTemplate, variables: dict[str, object]) -> None:
    for name in variables:
        if name in OWN_VARIABLES:
            raise invalid("chat_template_kwargs", f"must not set {name!r}, which has a field of its own")
        if name not in template.variables:
            known = ", ".join(sorted(template.variables)) or "none"
            raise invalid(
                "chat_template_kwargs",
                f"sets {name[:60]!r}, which the chat template does not read; it reads: {known}",
            )


def begins_answer(request: ConversationFields) -> bool:
    """Whether the prompt ends with what begins an answer, rather than within or behind the last message."""
    if request.add_generation_prompt is None:
        return not request.continue_final_message
    return request.add_generation_prompt
