"""Messages, and how they become a prompt."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from server.api.schemas.base import Body, Unsupported
from server.types import Role


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"] = Field(description="The kind of part; only texts are supported.")
    text: str = Field(description="The part's text.", examples=["Hello!"])


_PARTS = TypeAdapter(list[TextPart])


def _content(value: object) -> str | list[dict[str, str]]:
    """A text, or the parts of one as the template gets them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of parts")
    if not value:
        raise PydanticCustomError("content", "must not be an empty list")
    for part in value:
        if isinstance(part, dict) and isinstance(kind := part.get("type"), str) and kind != "text":
            raise PydanticCustomError(
                "content", "has a part of type {kind}; only 'text' is supported", {"kind": repr(kind[:40])}
            )
    try:
        return [part.model_dump() for part in _PARTS.validate_python(value)]
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise PydanticCustomError(
            "content",
            "holds a part that is not {form} (at {where})",
            {"form": '{"type": "text", "text": ...}', "where": where},
        ) from None


Content: TypeAlias = Annotated[
    str | list[dict[str, str]],
    PlainValidator(_content, json_schema_input_type=str | Annotated[list[TextPart], Field(min_length=1)]),
]


class Message(Body):
    """One turn of a conversation."""

    role: Role = Field(
        description="Who speaks. What becomes of each role, the chat template decides; it may refuse some.",
        examples=["user"],
    )
    content: Content = Field(
        description="A text, or a list of parts of type `text`. Parts are joined by line breaks, unless the template "
        "takes them apart.",
        examples=["Tell me about the sea."],
    )
    name: str | None = Field(None, description="The speaker's name, for templates that show it.", examples=["Ishmael"])
    tool_call_id: str | None = Field(
        None,
        description="In a message of the role `tool`: which call it answers, for templates that show it.",
        examples=["call_1"],
    )

    annotations: Annotated[object, Unsupported([])] = None
    audio: Annotated[object, Unsupported()] = None
    function_call: Annotated[object, Unsupported()] = None
    reasoning: Annotated[object, Unsupported("")] = None
    reasoning_content: Annotated[object, Unsupported("")] = None
    refusal: Annotated[object, Unsupported("")] = None
    tool_calls: Annotated[object, Unsupported([])] = None


class ConversationFields(Body):
    """The fields that say which prompt a conversation becomes."""

    messages: list[Message] = Field(
        min_length=1,
        description="The conversation so far, oldest message first.",
        examples=[[{"role": "user", "content": "Tell me about the sea."}]],
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="Whether the prompt ends with what begins an answer. Default true, and false with "
        "`continue_final_message`.",
        examples=[True],
    )
    continue_final_message: bool | None = Field(
        None,
        description="Continue the last message instead of answering it: the prompt ends right behind its content. Not "
        "together with `add_generation_prompt`. Default false.",
        examples=[True],
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="Further variables for the chat template; only those it reads.",
        examples=[{"enable_thinking": False}],
    )

    documents: list[dict[str, Any]] | None = Field(
        None,
        description="Texts to draw on, for templates that read them; for others an error.",
        examples=[[{"title": "Whales", "text": "Whales are mammals."}]],
    )

    chat_template: Annotated[object, Unsupported(hint="; give it to the server with --chat-template")] = None
    tools: Annotated[object, Unsupported([])] = None
